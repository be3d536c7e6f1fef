"""The decay gate of Gated DeltaNet: the log of what a state keeps per token, -exp(A_log) * softplus(alpha + dt_bias).

Dimensions: HV value heads; `...` any leading dimensions, usually [B, T].
"""

import torch
from torch import Tensor

# softplus(x) = x to the last bit of a float64 from here on (e^-40 < 2^-53); torch's default, 20, is for float32.
_SOFTPLUS_IS_IDENTITY = 40.0


def fused_gdn_gate(g: Tensor, A_log: Tensor, dt_bias: Tensor | None = None) -> Tensor:
    """Log decay of each token and value head, -exp(A_log) * softplus(g + dt_bias), always <= 0.

    Args:
        g: [..., HV] raw gate (the alpha section of the input projection), any floating dtype.
        A_log: [HV] log of the decay rate.
        dt_bias: [HV] bias of the raw gate; None means 0.

    Returns:
        [..., HV] float32 (float64 when g is float64), in nats per token. Differentiable in all three arguments; the
        gradients of A_log and dt_bias are summed over tokens in that dtype before any cast.

    Raises:
        ValueError: on a wrong shape, dtype or device.

    Source: Gated Delta Networks (arXiv 2412.06464), with Mamba2's parametrisation of the gate.
    """
    check_gate_arguments(g, A_log, dt_bias)
    return gdn_gate_reference(g, A_log, dt_bias)


def gdn_gate_reference(g: Tensor, A_log: Tensor, dt_bias: Tensor | None = None) -> Tensor:
    """The formula of `fused_gdn_gate` in plain torch, without checks: every other implementation's oracle."""
    dtype = torch.float64 if g.dtype == torch.float64 else torch.float32
    raw = g.to(dtype)
    if dt_bias is not None:
        raw = raw + dt_bias.to(dtype)
    return -A_log.to(dtype).exp() * torch.nn.functional.softplus(raw, threshold=_SOFTPLUS_IS_IDENTITY)


def check_gate_arguments(g: Tensor, A_log: Tensor, dt_bias: Tensor | None) -> None:
    """Raise ValueError unless A_log and dt_bias are floating [HV] vectors on the device of g [..., HV]."""
    if not g.is_floating_point() or g.dim() < 1:
        raise ValueError(f"g must be a floating-point tensor [..., HV], got {g.dtype} {list(g.shape)}")
    for name, x in (("A_log", A_log), ("dt_bias", dt_bias)):
        if x is None:
            continue
        if tuple(x.shape) != (g.shape[-1],) or not x.is_floating_point():
            raise ValueError(
                f"{name} must be a floating-point vector of {g.shape[-1]} elements, one for each value head of g "
                f"{list(g.shape)}, got {x.dtype} {list(x.shape)}"
            )
        if x.device != g.device:
            raise ValueError(f"{name} is on {x.device} but g is on {g.device}: move {name} with .to({str(g.device)!r})")
