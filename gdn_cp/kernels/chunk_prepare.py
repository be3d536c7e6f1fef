"""Everything of the chunked delta rule that does not depend on the state, for all chunks at once.

With C = 64 rows per chunk, K, Q raw rows, rk, rq their inverse norms (1 without L2 norm), G the inclusive cumulative
sum of the gate within the chunk, gamma = e^G, rho = e^(G_C - G), Gam_ij = e^(G_i - G_j) for i >= j and s the scale:

    A = (I + stricttril(diag(beta) (diag(rk) K K^T diag(rk) * Gam)))^-1            [C, C] unit lower triangular
    P = s (diag(rq) Q K^T diag(rk)) * Gam                                          [C, C] lower triangular
    X = K^T diag(rk rho) A  [K, C]            Y = P A  [C, C]

so that one step along the sequence needs four products, of which two wait for each other (see `chunk_fwd`):

    R = beta (V - (rk gamma) K S)      S+ = e^(G_C) S + X R      O = s (rq gamma) Q S + Y R

Results are chunk-major and padded to 64 rows: in the tail rows of a sequence's last chunk G repeats its last value,
beta, rk and rq are 0, and A is the identity, so that no reader needs a mask. Exponents are differences that are never
positive. Only the strict lower part of A is stored: its diagonal is exactly 1, added in float32 by who uses it.

Dimensions: B batch, T tokens, H query/key heads, HV value heads, K key head dim, C = 64 rows of a chunk,
NT chunks (bound).
"""

# pyright: reportGeneralTypeIssues=false
# triton.jit hides that tl.static_range is a loop from a type checker
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn_cp.kernels.activations_triton import exp
from gdn_cp.kernels.configs import Launch, launches, options, power_of_2, prepare_config
from gdn_cp.kernels.decay_triton import first_end
from gdn_cp.kernels.tables import CHUNK, ChunkTables, dense
from gdn_cp.launch import run_kernel

NORM_EPS = 1e-6
# Programs that share the chunks before a head's gates have forgotten, of one sequence: for 32 heads and two sequences,
# as many as an H200 has room for two or three times; and a head that never forgets is no long work for one of them.
LEADING_SLOTS = 16


@dataclass(frozen=True)
class Prepared:
    """State-independent parts of every chunk.

    G, bt: [NT, HV, 64] float32, cumulative gate and beta as used. rk, rq: [NT, H, 64] float32, None without L2 norm.
    Ag: [NT, HV, 64, 64] in the input dtype, strict lower part of A. X: [NT, HV, K, 64] and Yt: [NT, HV, 64, 64] in the
    input dtype, Yt[j, i] = Y[i, j]; None where only what is kept for the backward is held.
    """

    G: Tensor
    bt: Tensor
    rq: Tensor | None
    rk: Tensor | None
    Ag: Tensor
    X: Tensor | None = None
    Yt: Tensor | None = None


@triton.jit
def _gate(x, a_log, dt_bias):
    """-exp(A_log) softplus(x + dt_bias). log1p(e) as log(u) e / (u - 1), u = 1 + e: exact where e is lost in u."""
    y = x + dt_bias
    e = tl.exp(-tl.abs(y))
    u = 1.0 + e
    tail = tl.where(u == 1.0, e, tl.log(u) * e / tl.where(u == 1.0, 1.0, u - 1.0))
    return -tl.exp(a_log) * (tl.maximum(y, 0.0) + tail)


@triton.jit
def _decayed(kk, beta, rk_i, rk_j, G_i, G_j, DIAGONAL: tl.constexpr):
    """A 16 x 16 block of diag(beta) (diag(rk) K K^T diag(rk) * Gam), the strict lower part only on the diagonal."""
    difference = G_i[:, None] - G_j[None, :]
    if DIAGONAL:
        rows = tl.arange(0, 16)
        lower = rows[:, None] > rows[None, :]
        difference = tl.where(lower, difference, float("-inf"))
    return kk * (beta * rk_i)[:, None] * rk_j[None, :] * exp(difference)


@triton.jit
def _invert_unit_lower(scratch, N0, N1, N2, N3):
    """(I + N)^-1 of four strictly lower 16 x 16 blocks, row by row from above: A_i = I_i - sum over m < i of N_im A_m.

    A lane holds two columns of a block, all rows of them, and each N_im is the same for all columns: no step waits for
    other lanes. On the way to this layout and back the blocks lie in `scratch`, float32 [2048], in the cache.
    """
    i, j = tl.arange(0, 16)[:, None], tl.arange(0, 16)[None, :]
    at = scratch + i * 16 + j
    tl.store(at, N0)
    tl.store(at + 256, N1)
    tl.store(at + 512, N2)
    tl.store(at + 768, N3)
    tl.debug_barrier()
    lane = tl.arange(0, 32)
    N = scratch + lane // 8 * 256
    left, right = (), ()
    for r in tl.static_range(16):
        one = tl.where(lane % 8 == r, 1.0, 0.0)
        two = tl.where(lane % 8 + 8 == r, 1.0, 0.0)
        for m in tl.static_range(r):
            factor = tl.load(N + r * 16 + m)
            one -= factor * left[m]
            two -= factor * right[m]
        left, right = left + (one,), right + (two,)  # noqa: RUF005 (triton.jit joins tuples but does not unpack them)
    to = scratch + 1024 + lane // 8 * 16 + lane % 8
    for r in tl.static_range(16):
        tl.store(to + r * 64, left[r])
        tl.store(to + r * 64 + 8, right[r])
    tl.debug_barrier()
    at = scratch + 1024 + i * 64 + j
    A0, A1, A2, A3 = tl.load(at), tl.load(at + 16), tl.load(at + 32), tl.load(at + 48)
    tl.debug_barrier()
    return A0, A1, A2, A3


@triton.jit
def _dot16(a, b, PRECISION: tl.constexpr):
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _load_gate(
    g_ptr, beta_ptr, a_log, dt_bias, row, length, first: tl.constexpr, stride_g, stride_b,
    HAS_G: tl.constexpr, HAS_BETA: tl.constexpr, GATE: tl.constexpr, SIGMOID: tl.constexpr,
):  # fmt: skip
    """Gate and beta of rows first .. first + 15 of the chunk that starts at `row`; 0 past its end."""
    i = first + tl.arange(0, 16)
    mask = i < length
    gate = tl.zeros((16,), tl.float32)
    beta = tl.where(mask, 1.0, 0.0)
    if HAS_G:
        gate = tl.load(g_ptr + (row + i) * stride_g, mask=mask, other=0.0).to(tl.float32)
        if GATE:
            gate = tl.where(mask, _gate(gate, a_log, dt_bias), 0.0)
    if HAS_BETA:
        beta = tl.load(beta_ptr + (row + i) * stride_b, mask=mask, other=0.0).to(tl.float32)
        if SIGMOID:
            beta = tl.where(mask, 1.0 / (1.0 + tl.exp(-beta)), 0.0)
    return gate, beta


@triton.jit
def _inverse_norm(kk, first: tl.constexpr, length, EPS: tl.constexpr):
    """1 / |k| of rows first .. first + 15, whose squares are the diagonal of their block of K K^T."""
    i = tl.arange(0, 16)
    square = tl.sum(tl.where(i[:, None] == i[None, :], kk, 0.0), 1)
    return tl.where(first + tl.arange(0, 16) < length, 1.0 / tl.sqrt_rn(square + EPS), 0.0)


@triton.jit
def _store_block(base, block, row: tl.constexpr, column: tl.constexpr):
    i = tl.arange(0, 16)
    tl.store(base + (row + i)[:, None] * 64 + (column + i)[None, :], block.to(base.dtype.element_ty))


@triton.jit(do_not_specialize=["n_programs"])
def solve_kernel(
    k_ptr, g_ptr, beta_ptr, A_log_ptr, dt_bias_ptr, chunks_ptr, G_ptr, bt_ptr, rk_ptr, Ag_ptr,
    n_programs, stride_kt, stride_kh, stride_gt, stride_gh, stride_bt, stride_bh,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, EPS: tl.constexpr,
    HAS_G: tl.constexpr, HAS_BETA: tl.constexpr, GATE: tl.constexpr, HAS_BIAS: tl.constexpr, SIGMOID: tl.constexpr,
    NORM: tl.constexpr, PRECISION: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Program (chunk c, value head h): G, beta, rk of the chunk and the inverse A, by 16 x 16 blocks.

    One warp's: what it takes is time between dependent instructions, and few warps have room, so it is short of both.
    The four blocks on the diagonal are inverted by substitution in float32, those below follow from
    A_ij = -A_ii (sum over j <= m < i of N_im A_mj).
    """
    pid = tl.program_id(0)
    c = (pid // HV).to(tl.int64)
    hv = pid % HV
    if tl.load(chunks_ptr + c * 4) < 0:
        return
    row = tl.load(chunks_ptr + c * 4 + 1).to(tl.int64)
    length = tl.load(chunks_ptr + c * 4 + 2)
    h = hv // (HV // H)
    i = tl.arange(0, 16)

    kk00 = tl.zeros((16, 16), tl.float32)
    kk10 = tl.zeros((16, 16), tl.float32)
    kk11 = tl.zeros((16, 16), tl.float32)
    kk20 = tl.zeros((16, 16), tl.float32)
    kk21 = tl.zeros((16, 16), tl.float32)
    kk22 = tl.zeros((16, 16), tl.float32)
    kk30 = tl.zeros((16, 16), tl.float32)
    kk31 = tl.zeros((16, 16), tl.float32)
    kk32 = tl.zeros((16, 16), tl.float32)
    kk33 = tl.zeros((16, 16), tl.float32)
    k_base = k_ptr + row * stride_kt + h.to(tl.int64) * stride_kh
    for start in tl.range(0, K, BK):
        d = start + tl.arange(0, BK)
        tile = k_base + i[:, None] * stride_kt + d[None, :]
        columns = d[None, :] < K
        k0 = tl.load(tile, mask=(i[:, None] < length) & columns, other=0.0)
        kk00 = tl.dot(k0, tl.trans(k0), kk00, input_precision=DOT)
        k1 = tl.load(tile + 16 * stride_kt, mask=(16 + i[:, None] < length) & columns, other=0.0)
        kk10 = tl.dot(k1, tl.trans(k0), kk10, input_precision=DOT)
        kk11 = tl.dot(k1, tl.trans(k1), kk11, input_precision=DOT)
        k2 = tl.load(tile + 32 * stride_kt, mask=(32 + i[:, None] < length) & columns, other=0.0)
        kk20 = tl.dot(k2, tl.trans(k0), kk20, input_precision=DOT)
        kk21 = tl.dot(k2, tl.trans(k1), kk21, input_precision=DOT)
        kk22 = tl.dot(k2, tl.trans(k2), kk22, input_precision=DOT)
        k3 = tl.load(tile + 48 * stride_kt, mask=(48 + i[:, None] < length) & columns, other=0.0)
        kk30 = tl.dot(k3, tl.trans(k0), kk30, input_precision=DOT)
        kk31 = tl.dot(k3, tl.trans(k1), kk31, input_precision=DOT)
        kk32 = tl.dot(k3, tl.trans(k2), kk32, input_precision=DOT)
        kk33 = tl.dot(k3, tl.trans(k3), kk33, input_precision=DOT)

    a_log = 0.0
    dt_bias = 0.0
    if GATE:
        a_log = tl.load(A_log_ptr + hv).to(tl.float32)
        if HAS_BIAS:
            dt_bias = tl.load(dt_bias_ptr + hv).to(tl.float32)
    g_base = g_ptr + hv.to(tl.int64) * stride_gh if HAS_G else g_ptr
    b_base = beta_ptr + hv.to(tl.int64) * stride_bh if HAS_BETA else beta_ptr
    gate0, beta0 = _load_gate(
        g_base, b_base, a_log, dt_bias, row, length, 0, stride_gt, stride_bt, HAS_G, HAS_BETA, GATE, SIGMOID
    )
    gate1, beta1 = _load_gate(
        g_base, b_base, a_log, dt_bias, row, length, 16, stride_gt, stride_bt, HAS_G, HAS_BETA, GATE, SIGMOID
    )
    gate2, beta2 = _load_gate(
        g_base, b_base, a_log, dt_bias, row, length, 32, stride_gt, stride_bt, HAS_G, HAS_BETA, GATE, SIGMOID
    )
    gate3, beta3 = _load_gate(
        g_base, b_base, a_log, dt_bias, row, length, 48, stride_gt, stride_bt, HAS_G, HAS_BETA, GATE, SIGMOID
    )
    G0 = tl.cumsum(gate0, 0)
    sum0 = tl.sum(gate0, 0)
    G1 = sum0 + tl.cumsum(gate1, 0)
    sum1 = sum0 + tl.sum(gate1, 0)
    G2 = sum1 + tl.cumsum(gate2, 0)
    sum2 = sum1 + tl.sum(gate2, 0)
    G3 = sum2 + tl.cumsum(gate3, 0)
    out = (c * HV + hv) * 64
    tl.store(G_ptr + out + i, G0)
    tl.store(G_ptr + out + 16 + i, G1)
    tl.store(G_ptr + out + 32 + i, G2)
    tl.store(G_ptr + out + 48 + i, G3)
    tl.store(bt_ptr + out + i, beta0)
    tl.store(bt_ptr + out + 16 + i, beta1)
    tl.store(bt_ptr + out + 32 + i, beta2)
    tl.store(bt_ptr + out + 48 + i, beta3)
    one = tl.full((16,), 1.0, tl.float32)
    rk0, rk1, rk2, rk3 = one, one, one, one
    if NORM:
        rk0 = _inverse_norm(kk00, 0, length, EPS)
        rk1 = _inverse_norm(kk11, 16, length, EPS)
        rk2 = _inverse_norm(kk22, 32, length, EPS)
        rk3 = _inverse_norm(kk33, 48, length, EPS)
        if hv % (HV // H) == 0:
            norms = rk_ptr + (c * H + h) * 64 + i
            tl.store(norms, rk0)
            tl.store(norms + 16, rk1)
            tl.store(norms + 32, rk2)
            tl.store(norms + 48, rk3)

    base = Ag_ptr + (c * HV + hv) * 4096
    A00, A11, A22, A33 = _invert_unit_lower(
        base.to(tl.pointer_type(tl.float32)),  # the result's place, which nobody needs before it
        _decayed(kk00, beta0, rk0, rk0, G0, G0, True), _decayed(kk11, beta1, rk1, rk1, G1, G1, True),
        _decayed(kk22, beta2, rk2, rk2, G2, G2, True), _decayed(kk33, beta3, rk3, rk3, G3, G3, True))  # fmt: skip
    N10 = _decayed(kk10, beta1, rk1, rk0, G1, G0, False)
    N21 = _decayed(kk21, beta2, rk2, rk1, G2, G1, False)
    N32 = _decayed(kk32, beta3, rk3, rk2, G3, G2, False)
    N20 = _decayed(kk20, beta2, rk2, rk0, G2, G0, False)
    N31 = _decayed(kk31, beta3, rk3, rk1, G3, G1, False)
    N30 = _decayed(kk30, beta3, rk3, rk0, G3, G0, False)
    A10 = -_dot16(A11, _dot16(N10, A00, PRECISION), PRECISION)
    A21 = -_dot16(A22, _dot16(N21, A11, PRECISION), PRECISION)
    A32 = -_dot16(A33, _dot16(N32, A22, PRECISION), PRECISION)
    A20 = -_dot16(A22, _dot16(N20, A00, PRECISION) + _dot16(N21, A10, PRECISION), PRECISION)
    A31 = -_dot16(A33, _dot16(N31, A11, PRECISION) + _dot16(N32, A21, PRECISION), PRECISION)
    last = _dot16(N30, A00, PRECISION) + _dot16(N31, A10, PRECISION) + _dot16(N32, A20, PRECISION)
    A30 = -_dot16(A33, last, PRECISION)

    strict = i[:, None] > i[None, :]
    zero = tl.zeros((16, 16), tl.float32)
    _store_block(base, tl.where(strict, A00, 0.0), 0, 0)
    _store_block(base, tl.where(strict, A11, 0.0), 16, 16)
    _store_block(base, tl.where(strict, A22, 0.0), 32, 32)
    _store_block(base, tl.where(strict, A33, 0.0), 48, 48)
    _store_block(base, A10, 16, 0)
    _store_block(base, A20, 32, 0)
    _store_block(base, A21, 32, 16)
    _store_block(base, A30, 48, 0)
    _store_block(base, A31, 48, 16)
    _store_block(base, A32, 48, 32)
    _store_block(base, zero, 0, 16)
    _store_block(base, zero, 0, 32)
    _store_block(base, zero, 0, 48)
    _store_block(base, zero, 16, 32)
    _store_block(base, zero, 16, 48)
    _store_block(base, zero, 32, 48)


@triton.jit
def _store_products(
    q_ptr, k_ptr, G_ptr, rq_ptr, rk_ptr, Ag_ptr, X_ptr, Yt_ptr, c, local, row, length, hv, scale,
    stride_qt, stride_qh, stride_kt, stride_kh,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, EPS: tl.constexpr,
    NORM: tl.constexpr, STORE_RQ: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """X and Yt of chunk c, whose `length` rows begin at `row`, and value head hv, to place `local` of the results.

    K Q^T is made anew for every value head of a key head: what it would keep from one to the next are registers, with
    which a multiprocessor has room for two thirds of the programs.

    The transpose of Y is computed, Yt = P^T + Ag^T P^T (Ag the strict lower part), so that the first operand of each
    product is a tile as it was loaded. Tensor-core operands in registers are miscompiled on Hopper, and a first operand
    that is computed would be one.
    """
    h = hv // (HV // H)
    i = tl.arange(0, 64)
    d = tl.arange(0, BK)
    mask = (i[:, None] < length) & (d[None, :] < K)
    k = tl.load(k_ptr + row * stride_kt + h.to(tl.int64) * stride_kh + i[:, None] * stride_kt + d[None, :], mask, 0.0)
    Ag = tl.load(Ag_ptr + (c * HV + hv) * 4096 + i[:, None] * 64 + i[None, :])
    rk = tl.full((64,), 1.0, tl.float32)
    if NORM:
        rk = tl.load(rk_ptr + (c * H + h) * 64 + i)
    G = tl.load(G_ptr + (c * HV + hv) * 64 + i)
    q_base = q_ptr + row * stride_qt + h.to(tl.int64) * stride_qh
    q = tl.load(q_base + i[:, None] * stride_qt + d[None, :], mask, 0.0)
    rq = tl.full((64,), 1.0, tl.float32)
    if NORM:
        if STORE_RQ:
            qf = q.to(tl.float32)
            rq = tl.where(i < length, 1.0 / tl.sqrt_rn(tl.sum(qf * qf, 1) + EPS), 0.0)
            if hv % (HV // H) == 0:
                tl.store(rq_ptr + (c * H + h) * 64 + i, rq)
        else:
            rq = tl.load(rq_ptr + (c * H + h) * 64 + i)
    kq = tl.dot(k, tl.trans(q), input_precision=DOT) * rk[:, None] * (rq * scale)[None, :]
    difference = G[None, :] - G[:, None]
    Pt = kq * exp(tl.where(i[None, :] >= i[:, None], difference, float("-inf")))
    Yt = Pt + tl.dot(tl.trans(Ag), Pt.to(Ag.dtype), input_precision=DOT)
    out = Yt_ptr + (local * HV + hv) * 4096
    tl.store(out + i[:, None] * 64 + i[None, :], Yt.to(Ag.dtype))
    # The identity in Af is added in float32: rounded with Ag for the product it would be most of X's error.
    to_end = rk * tl.exp(tl.load(G_ptr + (c * HV + hv) * 64 + 63) - G)
    A = Ag.to(tl.float32) * to_end[:, None]
    X = tl.dot(tl.trans(k), A.to(k.dtype), input_precision=DOT) + tl.trans(k).to(tl.float32) * to_end[None, :]
    out = X_ptr + (local * HV + hv) * (K * 64)
    tl.store(out + d[:, None] * 64 + i[None, :], X.to(k.dtype), mask=(d[:, None] < K))


@triton.jit(do_not_specialize=["first_chunk"])
def products_kernel(
    q_ptr, k_ptr, G_ptr, rq_ptr, rk_ptr, Ag_ptr, chunks_ptr, X_ptr, Yt_ptr,
    first_chunk, scale, stride_qt, stride_qh, stride_kt, stride_kh,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, EPS: tl.constexpr,
    NORM: tl.constexpr, STORE_RQ: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Program (chunk, value head): X and Yt, from `first_chunk` on."""
    pid = tl.program_id(0)
    local = (pid // HV).to(tl.int64)
    c = local + first_chunk
    hv = pid % HV
    if tl.load(chunks_ptr + c * 4) < 0:
        return
    row = tl.load(chunks_ptr + c * 4 + 1).to(tl.int64)
    length = tl.load(chunks_ptr + c * 4 + 2)
    _store_products(
        q_ptr, k_ptr, G_ptr, rq_ptr, rk_ptr, Ag_ptr, X_ptr, Yt_ptr, c, local, row, length, hv, scale,
        stride_qt, stride_qh, stride_kt, stride_kh, H, HV, K, BK, EPS, NORM, STORE_RQ, DOT,
    )  # fmt: skip


@triton.jit
def leading_products_kernel(
    q_ptr, k_ptr, G_ptr, rq_ptr, rk_ptr, Ag_ptr, pieces_ptr, roles_ptr, X_ptr, Yt_ptr,
    scale, stride_qt, stride_qh, stride_kt, stride_kh,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, NORM: tl.constexpr, TRUNCATE: tl.constexpr,
    SLOTS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Program (whole sequence, slot, value head): X and Yt of those chunks that a walk for the gradient before the
    sequence takes, if a state enters it (`roles`): its first ones, until their gates sum to less than TRUNCATE.

    A program does every SLOTS-th of them. One for each chunk of the batch would have to ask whether that is among them,
    and most would do nothing else: that took longer than the products.
    """
    pid = tl.program_id(0)
    hv = pid % HV
    piece = pieces_ptr + pid // (HV * SLOTS) * 8
    n = tl.load(piece)
    if n < 0:
        return
    if (tl.load(roles_ptr + n) & 1) == 0:
        return
    first = tl.load(piece + 1).to(tl.int64)
    first_row = tl.load(piece + 3)
    rows = tl.load(piece + 4) - first_row
    count = first_end(G_ptr, first, tl.load(piece + 2), hv, TRUNCATE, HV)
    for index in range(pid // HV % SLOTS, count, SLOTS):
        c, row = first + index, (first_row + index * 64).to(tl.int64)
        _store_products(
            q_ptr, k_ptr, G_ptr, rq_ptr, rk_ptr, Ag_ptr, X_ptr, Yt_ptr, c, c, row, rows - index * 64, hv, scale,
            stride_qt, stride_qh, stride_kt, stride_kh, H, HV, K, BK, 0.0, NORM, False, DOT,
        )  # fmt: skip


@launches
def prepare(
    q: Tensor,
    k: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    tables: ChunkTables,
    *,
    scale: float,
    num_v_heads: int,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
) -> Prepared:
    """State-independent parts of every chunk of a batch, X and Yt included.

    Args:
        q, k: [B, T, H, K], the last dimension contiguous and the rows of the batch evenly spaced.
        g: [B, T, HV] log decay in nats, raw gate with `use_gate_in_kernel`, or None for no decay.
        beta: [B, T, HV], before the sigmoid with `use_beta_sigmoid_in_kernel`, or None for ones.
        tables: of this batch.
        scale: factor of the queries.
        num_v_heads: HV.
        A_log, dt_bias: [HV] of the gate.
        use_qk_l2norm_in_kernel, use_gate_in_kernel, use_beta_sigmoid_in_kernel: as the public operation's.
    """
    H, K = q.shape[2], q.shape[3]
    HV, NT = num_v_heads, tables.num_chunks
    launch = prepare_config(q.device, q.dtype, K)
    shape = (NT, HV, CHUNK)
    G, bt = (torch.empty(shape, dtype=torch.float32, device=q.device) for _ in range(2))
    rq = rk = None
    if use_qk_l2norm_in_kernel:
        rq, rk = (torch.empty(NT, H, CHUNK, dtype=torch.float32, device=q.device) for _ in range(2))
    Ag = torch.empty(*shape, CHUNK, dtype=q.dtype, device=q.device)
    if NT:
        run_kernel(solve_kernel, NT * HV,
            k, g, beta, dense(A_log), dense(dt_bias), tables.chunks, G, bt, rk, Ag,
            NT * HV, k.stride(1), k.stride(2),
            *((0, 0) if g is None else (g.stride(1), g.stride(2))),
            *((0, 0) if beta is None else (beta.stride(1), beta.stride(2))),
            **options(
            launch.solve_warps, launch.solve_stages, H=H, HV=HV, K=K,
            BK=min(power_of_2(K), launch.solve_block), EPS=NORM_EPS,
            HAS_G=g is not None, HAS_BETA=beta is not None, GATE=use_gate_in_kernel, HAS_BIAS=dt_bias is not None,
            SIGMOID=use_beta_sigmoid_in_kernel, NORM=use_qk_l2norm_in_kernel, PRECISION=launch.solve_precision,
            DOT=launch.precision),
        )  # fmt: skip
    prepared = Prepared(G, bt, rq, rk, Ag)
    X, Yt = _products(q, k, prepared, tables, scale, 0, NT, store_rq=True, launch=launch)
    return Prepared(G, bt, rq, rk, Ag, X, Yt)


@launches
def prepare_products(
    q: Tensor,
    k: Tensor,
    prepared: Prepared,
    tables: ChunkTables,
    *,
    scale: float,
    first_chunk: int = 0,
    num_chunks: int | None = None,
) -> tuple[Tensor, Tensor]:
    """X [num_chunks, HV, K, 64] and Yt [num_chunks, HV, 64, 64] of a range of chunks, from what the backward kept."""
    count = tables.num_chunks - first_chunk if num_chunks is None else num_chunks
    launch = prepare_config(q.device, q.dtype, q.shape[3])
    return _products(q, k, prepared, tables, scale, first_chunk, count, store_rq=False, launch=launch)


@launches
def prepare_leading_products(
    q: Tensor, k: Tensor, prepared: Prepared, tables: ChunkTables, roles: Tensor, truncate: float, *, scale: float
) -> tuple[Tensor, Tensor]:
    """X and Yt [NT, ..] of the chunks that a walk for the gradient before each sequence takes, truncated where gates
    sum to less than `truncate`; the rest is not written. `roles` int32 [N]: which sequences a state enters (see
    `chunk_pieces`). Sequences are whole in the tables."""
    launch, NT = prepare_config(q.device, q.dtype, q.shape[3]), tables.num_chunks
    X, Yt = _room_for_products(q, prepared, NT)
    slots = max(1, min(LEADING_SLOTS, NT // tables.num_pieces))
    if NT:
        run_kernel(leading_products_kernel, tables.num_pieces * slots * prepared.G.shape[1],
            q, k, prepared.G, prepared.rq, prepared.rk, prepared.Ag, tables.pieces, roles, X, Yt,
            scale, q.stride(1), q.stride(2), k.stride(1), k.stride(2),
            **options(
            launch.products_warps, launch.products_stages, launch.leading_registers,
            **_product_sizes(q, prepared), TRUNCATE=truncate, SLOTS=slots, DOT=launch.precision),
        )  # fmt: skip
    return X, Yt


def _products(
    q: Tensor, k: Tensor, prepared: Prepared, tables: ChunkTables, scale: float, first_chunk: int,
    num_chunks: int, *, store_rq: bool, launch: Launch,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    X, Yt = _room_for_products(q, prepared, num_chunks)
    if num_chunks:
        run_kernel(products_kernel, num_chunks * prepared.G.shape[1],
            q, k, prepared.G, prepared.rq, prepared.rk, prepared.Ag, tables.chunks, X, Yt,
            first_chunk, scale, q.stride(1), q.stride(2), k.stride(1), k.stride(2),
            **options(
            launch.products_warps, launch.products_stages, launch.products_registers,
            **_product_sizes(q, prepared), EPS=NORM_EPS, STORE_RQ=store_rq, DOT=launch.precision),
        )  # fmt: skip
    return X, Yt


def _room_for_products(q: Tensor, prepared: Prepared, num_chunks: int) -> tuple[Tensor, Tensor]:
    HV, K = prepared.G.shape[1], q.shape[3]
    X = torch.empty(num_chunks, HV, K, CHUNK, dtype=q.dtype, device=q.device)
    return X, torch.empty(num_chunks, HV, CHUNK, CHUNK, dtype=q.dtype, device=q.device)


def _product_sizes(q: Tensor, prepared: Prepared) -> dict[str, Any]:
    H, K = q.shape[2], q.shape[3]
    return {"H": H, "HV": prepared.G.shape[1], "K": K, "BK": power_of_2(K), "NORM": prepared.rk is not None}
