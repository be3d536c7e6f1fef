"""The parallel part of the delta rule's backward: every gradient of a chunk, once the states around it are known.

Given, for one chunk of C = 64 rows, the state S before it, the gradient dS+ of the state after it and M (see
`chunk_bwd_chains` for the notation), with k, q unit-length where `rk`, `rq` are given:

    R = V - gamma (K S)        U = beta R + Ag (beta R)        dV = dR = beta M
    dQK = scale (dO U^T) * Gam               E = stricttril((M U^T) * Gam)
    dQ = scale gamma (dO S^T) + dQK K        Z = rho (U dS+^T)
    dK = Z - gamma (dR S^T) + dQK^T Q - (beta E + (beta E)^T) K
    beta dbeta = beta (rowdot(M, R) - rowsum(E * K K^T))
               = rowdot(K, Z) + colsum(dQK * Q K^T) - colsum(beta E * K K^T)
    dG = rowsum(F) - colsum(F) + rowdot(Q, scale gamma dO S^T) - rowdot(K, Z) - rowdot(dR, gamma K S),
         F = stricttril(dQK * Q K^T) - beta E * K K^T;     dG_C += lam <S, dS+> + sum_j rowdot(K, Z)_j
    dg_t = sum of dG_i over i >= t

The gradient of the inverse needs no product of C x C matrices, since Af^T dU = M and Af (beta R) = U. The diagonal of
dQK * Q K^T, which would cancel between rows and columns of dG, never enters.

dbeta is the mean of its two forms, which are equal but for rounding: X and M, rounded, spoil the first and U the second
(the second is <U, dU> less what U has by way of later rows). That takes a fifth off the error, for a few row sums. The
second form is divided by beta, so where beta is almost 0 the first stands alone.

Three kernels, because one would need more registers than there are: `scores_kernel` makes what is [C, C] and [C, V],
`dq_kernel` and `dk_kernel` what is [C, K]. The latter build dQ and dK transposed, [K, C], so that the first factor of
every product is a tile as it lies in memory (see `chunk_bwd_chains`), and add all products to one accumulator, which is
small enough for several programs on a multiprocessor: one waits for memory while others compute. With x = r x_raw,
r = 1 / |x_raw|, the gradient of x_raw is y - x (x . y) with y = r dx, so what is stored between the kernels has the
norms multiplied in, and the decays:

    D = diag(rq) dQK diag(rk)         F = -diag(rk beta) E diag(rk)
    W = -diag(rk gamma) dR            U as stored = diag(rk rho) U

What one value head adds to Q . dQ and K . dK before the last products, which dG takes, is the difference of two sums
over the accumulator; of K . dK, K . (S W^T) = -rowdot(dR, gamma K S) is known.

Dimensions: B batch, T tokens, H q/k heads, HV value heads, K, V head dims, C = 64, NT chunks.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportReturnType=false, reportGeneralTypeIssues=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from gdn_cp.kernels.chunk_bwd_chains import (
    load_rows,
    load_state,
    matrix_tile,
    store_matrix_tile,
    store_rows,
    store_state,
    token_tile,
)
from gdn_cp.kernels.chunk_bwd_rows import second_share

LEAST_DECAY = tl.constexpr(2.0**-60)


@triton.jit
def _norm_gradient(y_t, x_t, r):
    """Gradient of x_raw, [K, C] like x_t = x_raw, from y = r dx, with r = 1 / |x_raw| of each column."""
    unit = x_t.to(tl.float32) * r[None, :]
    return y_t - unit * tl.sum(unit * y_t, 0)[None, :]


@triton.jit(do_not_specialize=["c0"])
def scores_kernel(
    q, k, v, do, G, bt, rq, rk, Ag, h, M, chunks, W, U, D, F, dG, db, scale, c0,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot, stride_oh,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, LEAST_BETA: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: chunk c0 + id // HV and value head id % HV. Stores W, U, D, F, and in dG and db, float32, dG and
    dbeta but for what comes through dQ and dK.

    M and W may be the same memory: each tile is read before it is written, and only by this program.
    """
    pid = tl.program_id(0)
    local = (pid // HV).to(tl.int64)
    chunk = c0 + local
    hv = (pid % HV).to(tl.int64)
    hk = hv // (HV // H)
    if tl.load(chunks + chunk * 4) < 0:
        return
    row = tl.load(chunks + chunk * 4 + 1).to(tl.int64)
    n_rows = tl.load(chunks + chunk * 4 + 2)
    i_c = tl.arange(0, C)
    valid = i_c < n_rows
    own = local * HV + hv
    q_tile = load_rows(q + row * stride_qt + hk * stride_qh, 0, n_rows, stride_qt, K, BK, C)
    k_tile = load_rows(k + row * stride_kt + hk * stride_kh, 0, n_rows, stride_kt, K, BK, C)
    Ag_tile = load_state(Ag + (chunk * HV + hv) * (C * C), 0, C, C, C, C, False)
    dtype = k_tile.dtype
    G_i = tl.load(G + (chunk * HV + hv) * C + i_c)
    G_last = tl.load(G + (chunk * HV + hv) * C + C - 1)
    b = tl.load(bt + (chunk * HV + hv) * C + i_c)
    k_norm = tl.full([C], 1.0, tl.float32)
    q_norm = tl.full([C], scale, tl.float32)
    if rk is not None:
        k_norm = tl.load(rk + (chunk * H + hk) * C + i_c)
        q_norm = tl.load(rq + (chunk * H + hk) * C + i_c) * scale
    from_start = tl.exp(G_i) * k_norm
    to_end = tl.exp(G_last - G_i) * k_norm
    dP = tl.zeros([C, C], tl.float32)
    MU = tl.zeros([C, C], tl.float32)
    m_dot_r = tl.zeros([C], tl.float32)
    w_dot_ks = tl.zeros([C], tl.float32)
    for i_v in tl.range(0, (V + BV - 1) // BV, num_stages=STAGES):
        S = matrix_tile(h, own, i_v, K, V, BK, BV, TMA)
        v_tile = token_tile(v, row, hv, i_v, n_rows, stride_vt, stride_vh, V, BV, C, TMA)
        do_tile = token_tile(do, row, hv, i_v, n_rows, stride_ot, stride_oh, V, BV, C, TMA)
        m_tile = matrix_tile(M, own, i_v, C, V, C, BV, TMA)
        KS = tl.dot(k_tile, S, input_precision=PRECISION)
        R = v_tile.to(tl.float32) - from_start[:, None] * KS
        m = m_tile.to(tl.float32)
        m_dot_r += tl.sum(m * R, 1)
        w = tl.where(valid[:, None], -(from_start * b)[:, None] * m, 0.0)
        w_stored = w.to(dtype)
        w_dot_ks += tl.sum((w + w_stored.to(tl.float32)) * KS, 1)
        store_matrix_tile(W, w_stored, own, i_v, C, V, C, BV, TMA)
        bR = tl.where(valid[:, None], b[:, None] * R, 0.0)
        u = tl.dot(Ag_tile, bR.to(dtype), acc=bR, input_precision=PRECISION)
        store_matrix_tile(U, (to_end[:, None] * u).to(dtype), own, i_v, C, V, C, BV, TMA)
        u_b = u.to(dtype)
        dP = tl.dot(do_tile, tl.trans(u_b), acc=dP, input_precision=PRECISION)
        if dtype != tl.float32:
            # What rounding U took is most of the error of sums over the rows of dP, and so of the gate's gradient.
            u_rest = (u - u_b.to(tl.float32)).to(dtype)
            dP = tl.dot(do_tile, tl.trans(u_rest), acc=dP, input_precision=PRECISION)
        MU = tl.dot(m_tile, tl.trans(u_b), acc=MU, input_precision=PRECISION)
    # Rows past the end are left out, not multiplied by 0: what is there may not be finite.
    lower = (i_c[:, None] >= i_c[None, :]) & valid[:, None]
    strict = (i_c[:, None] > i_c[None, :]) & valid[:, None]
    Gam = tl.exp(tl.where(lower, G_i[:, None] - G_i[None, :], float("-inf"))) * k_norm[None, :]
    D_tile = tl.where(lower, dP * Gam * q_norm[:, None], 0.0)
    store_state(D + own * (C * C), D_tile, 0, C, C, C, C, False)
    E = tl.where(strict, MU * Gam * k_norm[:, None], 0.0)
    store_state(F + own * (C * C), -b[:, None] * E, 0, C, C, C, C, False)
    EKK = E * tl.dot(k_tile, tl.trans(k_tile), input_precision=PRECISION)
    # K . (Z + S W^T) is taken off dG later, of which only K . Z belongs there: w_dot_ks puts the rest back, with W as
    # it is stored, so that its rounding cancels, and adds the term -rowdot(dR, gamma K S), which is the same with W
    # before it is rounded. Hence the sum of both in the loop.
    if dG is not None or db is not None:
        decayed = D_tile * tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        diagonal = tl.sum(tl.where(i_c[:, None] == i_c[None, :], decayed, 0.0), 1)
        decayed = tl.where(strict, decayed, 0.0) - b[:, None] * EKK
        columns = tl.sum(decayed, 0)
        if dG is not None:
            part = tl.where(valid, tl.sum(decayed, 1) - columns + w_dot_ks, 0.0)
            tl.store(dG + (chunk * HV + hv) * C + i_c, part + tl.where(i_c == C - 1, -0.5 * tl.sum(w_dot_ks, 0), 0.0))
        if db is not None:
            share = second_share(b, LEAST_BETA)
            first = (1.0 - share * b) * (m_dot_r - tl.sum(EKK, 1))
            tl.store(db + (chunk * HV + hv) * C + i_c, first + share * (columns + diagonal - 0.5 * w_dot_ks))


@triton.jit(do_not_specialize=["c0"])
def dq_kernel(
    q, k, do, G, rq, h, chunks, D, dq, q_dots, scale, c0, stride_qt, stride_qh, stride_kt, stride_kh,
    stride_ot, stride_oh, stride_dt, stride_dh,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: chunk c0 + id // H and q/k head id % H; dQ over all value heads of that head, and of each
    value head q_dots [.., C] = Q . (scale gamma dO S^T), for `row_gradients_kernel`.

    dQ^T = sum of (S dO^T) diag(scale gamma rq) + K^T D^T, then the norm's part. q and dq may be the same memory: the
    tile is written last, and nobody reads q after this kernel.
    """
    pid = tl.program_id(0)
    local = (pid // H).to(tl.int64)
    chunk = c0 + local
    hk = (pid % H).to(tl.int64)
    if tl.load(chunks + chunk * 4) < 0:
        return
    row = tl.load(chunks + chunk * 4 + 1).to(tl.int64)
    n_rows = tl.load(chunks + chunk * 4 + 2)
    i_c = tl.arange(0, C)
    q_at = q + row * stride_qt + hk * stride_qh
    dq_t = tl.zeros([BK, C], tl.float32)
    q_dot = tl.zeros([C], tl.float32)
    unit = tl.full([C], 1.0, tl.float32)
    for j in range(HV // H):
        hv = hk * (HV // H) + j
        own = local * HV + hv
        # The accumulator is in units of this head's decay: dO, multiplied by it, would have to be rounded again.
        gamma = tl.maximum(tl.exp(tl.load(G + (chunk * HV + hv) * C + i_c)), LEAST_DECAY)
        dq_t *= (unit / gamma)[None, :]
        unit = gamma
        for i_v in tl.range(0, (V + BV - 1) // BV, num_stages=STAGES):
            S = matrix_tile(h, own, i_v, K, V, BK, BV, TMA)
            do_tile = token_tile(do, row, hv, i_v, n_rows, stride_ot, stride_oh, V, BV, C, TMA)
            dq_t = tl.dot(S, tl.trans(do_tile), acc=dq_t, input_precision=PRECISION)
        if q_dots is not None:
            # Loaded where it is used: held in registers all along, the tile would cost a program on the multiprocessor.
            q_tile = load_rows(q_at, 0, n_rows, stride_qt, K, BK, C)
            so_far = tl.sum(tl.trans(q_tile).to(tl.float32) * dq_t, 0) * (unit * scale)
            if rq is not None:
                so_far *= tl.load(rq + (chunk * H + hk) * C + i_c)
            tl.store(q_dots + (chunk * HV + hv) * C + i_c, so_far - q_dot)
            q_dot = so_far
    unit *= scale
    if rq is not None:
        unit *= tl.load(rq + (chunk * H + hk) * C + i_c)
    # Rows of dO past the end may be another sequence's.
    dq_t = tl.where(i_c[None, :] < n_rows, dq_t * unit[None, :], 0.0)
    k_tile = load_rows(k + row * stride_kt + hk * stride_kh, 0, n_rows, stride_kt, K, BK, C)
    for j in range(HV // H):
        D_tile = load_state(D + (local * HV + hk * (HV // H) + j) * (C * C), 0, C, C, C, C, False)
        dq_t = tl.dot(tl.trans(k_tile), tl.trans(D_tile), acc=dq_t, input_precision=PRECISION)
    if rq is not None:
        q_tile = load_rows(q_at, 0, n_rows, stride_qt, K, BK, C)
        dq_t = _norm_gradient(dq_t, tl.trans(q_tile), tl.load(rq + (chunk * H + hk) * C + i_c))
    store_rows(dq + row * stride_dt + hk * stride_dh, tl.trans(dq_t), 0, n_rows, stride_dt, K, BK, C)


@triton.jit(do_not_specialize=["c0"])
def dk_kernel(
    q, k, G, rk, h, dh, chunks, W, U, D, F, dk, k_dots, state_dots, c0, stride_qt, stride_qh, stride_kt, stride_kh,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: chunk c0 + id // H and q/k head id % H; dK over all value heads of that head, and of each value head
    what `row_gradients_kernel` needs: k_dots [.., C] = K . (Z + S W^T), and state_dots = lam <S, dS+>.

    dK^T = sum of S W^T + dS+ U^T + Q^T D + K^T (F + F^T), then the norm's part.
    """
    pid = tl.program_id(0)
    local = (pid // H).to(tl.int64)
    chunk = c0 + local
    hk = (pid % H).to(tl.int64)
    if tl.load(chunks + chunk * 4) < 0:
        return
    row = tl.load(chunks + chunk * 4 + 1).to(tl.int64)
    n_rows = tl.load(chunks + chunk * 4 + 2)
    i_c = tl.arange(0, C)
    k_at = k + row * stride_kt + hk * stride_kh
    dk_t = tl.zeros([BK, C], tl.float32)
    k_dot = tl.zeros([C], tl.float32)
    for j in range(HV // H):
        hv = hk * (HV // H) + j
        own = local * HV + hv
        state_dot = tl.zeros([BK, BV], tl.float32)
        for i_v in tl.range(0, (V + BV - 1) // BV, num_stages=STAGES):
            S = matrix_tile(h, own, i_v, K, V, BK, BV, TMA)
            dS = matrix_tile(dh, own, i_v, K, V, BK, BV, TMA)
            W_tile = matrix_tile(W, own, i_v, C, V, C, BV, TMA)
            U_tile = matrix_tile(U, own, i_v, C, V, C, BV, TMA)
            dk_t = tl.dot(S, tl.trans(W_tile), acc=dk_t, input_precision=PRECISION)
            dk_t = tl.dot(dS, tl.trans(U_tile), acc=dk_t, input_precision=PRECISION)
            if k_dots is not None:
                state_dot += S.to(tl.float32) * dS.to(tl.float32)
        if k_dots is not None:
            k_tile = load_rows(k_at, 0, n_rows, stride_kt, K, BK, C)
            so_far = tl.sum(tl.trans(k_tile).to(tl.float32) * dk_t, 0)
            tl.store(k_dots + (chunk * HV + hv) * C + i_c, so_far - k_dot)
            k_dot = so_far
            lam = tl.exp(tl.load(G + (chunk * HV + hv) * C + C - 1))
            tl.store(state_dots + chunk * HV + hv, lam * tl.sum(state_dot))
    k_tile = load_rows(k_at, 0, n_rows, stride_kt, K, BK, C)
    q_tile = load_rows(q + row * stride_qt + hk * stride_qh, 0, n_rows, stride_qt, K, BK, C)
    for j in range(HV // H):
        own = local * HV + hk * (HV // H) + j
        D_tile = load_state(D + own * (C * C), 0, C, C, C, C, False)
        F_tile = load_state(F + own * (C * C), 0, C, C, C, C, False)
        dk_t = tl.dot(tl.trans(q_tile), D_tile, acc=dk_t, input_precision=PRECISION)
        dk_t = tl.dot(tl.trans(k_tile), F_tile, acc=dk_t, input_precision=PRECISION)
        dk_t = tl.dot(tl.trans(k_tile), tl.trans(F_tile), acc=dk_t, input_precision=PRECISION)
    if rk is not None:
        k_again = load_rows(k_at, 0, n_rows, stride_kt, K, BK, C)
        dk_t = _norm_gradient(dk_t, tl.trans(k_again), tl.load(rk + (chunk * H + hk) * C + i_c))
    store_rows(dk + (row * H + hk) * K, tl.trans(dk_t), 0, n_rows, H * K, K, BK, C)
