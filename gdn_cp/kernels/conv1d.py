"""Causal depthwise convolution over a packed batch, as the mixer applies it to q, k and v: no reach across sequences.

The kernels of `conv1d_triton` on a GPU; elsewhere, in float64 or with GDN_CP_BACKEND=reference a few shifted
multiply-adds in plain torch. Neither waits for the device, and the backward computes the convolution anew from x, so
that nothing but the input is kept.

Dimensions: T tokens (rows), D channels, W taps, N sequences.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gdn_cp.kernels.activations import silu_backward, silu_forward
from gdn_cp.kernels.backends import wants_kernels
from gdn_cp.kernels.bounds import check_cu_seqlens

_ACTIVATIONS = ("silu", "swish", None)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    activation: str | None = "silu",
) -> Tensor:
    """y_t = act(bias + sum_j weight[:, W-1-j] * x_{t-j}), j = 0..W-1, where x before the start of t's sequence is zero.

    Args:
        x: [T, D] packed rows, any floating dtype; sums are taken in float32 (float64 for float64).
        weight: [D, W], or [D, 1, W] as torch.nn.Conv1d stores it.
        bias: [D] or None.
        cu_seqlens: int32 or int64 [N + 1] on x's device, the row at which each sequence starts and, last, T; empty
            sequences are fine. None: one sequence. Its content is checked when it is on the CPU.
        activation: "silu" (or "swish", the same), or None.

    Returns:
        [T, D] in x's dtype. Differentiable once, in x, weight and bias; the gradients of weight and bias are summed
        over tokens in float32, in a fixed order, before the cast.

    Raises:
        ValueError: on a wrong shape, dtype, device or activation.
    """
    _check(x, weight, bias, cu_seqlens, activation)
    if wants_kernels(x):
        from gdn_cp.kernels.conv1d_triton import causal_conv1d_op, unsupported

        if unsupported(x, weight, bias) is None:
            return causal_conv1d_op(x, weight.flatten(1), bias, cu_seqlens, activation is not None)
    return causal_conv1d_reference(x, weight, bias, cu_seqlens, activation is not None)


def causal_conv1d_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor | None, silu: bool
) -> Tensor:
    """`causal_conv1d` in plain torch, without checks: the kernels' oracle."""
    position = None if cu_seqlens is None else _position_in_sequence(cu_seqlens, len(x))
    return _CausalConv1d.apply(x, weight.flatten(1), bias, position, silu)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor | None, activation: str | None) -> None:
    if x.dim() != 2 or not x.is_floating_point():
        raise ValueError(f"x must be floating-point rows [T, D], got {x.dtype} {list(x.shape)}")
    D = x.shape[1]
    if not (weight.dim() == 2 or (weight.dim() == 3 and weight.shape[1] == 1)) or weight.shape[0] != D:
        raise ValueError(f"weight must be [{D}, W] or [{D}, 1, W] as x has {D} channels, got {list(weight.shape)}")
    if weight.shape[-1] < 1:
        raise ValueError(f"weight must have at least one tap, got {list(weight.shape)}")
    if bias is not None and tuple(bias.shape) != (D,):
        raise ValueError(f"bias must be [{D}] as x has {D} channels, got {list(bias.shape)}")
    for name, other in (("weight", weight), ("bias", bias)):
        if other is not None and other.device != x.device:
            raise ValueError(f"{name} is on {other.device} but x is on {x.device}: move {name} to {x.device}")
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, len(x), x.device, "x")
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation must be 'silu', 'swish' or None, got {activation!r}")


def _position_in_sequence(cu_seqlens: Tensor, T: int) -> Tensor:
    """int64 [T, 1]: rows since the start of each row's sequence. For cu_seqlens (0, 2, 2, 5): 0 1 0 1 2."""
    rows = torch.arange(T, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens.long(), rows, right=True) - 1
    return (rows - cu_seqlens.long()[sequence])[:, None]


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, position: Tensor | None) -> Tensor:
    """The convolution before its activation, in the dtype of `weight` and `bias`, which is that of the sums."""
    taps = weight.unbind(1)
    y = x * taps[-1] if bias is None else torch.addcmul(bias, x, taps[-1])
    for j in range(1, len(taps)):
        past = x[:-j]
        if position is not None:
            # Filled, not multiplied by zero: the row may hold a NaN of another sequence.
            past = past.masked_fill(position[j:] < j, 0)
        y[j:].addcmul_(past, taps[-1 - j])
    return y


class _CausalConv1d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, position, silu):
        ctx.save_for_backward(x, weight, bias, position)
        ctx.silu = silu
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        y = _convolve(x, weight.to(dtype), None if bias is None else bias.to(dtype), position)
        return (silu_forward(y) if silu else y).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_outputs):
        x, weight, bias, position = ctx.saved_tensors
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        taps = weight.to(dtype).unbind(1)
        d = grad_outputs[0].to(dtype)
        if ctx.silu:
            y = _convolve(x, weight.to(dtype), None if bias is None else bias.to(dtype), position)
            d = silu_backward(d, y)
        dx = d * taps[-1] if ctx.needs_input_grad[0] else None
        dtaps = [(d * x).sum(0)] if ctx.needs_input_grad[1] else []
        for j in range(1, len(taps)):
            d_j = d[j:] if position is None else d[j:].masked_fill(position[j:] < j, 0)
            if dx is not None:
                dx[:-j].addcmul_(d_j, taps[-1 - j])
            if ctx.needs_input_grad[1]:
                dtaps.append((d_j * x[:-j]).sum(0))
        dweight = torch.stack(dtaps[::-1], 1).to(weight.dtype) if dtaps else None
        dbias = None if bias is None or not ctx.needs_input_grad[2] else d.sum(0).to(bias.dtype)
        return None if dx is None else dx.to(x.dtype), dweight, dbias, None, None
