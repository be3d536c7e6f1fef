"""The gated RMS norm in Triton, forward and backward: each element is read and written once each way.

A program takes tiles of whole heads, so that a head's mean is a reduction inside a warp. The backward computes the norm
anew from x. The weight's gradient is a float32 sum over all heads of all tokens: each program keeps a tile of sums over
its own tiles, and `sum_partials` adds the programs' sums in a fixed order. No atomics, so a repetition gives the same
bits; and no other element depends on the cut, so that a head has the bits that it has alone.

Heads may stand in blocks, as an exchange buffer holds them: block p has heads p*HB, ... of all tokens. Padded tokens
are read as zeros and written as zeros, so that whatever stands there goes nowhere.

Dimensions: R rows = tokens * heads, H heads of a token, HB heads of a block, V width of a head, BV the power of two
above it, BR rows of a tile.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportReturnType=false, reportGeneralTypeIssues=false
# triton.jit hides the options of a launch from a type checker, and triton.cdiv may return a constexpr
from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn_cp.kernels.activations_triton import sigmoid
from gdn_cp.kernels.configs import cdiv, launches, multiprocessors, power_of_2
from gdn_cp.kernels.sums_triton import LaterSums, sum_partials
from gdn_cp.launch import run_kernel

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
def _heads(base, token, head, block_stride, token_stride, head_stride, o_v, HB: tl.constexpr):
    """Addresses [BR, BV] of whole heads in blocks of HB, in 64 bits. Loads and stores of heads pass here."""
    place = (head // HB) * block_stride + token.to(tl.int64) * token_stride + (head % HB) * head_stride
    return base + place[:, None] + o_v[None, :]


@triton.jit
def _tile_of(padding, rows, num_rows, o_v, H: tl.constexpr, V: tl.constexpr, HAS_PADDING: tl.constexpr):
    """(token, head, mask of stores, mask of loads) of rows of heads."""
    token, head = rows // H, (rows % H).to(tl.int64)
    mask = (rows[:, None] < num_rows) & (o_v[None, :] < V)
    real = mask
    if HAS_PADDING:
        real = mask & (tl.load(padding + token, mask=rows < num_rows, other=1) == 0)[:, None]
    return token, head, mask, real


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
    x, z, weight, y, kept, padding, num_rows, eps, x_block, x_token, x_head, z_token, z_head,
    H: tl.constexpr, HB: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, BR: tl.constexpr,
    ROUND_PRODUCT: tl.constexpr, KEEP: tl.constexpr, HAS_PADDING: tl.constexpr,
):  # fmt: skip
    """One program: one tile of BR rows; row r is head r % H of token r // H. y is [R, V], as is kept, what was read of
    x (KEEP)."""
    rows, o_v = tl.program_id(0) * BR + tl.arange(0, BR), tl.arange(0, BV)
    token, head, mask, real = _tile_of(padding, rows, num_rows, o_v, H, V, HAS_PADDING)
    loaded = tl.load(_heads(x, token, head, x_block, x_token, x_head, o_v, HB), mask=real, other=0.0)
    gate = tl.load(_heads(z, token, head, 0, z_token, z_head, o_v, H), mask=real, other=0.0).to(tl.float32)
    w = tl.load(weight + o_v, mask=o_v < V, other=0.0).to(tl.float32)
    normed, _ = _normalised(loaded.to(tl.float32), V, eps)
    out = _gate_weighted(normed, w, x.dtype.element_ty, ROUND_PRODUCT) * (gate * sigmoid(gate))
    tl.store(_heads(y, rows, head, 0, V, 0, o_v, H), out.to(y.dtype.element_ty), mask=mask)
    if KEEP:
        tl.store(_heads(kept, rows, head, 0, V, 0, o_v, H), loaded, mask=mask)


@triton.jit(do_not_specialize=["num_rows", "tiles_per_program"])
def norm_backward_kernel(
    dy, x, z, weight, dx, dz, partial, padding, num_rows, tiles_per_program, eps,
    x_block, x_token, x_head, z_token, z_head, dy_token, dy_head, dx_block, dx_token, dz_token,
    H: tl.constexpr, HB: tl.constexpr, DX_HB: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, BR: tl.constexpr,
    HAS_PADDING: tl.constexpr,
):  # fmt: skip
    """One program: `tiles_per_program` consecutive tiles of BR rows. Heads of dx (in blocks of DX_HB) and of dz are V
    apart; partial is [P, V] float32.

    With n = x * s, c = dy * silu(z) and d = c * weight:
        dx = s * (d - n * mean(n * d))      dz = dy * n * weight * silu'(z)      dweight = sum c * n
    """
    o_r, o_v = tl.arange(0, BR), tl.arange(0, BV)
    w = tl.load(weight + o_v, mask=o_v < V, other=0.0).to(tl.float32)[None, :]
    sums = tl.zeros([BR, BV], tl.float32)
    i_p = tl.program_id(0)
    for i in range(i_p * tiles_per_program, tl.minimum((i_p + 1) * tiles_per_program, tl.cdiv(num_rows, BR))):
        token, head, mask, real = _tile_of(padding, i * BR + o_r, num_rows, o_v, H, V, HAS_PADDING)
        values = tl.load(_heads(x, token, head, x_block, x_token, x_head, o_v, HB), mask=real, other=0.0)
        gate = tl.load(_heads(z, token, head, 0, z_token, z_head, o_v, H), mask=real, other=0.0).to(tl.float32)
        d = tl.load(_heads(dy, token, head, 0, dy_token, dy_head, o_v, H), mask=real, other=0.0).to(tl.float32)
        normed, scale = _normalised(values.to(tl.float32), V, eps)
        s = sigmoid(gate)
        gated = d * (gate * s)
        sums += gated * normed
        d_gate = d * normed * w * (s * (1.0 + gate * (1.0 - s)))
        tl.store(_heads(dz, token, head, 0, dz_token, V, o_v, H), d_gate.to(dz.dtype.element_ty), mask=mask)
        d_normed = gated * w
        mean = tl.sum(normed * d_normed, axis=1) * (1.0 / V)
        d_values = scale * (d_normed - normed * mean[:, None])
        place = _heads(dx, token, head, dx_block, dx_token, V, o_v, DX_HB)
        tl.store(place, d_values.to(dx.dtype.element_ty), mask=mask)
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


@lru_cache(maxsize=64)
def _sizes(H: int, V: int, tile: int) -> dict[str, int]:
    """Compile-time sizes for H heads of width V."""
    BV = power_of_2(V)
    return {"H": H, "V": V, "BV": BV, "BR": tile // BV}


def _bytes(padding: Tensor | None) -> Tensor | None:
    return None if padding is None else padding.view(torch.uint8)


@launches
def gate_heads(
    x: Tensor, z: Tensor, weight: Tensor, eps: float, *, padding: Tensor | None = None, keep: bool = False
) -> tuple[Tensor, Tensor | None]:
    """The gated norm of heads in blocks.

    Args:
        x: [blocks, tokens, HB, V], last stride 1.
        z: [tokens, H, V], last stride 1.
        weight: [V], eps: as of `norm.gated_rms_norm`.
        padding: bool [tokens], True where x and z are not to be read and the result is zero; or None.
        keep: also copy what was read of x.

    Returns y [tokens, H*V] in x's dtype, and x in this form or None.
    """
    tokens, H, V = z.shape
    y = torch.empty(tokens, H * V, dtype=x.dtype, device=x.device)
    kept = torch.empty_like(y) if keep else None
    if y.numel():
        sizes, num_rows = _sizes(H, V, FORWARD_TILE), tokens * H
        run_kernel(norm_forward_kernel, cdiv(num_rows, sizes["BR"]),
            x, z, weight.contiguous(), y, kept, _bytes(padding), num_rows, eps, *x.stride()[:3], *z.stride()[:2],
            **sizes, HB=x.shape[2], ROUND_PRODUCT=weight.dtype == x.dtype, KEEP=keep, HAS_PADDING=padding is not None,
            num_warps=NUM_WARPS,
        )  # fmt: skip
    return y, kept


@launches
def gate_heads_backward(
    dy: Tensor, x: Tensor, z: Tensor, weight: Tensor, eps: float, dx: Tensor, dz: Tensor,
    *, padding: Tensor | None = None, later: LaterSums | None = None,
) -> Tensor:  # fmt: skip
    """Write the gradients of x and z, zeros for padded tokens, and return that of weight.

    Args:
        dy: [tokens, H, V], last stride 1, as `gate_heads` gave y.
        x, z, weight, eps, padding: as there.
        dx: [blocks, tokens, HB, V], heads V apart, any number of blocks. dz: [tokens, H, V], heads V apart.
        later: whose launch fills the gradient of weight; None: at once.
    """
    tokens, H, V = z.shape
    assert dx.stride(2) == dz.stride(1) == V or H == 1
    if not dy.numel():
        return torch.zeros_like(weight, memory_format=torch.contiguous_format)
    sizes, num_rows = _sizes(H, V, BACKWARD_TILE), tokens * H
    tiles = cdiv(num_rows, sizes["BR"])
    per_program = cdiv(tiles, PROGRAMS_PER_SM * multiprocessors(x.device))
    programs = cdiv(tiles, per_program)
    partial = torch.empty(programs, V, dtype=torch.float32, device=x.device)
    run_kernel(norm_backward_kernel, programs,
        dy, x, z, weight.contiguous(), dx, dz, partial, _bytes(padding), num_rows, per_program, eps, *x.stride()[:3],
        *z.stride()[:2], *dy.stride()[:2], *dx.stride()[:2], dz.stride(0),
        **sizes, HB=x.shape[2], DX_HB=dx.shape[2], HAS_PADDING=padding is not None, num_warps=NUM_WARPS,
    )  # fmt: skip
    return sum_partials(partial, weight.dtype, later=later)


def norm_forward(x: Tensor, z: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y [..., V], contiguous, in x's dtype; see `norm.gated_rms_norm`."""
    y, _ = gate_heads(_by_heads(x).unsqueeze(0), _by_heads(z), weight, eps)
    return y.view(x.shape)


def norm_backward(dy: Tensor, x: Tensor, z: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dz, dweight), each in the dtype of what it is the gradient of; dx and dz are contiguous."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dz = torch.empty(x.shape, dtype=z.dtype, device=x.device)
    xh, zh, dyh, dxh, dzh = (_by_heads(tensor) for tensor in (x, z, dy, dx, dz))
    dweight = gate_heads_backward(dyh, xh.unsqueeze(0), zh, weight, eps, dxh.unsqueeze(0), dzh)
    return dx, dz, dweight


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
    """32 heads 128 wide in bfloat16, z a section of a projection; float32; heads 96 wide; heads in 4 blocks, with a
    copy of them and padding."""
    return [
        *_cases("bf16", "*bf16", 128, 32, main=True),
        *_cases("fp32", "*fp32", 128, 32, main=True),
        *_cases("bf16/V96", "*bf16", 96, 32, main=False),
        *_cases("blocks", "*bf16", 128, 8, main=True),
    ]


def _cases(name: str, x: str, V: int, HB: int, *, main: bool) -> list[CompileCase]:
    """Forward and backward of 32 heads in blocks of HB."""
    from gdn_cp.kernels.compile_report import CompileCase

    in_blocks = HB < 32
    types = {"partial": "*fp32", "padding": "*u8", "num_rows": "i32", "tiles_per_program": "i32", "eps": "fp32"}
    constants = {"HB": HB, "DX_HB": HB, "ROUND_PRODUCT": True, "KEEP": in_blocks, "HAS_PADDING": in_blocks}
    if not in_blocks:
        constants |= {"kept": None, "padding": None}
    cases = []
    for kind, kernel, tile in (
        ("forward", norm_forward_kernel, FORWARD_TILE),
        ("backward", norm_backward_kernel, BACKWARD_TILE),
    ):
        given = {n: value for n, value in (constants | _sizes(32, V, tile)).items() if n in kernel.arg_names}
        strides = tuple(n for n in kernel.arg_names if n.endswith(("_block", "_token", "_head")))
        known = types | dict.fromkeys(strides, "i32")
        signature = {n: known.get(n, x) for n in kernel.arg_names if n not in given}
        cases.append(
            CompileCase(
                f"norm.{kind}/{name}", kernel, signature, given, num_warps=NUM_WARPS, divisible=strides, main=main
            )
        )
    return cases
