"""The last step of the delta rule's backward: gradients that are one number to a row, of beta and of the gate.

`chunk_bwd_local` has left, for every chunk and value head, sums over rows and columns of its products. In its notation

    dbeta = db + share k_dots
    dG    = dG' + q_dots - k_dots,    dG_C += state_dots + sum of k_dots,    dg_t = sum of dG_i over i >= t

where q_dots = Q . (scale gamma dO S^T), k_dots = K . (Z + S W^T), state_dots = lam <S, dS+>, and dG' and db are what
`scores_kernel` knows; share is that of the second form of dbeta (`second_share`). `chunk_bwd_fused` leaves state_dots
in C parts that add up to it, with the part of dG' that belongs to the last row.

Dimensions: T tokens, HV value heads, C = 64 rows of a chunk, NT chunks (bound).
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportIndexIssue=false

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn_cp.kernels.gate_triton import softplus
from gdn_cp.kernels.tables import CHUNK
from gdn_cp.launch import run_kernel

if TYPE_CHECKING:
    from gdn_cp.kernels.compile_report import CompileCase


@triton.jit
def second_share(beta, LEAST_BETA: tl.constexpr):
    """What the second form of beta dbeta is multiplied by: 1 / (2 beta), or 0 where beta is below LEAST_BETA, for U is
    proportional to beta and loses digits to the least exponent of its type."""
    counts = tl.abs(beta) >= LEAST_BETA
    return tl.where(counts, 0.5 / tl.where(counts, beta, 1.0), 0.0)


class RowSums(NamedTuple):
    """What the kernels of all slices leave: [NT, HV, C] float32 each, state_dots [NT, HV, 1 or C]; None what nobody
    needs."""

    dG: Tensor | None  # noqa: N815
    db: Tensor | None
    q_dots: Tensor | None
    k_dots: Tensor | None
    state_dots: Tensor | None


def row_sums(num_chunks: int, HV: int, device: torch.device, gate: bool, beta: bool, parts: int) -> RowSums:
    """Empty sums for the gradients of the gate and of beta, those that are wanted; state_dots in so many parts."""
    dG, db, q_dots, k_dots = torch.empty(4, num_chunks, HV, CHUNK, dtype=torch.float32, device=device)
    state_dots = torch.empty(num_chunks, HV, parts, dtype=torch.float32, device=device)
    either = gate or beta
    wanted = (gate, beta, gate, either, either)
    return RowSums(*(x if flag else None for x, flag in zip((dG, db, q_dots, k_dots, state_dots), wanted, strict=True)))


def least_beta(dtype: torch.dtype) -> float:
    """The least beta at which U, of order beta, still has its digits: 2^-14 is float16's least normal number."""
    return 2.0**-6 if dtype == torch.float16 else 2.0**-60


@triton.jit
def row_gradients_kernel(
    dG, db, q_dots, k_dots, state_dots, bt, g, A_log, dt_bias, chunks, dg, dbeta, parts, stride_gt, stride_gh,
    HV: tl.constexpr, C: tl.constexpr, PARTS: tl.constexpr, LEAST_BETA: tl.constexpr, GATE: tl.constexpr,
    SIGMOID: tl.constexpr,
):  # fmt: skip
    """One program: chunk id // HV and value head id % HV; what is one number to a row.

    That is dbeta, dg, and with the gate parts [NT, 2, HV] of dA_log and ddt_bias; dbeta or dg may be None.
    """
    pid = tl.program_id(0)
    chunk = (pid // HV).to(tl.int64)
    hv = pid % HV
    own = chunk * HV + hv
    i_c = tl.arange(0, C)
    n_rows = tl.where(tl.load(chunks + chunk * 4) < 0, 0, tl.load(chunks + chunk * 4 + 2))
    valid = i_c < n_rows
    at = tl.load(chunks + chunk * 4 + 1).to(tl.int64) + i_c
    k_dot = tl.load(k_dots + own * C + i_c, mask=valid, other=0.0)
    if dbeta is not None:
        b = tl.load(bt + own * C + i_c, mask=valid, other=0.0)
        db_i = tl.load(db + own * C + i_c, mask=valid, other=0.0) + second_share(b, LEAST_BETA) * k_dot
        if SIGMOID:
            db_i *= b * (1.0 - b)
        tl.store(dbeta + at * HV + hv, db_i.to(dbeta.dtype.element_ty), mask=valid)
    if dg is not None:
        # dG_C is in the last of the C rows also where the sequence ends earlier.
        dG_i = tl.load(dG + own * C + i_c, mask=n_rows > 0, other=0.0) - k_dot
        dG_i += tl.load(q_dots + own * C + i_c, mask=valid, other=0.0)
        dots = tl.load(state_dots + own * PARTS + tl.arange(0, PARTS), mask=n_rows > 0, other=0.0)
        from_last = tl.sum(dots, 0) + tl.sum(k_dot, 0)
        dG_i += tl.where(i_c == C - 1, from_last, 0.0)
        dg_i = tl.where(valid, tl.cumsum(dG_i, 0, reverse=True), 0.0)
        if GATE:
            x = tl.load(g + at * stride_gt + hv * stride_gh, mask=valid, other=0.0).to(tl.float32)
            if dt_bias is not None:
                x += tl.load(dt_bias + hv).to(tl.float32)
            rate = -tl.exp(tl.load(A_log + hv).to(tl.float32))
            tl.store(parts + chunk * 2 * HV + hv, tl.sum(dg_i * rate * softplus(x), 0))
            dg_i = dg_i * rate * tl.sigmoid(x)
            tl.store(parts + (chunk * 2 + 1) * HV + hv, tl.sum(dg_i, 0))
        tl.store(dg + at * HV + hv, dg_i.to(dg.dtype.element_ty), mask=valid)


def row_gradients(
    sums: RowSums, bt: Tensor, g: Tensor | None, A_log: Tensor | None, dt_bias: Tensor | None, chunks: Tensor,
    dg: Tensor | None, dbeta: Tensor | None, parts: Tensor | None, *, sigmoid: bool, least: float,
) -> None:  # fmt: skip
    """dg, dbeta [B, T, HV], those that are not None, of all chunks.

    Args:
        sums: see `row_sums`.
        bt: [NT, HV, C] beta as used.
        g: [B, T, HV] as given, with A_log and dt_bias [HV] where it is the raw gate.
        chunks: the chunk table.
        dg, dbeta: results in the dtype that they have; contiguous.
        parts: [NT, 2, HV] float32, receives the chunks' shares in dA_log and ddt_bias; None if g is the log decay.
        sigmoid: whether beta was given before the sigmoid.
        least: see `least_beta`.
    """
    if sums.k_dots is None or sums.state_dots is None or not sums.k_dots.shape[0]:
        return
    num_chunks, HV = sums.k_dots.shape[:2]
    strides = (0, 0) if g is None else (g.stride(1), g.stride(2))
    run_kernel(row_gradients_kernel, num_chunks * HV,
        *sums, bt, g, A_log, dt_bias, chunks, dg, dbeta, parts, *strides,
        HV=HV, C=CHUNK, PARTS=sums.state_dots.shape[2], LEAST_BETA=least, GATE=parts is not None, SIGMOID=sigmoid,
        num_warps=1,
    )  # fmt: skip


def compile_cases() -> list[CompileCase]:
    """The kernel with raw gate and beta, as Qwen3-Next has them."""
    from gdn_cp.kernels.compile_report import CompileCase

    types = dict.fromkeys(("g", "dg", "dbeta"), "*bf16") | {"chunks": "*i32", "stride_gt": "i32"}
    constants = {
        "HV": 32, "C": CHUNK, "PARTS": CHUNK, "LEAST_BETA": 2.0**-60, "GATE": True, "SIGMOID": True, "stride_gh": 1,
    }  # fmt: skip
    signature = {n: types.get(n, "*fp32") for n in row_gradients_kernel.arg_names if n not in constants}
    return [CompileCase("chunk_bwd_rows/bf16", row_gradients_kernel, signature, constants, num_warps=1)]
