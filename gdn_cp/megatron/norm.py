"""RMSNorm for Megatron models without Transformer Engine: with sequence parallelism and zero-centred weights.

Megatron's fallback, torch's own norm, refuses both.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn


def gain_of(weight: Tensor, config: TransformerConfig) -> Tensor:
    """The factor that a norm multiplies by; where the weight is the gain minus one, the sum is not rounded to bf16."""
    if not config.layernorm_zero_centered_gamma:
        return weight
    return weight.to(torch.promote_types(weight.dtype, torch.float32)) + 1


class RMSNorm(nn.Module):
    """x * rsqrt(mean(x^2) + eps) * weight over the last dimension, computed in float32, returned in x's dtype.

    With `config.layernorm_zero_centered_gamma` the stored weight is the gain minus one. With sequence parallelism the
    weight is marked, so that Megatron's `finalize_model_grads` (or `gdn_cp.megatron.reduce_gradients`) sums its
    gradient over the tensor-parallel ranks.

    Raises:
        ValueError: for a config whose normalization is not "RMSNorm".
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        super().__init__()
        if config.normalization != "RMSNorm":
            raise ValueError(f"config.normalization={config.normalization!r}: only 'RMSNorm' is supported")
        self.eps = eps
        self.config = config
        device = torch.device("cpu") if config.use_cpu_initialization else torch.cuda.current_device()
        start = torch.zeros if config.layernorm_zero_centered_gamma else torch.ones
        weight: Any = nn.Parameter(start(hidden_size, dtype=config.params_dtype, device=device))
        weight.sequence_parallel = config.sequence_parallel
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [..., hidden_size]."""
        gain = gain_of(self.weight, self.config)
        if gain.dtype == x.dtype:  # torch's own computes half precision in float32 and keeps no copy of it
            return nn.functional.rms_norm(x, (x.shape[-1],), gain, self.eps)
        full = x.to(torch.promote_types(x.dtype, torch.float32))
        return nn.functional.rms_norm(full, (x.shape[-1],), gain.to(full.dtype), self.eps).to(x.dtype)
