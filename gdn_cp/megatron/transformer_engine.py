"""Layer specs of Transformer Engine modules around Gated DeltaNet: fused norm and projection, TE attention, FP8.

    config = TransformerConfig(..., fp8="hybrid", fp8_recipe="tensorwise")       # fp8: as you like
    model = GPTModel(config, get_hybrid_block_spec(config, transformer_engine=True), ...)

The layer norm is fused into the input projection (TELayerNormColumnParallelLinear), the output projection is
TERowParallelLinear, norms are TENorm, attention is TEDotProductAttention, which knows context parallelism over packed
rows in the zigzag layout. With `config.fp8` Megatron runs the projections in FP8; convolution, gate, delta rule and
gated norm stay as they are. Checkpoints are the same as those of the specs without Transformer Engine.

Written against the interface of Transformer Engine in megatron-core 0.16.1 and 0.19.2.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from gdn_cp.comm.choice import A2aSize
from gdn_cp.megatron.compat import mlp_spec
from gdn_cp.megatron.gated_delta_net import GatedDeltaNet, GatedDeltaNetSubmodules, dims_of_config
from gdn_cp.megatron.rotary import PackedSelfAttention

_FP8_GRANULE = 16  # both dimensions of a matrix product in FP8 are multiples of it


@dataclass(frozen=True)
class Engine:
    """Megatron's wrappers of Transformer Engine modules that the specs are made of."""

    norm_and_column_linear: Any
    row_linear: Any
    norm: Any
    attention: Any
    provider: Any
    """Megatron's BackendSpecProvider, which the MLP (or mixture of experts) is made by."""


def load_engine() -> Engine:
    """Megatron's wrappers.

    Raises:
        ValueError: where Transformer Engine is not installed.
    """
    wrappers: Any = importlib.import_module("megatron.core.extensions.transformer_engine")
    if not wrappers.HAVE_TE:
        raise ValueError(
            "transformer_engine=True, but Transformer Engine is not installed: pip install 'gdn_cp[te]' on a machine "
            "with CUDA, or leave transformer_engine=False"
        )
    provider: Any = importlib.import_module("megatron.core.extensions.transformer_engine_spec_provider")
    return Engine(
        norm_and_column_linear=wrappers.TELayerNormColumnParallelLinear,
        row_linear=wrappers.TERowParallelLinear,
        norm=wrappers.TENorm,
        attention=wrappers.TEDotProductAttention,
        provider=provider.TESpecProvider(),
    )


def gdn_layer_spec(
    config: TransformerConfig,
    engine: Engine,
    *,
    backend: str | None = None,
    a2a_size: A2aSize = "auto",
    intra_card: int | None = None,
    truncate_states: bool | None = None,
    experts: bool = True,
) -> ModuleSpec:
    """A transformer layer with Gated DeltaNet, as `gdn_cp.megatron.get_gdn_layer_spec`, of TE modules.

    Raises ValueError under `config.fp8` for a projection width that FP8 products do not take.
    """
    _check_fp8(config)
    mixer = ModuleSpec(
        module=GatedDeltaNet,
        params={
            "backend": backend,
            "a2a_size": a2a_size,
            "intra_card": intra_card,
            "truncate_states": truncate_states,
        },
        submodules=GatedDeltaNetSubmodules(
            in_proj=engine.norm_and_column_linear, out_norm=engine.norm, out_proj=engine.row_linear
        ),
        metainfo={"fuse_input_layernorm": True},
    )
    return _layer_spec(config, engine, mixer, experts)


def attention_layer_spec(config: TransformerConfig, engine: Engine, *, experts: bool = True) -> ModuleSpec:
    """A transformer layer with full attention, as `gdn_cp.megatron.get_attention_layer_spec`, of TE modules."""
    norm: Any = engine.norm if config.qk_layernorm else None
    attention = ModuleSpec(
        module=PackedSelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=engine.norm_and_column_linear,
            core_attention=packed_attention(engine.attention),
            linear_proj=engine.row_linear,
            q_layernorm=norm,
            k_layernorm=norm,
        ),
    )
    return _layer_spec(config, engine, attention, experts)


@lru_cache(maxsize=8)
def packed_attention(attention: type) -> type:
    """`attention`, a core attention that needs the boundaries of packed rows, for use in `PackedSelfAttention`."""

    class PackedCoreAttention(attention):
        """Gives the attention the batch's own parameters, which Megatron's attention does not see.

        Raises ValueError for packed rows in another layout than zigzag on several ranks.
        """

        def forward(self, *arguments: Any, packed_seq_params: Any = None, **settings: Any) -> Any:
            """As the attention's own."""
            batch = getattr(packed_seq_params, "whole_batch", None) or packed_seq_params
            layout = getattr(batch, "layout", None)
            if layout is not None and layout.kind != "zigzag" and layout.cp_size > 1:
                raise ValueError(
                    f"{layout}: Transformer Engine's attention knows the zigzag layout only; use ThdLayout.zigzag, or "
                    "attention layers of gdn_cp.megatron.get_attention_layer_spec"
                )
            return super().forward(*arguments, packed_seq_params=batch, **settings)

    return PackedCoreAttention


def _check_fp8(config: TransformerConfig) -> None:
    """Refuse widths before Transformer Engine asserts in the first step."""
    if not config.fp8:
        return
    dims, tp = dims_of_config(config), config.tensor_model_parallel_size
    widths = {
        "the input projection's rows (q, k, v, z, beta, alpha)": dims.in_proj_dim,
        "the output projection's columns": dims.num_v_heads * dims.head_v_dim,
    }
    for name, width in widths.items():
        if width % (tp * _FP8_GRANULE):
            raise ValueError(
                f"config.fp8={config.fp8!r}: {name}, {width} over tensor_model_parallel_size={tp}, are not a multiple "
                f"of {_FP8_GRANULE} on each rank; use a smaller tensor-parallel size, or fp8=None"
            )


def _layer_spec(config: TransformerConfig, engine: Engine, mixer: ModuleSpec, experts: bool) -> ModuleSpec:
    dense = config.num_moe_experts is None or not experts
    submodules: dict[str, Any] = {
        "input_layernorm": IdentityOp,
        "self_attention": mixer,
        "self_attn_bda": get_bias_dropout_add,
        "pre_mlp_layernorm": IdentityOp if dense else engine.norm,
        "mlp": mlp_spec(config, engine.provider, experts=experts),
        "mlp_bda": get_bias_dropout_add,
    }
    return ModuleSpec(module=TransformerLayer, submodules=TransformerLayerSubmodules(**submodules))
