"""How much arithmetic a training step is, and how much a device could do: the numbers behind TFLOP/s and MFU.

Counted are matrix products, a multiply-add as 2, the backward as twice the forward, recomputation not at all, over real
tokens only (padding is waste, not work):

    6 * (weights that multiply a token)                                     every projection and the output layer
  + 6 * s * heads * head_dim          a token of a sequence of s tokens     causal attention, half of the square
  + 3 * (4 C K H + HV * (2 C (K + 2 V) + 6 K V))                            the chunked delta rule

The last line, per token: k k^T and q k^T inside a chunk (2 C K each, per key head), the solved triangle times k and v
(2 C (K + V)), attention inside the chunk times the new values (2 C V), and three products with the state (2 K V each).

Dimensions: C chunk (64), K = V head width, H key heads, HV value heads, s tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from gdn_cp.training.config import ModelConfig

_CHUNK = 64

# Dense bf16 TFLOP/s with float32 accumulation, from the makers' data sheets; the first name that fits counts.
_PEAK_TFLOPS = (
    ("GB200", 2500.0),
    ("B200", 2250.0),
    ("H200", 989.4),
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("H100", 989.4),
    ("H800", 989.4),
    ("H20", 148.0),
    ("A100", 312.0),
    ("A800", 312.0),
    ("L40S", 362.0),
)


def attention_layers(model: ModelConfig) -> int:
    """How many of the layers are full attention."""
    return model.layers // model.attention_every


def matmul_weights(model: ModelConfig) -> int:
    """Weights that multiply every token: all projections and the output layer, neither embedding nor convolution."""
    gdn_values = model.gdn_value_heads * model.gdn_head_dim
    gdn_inputs = 2 * model.gdn_key_heads * model.gdn_head_dim + 2 * gdn_values + 2 * model.gdn_value_heads
    query = model.attention_heads * model.attention_head_dim
    attention_inputs = (
        query * (2 if model.attention_gate else 1) + 2 * model.attention_groups * model.attention_head_dim
    )
    n_attention = attention_layers(model)
    return model.hidden * (
        (model.layers - n_attention) * (gdn_inputs + gdn_values)
        + n_attention * (attention_inputs + query)
        + model.layers * 3 * model.ffn
        + model.vocab
    )


def training_flops(model: ModelConfig, seqlens: Iterable[int]) -> float:
    """Floating-point operations of forward and backward over sequences of these real lengths (see the module)."""
    lengths = list(seqlens)
    head_dim = model.gdn_head_dim
    delta_rule = 3 * (
        4 * _CHUNK * head_dim * model.gdn_key_heads
        + model.gdn_value_heads * (6 * _CHUNK * head_dim + 6 * head_dim * head_dim)
    )
    n_attention = attention_layers(model)
    per_token = 6 * matmul_weights(model) + (model.layers - n_attention) * delta_rule
    per_square = 6 * n_attention * model.attention_heads * model.attention_head_dim
    return float(per_token * sum(lengths) + per_square * sum(length * length for length in lengths))


def peak_tflops(device: torch.device) -> float | None:
    """Dense bf16 TFLOP/s of the device, or None where this module does not know it (then there is no MFU)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _PEAK_TFLOPS if part in name), None)
