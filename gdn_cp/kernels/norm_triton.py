"""The gated RMS norm in Triton, forward and backward: each element is read and written once each way.

A program takes tiles of whole heads, so that a head's mean is a reduction inside a warp. The backward computes the norm
anew from x. The weight's gradient is a float32 sum over all heads of all tokens: each program keeps a tile of sums over
its own tiles, and `sum_partials` adds the programs' sums in a fixed order. No atomics, so a repetition gives the same
bits; and no other element depends on the cut, so that a head has the bits that it has alone.

Dimensions: R rows = tokens * heads, H heads of a token, V width of a head, BV the power of two above it, BR rows of a
tile.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportReturnType=false, reportGeneralTypeIssues=false
# triton.jit hides the options of a launch from a type checker, and triton.cdiv may return a constexpr
from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn_cp.kernels.activations_triton import sigmoid
from gdn_cp.kernels.configs import launches, multiprocessors
from gdn_cp.kernels.gate_triton import sum_partials

if TYPE_CHECKING:
    from gdn_cp.kernels.compile_report import CompileCase

# Elements of a tile: with 128 threads, 4 and 2 loads of 16 bytes of bfloat16 from each tensor in flight.
FORWARD_TILE = 4096
BACKWARD_TILE = 2048
NUM_WARPS = 4
MIN_WIDTH, MAX_WIDTH = 16, 256
# Programs of the backward for each multiprocessor, as many as fit on it together; each has one row of partial sums.
PROGRAMS_PER_SM = 5


@triton.jit
def _heads(base, token, head, token_stride, head_stride, o_v):
    """Addresses [BR, BV] of whole heads, in 64 bits. Loads and stores of heads pass here: a map of tokens into an
    exchange buffer belongs in this function."""
    return base + (token.to(tl.int64) * token_stride + head * head_stride)[:, None] + o_v[None, :]


@triton.jit
def _normalised(x, V: tl.constexpr, eps):
    """(x * s, s [BR, 1]) with s the inverse root of the mean square; x is float32, zero beyond V."""
    scale = tl.rsqrt(tl.sum(x * x, axis=1) * (1.0 / V) + eps)[:, None]
    return x * scale, scale


@triton.jit
def _gate_weighted(normed, weight, x_type: tl.constexpr, ROUND_PRODUCT: tl.constexpr):
    """weight * normed with the roundings of Qwen3-Next: normed in x's dtype, and the product too if weight has it."""
    product = weight[None, :] * normed.to(x_type).to(tl.float32)
    if ROUND_PRODUCT:
        product = product.to(x_type).to(tl.float32)
    return product


@triton.jit(do_not_specialize=["num_rows"])
def norm_forward_kernel(
    x, z, weight, y, num_rows, eps, x_token, x_head, z_token, z_head,
    H: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, BR: tl.constexpr, ROUND_PRODUCT: tl.constexpr,
):  # fmt: skip
    """One program: one tile of BR rows; row r is head r % H of token r // H. y is [R, V]."""
    rows, o_v = tl.program_id(0) * BR + tl.arange(0, BR), tl.arange(0, BV)
    token, head = rows // H, (rows % H).to(tl.int64)
    mask = (rows[:, None] < num_rows) & (o_v[None, :] < V)
    values = tl.load(_heads(x, token, head, x_token, x_head, o_v), mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(_heads(z, token, head, z_token, z_head, o_v), mask=mask, other=0.0).to(tl.float32)
    w = tl.load(weight + o_v, mask=o_v < V, other=0.0).to(tl.float32)
    normed, _ = _normalised(values, V, eps)
    out = _gate_weighted(normed, w, x.dtype.element_ty, ROUND_PRODUCT) * (gate * sigmoid(gate))
    tl.store(_heads(y, rows, 0, V, 0, o_v), out.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows", "tiles_per_program"])
def norm_backward_kernel(
    dy, x, z, weight, dx, dz, partial, num_rows, tiles_per_program, eps,
    x_token, x_head, z_token, z_head, dy_token, dy_head,
    H: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """One program: `tiles_per_program` consecutive tiles of BR rows. dx and dz are [R, V], partial [P, V] float32.

    With n = x * s, c = dy * silu(z) and d = c * weight:
        dx = s * (d - n * mean(n * d))      dz = dy * n * weight * silu'(z)      dweight = sum c * n
    """
    o_r, o_v = tl.arange(0, BR), tl.arange(0, BV)
    w = tl.load(weight + o_v, mask=o_v < V, other=0.0).to(tl.float32)[None, :]
    sums = tl.zeros([BR, BV], tl.float32)
    i_p = tl.program_id(0)
    for i in range(i_p * tiles_per_program, tl.minimum((i_p + 1) * tiles_per_program, tl.cdiv(num_rows, BR))):
        rows = i * BR + o_r
        token, head = rows // H, (rows % H).to(tl.int64)
        mask = (rows[:, None] < num_rows) & (o_v[None, :] < V)
        values = tl.load(_heads(x, token, head, x_token, x_head, o_v), mask=mask, other=0.0).to(tl.float32)
        gate = tl.load(_heads(z, token, head, z_token, z_head, o_v), mask=mask, other=0.0).to(tl.float32)
        d = tl.load(_heads(dy, token, head, dy_token, dy_head, o_v), mask=mask, other=0.0).to(tl.float32)
        normed, scale = _normalised(values, V, eps)
        s = sigmoid(gate)
        gated = d * (gate * s)
        sums += gated * normed
        d_gate = d * normed * w * (s * (1.0 + gate * (1.0 - s)))
        tl.store(_heads(dz, rows, 0, V, 0, o_v), d_gate.to(dz.dtype.element_ty), mask=mask)
        d_normed = gated * w
        mean = tl.sum(normed * d_normed, axis=1) * (1.0 / V)
        d_values = scale * (d_normed - normed * mean[:, None])
        tl.store(_heads(dx, rows, 0, V, 0, o_v), d_values.to(dx.dtype.element_ty), mask=mask)
    tl.store(partial + i_p.to(tl.int64) * V + o_v, tl.sum(sums, axis=0), mask=o_v < V)


def unsupported(x: Tensor, z: Tensor, weight: Tensor) -> str | None:
    """Why these kernels cannot serve a call whose shapes fit each other; None when they can."""
    if not MIN_WIDTH <= x.shape[-1] <= MAX_WIDTH:
        return f"heads {x.shape[-1]} wide, not {MIN_WIDTH} to {MAX_WIDTH}"
    for name, tensor in (("x", x), ("z", z), ("weight", weight)):
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"{name} is {tensor.dtype}"
    return None


def _by_heads(x: Tensor) -> Tensor:
    """x [..., V] as [tokens, H, V] with adjacent channels, copied only where its strides force it."""
    heads = x.unsqueeze(0) if x.dim() == 1 else x
    heads = heads.reshape(-1, 1 if x.dim() < 3 else x.shape[-2], x.shape[-1])
    return heads if heads.stride(2) == 1 else heads.contiguous()


def _sizes(H: int, V: int, tile: int) -> dict[str, int]:
    """Compile-time sizes for tensors [tokens, H, V]."""
    BV = triton.next_power_of_2(V)
    return {"H": H, "V": V, "BV": BV, "BR": tile // BV}


@launches
def norm_forward(x: Tensor, z: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y [..., V], contiguous, in x's dtype; see `norm.gated_rms_norm`."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel():
        xh, zh = _by_heads(x), _by_heads(z)
        sizes, num_rows = _sizes(*xh.shape[1:], FORWARD_TILE), y.numel() // y.shape[-1]
        norm_forward_kernel[(triton.cdiv(num_rows, sizes["BR"]),)](
            xh, zh, weight.contiguous(), y, num_rows, eps, *xh.stride()[:2], *zh.stride()[:2],
            **sizes, ROUND_PRODUCT=weight.dtype == x.dtype, num_warps=NUM_WARPS,
        )  # fmt: skip
    return y


@launches
def norm_backward(dy: Tensor, x: Tensor, z: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dz, dweight), each in the dtype of what it is the gradient of; dx and dz are contiguous."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dz = torch.empty(x.shape, dtype=z.dtype, device=x.device)
    if not dx.numel():
        return dx, dz, torch.zeros_like(weight, memory_format=torch.contiguous_format)
    xh, zh, dyh = _by_heads(x), _by_heads(z), _by_heads(dy)
    sizes, num_rows = _sizes(*xh.shape[1:], BACKWARD_TILE), dx.numel() // dx.shape[-1]
    tiles = triton.cdiv(num_rows, sizes["BR"])
    per_program = triton.cdiv(tiles, PROGRAMS_PER_SM * multiprocessors(x.device))
    programs = triton.cdiv(tiles, per_program)
    partial = torch.empty(programs, sizes["V"], dtype=torch.float32, device=x.device)
    norm_backward_kernel[(programs,)](
        dyh, xh, zh, weight.contiguous(), dx, dz, partial, num_rows, per_program, eps,
        *xh.stride()[:2], *zh.stride()[:2], *dyh.stride()[:2],
        **sizes, num_warps=NUM_WARPS,
    )  # fmt: skip
    return dx, dz, sum_partials(partial).to(weight.dtype)


@torch.library.custom_op("gdn_cp::gated_rms_norm", mutates_args=())
def gated_rms_norm_op(x: Tensor, z: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`norm_forward` as a torch operator, so that torch.compile and activation checkpointing see one node."""
    return norm_forward(x, z, weight, eps)


@torch.library.custom_op("gdn_cp::gated_rms_norm_backward", mutates_args=())
def gated_rms_norm_backward_op(
    dy: Tensor, x: Tensor, z: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`norm_backward` as a torch operator."""
    return norm_backward(dy, x, z, weight, eps)


@gated_rms_norm_op.register_fake
def _(x: Tensor, z: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


@gated_rms_norm_backward_op.register_fake
def _(dy: Tensor, x: Tensor, z: Tensor, weight: Tensor, eps: float):
    return x.new_empty(x.shape), z.new_empty(x.shape), weight.new_empty(weight.shape)


def _setup_context(ctx, inputs, output) -> None:
    x, z, weight, eps = inputs
    ctx.save_for_backward(x, z, weight)
    ctx.eps = eps


def _backward(ctx, dy: Tensor):
    return *gated_rms_norm_backward_op(dy, *ctx.saved_tensors, ctx.eps), None


gated_rms_norm_op.register_autograd(_backward, setup_context=_setup_context)


def compile_cases() -> list[CompileCase]:
    """32 heads 128 wide in bfloat16, z a section of a projection; float32; heads 96 wide."""
    from gdn_cp.kernels.compile_report import CompileCase

    strides = ("x_token", "x_head", "z_token", "z_head", "dy_token", "dy_head")
    cases = []
    kinds = (("bf16", "*bf16", 128, True), ("fp32", "*fp32", 128, True), ("bf16/V96", "*bf16", 96, False))
    for name, x, V, main in kinds:
        shared = {"x": x, "z": x, "weight": x, "num_rows": "i32", "eps": "fp32"} | dict.fromkeys(strides[:4], "i32")
        backward = {"dy": x, "dx": x, "dz": x, "partial": "*fp32", "tiles_per_program": "i32"}
        cases += [
            CompileCase(
                f"norm.forward/{name}", norm_forward_kernel, {**shared, "y": x},
                {**_sizes(32, V, FORWARD_TILE), "ROUND_PRODUCT": True},
                num_warps=NUM_WARPS, divisible=strides[:4], main=main,
            ),
            CompileCase(
                f"norm.backward/{name}", norm_backward_kernel, {**shared, **backward, **dict.fromkeys(strides, "i32")},
                _sizes(32, V, BACKWARD_TILE), num_warps=NUM_WARPS, divisible=strides, main=main,
            ),
        ]  # fmt: skip
    return cases
