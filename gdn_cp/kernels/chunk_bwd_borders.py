"""The delta rule's backward beside states that are given: what rounding them took from the gate's gradient, put back.

`chunk_bwd_chains` stores the state S before each chunk and the gradient dS+ after it rounded, and the sums over rows of
which the gate's gradient consists (`chunk_bwd_rows`) are made from those. Inside a sequence such roundings are a few of
many. A sequence of one chunk has none but these: of the initial state, of the final state's gradient, and of U, which
is multiplied with the latter. The three are most of the error of dA_log and ddt_bias there, and those sums may by
chance be near zero when the errors are not. So in the first chunk of a sequence with an initial state, and in the last
with a gradient of the final state, one more launch adds, with s and d what storing took from S and dS+,

    dG         += rowdot(Q, scale gamma dO s^T) + rowdot(W, K s)
    k_dots     += rowdot(rho u, K (dS+ + d)) - rowdot(U, K dS+),    u = (I + Ag) beta (V - gamma K (S + s))
    state_dots  = lam <S + s, dS+ + d>

in the notation of `chunk_bwd_local`, whose W and U are the stored ones. A second 16-bit part s has as many digits more.
rowdot(W, K s) belongs to k_dots, which is taken off, and twice to what dG' has of W; it is the difference. What s
changes in the scores stays, a hundredth of the square of the error that is left, and what d changes in M, a fifth.

Dimensions: T tokens, H q/k heads, HV value heads, K, V head dims, C = 64, NT chunks, NP pieces, N sequences.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportReturnType=false, reportGeneralTypeIssues=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false
# ruff: noqa: SIM102  (an if on a constant is decided when the kernel is compiled, `and` is not)

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn_cp.kernels.chunk_bwd_chains import load_rows, load_state
from gdn_cp.kernels.configs import dot_precision
from gdn_cp.kernels.tables import CHUNK

if TYPE_CHECKING:
    from gdn_cp.kernels.compile_report import CompileCase


class GivenStates(NamedTuple):
    """States from outside: [N, HV, K, V] float32 contiguous, [N, HV, V, K] with `v_first`; None: not given."""

    initial_state: Tensor | None
    dht: Tensor | None
    v_first: bool

    def rounded_for(self, dtype: torch.dtype) -> bool:
        """Whether products with inputs of this dtype round any."""
        return dtype != torch.float32 and (self.initial_state is not None or self.dht is not None)


@triton.jit(do_not_specialize=["c0", "c1"])
def borders_kernel(
    q, k, v, do, G, bt, rq, rk, Ag, h, dh, W, U, pieces, initial_state, dht, dG, k_dots, state_dots, scale, c0, c1,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot, stride_oh,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, V_FIRST: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: piece id // (2 HV), value head, and the piece's first (id even) or last chunk.

    It returns at once unless the chunk is of c0 .. c1-1 and begins a sequence with an initial state, or ends one with a
    gradient of the final state; if it does both, the even program does it. For example, three sequences of 1, 2 and 0
    chunks, not cut, with both and one head: programs 0, 2 and 3 work, on chunks 0, 1 and 2.
    """
    pid = tl.program_id(0)
    hv = ((pid // 2) % HV).to(tl.int64)
    piece = pieces + (pid // (2 * HV)) * 8
    seq = tl.load(piece)
    count = tl.load(piece + 2)
    at_end = pid % 2
    j = tl.where(at_end != 0, count - 1, 0)
    chunk = (tl.load(piece + 1) + j).to(tl.int64)
    begins = (tl.load(piece + 5) != 0) & (j == 0) & (initial_state is not None)
    ends = (tl.load(piece + 6) != 0) & (j == count - 1) & (dht is not None)
    works = tl.where(at_end != 0, ends & (begins == 0), begins)
    if (seq < 0) | (count == 0) | (works == 0) | (chunk < c0) | (chunk >= c1):
        return
    hk = hv // (HV // H)
    row = (tl.load(piece + 3) + j * C).to(tl.int64)
    n_rows = tl.load(piece + 4) - row.to(tl.int32)
    i_c = tl.arange(0, C)
    valid = i_c < n_rows
    at = (chunk * HV + hv) * C
    own = (chunk - c0) * HV + hv
    state_at = (seq.to(tl.int64) * HV + hv) * (K * V)
    q_tile = load_rows(q + row * stride_qt + hk * stride_qh, 0, n_rows, stride_qt, K, BK, C)
    k_tile = load_rows(k + row * stride_kt + hk * stride_kh, 0, n_rows, stride_kt, K, BK, C)
    Ag_tile = load_state(Ag + at * C, 0, C, C, C, C, False)
    dtype = k_tile.dtype
    G_i = tl.load(G + at + i_c)
    G_last = tl.load(G + at + C - 1)
    b = tl.load(bt + at + i_c)
    from_start = tl.exp(G_i)
    to_end = tl.exp(G_last - G_i)
    q_scale = from_start * scale
    if rk is not None:
        k_norm = tl.load(rk + (chunk * H + hk) * C + i_c)
        from_start *= k_norm
        to_end *= k_norm
        q_scale *= tl.load(rq + (chunk * H + hk) * C + i_c)
    dG_i = tl.zeros([C], tl.float32)
    k_dot = tl.zeros([C], tl.float32)
    state_dot = tl.zeros([BK], tl.float32)
    for i_v in tl.range(0, (V + BV - 1) // BV, num_stages=STAGES):
        S = load_state(h + own * (K * V), i_v, K, V, BK, BV, False)
        dS = load_state(dh + own * (K * V), i_v, K, V, BK, BV, False)
        s = tl.zeros([BK, BV], tl.float32)
        d = tl.zeros([BK, BV], tl.float32)
        if initial_state is not None:
            if begins:
                s = load_state(initial_state + state_at, i_v, K, V, BK, BV, V_FIRST) - S.to(tl.float32)
        if dht is not None:
            if ends:
                d = load_state(dht + state_at, i_v, K, V, BK, BV, V_FIRST) - dS.to(tl.float32)
        state_dot += tl.sum((S.to(tl.float32) + s) * (dS.to(tl.float32) + d), 1)
        s_b = s.to(dtype)
        lost = tl.dot(k_tile, s_b, input_precision=PRECISION)
        do_tile = load_rows(do + row * stride_ot + hv * stride_oh, i_v, n_rows, stride_ot, V, BV, C)
        Qs = tl.dot(q_tile, s_b, input_precision=PRECISION)
        dG_i += tl.sum(Qs * do_tile.to(tl.float32), 1) * q_scale
        W_tile = load_state(W + own * (C * V), i_v, C, V, C, BV, False)
        dG_i += tl.sum(W_tile.to(tl.float32) * lost, 1)
        KS = tl.dot(k_tile, S, acc=lost, input_precision=PRECISION)
        v_tile = load_rows(v + row * stride_vt + hv * stride_vh, i_v, n_rows, stride_vt, V, BV, C)
        bR = b[:, None] * (v_tile.to(tl.float32) - from_start[:, None] * KS)
        bR = tl.where(valid[:, None], bR, 0.0)
        u = to_end[:, None] * tl.dot(Ag_tile, bR.to(dtype), acc=bR, input_precision=PRECISION)
        U_tile = load_state(U + own * (C * V), i_v, C, V, C, BV, False)
        KdS = tl.dot(k_tile, dS, input_precision=PRECISION)
        k_dot += tl.sum((u - U_tile.to(tl.float32)) * KdS, 1)
        Kd = tl.dot(k_tile, d.to(dtype), input_precision=PRECISION)
        k_dot += tl.sum(u * Kd, 1)
    tl.store(dG + at + i_c, tl.load(dG + at + i_c) + tl.where(valid, dG_i, 0.0))
    tl.store(k_dots + at + i_c, tl.load(k_dots + at + i_c) + tl.where(valid, k_dot, 0.0))
    tl.store(state_dots + chunk * HV + hv, tl.exp(G_last) * tl.sum(state_dot))


def borders_options(K: int, V: int) -> dict[str, int]:
    """Columns of the state per step and the launch's options: for more columns there are too few registers."""
    return {"BV": 32 if K <= 64 and V > 16 else 16, "STAGES": 2, "num_warps": 4, "num_stages": 2}


def compile_cases() -> list[CompileCase]:
    """The kernel at Qwen3-Next's heads for head dims 128, 64, 256, with both states."""
    from gdn_cp.kernels.compile_report import CompileCase

    cases = []
    for dim in (128, 64, 256):
        options = borders_options(dim, dim)
        constants = {
            "H": 16, "HV": 32, "K": dim, "V": dim, "BK": dim, "BV": options["BV"], "C": CHUNK, "V_FIRST": False,
            "PRECISION": dot_precision(torch.bfloat16), "STAGES": options["STAGES"],
        }  # fmt: skip
        float32 = "G bt rq rk initial_state dht dG k_dots state_dots"
        strides = tuple(n for n in borders_kernel.arg_names if n.startswith("stride"))
        types = dict.fromkeys(float32.split(), "*fp32") | dict.fromkeys((*strides, "c0", "c1"), "i32")
        types |= {"pieces": "*i32", "scale": "fp32"}
        signature = {n: types.get(n, "*bf16") for n in borders_kernel.arg_names if n not in constants}
        cases.append(
            CompileCase(
                f"chunk_bwd_borders/bf16/K{dim}", borders_kernel, signature, constants, num_warps=options["num_warps"],
                num_stages=options["num_stages"], divisible=strides, main=dim <= 128, spills_allowed=dim > 128,
            )
        )  # fmt: skip
    return cases
