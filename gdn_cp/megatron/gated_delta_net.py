"""Gated DeltaNet as a Megatron-Core module: tensor, sequence and context parallelism, packed and batched input.

Parameter names, shapes and checkpoint keys are those of Megatron's own GatedDeltaNet, so that checkpoints pass both
ways; Megatron's is not subclassed because it cannot be built without flash-linear-attention.

Dimensions: s local rows of a context-parallel rank, b batch, h hidden size, tp tensor-parallel size; H, HV, K, V as in
`gdn_cp.gated_delta_net`. With sequence parallelism the module's input and output have s/tp rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    checkpoint,
    copy_to_tensor_model_parallel_region,
    get_cuda_rng_tracker,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
    sharded_state_dict_default,
)
from torch import Tensor, nn
from torch.nn.functional import silu

from gdn_cp.comm.choice import A2aSize, check_request, choose_a2a_size
from gdn_cp.comm.layout import ThdLayout, _build_head_perm_for_split_sections
from gdn_cp.gated_delta_net import GdnDims, gated_delta_net_mixer, keep_precision
from gdn_cp.kernels.chunk import check_intra_card
from gdn_cp.megatron.compat import module_name, split_tensor_factory
from gdn_cp.megatron.inference import mix_with_cache
from gdn_cp.megatron.norm import gain_of
from gdn_cp.megatron.packed import GdnPackedSeqParams, cp_group_of, is_packed, layout_of_batch, layout_of_packed
from gdn_cp.mixer_checks import check_tensor

IN_PROJ_SECTIONS = ("query", "key", "value", "z", "beta", "alpha")


@dataclass
class GatedDeltaNetSubmodules:
    """What to build the layer of: a column-parallel linear, an RMSNorm and a row-parallel linear."""

    in_proj: Any
    out_norm: Any
    out_proj: Any


class GatedDeltaNet(MegatronModule):
    """A Gated DeltaNet layer for a Megatron TransformerLayer, in place of self-attention.

    Parameters of one tensor-parallel rank: `in_proj.weight` [in_proj_dim/tp, h] (this rank's share of each of the
    sections q, k, v, z, beta, alpha, one after the other), `conv1d.weight` [conv_dim/tp, 1, W] (q, k, v likewise),
    `A_log` and `dt_bias` [HV/tp] (float32 whatever `params_dtype` is), `out_norm.weight` [V], `out_proj.weight`
    [h, HV*V/tp]. `config.linear_*` gives the sizes. Initialised as Megatron's: A uniform in `A_init_range`, dt_bias
    ones; with `use_cpu_initialization` the values do not depend on tp.

    Selective recomputation of "core_attn" keeps the input projection's output alone and runs all up to the output
    projection, exchange included, again in the backward.

    Args:
        config: activation_func must be torch's silu. Leave `experimental_attention_variant=None`: with
            "gated_delta_net" 0.16.1 asserts that there is no context parallelism.
        submodules: see `get_gdn_layer_spec`.
        layer_number: counted from 1, over all pipeline stages.
        bias: biases of the two linear layers; only False.
        use_qk_l2norm: queries and keys of unit length; only True.
        conv_bias: bias of the convolution.
        conv_init: half-width of the uniform initialisation of the convolution; None: torch's default.
        A_init_range: see above.
        pg_collection: groups `tp` and `cp`.
        name: passed down by 0.19.2.
        cp_comm_type: an attention setting, without meaning here, as pp_layer_offset.
        pp_layer_offset: see cp_comm_type.
        backend: implementation of the delta rule, see `gdn_cp.choose_backend`.
        intra_card, truncate_states: see `gdn_cp.gated_delta_net_mixer`.
        a2a_size: how context parallelism shares the work where the batch's packed_seq_params leave it open: the ranks
            that trade heads for tokens, a divisor of the group's size; "largest" that divides the heads, "auto" for
            the planner's choice for each batch (both take any head count); None for all of the group.

    Raises:
        ValueError: for sizes that tp does not divide and for unsupported settings.
    """

    conv1d: nn.Conv1d
    A_log: nn.Parameter
    dt_bias: nn.Parameter

    def __init__(
        self,
        config: TransformerConfig,
        submodules: GatedDeltaNetSubmodules,
        layer_number: int | None = None,
        bias: bool = False,
        conv_bias: bool = False,
        conv_init: float | None = None,
        use_qk_l2norm: bool = True,
        A_init_range: tuple[float, float] = (1, 16),
        pg_collection: ProcessGroupCollection | None = None,
        *,
        name: str | None = None,
        cp_comm_type: str | None = None,
        pp_layer_offset: int | None = None,
        backend: str | None = None,
        a2a_size: A2aSize = "auto",
        intra_card: int | None = None,
        truncate_states: bool | None = None,
    ) -> None:
        super().__init__(config)
        if pg_collection is None:
            pg_collection = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
        if config.activation_func is not silu:
            raise ValueError(
                f"config.activation_func={config.activation_func}: set torch.nn.functional.silu, the convolution's"
            )
        if bias or not use_qk_l2norm:
            raise ValueError(f"bias={bias}, use_qk_l2norm={use_qk_l2norm}: only False and True are supported")
        check_request(a2a_size, 1 if a2a_size is None or isinstance(a2a_size, str) else a2a_size)
        self.pg_collection = pg_collection
        self.layer_number = layer_number
        self.backend = backend
        self.rule_options = {"intra_card": check_intra_card(intra_card), "truncate_states": truncate_states}
        modules = config.recompute_modules or []
        self.recompute_mixer = config.recompute_granularity == "selective" and "core_attn" in modules
        self.a2a_size: A2aSize = a2a_size
        self.conv_init, self.A_init_range = conv_init, A_init_range
        self.tp_size, self.tp_rank = pg_collection.tp.size(), pg_collection.tp.rank()
        self.all_heads = all_heads = dims_of_config(config)
        self.dims = _dims_of_tp_rank(all_heads, self.tp_size)

        self.in_proj = build_module(
            submodules.in_proj,
            config.hidden_size,
            all_heads.in_proj_dim,
            config=config,
            init_method=self._by_section(config.init_method),
            gather_output=False,
            bias=False,
            skip_bias_add=False,
            is_expert=False,
            tp_comm_buffer_name="fc1",
            tp_group=pg_collection.tp,
            **module_name(name, "in_proj"),
        )
        self._build_conv_and_gate(conv_bias)
        self.out_norm = build_module(
            submodules.out_norm, config=config, hidden_size=all_heads.head_v_dim, eps=config.layernorm_epsilon
        )
        self.out_proj = build_module(
            submodules.out_proj,
            all_heads.num_v_heads * all_heads.head_v_dim,
            config.hidden_size,
            config=config,
            init_method=config.output_layer_init_method,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=True,
            is_expert=False,
            tp_comm_buffer_name="fc2",
            tp_group=pg_collection.tp,
            **module_name(name, "out_proj"),
        )
        if config.perform_initialization:
            self.reset_parameters()

    def _build_conv_and_gate(self, conv_bias: bool) -> None:
        config, dims = self.config, self.dims
        device = torch.device("cpu") if config.use_cpu_initialization else torch.device(torch.cuda.current_device())
        conv1d: Any = nn.utils.skip_init(
            nn.Conv1d,
            dims.conv_dim,
            dims.conv_dim,
            dims.conv_kernel,
            groups=dims.conv_dim,
            bias=conv_bias,
            device=device,
            dtype=config.params_dtype,
        )
        self.conv1d = conv1d
        self.dt_bias = nn.Parameter(torch.empty(dims.num_v_heads, dtype=torch.float32, device=device))
        self.A_log = nn.Parameter(torch.empty(dims.num_v_heads, dtype=torch.float32, device=device))
        parameter: Any
        for parameter in (*self.conv1d.parameters(), self.dt_bias, self.A_log):
            parameter.tensor_model_parallel = True  # Megatron counts it once per rank in norms and checkpoints
            parameter.partition_dim = 0

    def _by_section(self, init_method: Any) -> Callable[[Tensor], None]:
        """An initialiser of in_proj that gives each tp rank its share of each section.

        On the CPU Megatron draws the whole weight on every rank and takes contiguous rows; reordering the rows first
        makes those the right ones, so that every tp computes the same function.
        """

        def init(weight: Tensor) -> None:
            init_method(weight)
            if self.tp_size > 1 and weight.shape[0] == self.all_heads.in_proj_dim:
                order = _build_head_perm_for_split_sections(self.all_heads.sections, self.tp_size, weight.device)
                weight.copy_(weight[order])

        return torch.no_grad()(init)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the convolution and the gate anew.

        On the CPU every tp rank draws all heads and keeps its own; on the GPU each draws its own from Megatron's
        tensor-parallel random state, as Megatron does.
        """
        if self.config.use_cpu_initialization:
            self._draw_conv_and_gate(self.all_heads, self.tp_rank, self.tp_size)
        else:
            tracker: Any = get_cuda_rng_tracker()
            with tracker.fork():
                self._draw_conv_and_gate(self.dims, 0, 1)

    def _draw_conv_and_gate(self, heads: GdnDims, rank: int, size: int) -> None:
        def of_this_rank(whole: Tensor, sections: tuple[int, ...]) -> Tensor:
            order = _build_head_perm_for_split_sections(sections, size, whole.device)
            return whole[order].chunk(size)[rank]

        device, widths = self.A_log.device, heads.sections[:3]
        bound = heads.conv_kernel**-0.5 if self.conv_init is None else self.conv_init  # torch's, for a depthwise one
        weight = torch.empty(heads.conv_dim, 1, heads.conv_kernel, device=device).uniform_(-bound, bound)
        self.conv1d.weight.copy_(of_this_rank(weight, widths))
        if self.conv1d.bias is not None:
            bound = heads.conv_kernel**-0.5
            self.conv1d.bias.copy_(
                of_this_rank(torch.empty(heads.conv_dim, device=device).uniform_(-bound, bound), widths)
            )
        A = torch.empty(heads.num_v_heads, device=device).uniform_(*self.A_init_range)
        self.A_log.copy_(of_this_rank(A, (heads.num_v_heads,)).log())
        self.dt_bias.fill_(1.0)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GatedDeltaNet:
        return super()._apply(keep_precision(fn, self.A_log, self.dt_bias), recurse)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        key_value_states: Tensor | None = None,
        inference_context: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        sequence_len_offset: Any = None,
        *,
        inference_params: Any = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Run the layer on this rank's rows.

        Args:
            hidden_states: [s, b, h] (s/tp rows with sequence parallelism). Packed: b = 1 and the rows of the batch's
                layout. Not packed: b sequences cut by Megatron's zigzag.
            attention_mask: ignored, the layer is causal.
            key_value_states: only None.
            inference_context: Megatron's static one, see `gdn_cp.megatron.inference`; in eval mode, on one
                context-parallel rank, not packed.
            attention_bias: only None.
            packed_seq_params: `GdnPackedSeqParams`, or Megatron's own (see `layout_of_packed`).
            sequence_len_offset: only None, as inference_params.
            inference_params: only None.

        Returns:
            [s, b, h] and the output bias, None. Rotary embeddings and other arguments of attention are ignored.

        Raises:
            ValueError: for inference in other ways, cross attention or an attention bias; for a batch that does not
                fit.
        """
        refused = {
            "inference_params": inference_params,
            "sequence_len_offset": sequence_len_offset,
            "key_value_states": key_value_states,
            "attention_bias": attention_bias,
        }
        for name, value in refused.items():
            if value is not None:
                raise ValueError(
                    f"{name} was given: this layer has no cross attention, no attention bias, and for inference takes "
                    "inference_context alone, without flash_decode or CUDA graphs of Megatron's"
                )
        self._check_hidden_states(hidden_states)
        packed = is_packed(packed_seq_params)
        group = cp_group_of(packed_seq_params, self.pg_collection.cp)
        if inference_context is not None:
            return self._infer(hidden_states, inference_context, packed_seq_params, group)
        if packed and hidden_states.shape[1] != 1:
            raise ValueError(
                f"hidden_states has batch size {hidden_states.shape[1]}: packed rows need [rows, 1, hidden]"
            )
        projected, _bias = self.in_proj(hidden_states)
        seqlen, batch, _width = projected.shape
        cp_size = 1 if group is None else group.size()
        if packed and packed_seq_params is not None:
            layout = layout_of_packed(packed_seq_params, seqlen, cp_size, projected.device)
        else:
            layout = layout_of_batch(batch, seqlen * cp_size, cp_size, projected.device)
        a2a_size = self._a2a_size(packed_seq_params, layout, projected)

        def mix(rows: Tensor) -> Tensor:
            arguments = self._mixer_arguments()
            return gated_delta_net_mixer(
                rows,
                **arguments,
                layout=layout,
                group=group,
                a2a_size=a2a_size,
                backend=self.backend,
                **self.rule_options,
            )

        # With one sequence, as always when packed, the rows lie as they should: a view of autograd's less each way.
        rows = projected.squeeze(1) if batch == 1 else projected.transpose(0, 1).flatten(0, 1)
        mixed: Any = checkpoint(mix, False, rows) if self.training and self.recompute_mixer else mix(rows)
        if batch == 1:
            return self.out_proj(mixed.unsqueeze(1))
        return self.out_proj(mixed.unflatten(0, (batch, seqlen)).transpose(0, 1).contiguous())

    def _check_hidden_states(self, hidden_states: Tensor) -> None:
        check_tensor("hidden_states", hidden_states)
        width = self.config.hidden_size
        if hidden_states.dim() != 3 or hidden_states.shape[2] != width or not hidden_states.is_floating_point():
            raise ValueError(
                f"hidden_states is {hidden_states.dtype} {list(hidden_states.shape)}: expected floating point "
                f"[s, b, {width}]"
            )
        if hidden_states.device != self.A_log.device:
            raise ValueError(f"hidden_states is on {hidden_states.device} but the layer on {self.A_log.device}")

    def _mixer_arguments(self) -> dict[str, Any]:
        return {
            "dims": self.dims,
            "conv1d_weight": self.conv1d.weight,
            "conv1d_bias": self.conv1d.bias,
            "A_log": self.A_log,
            "dt_bias": self.dt_bias,
            "out_norm_weight": self._out_norm_gain(),
            "norm_eps": self.config.layernorm_epsilon,
        }

    def _infer(self, hidden_states: Tensor, context: Any, packed_seq_params: Any, group: Any) -> tuple[Tensor, None]:
        """The next tokens of every sequence of a static batch."""
        for wrong, value, remedy in (
            ("packed_seq_params", packed_seq_params, "give prompts of equal length as a batch"),
            ("context parallelism", group, "infer with context_parallel_size=1"),
            ("training mode", self.training or None, "call model.eval()"),
        ):
            if value is not None:
                raise ValueError(f"inference_context was given with {wrong}: {remedy}")
        projected, _bias = self.in_proj(hidden_states)
        mixed = mix_with_cache(projected, context, self.layer_number or 0, self._mixer_arguments(), self.backend)
        return self.out_proj(mixed.contiguous())

    def _a2a_size(self, packed_seq_params: PackedSeqParams | None, layout: ThdLayout, projected: Tensor) -> int:
        """The batch's a2a_size where it has one, else this layer's, resolved for the batch."""
        asked: A2aSize = getattr(packed_seq_params, "a2a_size", None)
        if asked is None:
            asked = self.a2a_size
        taken = choose_a2a_size(asked, layout, self.dims, element_size=projected.element_size())
        if isinstance(packed_seq_params, GdnPackedSeqParams):
            packed_seq_params.a2a_size_taken = taken
        return taken

    def _out_norm_gain(self) -> Tensor:
        """The gated norm's weight. Each tp rank's gradient of it covers its own heads, so the ranks must be summed.

        With sequence parallelism Megatron does that for the marked weight; without it, it would not.
        """
        gain = gain_of(self.out_norm.weight, self.config)
        if self.tp_size > 1 and not self.config.sequence_parallel:
            return copy_to_tensor_model_parallel_region(gain, group=self.pg_collection.tp)
        return gain

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple = (),
        metadata: dict | None = None,
        tp_group: torch.distributed.ProcessGroup | None = None,
    ) -> ShardedStateDict:
        """Describe the parameters to distributed checkpoints, key for key as Megatron's own layer does.

        in_proj and conv1d are saved as one tensor per section, so that a checkpoint can be loaded at another tp.
        """
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        tp_group = self.pg_collection.tp if tp_group is None else tp_group
        own: dict[str, Any] = {}
        self._save_to_state_dict(own, "", keep_vars=True)
        groups = {"tp_group": tp_group, "dp_cp_group": metadata["dp_cp_group"]}
        sharded = make_sharded_tensors_for_checkpoint(
            own, prefix, {"A_log": 0, "dt_bias": 0}, sharded_offsets, **groups
        )
        for name, module in self.named_children():
            if name == "conv1d":
                state = module.state_dict(prefix="", keep_vars=True)
                axes = dict.fromkeys(state, 0)
                sharded.update(
                    make_sharded_tensors_for_checkpoint(state, f"{prefix}{name}.", axes, sharded_offsets, **groups)
                )
            else:
                sharded.update(
                    sharded_state_dict_default(module, f"{prefix}{name}.", sharded_offsets, metadata, tp_group=tp_group)
                )
        split = split_tensor_factory()
        sections = self.dims.sections
        splits = {"in_proj.weight": 6, "conv1d.weight": 3, "conv1d.bias": 3}
        for key, count in splits.items():
            if f"{prefix}{key}" in sharded:
                widths, names = list(sections[:count]), list(IN_PROJ_SECTIONS[:count])
                sharded[f"{prefix}{key}"] = split(sharded[f"{prefix}{key}"], widths, names, 0)
        return sharded

    def backward_dw(self) -> None:
        """Run the delayed weight gradients of the two linear layers (a setting of Megatron's schedules)."""
        self.in_proj.backward_dw()
        self.out_proj.backward_dw()


def dims_of_config(config: TransformerConfig) -> GdnDims:
    """The heads that `config.linear_*` describes, over all tensor-parallel ranks."""
    return GdnDims(
        num_k_heads=config.linear_num_key_heads or 0,
        num_v_heads=config.linear_num_value_heads or 0,
        head_k_dim=config.linear_key_head_dim or 0,
        head_v_dim=config.linear_value_head_dim or 0,
        conv_kernel=config.linear_conv_kernel_dim or 0,
    )


def _dims_of_tp_rank(dims: GdnDims, tp_size: int) -> GdnDims:
    for name, heads in (("key", dims.num_k_heads), ("value", dims.num_v_heads)):
        if heads % tp_size:
            raise ValueError(
                f"config.linear_num_{name}_heads={heads} is not divisible by the tensor-parallel size {tp_size}"
            )
    return dims.per_rank(tp_size)
