"""The decay gate of Gated DeltaNet: the log of what a state keeps per token, -exp(A_log) * softplus(alpha + dt_bias).

Dimensions: B batch, T tokens, HV value heads, N sequences; `...` any leading dimensions, usually [B, T].
"""

from itertools import pairwise

import torch
from torch import Tensor

from gdn_cp.kernels.activations import softplus
from gdn_cp.kernels.backends import wants_kernels
from gdn_cp.kernels.bounds import check_cu_seqlens, read_bounds

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


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
    if wants_kernels(g):
        from gdn_cp.kernels.gate_triton import gdn_gate_op

        return gdn_gate_op(g, A_log, dt_bias, None, False)
    return gdn_gate_reference(g, A_log, dt_bias)


def fused_gdn_gate_chunk_cumsum(
    g: Tensor, A_log: Tensor, dt_bias: Tensor | None = None, *, cu_seqlens: Tensor | None = None
) -> Tensor:
    """Gate and its inclusive running sum inside each chunk of 64 tokens, in one pass over memory.

    Chunks start at the start of each sequence. For example a sequence of 66 tokens whose gate is -1 everywhere gives
    -1, -2, ..., -64, -1, -2.

    Args:
        g: [B, T, HV] raw gate, any floating dtype.
        A_log, dt_bias: as for `fused_gdn_gate`.
        cu_seqlens: int32 or int64 [N + 1] on g's device, bounds of packed sequences, B must be 1; None: each row of the
            batch is a sequence.

    Returns:
        [B, T, HV] float32 (float64 when g is float64). Differentiable in g, A_log and dt_bias.

    Raises:
        ValueError: on a wrong shape, dtype or device.
    """
    check_gate_arguments(g, A_log, dt_bias)
    if g.dim() != 3 or (cu_seqlens is not None and g.shape[0] != 1):
        raise ValueError(f"g must be [B, T, HV], with B = 1 if cu_seqlens is given, got {list(g.shape)}")
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, g.shape[1], g.device, "g")
    if wants_kernels(g):
        from gdn_cp.kernels.gate_triton import gdn_gate_op

        return gdn_gate_op(g, A_log, dt_bias, cu_seqlens, True)
    gate = gdn_gate_reference(g, A_log, dt_bias)
    bounds = (0, g.shape[1]) if cu_seqlens is None else read_bounds(cu_seqlens, g.shape[1])
    lengths = [min(64, end - row) for start, end in pairwise(bounds) for row in range(start, end, 64)]
    return torch.cat([chunk.cumsum(1) for chunk in gate.split(lengths, dim=1)], dim=1) if lengths else gate


def gdn_gate_reference(g: Tensor, A_log: Tensor, dt_bias: Tensor | None = None) -> Tensor:
    """The formula of `fused_gdn_gate` in plain torch, without checks: every other implementation's oracle."""
    dtype = torch.float64 if g.dtype == torch.float64 else torch.float32
    raw = g.to(dtype)
    if dt_bias is not None:
        raw = raw + dt_bias.to(dtype)
    return -A_log.to(dtype).exp() * softplus(raw)


def check_gate_arguments(g: Tensor, A_log: Tensor, dt_bias: Tensor | None) -> None:
    """Raise ValueError unless A_log and dt_bias are floating [HV] vectors on the device of g [..., HV]; TypeError for
    what is no tensor."""
    for name, x in (("g", g), ("A_log", A_log), ("dt_bias", dt_bias)):
        if not isinstance(x, Tensor) and not (x is None and name == "dt_bias"):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if g.dtype not in _DTYPES or g.dim() < 1:
        raise ValueError(f"g must be a floating-point tensor [..., HV], got {g.dtype} {list(g.shape)}")
    for name, x in (("A_log", A_log), ("dt_bias", dt_bias)):
        if x is None:
            continue
        if tuple(x.shape) != (g.shape[-1],) or x.dtype not in _DTYPES:
            raise ValueError(
                f"{name} must be a floating-point vector of {g.shape[-1]} elements, one for each value head of g "
                f"{list(g.shape)}, got {x.dtype} {list(x.shape)}"
            )
        if x.device != g.device:
            raise ValueError(f"{name} is on {x.device} but g is on {g.device}: move {name} with .to({str(g.device)!r})")
