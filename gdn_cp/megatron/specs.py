"""Layer specs for Megatron's GPTModel, of plain Megatron modules or of Transformer Engine's.

    config = TransformerConfig(..., linear_attention_freq=4, linear_num_key_heads=16, linear_num_value_heads=32,
                               linear_key_head_dim=128, linear_value_head_dim=128, linear_conv_kernel_dim=4)
    model = GPTModel(config, get_hybrid_block_spec(config), ...)

Leave `experimental_attention_variant=None`: with "gated_delta_net" megatron-core 0.16.1 refuses context parallelism.
`linear_attention_freq` also makes Megatron save each layer under its own keys, which a hybrid model needs.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType, LayerType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from gdn_cp.comm.choice import A2aSize
from gdn_cp.megatron.compat import mlp_spec
from gdn_cp.megatron.core_attention import CoreAttention
from gdn_cp.megatron.gated_delta_net import GatedDeltaNet, GatedDeltaNetSubmodules
from gdn_cp.megatron.huggingface_experts import moe_pattern
from gdn_cp.megatron.norm import RMSNorm
from gdn_cp.megatron.rotary import PackedSelfAttention

DEFAULT_ATTENTION_FREQ = 4

# Transformer Engine fuses the input norm into the projection and saves it there; Megatron's own checkpoints are so.
_GDN_KEYS = {"input_layernorm.": "self_attention.in_proj.layer_norm_"}
_ATTENTION_KEYS = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
_MLP_KEYS = {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}


def get_gdn_layer_spec(
    config: TransformerConfig,
    *,
    backend: str | None = None,
    a2a_size: A2aSize = "auto",
    intra_card: int | None = None,
    truncate_states: bool | None = None,
    experts: bool = True,
) -> ModuleSpec:
    """A transformer layer with Gated DeltaNet in place of self-attention.

    Args:
        config: of the model; `linear_*` gives the sizes.
        backend: implementation of the delta rule, see `gdn_cp.choose_backend`.
        a2a_size: how context parallelism shares the work, see `gdn_cp.megatron.GatedDeltaNet`. A batch's
            packed_seq_params may say otherwise.
        intra_card, truncate_states: see `gdn_cp.gated_delta_net_mixer`.
        experts: False gives a dense layer in a model with `config.num_moe_experts`.
    """
    mixer = ModuleSpec(
        module=GatedDeltaNet,
        params={
            "backend": backend,
            "a2a_size": a2a_size,
            "intra_card": intra_card,
            "truncate_states": truncate_states,
        },
        submodules=GatedDeltaNetSubmodules(in_proj=ColumnParallelLinear, out_norm=RMSNorm, out_proj=RowParallelLinear),
    )
    return _layer_spec(config, mixer, _GDN_KEYS, experts)


def get_attention_layer_spec(config: TransformerConfig, *, experts: bool = True) -> ModuleSpec:
    """A transformer layer with full attention that takes packed batches under context parallelism.

    `experts` as in `get_gdn_layer_spec`. `config.qk_layernorm` and `config.attention_output_gate` (both set in
    Qwen3-Next) are honoured.
    """
    norm: Any = RMSNorm if config.qk_layernorm else None
    attention = ModuleSpec(
        module=PackedSelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=CoreAttention,
            linear_proj=RowParallelLinear,
            q_layernorm=norm,
            k_layernorm=norm,
        ),
    )
    return _layer_spec(config, attention, _ATTENTION_KEYS, experts)


def get_hybrid_block_spec(
    config: TransformerConfig,
    *,
    backend: str | None = None,
    a2a_size: A2aSize = "auto",
    intra_card: int | None = None,
    truncate_states: bool | None = None,
    vp_stage: int | None = None,
    pp_rank: int | None = None,
    transformer_engine: bool = False,
) -> TransformerBlockSubmodules:
    """The decoder of a hybrid model: full attention every `config.linear_attention_freq`-th layer, else GDN.

    Args:
        config: `linear_attention_freq` is a number (None: 4) or a list with 1 for GDN and 0 for attention per layer;
            `moe_layer_freq` says which layers have experts, if the model has them.
        backend: implementation of the delta rule.
        a2a_size, intra_card, truncate_states: of the GDN layers, see `get_gdn_layer_spec`.
        vp_stage: virtual pipeline stage.
        pp_rank: pipeline rank; None: this process's.
        transformer_engine: use its modules, see `gdn_cp.megatron.transformer_engine`.

    Raises:
        ValueError: for a list of another length than `num_layers`, for interleaved pipelines that would hang, and
            where Transformer Engine is asked for and absent.
    """
    _check_pipeline(config)
    if config.normalization != "RMSNorm":
        raise ValueError(f"config.normalization={config.normalization!r}: set 'RMSNorm'")
    pattern = linear_attention_pattern(config)
    placement: Any = config.pipeline_model_parallel_layout
    if placement is not None:
        stage = placement.get_layer_id_list(layer_type=LayerType.decoder, vp_stage=vp_stage, pp_rank=pp_rank)
    else:
        offset = get_transformer_layer_offset(config, vp_stage=vp_stage, pp_rank=pp_rank)
        stage = range(offset, offset + get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=pp_rank))
    choices: dict[str, Any] = {"intra_card": intra_card, "truncate_states": truncate_states}
    choices |= {"backend": backend, "a2a_size": a2a_size}
    gdn: Any = partial(get_gdn_layer_spec, config, **choices)
    attention: Any = partial(get_attention_layer_spec, config)
    final_norm: Any = RMSNorm
    if transformer_engine:
        from gdn_cp.megatron import transformer_engine as te

        engine = te.load_engine()
        gdn = partial(te.gdn_layer_spec, config, engine, **choices)
        attention, final_norm = partial(te.attention_layer_spec, config, engine), engine.norm
    sparse = moe_pattern(config)
    layers = [(gdn if pattern[layer] else attention)(experts=bool(sparse[layer])) for layer in stage]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=final_norm)


def _check_pipeline(config: TransformerConfig) -> None:
    """Refuse interleaved schedules of Megatron's that hang.

    Of two stages each is the one before and the one after the other. Megatron posts a batch of messages in the same
    order on both, so that what one sends backward the other takes for what was sent forward; shapes always travel in a
    batch. With more stages, shapes and batches of tensors wait for each other.
    """
    if config.virtual_pipeline_model_parallel_size is None:
        return
    stages, shapes = config.pipeline_model_parallel_size, config.variable_seq_lengths
    in_batches = config.batch_p2p_comm or not config.overlap_p2p_comm
    if (stages == 2 and (shapes or in_batches)) or (shapes and in_batches):
        remedy = "overlap_p2p_comm=True and batch_p2p_comm=False"
        if shapes and stages == 2:
            remedy += ", and variable_seq_lengths=False with packs of equal row counts; or take more stages"
        raise ValueError(
            f"config.variable_seq_lengths={shapes}, overlap_p2p_comm={config.overlap_p2p_comm}, "
            f"batch_p2p_comm={config.batch_p2p_comm}: Megatron's interleaved schedule of {stages} stages would hang; "
            f"set {remedy}"
        )


def linear_attention_pattern(config: TransformerConfig) -> list[int]:
    """Per layer 1 for Gated DeltaNet, 0 for full attention."""
    freq = config.linear_attention_freq
    if isinstance(freq, list):
        if len(freq) != config.num_layers:
            raise ValueError(f"config.linear_attention_freq has {len(freq)} entries for {config.num_layers} layers")
        return freq
    every = DEFAULT_ATTENTION_FREQ if freq is None else freq
    return [int((layer + 1) % every != 0) for layer in range(config.num_layers)]


def _layer_spec(config: TransformerConfig, mixer: ModuleSpec, keys: dict[str, str], experts: bool) -> ModuleSpec:
    dense = config.num_moe_experts is None or not experts
    submodules: dict[str, Any] = {
        "input_layernorm": RMSNorm,
        "self_attention": mixer,
        "self_attn_bda": get_bias_dropout_add,
        "pre_mlp_layernorm": RMSNorm,
        "mlp": mlp_spec(config, experts=experts),
        "mlp_bda": get_bias_dropout_add,
        "sharded_state_dict_keys_map": {**keys, **(_MLP_KEYS if dense else {})},
    }
    return ModuleSpec(module=TransformerLayer, submodules=TransformerLayerSubmodules(**submodules))
