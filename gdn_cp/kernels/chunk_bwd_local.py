"""The parallel part of the delta rule's backward: every gradient of a chunk, once the states around it are known.

Given, for one chunk of C = 64 rows, the state S before it, the gradient dS+ of the state after it and M (see
`chunk_bwd_chains` for the notation), with k, q unit-length where `rk`, `rq` are given:

    R = V - gamma (K S)        U = beta R + Ag (beta R)        dV = dR = beta M
    dQK = scale (dO U^T) * Gam               E = stricttril((M U^T) * Gam)
    dQ = scale gamma (dO S^T) + dQK K        Z = rho (U dS+^T)
    dK = Z - gamma (dR S^T) + dQK^T Q - (beta E + (beta E)^T) K
    dbeta = rowdot(M, R) - rowsum(E * K K^T)
    dG = rowsum(F) - colsum(F) + rowdot(Q, scale gamma dO S^T) - rowdot(K, Z) - rowdot(dR, gamma K S),
         F = stricttril(dQK * Q K^T) - beta E * K K^T;     dG_C += lam <S, dS+> + sum_j rowdot(K, Z)_j
    dg_t = sum of dG_i over i >= t

The gradient of the inverse needs no product of C x C matrices, since Af^T dU = M and Af (beta R) = U. The diagonal of
dQK * Q K^T, which would cancel between rows and columns of dG, never enters.

Three kernels, because one would need more registers than there are: `scores_kernel` makes what is [C, C] and [C, V],
`dq_kernel` and `dk_kernel` what is [C, K]. The latter build dQ and dK transposed, [K, C], so that the first factor of
every product is a tile as it lies in memory (see `chunk_bwd_chains`). With x = r x_raw, r = 1 / |x_raw|, the gradient
of x_raw is y - x (x . y) with y = r dx, so the scores are stored with the norms multiplied in:

    D = diag(rq) dQK diag(rk)         F = -diag(rk beta) E diag(rk)

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
from gdn_cp.kernels.gate_triton import softplus


@triton.jit
def _norm_gradient(y_t, x_t, r):
    """Gradient of x_raw, [K, C] like x_t = x_raw, from y = r dx, with r = 1 / |x_raw| of each column."""
    unit = x_t.to(tl.float32) * r[None, :]
    return y_t - unit * tl.sum(unit * y_t, 0)[None, :]


@triton.jit(do_not_specialize=["c0"])
def scores_kernel(
    q, k, v, do, G, bt, rq, rk, Ag, h, M, chunks, dv, U, D, F, dG, dbeta, scale, c0,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot, stride_oh,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, SIGMOID: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: chunk c0 + id // HV and value head id % HV. Stores U, D, F, dV, dbeta and
    dG but for what comes through dQ and dK.

    M and dv may be the same memory: each tile is read before it is written, and only by this program.
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
    b = tl.load(bt + (chunk * HV + hv) * C + i_c)
    gamma = tl.exp(G_i)
    k_norm = tl.full([C], 1.0, tl.float32)
    q_norm = tl.full([C], scale, tl.float32)
    if rk is not None:
        k_norm = tl.load(rk + (chunk * H + hk) * C + i_c)
        q_norm = tl.load(rq + (chunk * H + hk) * C + i_c) * scale
    dP = tl.zeros([C, C], tl.float32)
    MU = tl.zeros([C, C], tl.float32)
    m_dot_r = tl.zeros([C], tl.float32)
    dr_dot_ks = tl.zeros([C], tl.float32)
    for i_v in tl.range(0, (V + BV - 1) // BV, num_stages=STAGES):
        S = matrix_tile(h, own, i_v, K, V, BK, BV, TMA)
        v_tile = token_tile(v, row, hv, i_v, n_rows, stride_vt, stride_vh, V, BV, C, TMA)
        do_tile = token_tile(do, row, hv, i_v, n_rows, stride_ot, stride_oh, V, BV, C, TMA)
        m_tile = token_tile(M, row, hv, i_v, n_rows, HV * V, V, V, BV, C, TMA)
        KS = (gamma * k_norm)[:, None] * tl.dot(k_tile, S, input_precision=PRECISION)
        R = v_tile.to(tl.float32) - KS
        m = m_tile.to(tl.float32)
        m_dot_r += tl.sum(m * R, 1)
        dR = b[:, None] * m
        dr_dot_ks += tl.sum(dR * KS, 1)  # beta is 0 past the end, and so are dR and U
        store_rows(dv + (row * HV + hv) * V, dR, i_v, n_rows, HV * V, V, BV, C)
        bR = tl.where(valid[:, None], b[:, None] * R, 0.0)
        U_b = tl.dot(Ag_tile, bR.to(dtype), acc=bR, input_precision=PRECISION).to(dtype)
        store_matrix_tile(U, U_b, own, i_v, C, V, C, BV, TMA)
        dP = tl.dot(do_tile, tl.trans(U_b), acc=dP, input_precision=PRECISION)
        MU = tl.dot(m_tile, tl.trans(U_b), acc=MU, input_precision=PRECISION)
    # Rows past the end are left out, not multiplied by 0: what is there may not be finite.
    lower = (i_c[:, None] >= i_c[None, :]) & valid[:, None]
    strict = (i_c[:, None] > i_c[None, :]) & valid[:, None]
    Gam = tl.exp(tl.where(lower, G_i[:, None] - G_i[None, :], float("-inf"))) * k_norm[None, :]
    D_tile = tl.where(lower, dP * Gam * q_norm[:, None], 0.0)
    store_state(D + own * (C * C), D_tile, 0, C, C, C, C, False)
    E = tl.where(strict, MU * Gam * k_norm[:, None], 0.0)
    store_state(F + own * (C * C), -b[:, None] * E, 0, C, C, C, C, False)
    EKK = E * tl.dot(k_tile, tl.trans(k_tile), input_precision=PRECISION)
    if dbeta is not None:
        d = m_dot_r - tl.sum(EKK, 1)
        if SIGMOID:
            d *= b * (1.0 - b)
        tl.store(dbeta + (row + i_c) * HV + hv, d.to(dbeta.dtype.element_ty), mask=valid)
    if dG is not None:
        decayed = tl.where(strict, D_tile * tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION), 0.0)
        decayed -= b[:, None] * EKK
        tl.store(dG + own * C + i_c, tl.sum(decayed, 1) - tl.sum(decayed, 0) - dr_dot_ks)


@triton.jit(do_not_specialize=["c0"])
def dq_kernel(
    q, k, do, G, rq, h, chunks, D, dG, dq, scale, c0, stride_qt, stride_qh, stride_kt, stride_kh, stride_ot, stride_oh,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: chunk c0 + id // H and q/k head id % H; dQ over all value heads of that head, and its part of dG.

    dQ^T = sum of S dO^T diag(scale gamma) + K^T (D / rq)^T; the products take tiles as loaded, scales come after.
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
    k_tile = load_rows(k + row * stride_kt + hk * stride_kh, 0, n_rows, stride_kt, K, BK, C)
    q_norm = tl.full([C], 1.0, tl.float32)
    if rq is not None:
        q_norm = tl.load(rq + (chunk * H + hk) * C + i_c)
    dq_t = tl.zeros([BK, C], tl.float32)
    for j in range(HV // H):
        hv = hk * (HV // H) + j
        own = local * HV + hv
        D_tile = load_state(D + own * (C * C), 0, C, C, C, C, False)
        dq_t = tl.dot(tl.trans(k_tile), tl.trans(D_tile), acc=dq_t, input_precision=PRECISION)
        G_i = tl.load(G + (chunk * HV + hv) * C + i_c)
        through_s = tl.zeros([BK, C], tl.float32)
        for i_v in tl.range(0, (V + BV - 1) // BV, num_stages=STAGES):
            S = matrix_tile(h, own, i_v, K, V, BK, BV, TMA)
            do_tile = token_tile(do, row, hv, i_v, n_rows, stride_ot, stride_oh, V, BV, C, TMA)
            through_s = tl.dot(S, tl.trans(do_tile), acc=through_s, input_precision=PRECISION)
        through_s *= (scale * tl.exp(G_i) * q_norm)[None, :]
        dq_t += through_s
        if dG is not None:
            # Loaded again: held in registers all along, the tile would take the place of a second program.
            q_again = load_rows(q + row * stride_qt + hk * stride_qh, 0, n_rows, stride_qt, K, BK, C)
            q_dot = tl.sum(tl.trans(q_again).to(tl.float32) * through_s, 0)
            # Rows of dO past the end may be another sequence's.
            part = tl.load(dG + own * C + i_c)
            tl.store(dG + own * C + i_c, tl.where(i_c < n_rows, part + q_dot, 0.0))
    if rq is not None:
        q_again = load_rows(q + row * stride_qt + hk * stride_qh, 0, n_rows, stride_qt, K, BK, C)
        dq_t = _norm_gradient(dq_t, tl.trans(q_again), tl.load(rq + (chunk * H + hk) * C + i_c))
    store_rows(dq + (row * H + hk) * K, tl.trans(dq_t), 0, n_rows, H * K, K, BK, C)


@triton.jit(do_not_specialize=["c0"])
def dk_kernel(
    q, k, G, rk, h, dh, chunks, dv, U, D, F, dG, dk, c0, stride_qt, stride_qh, stride_kt, stride_kh,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: chunk c0 + id // H and q/k head id % H; dK over all value heads of that head, and the rest of dG.

    dK^T = sum of dS+ U^T diag(rho) - S dR^T diag(gamma) + (Q^T D + K^T (F + F^T)) / rk. One loop over (value head,
    BV columns) pairs, so that the next tiles of S, dS+, dR and U are always on their way.
    """
    NV: tl.constexpr = (V + BV - 1) // BV
    pid = tl.program_id(0)
    local = (pid // H).to(tl.int64)
    chunk = c0 + local
    hk = (pid % H).to(tl.int64)
    if tl.load(chunks + chunk * 4) < 0:
        return
    row = tl.load(chunks + chunk * 4 + 1).to(tl.int64)
    n_rows = tl.load(chunks + chunk * 4 + 2)
    i_c = tl.arange(0, C)
    q_tile = load_rows(q + row * stride_qt + hk * stride_qh, 0, n_rows, stride_qt, K, BK, C)
    k_tile = load_rows(k + row * stride_kt + hk * stride_kh, 0, n_rows, stride_kt, K, BK, C)
    dk_t = tl.zeros([BK, C], tl.float32)
    through_s = tl.zeros([BK, C], tl.float32)
    through_ds = tl.zeros([BK, C], tl.float32)
    state_dot = 0.0
    for step in tl.range(0, (HV // H) * NV, num_stages=STAGES):
        hv = hk * (HV // H) + step // NV
        i_v = step % NV
        own = local * HV + hv
        S = matrix_tile(h, own, i_v, K, V, BK, BV, TMA)
        dS = matrix_tile(dh, own, i_v, K, V, BK, BV, TMA)
        dR = token_tile(dv, row, hv, i_v, n_rows, HV * V, V, V, BV, C, TMA)
        U_tile = matrix_tile(U, own, i_v, C, V, C, BV, TMA)
        through_s = tl.dot(S, tl.trans(dR), acc=through_s, input_precision=PRECISION)
        through_ds = tl.dot(dS, tl.trans(U_tile), acc=through_ds, input_precision=PRECISION)
        if dG is not None:
            state_dot += tl.sum(S.to(tl.float32) * dS.to(tl.float32))
        if i_v == NV - 1:
            D_tile = load_state(D + own * (C * C), 0, C, C, C, C, False)
            F_tile = load_state(F + own * (C * C), 0, C, C, C, C, False)
            G_i = tl.load(G + (chunk * HV + hv) * C + i_c)
            G_last = tl.load(G + (chunk * HV + hv) * C + C - 1)
            gamma = tl.exp(G_i)
            rho = tl.exp(G_last - G_i)
            if rk is not None:
                k_norm = tl.load(rk + (chunk * H + hk) * C + i_c)
                gamma *= k_norm
                rho *= k_norm
            dk_t = tl.dot(tl.trans(q_tile), D_tile, acc=dk_t, input_precision=PRECISION)
            dk_t = tl.dot(tl.trans(k_tile), F_tile, acc=dk_t, input_precision=PRECISION)
            dk_t = tl.dot(tl.trans(k_tile), tl.trans(F_tile), acc=dk_t, input_precision=PRECISION)
            through_ds *= rho[None, :]
            dk_t += through_ds - through_s * gamma[None, :]
            if dG is not None:
                k_dot_z = tl.sum(tl.trans(k_tile).to(tl.float32) * through_ds, 0)
                from_last = tl.exp(G_last) * state_dot + tl.sum(k_dot_z, 0)
                part = tl.load(dG + own * C + i_c) - k_dot_z
                tl.store(dG + own * C + i_c, part + tl.where(i_c == C - 1, from_last, 0.0))
            through_s = tl.zeros([BK, C], tl.float32)
            through_ds = tl.zeros([BK, C], tl.float32)
            state_dot = 0.0
    if rk is not None:
        # Loaded again: held in registers all along, the tile would cost some that the loop needs.
        k_again = load_rows(k + row * stride_kt + hk * stride_kh, 0, n_rows, stride_kt, K, BK, C)
        dk_t = _norm_gradient(dk_t, tl.trans(k_again), tl.load(rk + (chunk * H + hk) * C + i_c))
    store_rows(dk + (row * H + hk) * K, tl.trans(dk_t), 0, n_rows, H * K, K, BK, C)


@triton.jit(do_not_specialize=["c0"])
def gate_gradients_kernel(
    dG, g, A_log, dt_bias, chunks, dg, parts, c0, stride_gt, stride_gh,
    HV: tl.constexpr, C: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """One program: chunk c0 + id // HV and value head id % HV; dg, and parts [NT, 2, HV] of dA_log and ddt_bias."""
    pid = tl.program_id(0)
    local = (pid // HV).to(tl.int64)
    chunk = c0 + local
    hv = pid % HV
    i_c = tl.arange(0, C)
    n_rows = tl.where(tl.load(chunks + chunk * 4) < 0, 0, tl.load(chunks + chunk * 4 + 2))
    valid = i_c < n_rows
    at = tl.load(chunks + chunk * 4 + 1).to(tl.int64) + i_c
    # dG_C is in the last of the C rows also where the sequence ends earlier.
    dG_i = tl.load(dG + (local * HV + hv) * C + i_c, mask=n_rows > 0, other=0.0)
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
