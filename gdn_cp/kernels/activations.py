"""Sigmoid, silu and softplus whose value at an element does not depend on where it stands in the tensor.

Torch's own on a CPU evaluate the last few elements of a tensor with another exponential than the rest, so that a head's
last bits change with the number of heads beside it, and a head-parallel run would differ from a single-rank one. Here
they are put together from operations that give every element the same bits. On other devices torch's own already do.
"""

import torch
from torch import Tensor

# softplus(x) = x to the last bit of a float64 from here on (e^-40 < 2^-53); torch's default, 20, is for float32.
_SOFTPLUS_IS_IDENTITY = 40.0


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + e^-x) in x's dtype, differentiable once."""
    return _Sigmoid.apply(x) if x.device.type == "cpu" else torch.sigmoid(x)


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x) in x's dtype, without overflow, differentiable once."""
    if x.device.type == "cpu":
        return _Softplus.apply(x)
    return torch.nn.functional.softplus(x, threshold=_SOFTPLUS_IS_IDENTITY)


def silu_forward(x: Tensor) -> Tensor:
    """x * sigmoid(x); its gradient is `silu_backward`, for callers that have their own autograd function."""
    return x * _sigmoid(x) if x.device.type == "cpu" else torch.nn.functional.silu(x)


def silu_backward(d: Tensor, x: Tensor) -> Tensor:
    """d * (s + x * s * (1 - s)) with s = sigmoid(x): the gradient of x from that of silu(x)."""
    if x.device.type != "cpu":
        return torch.ops.aten.silu_backward(d, x)
    s = _sigmoid(x)
    return (1 - s).mul_(x).add_(1).mul_(s).mul_(d)


def _sigmoid(x: Tensor) -> Tensor:
    # e^-x overflows to infinity for very negative x, of which the reciprocal is the 0 that is wanted.
    return x.neg().exp_().add_(1).reciprocal_()


class _Sigmoid(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        y = _sigmoid(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grad_outputs):
        (y,) = ctx.saved_tensors
        return (1 - y).mul_(y).mul_(grad_outputs[0])


class _Softplus(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.abs().neg_().exp_().log1p_().add_(x.clamp(min=0))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grad_outputs):
        (x,) = ctx.saved_tensors
        return _sigmoid(x).mul_(grad_outputs[0])
