"""The mixer's output norm: RMS norm of each head's output, times a weight, times silu of the gate z.

The kernels of `norm_triton` on a GPU; elsewhere, in float64 or with GDN_CP_BACKEND=reference plain torch.

Dimensions: V value head dim; `...` any leading dimensions, usually tokens and value heads.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gdn_cp.kernels.activations import silu_backward, silu_forward
from gdn_cp.kernels.backends import wants_kernels


def gated_rms_norm(x: Tensor, z: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """x * rsqrt(mean(x^2) + eps) * weight * silu(z), mean over the last dimension.

    Computed in float32 (float64 for float64), with the roundings of Qwen3-Next's own norm, so that its checkpoints give
    the same numbers: the normalised x is rounded to x's dtype before the weight, the gate is applied in float32. Only
    the arguments are kept for the backward.

    Args:
        x: [..., V] any floating dtype.
        z: [..., V] gate before silu.
        weight: [V].
        eps: added to the mean square, positive.

    Returns:
        [..., V] in x's dtype. Differentiable once, in x, z and weight; the weight's gradient is summed in float32.

    Raises:
        ValueError: on a wrong shape, dtype or eps.

    Source: RMSNorm (arXiv 1910.07467), gated as in Gated Delta Networks (arXiv 2412.06464).
    """
    if not x.is_floating_point() or x.dim() < 1:
        raise ValueError(f"x must be a floating-point tensor [..., V], got {x.dtype} {list(x.shape)}")
    if z.shape != x.shape:
        raise ValueError(f"z must have x's shape {list(x.shape)}, got {list(z.shape)}")
    if tuple(weight.shape) != (x.shape[-1],):
        raise ValueError(f"weight must be [{x.shape[-1]}], the last dimension of x, got {list(weight.shape)}")
    for name, other in (("z", z), ("weight", weight)):
        if other.device != x.device:
            raise ValueError(f"{name} is on {other.device} but x is on {x.device}: move {name} to {x.device}")
    if not eps > 0:
        raise ValueError(f"eps must be positive, or a row of zeros divides by zero, got {eps}")
    if wants_kernels(x):
        from gdn_cp.kernels.norm_triton import gated_rms_norm_op, unsupported

        if unsupported(x, z, weight) is None:
            return gated_rms_norm_op(x, z, weight, eps)
    return gated_rms_norm_reference(x, z, weight, eps)


def gated_rms_norm_reference(x: Tensor, z: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`gated_rms_norm` in plain torch, without checks: the kernels' oracle."""
    return _GatedRmsNorm.apply(x, z, weight, eps)


def _normalise(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x and its inverse root mean square, normalised, in the dtype of the computation."""
    y = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    scale = torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return y * scale, scale


class _GatedRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, z, weight, eps):
        ctx.save_for_backward(x, z, weight)
        ctx.eps = eps
        normed, _ = _normalise(x, eps)
        return (weight * normed.to(x.dtype) * silu_forward(z.to(normed.dtype))).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_outputs):
        """With n = x * s and d = dy * weight * silu(z): dx = s * (d - n * mean(n * d))."""
        x, z, weight = ctx.saved_tensors
        normed, scale = _normalise(x, ctx.eps)
        dtype = normed.dtype
        dy, w, gate = grad_outputs[0].to(dtype), weight.to(dtype), z.to(dtype)
        dz = silu_backward(dy * normed * w, gate).to(z.dtype) if ctx.needs_input_grad[1] else None
        gated = dy * silu_forward(gate)
        dweight = (gated * normed).reshape(-1, x.shape[-1]).sum(0).to(weight.dtype) if ctx.needs_input_grad[2] else None
        d = gated * w
        dx = (scale * (d - normed * (normed * d).mean(-1, keepdim=True))).to(x.dtype)
        return dx, dz, dweight, None
