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

Two kernels, because one would need more registers than there are: `scores_kernel` makes what is [C, C] and [C, V],
and `dqk_kernel` what is [C, K]. The second one builds dQ and dK transposed, [K, C], so that the first factor of every product
is a tile as it lies in memory (see `chunk_bwd_chains`). With x = r x_raw, r = 1 / |x_raw|, the gradient of x_raw is
y - x (x . y) with y = r dx, so the scores are stored with the norms multiplied in:

    D = diag(rq) dQK diag(rk)         F = -diag(rk beta) E diag(rk)

Dimensions: B batch, T tokens, H q/k heads, HV value heads, K, V head dims, C = 64, NT chunks.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gdn_cp.kernels.chunk_bwd_chains import matrix_tile, store_matrix_tile, store_rows, token_tile
from gdn_cp.kernels.gate_triton import softplus


@triton.jit
def _norm_gradient(y_t, x_t, r):
    """Gradient of x_raw, [K, C] like x_t = x_raw, from y = r dx, with r = 1 / |x_raw| of each column."""
    unit = x_t.to(tl.float32) * r[None, :]
    return y_t - unit * tl.sum(unit * y_t, 0)[None, :]


@triton.jit
def _store_gate_gradients(
    dG, g, A_log, dt_bias, dg_ptr, dA_part, ddt_part, row, n_rows, chunk, hv, stride_gt, stride_gh,
    HV: tl.constexpr, C: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """Write the gradient of g of one chunk and head, and its share of those of A_log and dt_bias."""
    i_c = tl.arange(0, C)
    valid = i_c < n_rows
    dg = tl.where(valid, tl.cumsum(dG, 0, reverse=True), 0.0)
    if GATE:
        x = tl.load(g + (row + i_c) * stride_gt + hv * stride_gh, mask=valid, other=0.0).to(tl.float32)
        if dt_bias is not None:
            x += tl.load(dt_bias + hv).to(tl.float32)
        rate = -tl.exp(tl.load(A_log + hv).to(tl.float32))
        tl.store(dA_part + chunk * HV + hv, tl.sum(dg * rate * softplus(x), 0))
        dg = dg * rate * tl.sigmoid(x)
        tl.store(ddt_part + chunk * HV + hv, tl.sum(dg, 0))
    tl.store(dg_ptr + (row + i_c) * HV + hv, dg.to(dg_ptr.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=["c0"])
def scores_kernel(
    q, k, v, do, G, bt, rq, rk, Ag, h, M, chunks, dv, U, D, F, dG, dbeta, scale, c0,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot, stride_oh,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, SIGMOID: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: chunk c0 + id // HV and value head id % HV. Stores U, D, F, dV, dbeta and what S gives to dG.

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
    q_tile = token_tile(q, row, hk, 0, n_rows, stride_qt, stride_qh, K, BK, C, TMA)
    k_tile = token_tile(k, row, hk, 0, n_rows, stride_kt, stride_kh, K, BK, C, TMA)
    dtype = k_tile.dtype
    Ag_tile = matrix_tile(Ag, chunk * HV + hv, 0, C, C, C, C, TMA)
    G_i = tl.load(G + (chunk * HV + hv) * C + i_c)
    b = tl.load(bt + (chunk * HV + hv) * C + i_c)
    gamma = tl.exp(G_i)
    k_norm = tl.full([C], 1.0, tl.float32)
    q_norm = tl.full([C], scale, tl.float32)
    if rk is not None:
        k_norm = tl.load(rk + (chunk * H + hk) * C + i_c)
        q_norm = tl.load(rq + (chunk * H + hk) * C + i_c) * scale
    q_norm = tl.where(valid, q_norm, 0.0)  # rows of q, k, dO and M past the end may be another sequence's
    dP = tl.zeros([C, C], tl.float32)
    MU = tl.zeros([C, C], tl.float32)
    m_dot_r = tl.zeros([C], tl.float32)
    from_state = tl.zeros([C], tl.float32)
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
        from_state -= tl.sum(dR * KS, 1)  # beta is 0 past the end, and so are dR and U
        store_rows(dv + (row * HV + hv) * V, dR, i_v, n_rows, HV * V, V, BV, C)
        bR = b[:, None] * R
        U_b = tl.dot(Ag_tile, bR.to(dtype), acc=bR, input_precision=PRECISION).to(dtype)
        store_matrix_tile(U, U_b, own, i_v, C, V, C, BV, TMA)
        dP = tl.dot(do_tile, tl.trans(U_b), acc=dP, input_precision=PRECISION)
        MU = tl.dot(m_tile, tl.trans(U_b), acc=MU, input_precision=PRECISION)
        if dG is not None:
            QS = (gamma * q_norm)[:, None] * tl.dot(q_tile, S, input_precision=PRECISION)
            from_state += tl.sum(do_tile.to(tl.float32) * QS, 1)
    strict = i_c[:, None] > i_c[None, :]
    Gam = tl.exp(tl.where(i_c[:, None] >= i_c[None, :], G_i[:, None] - G_i[None, :], float("-inf"))) * k_norm[None, :]
    D_tile = dP * Gam * q_norm[:, None]
    store_matrix_tile(D, D_tile.to(dtype), own, 0, C, C, C, C, TMA)
    E = tl.where(strict, MU * Gam * k_norm[:, None], 0.0)
    store_matrix_tile(F, (-b[:, None] * E).to(dtype), own, 0, C, C, C, C, TMA)
    EKK = E * tl.dot(k_tile, tl.trans(k_tile), input_precision=PRECISION)
    if dbeta is not None:
        d = m_dot_r - tl.sum(EKK, 1)
        if SIGMOID:
            d *= b * (1.0 - b)
        tl.store(dbeta + (row + i_c) * HV + hv, d.to(dbeta.dtype.element_ty), mask=valid)
    if dG is not None:
        decayed = tl.where(strict, D_tile * tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION), 0.0)
        decayed -= b[:, None] * EKK
        tl.store(dG + own * C + i_c, tl.sum(decayed, 1) - tl.sum(decayed, 0) + from_state)


@triton.jit(do_not_specialize=["c0"])
def dqk_kernel(
    q, k, do, g, G, rq, rk, h, dh, chunks, dv, U, D, F, dG, A_log, dt_bias, dq, dk, dg, dA_part, ddt_part, scale, c0,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_ot, stride_oh, stride_gt, stride_gh,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, GATE: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: chunk c0 + id // H and q/k head id % H; dQ and dK over all value heads of that head, and their dg."""
    R_HEADS: tl.constexpr = HV // H
    pid = tl.program_id(0)
    local = (pid // H).to(tl.int64)
    chunk = c0 + local
    hk = (pid % H).to(tl.int64)
    i_c = tl.arange(0, C)
    if tl.load(chunks + chunk * 4) < 0:
        if GATE:
            for j in range(R_HEADS):
                tl.store(dA_part + chunk * HV + hk * R_HEADS + j, 0.0)
                tl.store(ddt_part + chunk * HV + hk * R_HEADS + j, 0.0)
        return
    row = tl.load(chunks + chunk * 4 + 1).to(tl.int64)
    n_rows = tl.load(chunks + chunk * 4 + 2)
    valid = i_c < n_rows
    q_tile = token_tile(q, row, hk, 0, n_rows, stride_qt, stride_qh, K, BK, C, TMA)
    k_tile = token_tile(k, row, hk, 0, n_rows, stride_kt, stride_kh, K, BK, C, TMA)
    k_norm = tl.full([C], 1.0, tl.float32)
    q_norm = tl.full([C], 1.0, tl.float32)
    if rk is not None:
        k_norm = tl.load(rk + (chunk * H + hk) * C + i_c)
        q_norm = tl.load(rq + (chunk * H + hk) * C + i_c)
    dtype = k_tile.dtype
    dq_t = tl.zeros([BK, C], tl.float32)
    dk_t = tl.zeros([BK, C], tl.float32)
    for j in range(R_HEADS):
        hv = hk * R_HEADS + j
        own = local * HV + hv
        G_i = tl.load(G + (chunk * HV + hv) * C + i_c)
        G_last = tl.load(G + (chunk * HV + hv) * C + C - 1)
        gamma = tl.where(valid, tl.exp(G_i), 0.0)  # dO and dR past the end may be another sequence's
        u_scale = tl.exp(G_last - G_i) * k_norm
        k_dot_z = tl.zeros([C], tl.float32)
        state_dot = 0.0
        D_tile = matrix_tile(D, own, 0, C, C, C, C, TMA)
        dq_t = tl.dot(tl.trans(k_tile), tl.trans(D_tile), acc=dq_t, input_precision=PRECISION)
        dk_t = tl.dot(tl.trans(q_tile), D_tile, acc=dk_t, input_precision=PRECISION)
        F_tile = matrix_tile(F, own, 0, C, C, C, C, TMA)
        dk_t = tl.dot(tl.trans(k_tile), F_tile, acc=dk_t, input_precision=PRECISION)
        dk_t = tl.dot(tl.trans(k_tile), tl.trans(F_tile), acc=dk_t, input_precision=PRECISION)
        for i_v in tl.range(0, (V + BV - 1) // BV, num_stages=STAGES):
            S = matrix_tile(h, own, i_v, K, V, BK, BV, TMA)
            dS = matrix_tile(dh, own, i_v, K, V, BK, BV, TMA)
            do_tile = token_tile(do, row, hv, i_v, n_rows, stride_ot, stride_oh, V, BV, C, TMA)
            dR = token_tile(dv, row, hv, i_v, n_rows, HV * V, V, V, BV, C, TMA)
            U_tile = matrix_tile(U, own, i_v, C, V, C, BV, TMA)
            do_scaled = ((scale * gamma * q_norm)[:, None] * do_tile.to(tl.float32)).to(dtype)
            dq_t = tl.dot(S, tl.trans(do_scaled), acc=dq_t, input_precision=PRECISION)
            dR_scaled = (-(gamma * k_norm)[:, None] * dR.to(tl.float32)).to(dtype)
            dk_t = tl.dot(S, tl.trans(dR_scaled), acc=dk_t, input_precision=PRECISION)
            U_scaled = u_scale[:, None] * U_tile.to(tl.float32)
            dk_t = tl.dot(dS, tl.trans(U_scaled.to(dtype)), acc=dk_t, input_precision=PRECISION)
            if dg is not None:
                k_dot_z += tl.sum(U_scaled * tl.dot(k_tile, dS, input_precision=PRECISION), 1)
                state_dot += tl.sum(S.to(tl.float32) * dS.to(tl.float32))
        if dg is not None:
            dG_i = tl.load(dG + own * C + i_c) - k_dot_z
            dG_i += tl.where(i_c == C - 1, tl.exp(G_last) * state_dot + tl.sum(k_dot_z, 0), 0.0)
            _store_gate_gradients(
                dG_i,
                g,
                A_log,
                dt_bias,
                dg,
                dA_part,
                ddt_part,
                row,
                n_rows,
                chunk,
                hv,
                stride_gt,
                stride_gh,
                HV,
                C,
                GATE,
            )
    if rk is not None:
        # Loaded again: the tiles above are in shared memory, and would take registers all along.
        q_again = token_tile(q, row, hk, 0, n_rows, stride_qt, stride_qh, K, BK, C, TMA)
        dq_t = _norm_gradient(dq_t, tl.trans(q_again), tl.load(rq + (chunk * H + hk) * C + i_c))
    store_rows(dq + (row * H + hk) * K, tl.trans(dq_t), 0, n_rows, H * K, K, BK, C)
    if rk is not None:
        k_again = token_tile(k, row, hk, 0, n_rows, stride_kt, stride_kh, K, BK, C, TMA)
        dk_t = _norm_gradient(dk_t, tl.trans(k_again), tl.load(rk + (chunk * H + hk) * C + i_c))
    store_rows(dk + (row * H + hk) * K, tl.trans(dk_t), 0, n_rows, H * K, K, BK, C)
