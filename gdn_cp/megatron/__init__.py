"""The Megatron-Core module, its layer specs, and its core attention for context parallelism."""

from gdn_cp.megatron.core_attention import CoreAttention
from gdn_cp.megatron.cpu_shim import install_cpu_shim
from gdn_cp.megatron.gated_delta_net import GatedDeltaNet, GatedDeltaNetSubmodules
from gdn_cp.megatron.gradients import reduce_gradients
from gdn_cp.megatron.inference import GdnInferenceContext
from gdn_cp.megatron.norm import RMSNorm
from gdn_cp.megatron.packed import GdnPackedSeqParams, packed_seq_params_from_layout
from gdn_cp.megatron.rotary import PackedSelfAttention
from gdn_cp.megatron.specs import get_attention_layer_spec, get_gdn_layer_spec, get_hybrid_block_spec

__all__ = [
    "CoreAttention",
    "GatedDeltaNet",
    "GatedDeltaNetSubmodules",
    "GdnInferenceContext",
    "GdnPackedSeqParams",
    "PackedSelfAttention",
    "RMSNorm",
    "get_attention_layer_spec",
    "get_gdn_layer_spec",
    "get_hybrid_block_spec",
    "install_cpu_shim",
    "packed_seq_params_from_layout",
    "reduce_gradients",
]
