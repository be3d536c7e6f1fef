"""The Gated DeltaNet mixer, all between in_proj and out_proj, as one function, and a plain torch module around it.

    in_proj -> all-to-all of q, k, v, beta, alpha -> conv + SiLU -> delta rule -> all-to-all back
            -> RMSNorm gated by z -> out_proj

The all-to-all joins groups of `a2a_size` ranks. Where these are not all ranks, a group holds segments of sequences, and
the convolution's halo and the rule's states pass between groups (`gdn_cp.state_passing`).

z never travels: the gated norm is per token and head, so it runs where z already is. Every stage is the identity when
it has nothing to do. The layer is that of Gated Delta Networks (arXiv:2412.06464) with the sections, the initialisation
and the gated norm of Qwen3-Next.

Dimensions: t local rows of this rank, T rows of the whole batch, H query/key heads, HV value heads (v head j belongs to
q/k head j // (HV/H)), K key dim, V value dim, W convolution width, P context-parallel size, N sequences. `_cp` names
rows cut over the ranks with all heads, `_hp` all rows with this rank's heads.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gdn_cp.comm.all_to_all import cp_to_hp, hp_to_cp
from gdn_cp.comm.choice import A2aSize, choose_a2a_size
from gdn_cp.comm.groups import CpGroups, cp_groups
from gdn_cp.comm.layout import ThdLayout
from gdn_cp.kernels.chunk import check_intra_card
from gdn_cp.kernels.conv1d import causal_conv1d
from gdn_cp.kernels.norm import gated_rms_norm
from gdn_cp.kernels.segments import RuleOptions, TokenInputs, run_rule
from gdn_cp.mixer_checks import (
    check_call,
    check_count,
    check_creation,
    check_eps,
    check_hidden_states,
    check_layout_and_group,
    check_parameters,
)
from gdn_cp.state_passing import convolve_segments, state_passing_delta_rule

A_INIT_RANGE = (0.01, 16.0)  # as Qwen3-Next; the lower end keeps log(A) finite

RULE = RuleOptions(use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True, use_beta_sigmoid_in_kernel=True)
"""The delta rule as this layer takes it: from raw q, k, beta and alpha."""


@dataclass(frozen=True)
class GdnDims:
    """Head counts and widths of one layer on one tensor-parallel rank.

    Raises ValueError where a count is not positive or `num_v_heads` is not a multiple of `num_k_heads`, TypeError where
    one is no int.
    """

    num_k_heads: int
    num_v_heads: int
    head_k_dim: int
    head_v_dim: int
    conv_kernel: int = 4

    def __post_init__(self) -> None:
        for name in ("num_k_heads", "num_v_heads", "head_k_dim", "head_v_dim", "conv_kernel"):
            check_count(name, getattr(self, name))
        if self.num_v_heads % self.num_k_heads:
            raise ValueError(
                f"num_v_heads={self.num_v_heads} must be a multiple of num_k_heads={self.num_k_heads}: "
                "each q/k head serves the same number of v heads"
            )

    @cached_property
    def sections(self) -> tuple[int, int, int, int, int, int]:
        """Widths of q, k, v, z, beta, alpha in the projection, in this order."""
        qk, v = self.num_k_heads * self.head_k_dim, self.num_v_heads * self.head_v_dim
        return qk, qk, v, v, self.num_v_heads, self.num_v_heads

    @cached_property
    def conv_dim(self) -> int:
        """Channels of the convolution: q, k and v."""
        return sum(self.sections[:3])

    @cached_property
    def in_proj_dim(self) -> int:
        """Width of the projection: all six sections."""
        return sum(self.sections)

    @lru_cache(maxsize=64)  # noqa: B019 - dims are few and small, and every call of a layer asks twice
    def per_rank(self, a2a_size: int) -> GdnDims:
        """The heads that one rank runs after the all-to-all over `a2a_size` ranks.

        Raises ValueError where the head counts are not divisible.
        """
        for name in ("num_k_heads", "num_v_heads"):
            if getattr(self, name) % a2a_size:
                raise ValueError(
                    f"{name}={getattr(self, name)} (of this tensor-parallel rank) is not divisible by "
                    f"a2a_size={a2a_size}: choose an a2a_size that divides the heads (1 always does)"
                )
        return replace(self, num_k_heads=self.num_k_heads // a2a_size, num_v_heads=self.num_v_heads // a2a_size)


def gated_delta_net_mixer(
    projected: Tensor,
    *,
    dims: GdnDims,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None = None,
    A_log: Tensor,
    dt_bias: Tensor,
    out_norm_weight: Tensor,
    layout: ThdLayout | None = None,
    group: dist.ProcessGroup | None = None,
    a2a_size: A2aSize = None,
    norm_eps: float = 1e-6,
    backend: str | None = None,
    intra_card: int | None = None,
    truncate_states: bool | None = None,
) -> Tensor:
    """Mix the tokens of each sequence: from the input projection's output to the output projection's input.

    Per v head, with q, k, v after the causal convolution and SiLU, q and k of unit length, beta = sigmoid(beta) and
    g = -exp(A_log) * softplus(alpha + dt_bias):

        S_t = exp(g_t) * S_{t-1} + beta_t * k_t (v_t - k_t^T exp(g_t) S_{t-1})^T,   o_t = K^-0.5 * S_t^T q_t
        out = rmsnorm(o) * out_norm_weight * silu(z)

    Args:
        projected: [t, in_proj_dim], sections q, k, v, z, beta, alpha; rows as `layout` gives them to this rank.
        dims: the heads of this tensor-parallel rank, before the exchange.
        conv1d_weight: [conv_dim, 1, W], channels of q, k, v.
        conv1d_bias: [conv_dim] or None.
        A_log: [HV] float32 (float64 with float64 input), as is dt_bias [HV].
        out_norm_weight: [V].
        layout: which rows this rank holds. None: one unpadded sequence on one rank.
        group: the context-parallel group; None: one rank.
        a2a_size: ranks that trade heads for tokens, a divisor of the group's size; None for all of the group,
            "largest" that divides the heads, "auto" for the planner's choice. With less than all, groups of a2a_size
            neighbours pass states to each other; the first call with 1 < a2a_size < size makes process groups, see
            `gdn_cp.comm.groups.cp_groups`.
        norm_eps: epsilon of the gated RMSNorm.
        backend: implementation of the delta rule, see `gdn_cp.choose_backend`.
        intra_card: chunks of 64 tokens to a piece into which one card cuts a sequence, as for
            `gdn_cp.chunk_gated_delta_rule`; None chooses, 0 never cuts.
        truncate_states: where states pass between ranks, let them end where they have decayed below a bound (4.5e-5 of
            themselves), which saves walks; see `gdn_cp.kernels.segments.summarise_segments`. None: in 16-bit dtypes,
            whose own rounding is 2e-3 or 2e-4.

    Returns:
        [t, HV*V] in the dtype of `projected`. Padded rows are zero, whatever stands in them (NaN too), and have no
        effect on any gradient.

    Each rank's parameter gradients cover its own heads and tokens, so their sum over the group is the gradient.

    Raises:
        ValueError: for whatever does not fit, before any collective: shapes, dtypes, devices, heads not divisible by
            a2a_size, a group without a layout.
    """
    if not isinstance(dims, GdnDims):
        raise TypeError(f"dims must be a gdn_cp.GdnDims, got {type(dims).__name__}")
    check_call(projected, dims, layout, group)
    check_parameters(projected, dims, conv1d_weight, conv1d_bias, A_log, dt_bias, out_norm_weight)
    check_eps(norm_eps)
    rule = replace(RULE, backend=backend, intra_card=check_intra_card(intra_card))
    truncate_states = projected.element_size() == 2 if truncate_states is None else truncate_states
    size = 1 if group is None else group.size()
    rank = 0 if group is None else group.rank()
    a2a_size = choose_a2a_size(a2a_size, layout, dims, element_size=projected.element_size())
    heads, head_index = dims.per_rank(a2a_size), rank % a2a_size
    groups = None if group is None or a2a_size == size else cp_groups(group, a2a_size)
    if projected.device.type == "cuda" and not torch.compiler.is_compiling():
        parameters = (conv1d_weight, conv1d_bias, A_log, dt_bias, out_norm_weight)
        whole_group = None if size == 1 else group
        mixed = _mix_fused(projected, parameters, dims, layout, whole_group, groups, norm_eps, rule, truncate_states)
        if mixed is not None:
            return mixed

    padding = None if layout is None else layout.local_padding(rank)
    if padding is not None:
        projected = projected.masked_fill(padding[:, None], 0)
    qkv_widths = dims.sections[:3]
    qkv, z_cp, beta, alpha = projected.split((dims.conv_dim, *dims.sections[3:]), dim=1)
    if layout is not None:
        sections = (qkv_widths, dims.num_v_heads, dims.num_v_heads)
        qkv, beta, alpha = cp_to_hp((qkv, beta, alpha), layout, group, sections=sections, a2a_size=a2a_size)
    o_hp, _ = mix_sequences(
        qkv,
        beta,
        alpha,
        heads,
        conv1d_weight=_of_this_rank(conv1d_weight, qkv_widths, head_index, a2a_size),
        conv1d_bias=None if conv1d_bias is None else _of_this_rank(conv1d_bias, qkv_widths, head_index, a2a_size),
        A_log=_of_this_rank(A_log, (dims.num_v_heads,), head_index, a2a_size),
        dt_bias=_of_this_rank(dt_bias, (dims.num_v_heads,), head_index, a2a_size),
        layout=layout,
        groups=groups,
        rule=rule,
        truncate_states=truncate_states,
    )
    o_cp = o_hp if layout is None else hp_to_cp(o_hp, layout, group, a2a_size=a2a_size)

    out = gate_output(o_cp, z_cp, dims, out_norm_weight, norm_eps)
    # z is zero on padded rows, so out is too; the mask keeps a NaN gradient that arrives there from passing.
    return out if padding is None else out.masked_fill(padding[:, None], 0)


def _mix_fused(
    projected: Tensor,
    parameters: tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor],
    dims: GdnDims,
    layout: ThdLayout | None,
    group: dist.ProcessGroup | None,
    groups: CpGroups | None,
    eps: float,
    rule: RuleOptions,
    truncate_states: bool,
) -> Tensor | None:
    """The mixer as one function over Triton kernels (`gdn_cp.fused_mixer`), where they can serve the call."""
    if importlib.util.find_spec("triton") is None:
        return None
    from gdn_cp.fused_mixer import MixerParameters, fused_call, fused_mixer, refusal

    of_layer = MixerParameters(*parameters)
    whole = 1 if group is None else group.size()
    heads = dims.per_rank(whole if groups is None else groups.a2a_size)
    if refusal(projected, of_layer, heads, layout, rule.backend) is not None:
        return None
    call = fused_call(
        projected, of_layer, dims, layout=layout, group=group, eps=eps, groups=groups, intra_card=rule.intra_card
    )
    if call.states is not None:
        call = call.with_rule(rule, truncate_states)
    return fused_mixer(projected, of_layer, call)


def gate_output(o: Tensor, z: Tensor, dims: GdnDims, weight: Tensor, eps: float) -> Tensor:
    """The gated norm of every head of o by z, both [rows, HV*V]."""
    per_head = (dims.num_v_heads, dims.head_v_dim)
    return gated_rms_norm(o.unflatten(1, per_head), z.unflatten(1, per_head), weight, eps).flatten(1)


def split_heads(
    qkv: Tensor, beta: Tensor, alpha: Tensor, heads: GdnDims, A_log: Tensor, dt_bias: Tensor
) -> TokenInputs:
    """What the rule reads of rows after the convolution: qkv [rows, conv_dim], beta and alpha [rows, HV]."""
    q, k, v = qkv.split(heads.sections[:3], dim=1)
    return TokenInputs(
        q=q.unflatten(1, (heads.num_k_heads, heads.head_k_dim)).unsqueeze(0),
        k=k.unflatten(1, (heads.num_k_heads, heads.head_k_dim)).unsqueeze(0),
        v=v.unflatten(1, (heads.num_v_heads, heads.head_v_dim)).unsqueeze(0),
        g=alpha.unsqueeze(0),
        beta=beta.unsqueeze(0),
        A_log=A_log,
        dt_bias=dt_bias,
    )


def mix_sequences(
    qkv: Tensor,
    beta: Tensor,
    alpha: Tensor,
    heads: GdnDims,
    *,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    A_log: Tensor,
    dt_bias: Tensor,
    layout: ThdLayout | None,
    groups: CpGroups | None,
    rule: RuleOptions,
    truncate_states: bool = False,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Convolution and delta rule along sequences for this rank's heads: [rows, ...] -> o [rows, HV*V].

    The rows are whole sequences, or with `groups` the segments of this rank's group, which others continue. The final
    states [N, HV, K, V] of whole sequences come second, if asked for.
    """
    cu_seqlens = None if layout is None else layout.cu_seqlens_tensor()
    if groups is None:
        qkv = causal_conv1d(qkv, conv1d_weight, conv1d_bias, cu_seqlens=cu_seqlens, activation="silu")
    else:
        assert layout is not None
        qkv = convolve_segments(qkv, conv1d_weight, conv1d_bias, layout, groups, activation="silu")
    inputs = split_heads(qkv, beta, alpha, heads, A_log, dt_bias)
    final_state = None
    if groups is None:
        o, final_state = run_rule(inputs, rule, cu_seqlens, output_final_state=output_final_state)
    else:
        assert layout is not None
        assert not output_final_state
        o = state_passing_delta_rule(inputs, rule, layout, groups, truncate=truncate_states)
    return o.squeeze(0).flatten(1), final_state


def _of_this_rank(parameter: Tensor, sections: Sequence[int], index: int, size: int) -> Tensor:
    """The index-th of `size` shares of each section of dim 0, side by side; autograd leaves zeros for the others."""
    if size == 1:
        return parameter
    shares = [width // size for width in sections]
    parts = parameter.split(tuple(sections))
    return torch.cat([part.narrow(0, index * share, share) for part, share in zip(parts, shares, strict=True)])


def keep_precision(convert: Callable[[Tensor], Tensor], *parameters: Tensor) -> Callable[[Tensor], Tensor]:
    """Wrap the function that `nn.Module._apply` maps over tensors: `parameters` are never cast to half precision.

    They still move with `convert` to another device, and their gradients with them.
    """

    def converted(tensor: Tensor) -> Tensor:
        result = convert(tensor)
        kept = any(tensor is p or tensor is p.grad for p in parameters)
        if kept and result.dtype in (torch.bfloat16, torch.float16):
            return tensor.to(result.device)
        return result

    return converted


@lru_cache(maxsize=16)
def _whole_sequences(batch: int, seqlen: int, device: torch.device) -> ThdLayout:
    return ThdLayout.batched(batch, seqlen, 1, device=device)


class GatedDeltaNet(nn.Module):
    """A Gated DeltaNet layer as a plain module: parameters only; layout and group are given at each call.

    Parameters: `in_proj` (no bias; rows in the order q, k, v, z, beta, alpha), `conv1d` (depthwise, [conv_dim, 1, W]),
    `A_log` and `dt_bias` [HV] (float32 whatever `dtype` is, and through `.to(torch.bfloat16)`, `.half()` and the like),
    `out_norm`, `out_proj` (no bias). Initialised as Qwen3-Next: A uniform in [0.01, 16], dt_bias ones.

    Under context parallelism each rank's gradients are its part; their sum over the group is the gradient.
    """

    def __init__(
        self,
        hidden_size: int,
        num_k_heads: int,
        num_v_heads: int,
        head_k_dim: int = 128,
        head_v_dim: int = 128,
        conv_kernel: int = 4,
        *,
        norm_eps: float = 1e-6,
        conv_bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_eps(norm_eps)
        check_creation(dtype, device)
        self.hidden_size = check_count("hidden_size", hidden_size)
        self.norm_eps = norm_eps
        self.dims = dims = GdnDims(num_k_heads, num_v_heads, head_k_dim, head_v_dim, conv_kernel)
        value_dim = num_v_heads * head_v_dim
        self.in_proj = nn.Linear(hidden_size, dims.in_proj_dim, bias=False, device=device, dtype=dtype)
        self.conv1d = nn.Conv1d(
            dims.conv_dim,
            dims.conv_dim,
            conv_kernel,
            groups=dims.conv_dim,
            bias=conv_bias,
            device=device,
            dtype=dtype,
        )
        gate_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self.A_log = nn.Parameter(torch.empty(num_v_heads, device=device, dtype=gate_dtype))
        self.dt_bias = nn.Parameter(torch.empty(num_v_heads, device=device, dtype=gate_dtype))
        self.out_norm = nn.RMSNorm(head_v_dim, eps=norm_eps, device=device, dtype=dtype)
        self.out_proj = nn.Linear(value_dim, hidden_size, bias=False, device=device, dtype=dtype)
        self.reset_gate()

    @torch.no_grad()
    def reset_gate(self) -> None:
        """Draw A_log anew and set dt_bias to ones."""
        self.A_log.uniform_(*A_INIT_RANGE).log_()
        self.dt_bias.fill_(1.0)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GatedDeltaNet:
        return super()._apply(keep_precision(fn, self.A_log, self.dt_bias), recurse)

    def forward(
        self,
        hidden_states: Tensor,
        *,
        layout: ThdLayout | None = None,
        group: dist.ProcessGroup | None = None,
        a2a_size: A2aSize = None,
        backend: str | None = None,
        batch_first: bool = True,
        intra_card: int | None = None,
        truncate_states: bool | None = None,
    ) -> Tensor:
        """Run the layer on this rank's rows.

        Args:
            hidden_states: [t, hidden] packed rows (a layout is required), or [B, S, hidden] ([S, B, hidden] with
                `batch_first=False`): B sequences, of each of which this rank holds S tokens. For a batch on several
                ranks pass `ThdLayout.batched(B, S * cp_size, cp_size, kind=...)`.
            layout: which rows this rank holds; see `gated_delta_net_mixer`, as for group, a2a_size and backend.
            group: the context-parallel group; None: one rank.
            a2a_size: ranks that trade heads for tokens.
            backend: implementation of the delta rule.
            batch_first: order of a three-dimensional input.
            intra_card, truncate_states: see `gated_delta_net_mixer`.

        Returns:
            The same shape as `hidden_states`. Padded rows are zero.

        Raises:
            ValueError: packed rows, or a batch on several ranks, without a layout; and as `gated_delta_net_mixer`.
        """
        rows, layout = self.packed_rows(hidden_states, layout, group, batch_first)
        mixed = gated_delta_net_mixer(
            self.in_proj(rows),
            **self.mixer_arguments(),
            layout=layout,
            group=group,
            a2a_size=a2a_size,
            backend=backend,
            intra_card=intra_card,
            truncate_states=truncate_states,
        )
        out = self.out_proj(mixed)
        if hidden_states.dim() == 2:
            return out
        if batch_first:
            return out.view(hidden_states.shape)
        return out.view(hidden_states.shape[1], hidden_states.shape[0], -1).transpose(0, 1)

    def mixer_arguments(self) -> dict[str, Any]:
        """What `gated_delta_net_mixer` and its kin of `gdn_cp.inference` take of this layer."""
        return {
            "dims": self.dims,
            "conv1d_weight": self.conv1d.weight,
            "conv1d_bias": self.conv1d.bias,
            "A_log": self.A_log,
            "dt_bias": self.dt_bias,
            "out_norm_weight": self.out_norm.weight,
            "norm_eps": self.norm_eps,
        }

    def packed_rows(
        self, hidden_states: Tensor, layout: ThdLayout | None, group: dist.ProcessGroup | None, batch_first: bool = True
    ) -> tuple[Tensor, ThdLayout]:
        """Rows [t, hidden] of an input in any of the forms that `forward` takes, and their layout; checked."""
        check_layout_and_group(layout, group)
        check_hidden_states(hidden_states, self.hidden_size, self.in_proj.weight)
        rows = hidden_states
        if hidden_states.dim() == 3:
            by_batch = hidden_states if batch_first else hidden_states.transpose(0, 1)
            layout = self._layout_of_batch(by_batch, layout, group)
            rows = by_batch.flatten(0, 1)
        elif layout is None:
            raise ValueError(
                "layout=None with packed rows [t, hidden]: pass a ThdLayout, since without sequence boundaries "
                "documents would leak into each other; for one sequence pass [1, S, hidden]"
            )
        if layout.t_local != rows.shape[0]:
            raise ValueError(
                f"hidden_states has {rows.shape[0]} rows but layout.t_local={layout.t_local}: pass this rank's rows"
            )
        return rows, layout

    def _layout_of_batch(
        self, by_batch: Tensor, layout: ThdLayout | None, group: dist.ProcessGroup | None
    ) -> ThdLayout:
        """The layout of a [B, S, hidden] input: the given one if it fits, or B whole sequences on one rank."""
        batch, seqlen = by_batch.shape[:2]
        size = 1 if group is None else group.size()
        if layout is None:
            if size > 1:
                raise ValueError(
                    f"layout=None with a batch on {size} ranks: pass "
                    f"layout=ThdLayout.batched({batch}, {seqlen * size}, {size}, kind=...), which says how each "
                    "sequence is cut"
                )
            return _whole_sequences(batch, seqlen, by_batch.device)
        equal_lengths = tuple(i * seqlen * layout.cp_size for i in range(batch + 1))
        # A flat cut leaves the first rank the first sequences only, a batched one some of each.
        if batch > 1 and (
            layout.cu_seqlens != equal_lengths or set(layout.segments(1, 0).sequence_ids) != set(range(batch))
        ):
            raise ValueError(
                f"hidden_states holds {batch} sequences of {seqlen} local tokens each, which {layout} does not: pass "
                f"ThdLayout.batched({batch}, {seqlen * layout.cp_size}, {layout.cp_size}), or packed rows [t, hidden]"
            )
        return layout
