"""The decay gate in Triton: g = -exp(A_log) * softplus(alpha + dt_bias), if wanted summed up inside each chunk, and its
gradient.

Forward and backward read and write each element once. The gradients of A_log and dt_bias are float32 sums over all
rows: each program sums its own chunks, a second kernel adds the programs' sums in a fixed order. No atomics, so a
repetition gives the same bits.

Dimensions: R rows (tokens of all sequences), HV value heads, C rows of a chunk (64), NT chunks.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportReturnType=false, reportGeneralTypeIssues=false
# triton.jit hides the options of a launch from a type checker, and triton.cdiv may return a constexpr
from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn_cp.kernels.configs import cdiv, launches, power_of_2
from gdn_cp.kernels.sums_triton import sum_partials
from gdn_cp.kernels.tables import CHUNK, chunk_tables, dense
from gdn_cp.launch import run_kernel

if TYPE_CHECKING:
    from gdn_cp.kernels.compile_report import CompileCase

BLOCK_HEADS = 32  # heads of one program: with 64 rows of bfloat16, tiles of 4 KiB
MAX_PARTIALS = 1024  # programs of the backward in the row direction, each with one partial sum per head


@triton.jit
def log1p_exp_neg(x):
    """log(1 + exp(-|x|)) to a few units in the last place of float32, however large |x| is.

    With e = exp(-|x|) and w = fl(1 + e), the rounding error of w cancels in log(w) * e / (w - 1): Kahan's log1p.
    """
    e = tl.exp(-tl.abs(x))
    w = 1.0 + e
    return tl.where(w == 1.0, e, tl.log(w) * (e / tl.where(w == 1.0, 1.0, w - 1.0)))


@triton.jit
def softplus(x):
    """log(1 + exp(x)) without overflow: max(x, 0) + log(1 + exp(-|x|))."""
    return tl.maximum(x, 0.0) + log1p_exp_neg(x)


@triton.jit
def gate_of(x, a_log):
    """-exp(a_log) * softplus(x) for float32 x = alpha + dt_bias."""
    return -tl.exp(a_log) * softplus(x)


@triton.jit
def _rows_of(chunks, i_t, num_rows, C: tl.constexpr, IS_TABLE: tl.constexpr):
    """First row and number of valid rows of chunk i_t; without a table chunks are consecutive runs of C rows."""
    if IS_TABLE:
        sequence = tl.load(chunks + i_t * 4)
        first = tl.load(chunks + i_t * 4 + 1).to(tl.int64)
        count = tl.where(sequence < 0, 0, tl.load(chunks + i_t * 4 + 2))
        first = tl.where(sequence < 0, 0, first)
    else:
        first = (tl.zeros((), tl.int64) + i_t) * C
        count = tl.minimum(num_rows - first, C).to(tl.int32)
    return first, count


@triton.jit(do_not_specialize=["num_rows"])
def gate_forward_kernel(
    g, A_log, dt_bias, out, chunks, num_rows, g_row, g_head,
    HV: tl.constexpr, BH: tl.constexpr, C: tl.constexpr,
    HAS_DT_BIAS: tl.constexpr, CUMSUM: tl.constexpr, IS_TABLE: tl.constexpr,
):  # fmt: skip
    """One program: one chunk of rows and BH heads. CUMSUM: out is the inclusive sum over the chunk's rows so far."""
    n_h: tl.constexpr = (HV + BH - 1) // BH
    i_t, i_h = tl.program_id(0) // n_h, tl.program_id(0) % n_h
    first, count = _rows_of(chunks, i_t, num_rows, C, IS_TABLE)
    o_t, o_h = tl.arange(0, C), i_h * BH + tl.arange(0, BH)
    mask = (o_t[:, None] < count) & (o_h[None, :] < HV)
    rows = first + o_t.to(tl.int64)
    x = tl.load(g + rows[:, None] * g_row + o_h[None, :] * g_head, mask=mask, other=0.0).to(tl.float32)
    if HAS_DT_BIAS:
        x += tl.load(dt_bias + o_h, mask=o_h < HV, other=0.0).to(tl.float32)[None, :]
    y = gate_of(x, tl.load(A_log + o_h, mask=o_h < HV, other=0.0).to(tl.float32)[None, :])
    if CUMSUM:
        y = tl.cumsum(y, axis=0)
    tl.store(out + rows[:, None] * HV + o_h[None, :], y, mask=mask)


@triton.jit(do_not_specialize=["num_rows", "num_chunks"])
def gate_backward_kernel(
    dout, g, A_log, dt_bias, dg, partial, chunks, num_rows, num_chunks, g_row, g_head, chunks_per_program,
    HV: tl.constexpr, BH: tl.constexpr, C: tl.constexpr,
    HAS_DT_BIAS: tl.constexpr, CUMSUM: tl.constexpr, IS_TABLE: tl.constexpr,
):  # fmt: skip
    """One program: `chunks_per_program` consecutive chunks and BH heads. partial is [programs, 2, HV] float32.

    With y = -a * softplus(x), a = exp(A_log), dy the gradient of y (the reversed sum of dout under CUMSUM):
        dx = -a * sigmoid(x) * dy      dA_log = sum dy * y      ddt_bias = sum dx
    """
    n_h: tl.constexpr = (HV + BH - 1) // BH
    i_p, i_h = tl.program_id(0) // n_h, tl.program_id(0) % n_h
    o_t, o_h = tl.arange(0, C), i_h * BH + tl.arange(0, BH)
    m_h = o_h < HV
    a = tl.exp(tl.load(A_log + o_h, mask=m_h, other=0.0).to(tl.float32))
    bias = tl.zeros([BH], tl.float32)
    if HAS_DT_BIAS:
        bias += tl.load(dt_bias + o_h, mask=m_h, other=0.0).to(tl.float32)
    sum_a = tl.zeros([BH], tl.float32)
    sum_x = tl.zeros([BH], tl.float32)
    for i_t in range(i_p * chunks_per_program, tl.minimum((i_p + 1) * chunks_per_program, num_chunks)):
        first, count = _rows_of(chunks, i_t, num_rows, C, IS_TABLE)
        mask = (o_t[:, None] < count) & m_h[None, :]
        rows = first + o_t.to(tl.int64)
        x = tl.load(g + rows[:, None] * g_row + o_h[None, :] * g_head, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dout + rows[:, None] * HV + o_h[None, :], mask=mask, other=0.0)
        if CUMSUM:
            dy = tl.cumsum(dy, axis=0, reverse=True)
        x += bias[None, :]
        dx = -a[None, :] * tl.sigmoid(x) * dy
        tl.store(dg + rows[:, None] * HV + o_h[None, :], dx.to(dg.dtype.element_ty), mask=mask)
        # Rows past the end have dy = 0 only without CUMSUM's running sum, so they are masked once more.
        sum_a += tl.sum(tl.where(mask, -a[None, :] * softplus(x) * dy, 0.0), axis=0)
        sum_x += tl.sum(tl.where(mask, dx, 0.0), axis=0)
    tl.store(partial + (i_p * 2) * HV + o_h, sum_a, mask=m_h)
    tl.store(partial + (i_p * 2 + 1) * HV + o_h, sum_x, mask=m_h)


def _grid(g: Tensor, cu_seqlens: Tensor | None, cumsum: bool) -> tuple[Tensor | None, int, int]:
    """(chunk table or None, number of chunks, number of head blocks); g is [B, T, HV] with cumsum, else [..., HV]."""
    heads = cdiv(g.shape[-1], _block_heads(g.shape[-1]))
    if not cumsum:
        return None, cdiv(g.numel() // g.shape[-1], CHUNK), heads
    B, T = g.shape[:2]
    tables = chunk_tables(B, T, cu_seqlens, g.device)
    return tables.chunks, tables.num_chunks, heads


@launches
def gate_forward(g: Tensor, A_log: Tensor, dt_bias: Tensor | None, cu_seqlens: Tensor | None, cumsum: bool) -> Tensor:
    """Gate of g [..., HV] in float32; with `cumsum` g is [B, T, HV] and sums restart at every chunk of a sequence."""
    HV = g.shape[-1]
    out = torch.empty(g.shape, dtype=torch.float32, device=g.device)
    chunks, n_t, n_h = _grid(g, cu_seqlens, cumsum)
    if out.numel():
        flat = _flat_rows(g)
        run_kernel(gate_forward_kernel, n_t * n_h,
            flat, dense(A_log), dense(dt_bias), out, chunks, flat.shape[0], flat.stride(0), flat.stride(1),
            HV=HV, BH=_block_heads(HV), C=CHUNK, HAS_DT_BIAS=dt_bias is not None, CUMSUM=cumsum,
            IS_TABLE=chunks is not None, num_warps=4,
        )  # fmt: skip
    return out


@launches
def gate_backward(
    dout: Tensor, g: Tensor, A_log: Tensor, dt_bias: Tensor | None, cu_seqlens: Tensor | None, cumsum: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(dg in g's dtype, dA_log, ddt_bias in float32) from the gradient of `gate_forward`'s result."""
    HV = g.shape[-1]
    dg = torch.empty(g.shape, dtype=g.dtype, device=g.device)
    chunks, n_t, n_h = _grid(g, cu_seqlens, cumsum)
    per_program = max(1, cdiv(n_t, MAX_PARTIALS))
    programs = cdiv(n_t, per_program)
    partial = torch.empty(programs, 2, HV, dtype=torch.float32, device=g.device)
    if programs:
        flat = _flat_rows(g)
        run_kernel(gate_backward_kernel, programs * n_h,
            dout.contiguous(), flat, dense(A_log), dense(dt_bias), dg, partial, chunks, flat.shape[0], n_t,
            flat.stride(0), flat.stride(1), per_program,
            HV=HV, BH=_block_heads(HV), C=CHUNK, HAS_DT_BIAS=dt_bias is not None, CUMSUM=cumsum,
            IS_TABLE=chunks is not None, num_warps=4,
        )  # fmt: skip
    sums = sum_partials(partial)
    return dg, sums[0], sums[1]


def _block_heads(HV: int) -> int:
    return min(BLOCK_HEADS, power_of_2(HV))


def _flat_rows(g: Tensor) -> Tensor:
    """g as [R, HV], without a copy where its leading dimensions are evenly strided."""
    return g.reshape(-1, g.shape[-1])


@torch.library.custom_op("gdn_cp::gdn_gate", mutates_args=())
def gdn_gate_op(g: Tensor, A_log: Tensor, dt_bias: Tensor | None, cu_seqlens: Tensor | None, cumsum: bool) -> Tensor:
    """`gate_forward` as a torch operator, so that torch.compile and activation checkpointing see one node."""
    return gate_forward(g, A_log, dt_bias, cu_seqlens, cumsum)


@torch.library.custom_op("gdn_cp::gdn_gate_backward", mutates_args=())
def gdn_gate_backward_op(
    dout: Tensor, g: Tensor, A_log: Tensor, dt_bias: Tensor | None, cu_seqlens: Tensor | None, cumsum: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`gate_backward` as a torch operator."""
    dg, dA_log, ddt_bias = gate_backward(dout, g, A_log, dt_bias, cu_seqlens, cumsum)
    return dg, dA_log, ddt_bias.clone()  # the two sums share memory, which an operator's results must not


@gdn_gate_op.register_fake
def _(g: Tensor, A_log: Tensor, dt_bias: Tensor | None, cu_seqlens: Tensor | None, cumsum: bool) -> Tensor:
    return torch.empty(g.shape, dtype=torch.float32, device=g.device)


@gdn_gate_backward_op.register_fake
def _(dout: Tensor, g: Tensor, A_log: Tensor, dt_bias: Tensor | None, cu_seqlens: Tensor | None, cumsum: bool):
    sums = A_log.new_empty(A_log.shape, dtype=torch.float32)
    return torch.empty(g.shape, dtype=g.dtype, device=g.device), sums, torch.empty_like(sums)


def _setup_context(ctx, inputs, output) -> None:
    g, A_log, dt_bias, cu_seqlens, cumsum = inputs
    ctx.save_for_backward(g, A_log, dt_bias, cu_seqlens)
    ctx.cumsum = cumsum


def _backward(ctx, dout: Tensor):
    g, A_log, dt_bias, cu_seqlens = ctx.saved_tensors
    dg, dA_log, ddt_bias = gdn_gate_backward_op(dout, g, A_log, dt_bias, cu_seqlens, ctx.cumsum)
    return dg, dA_log.to(A_log.dtype), None if dt_bias is None else ddt_bias.to(dt_bias.dtype), None, None


gdn_gate_op.register_autograd(_backward, setup_context=_setup_context)


def compile_cases() -> list[CompileCase]:
    """The gate of 32 value heads, alone and with its cumulative sum, and its gradient."""
    from gdn_cp.kernels.compile_report import CompileCase

    constants = {"HV": 32, "BH": 32, "C": CHUNK, "HAS_DT_BIAS": True, "g_head": 1}
    forward = {"g": "*bf16", "A_log": "*fp32", "dt_bias": "*fp32", "out": "*fp32", "num_rows": "i32", "g_row": "i32"}
    backward = {**forward, "dout": "*fp32", "dg": "*bf16", "partial": "*fp32", "num_chunks": "i32"}
    del backward["out"]
    backward["chunks_per_program"] = "i32"
    cases = []
    for cumsum in (False, True):
        mode = {**constants, "CUMSUM": cumsum, "IS_TABLE": cumsum}
        table: dict[str, str] = {"chunks": "*i32"} if cumsum else {}
        if not cumsum:
            mode["chunks"] = None
        suffix = "cumsum" if cumsum else "plain"
        cases.append(CompileCase(f"gate.forward/{suffix}", gate_forward_kernel, {**forward, **table}, mode))
        cases.append(CompileCase(f"gate.backward/{suffix}", gate_backward_kernel, {**backward, **table}, mode))
    return cases
