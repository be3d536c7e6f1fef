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
dQK * Q K^T, which would cancel between rows and columns of dG, never enters. dQ and dK are built transposed, [K, C], so
that the first factor of every product is a tile as it lies in memory (see `chunk_bwd_chains`).

Dimensions: B batch, T tokens, H q/k heads, r value heads of a q/k head, HV = H r, K, V head dims, C = 64, NT chunks.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gdn_cp.kernels.chunk_bwd_chains import load_rows, load_state, store_rows
from gdn_cp.kernels.gate_triton import softplus


@triton.jit
def _norm_gradient(d_t, x_t, r):
    """Gradient of x from that of x / |x|, both [K, C], with r = 1 / |x| of each column."""
    unit = x_t * r[None, :]
    return r[None, :] * (d_t - unit * tl.sum(unit * d_t, 0)[None, :])


@triton.jit
def _store_gate_gradients(
    dG, dbeta, g, bt, A_log, dt_bias, dg_ptr, dbeta_ptr, dA_part, ddt_part, row, n_rows, chunk, hv,
    stride_gt, stride_gh, HV: tl.constexpr, C: tl.constexpr, GATE: tl.constexpr, SIGMOID: tl.constexpr,
):  # fmt: skip
    """Write the gradients of g and beta of one chunk and head, and its share of those of A_log and dt_bias."""
    i_c = tl.arange(0, C)
    valid = i_c < n_rows
    at = (row + i_c) * HV + hv
    if dbeta_ptr is not None:
        if SIGMOID:
            dbeta = dbeta * bt * (1.0 - bt)
        tl.store(dbeta_ptr + at, dbeta.to(dbeta_ptr.dtype.element_ty), mask=valid)
    if dg_ptr is not None:
        dg = tl.where(valid, tl.cumsum(dG, 0, reverse=True), 0.0)
        if GATE:
            x = tl.load(g + (row + i_c) * stride_gt + hv * stride_gh, mask=valid, other=0.0).to(tl.float32)
            if dt_bias is not None:
                x += tl.load(dt_bias + hv).to(tl.float32)
            rate = -tl.exp(tl.load(A_log + hv).to(tl.float32))
            tl.store(dA_part + chunk * HV + hv, tl.sum(dg * rate * softplus(x), 0))
            dg = dg * rate * tl.sigmoid(x)
            tl.store(ddt_part + chunk * HV + hv, tl.sum(dg, 0))
        tl.store(dg_ptr + at, dg.to(dg_ptr.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=["c0"])
def local_gradients_kernel(
    q, k, v, do, g, G, bt, rq, rk, Ag, h, dh, M, A_log, dt_bias, chunks, dq, dk, dv, dg, dbeta, dA_part, ddt_part,
    scale, c0, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot, stride_oh,
    stride_gt, stride_gh,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, GATE: tl.constexpr, SIGMOID: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: chunk c0 + id // H and q/k head id % H, with all value heads of that head.

    Walks over (value head, block of BV columns) pairs in one loop, so that the next tiles are fetched while one is
    worked on. dQ and dK gather all value heads on the chip; dQK and beta E, which meet only K and Q, are summed over
    value heads first and multiplied once. M and dv may be the same memory: each tile is read before it is written.
    """
    pid = tl.program_id(0)
    chunk = (c0 + pid // H).to(tl.int64)
    local = (pid // H).to(tl.int64)
    hk = (pid % H).to(tl.int64)
    R_HEADS: tl.constexpr = HV // H
    NV: tl.constexpr = (V + BV - 1) // BV
    i_c = tl.arange(0, C)
    seq = tl.load(chunks + chunk * 4)
    if seq < 0:
        if GATE:
            for j in range(R_HEADS):
                tl.store(dA_part + chunk * HV + hk * R_HEADS + j, 0.0)
                tl.store(ddt_part + chunk * HV + hk * R_HEADS + j, 0.0)
        return
    row = tl.load(chunks + chunk * 4 + 1).to(tl.int64)
    n_rows = tl.load(chunks + chunk * 4 + 2)
    dtype = h.dtype.element_ty
    q_tile = load_rows(q + row * stride_qt + hk * stride_qh, 0, n_rows, stride_qt, K, BK, C)
    k_tile = load_rows(k + row * stride_kt + hk * stride_kh, 0, n_rows, stride_kt, K, BK, C)
    strict = i_c[:, None] > i_c[None, :]

    dq_t = tl.zeros([BK, C], tl.float32)
    dk_t = tl.zeros([BK, C], tl.float32)
    dQK_sum = tl.zeros([C, C], tl.float32)
    bE_sum = tl.zeros([C, C], tl.float32)
    dP = tl.zeros([C, C], tl.float32)
    MU = tl.zeros([C, C], tl.float32)
    m_dot_r = tl.zeros([C], tl.float32)
    dG = tl.zeros([C], tl.float32)
    dG_last = 0.0
    for step in tl.range(0, R_HEADS * NV, num_stages=STAGES):
        hv = hk * R_HEADS + step // NV
        i_v = step % NV
        state_at = (local * HV + hv) * (K * V)
        S = load_state(h + state_at, i_v, K, V, BK, BV, False)
        dS = load_state(dh + state_at, i_v, K, V, BK, BV, False)
        v_tile = load_rows(v + row * stride_vt + hv * stride_vh, i_v, n_rows, stride_vt, V, BV, C)
        do_tile = load_rows(do + row * stride_ot + hv * stride_oh, i_v, n_rows, stride_ot, V, BV, C)
        m_tile = load_rows(M + (row * HV + hv) * V, i_v, n_rows, HV * V, V, BV, C)
        Ag_tile = load_state(Ag + (chunk * HV + hv) * (C * C), 0, C, C, C, C, False)
        G_i = tl.load(G + (chunk * HV + hv) * C + i_c)
        b = tl.load(bt + (chunk * HV + hv) * C + i_c)
        G_last = tl.load(G + (chunk * HV + hv) * C + C - 1)
        gamma = tl.exp(G_i)
        k_scale = gamma
        q_scale = scale * gamma
        u_scale = tl.exp(G_last - G_i)
        z_scale = u_scale
        if rk is not None:
            k_norm = tl.load(rk + (chunk * H + hk) * C + i_c)
            k_scale *= k_norm
            z_scale *= k_norm

        # The state's part of dG_C, then R and U.
        dG_last += tl.exp(G_last) * tl.sum(S.to(tl.float32) * dS.to(tl.float32))
        KS = k_scale[:, None] * tl.dot(k_tile, S, input_precision=PRECISION)
        R = v_tile.to(tl.float32) - KS
        m = m_tile.to(tl.float32)
        m_dot_r += tl.sum(m * R, 1)
        dR = b[:, None] * m
        dG -= tl.sum(dR * KS, 1)
        store_rows(dv + (row * HV + hv) * V, dR, i_v, n_rows, HV * V, V, BV, C)
        dk_t = tl.dot(S, tl.trans((-gamma[:, None] * dR).to(dtype)), acc=dk_t, input_precision=PRECISION)
        bR = b[:, None] * R
        U = tl.dot(Ag_tile, bR.to(dtype), acc=bR, input_precision=PRECISION)

        # What meets U.
        dP = tl.dot(do_tile, tl.trans(U.to(dtype)), acc=dP, input_precision=PRECISION)
        MU = tl.dot(m_tile, tl.trans(U.to(dtype)), acc=MU, input_precision=PRECISION)
        dk_t = tl.dot(dS, tl.trans((u_scale[:, None] * U).to(dtype)), acc=dk_t, input_precision=PRECISION)
        k_dot_z = tl.sum(z_scale[:, None] * U * tl.dot(k_tile, dS, input_precision=PRECISION), 1)
        dG -= k_dot_z
        dG_last += tl.sum(k_dot_z, 0)

        # What meets dO and S.
        do_scaled = q_scale[:, None] * do_tile.to(tl.float32)
        dq_t = tl.dot(S, tl.trans(do_scaled.to(dtype)), acc=dq_t, input_precision=PRECISION)
        q_dot = tl.sum(do_scaled * tl.dot(q_tile, S, input_precision=PRECISION), 1)
        if rk is not None:
            q_dot *= tl.load(rq + (chunk * H + hk) * C + i_c)
        dG += q_dot

        if i_v == NV - 1:
            Gam = tl.exp(tl.where(i_c[:, None] >= i_c[None, :], G_i[:, None] - G_i[None, :], float("-inf")))
            KK = tl.dot(k_tile, tl.trans(k_tile), input_precision=PRECISION)
            QK = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
            if rk is not None:
                k_norm_j = tl.load(rk + (chunk * H + hk) * C + i_c)
                KK *= k_norm_j[:, None] * k_norm_j[None, :]
                QK *= tl.load(rq + (chunk * H + hk) * C + i_c)[:, None] * k_norm_j[None, :]
            dQK = scale * dP * Gam
            E = tl.where(strict, MU * Gam, 0.0)
            dQK_sum += dQK
            bE_sum += b[:, None] * E
            EKK = E * KK
            F = tl.where(strict, dQK * QK, 0.0) - b[:, None] * EKK
            dG += tl.sum(F, 1) - tl.sum(F, 0)
            _store_gate_gradients(
                dG + tl.where(i_c == C - 1, dG_last, 0.0), m_dot_r - tl.sum(EKK, 1),
                g, b, A_log, dt_bias, dg, dbeta, dA_part, ddt_part, row, n_rows, chunk, hv,
                stride_gt, stride_gh, HV, C, GATE, SIGMOID,
            )  # fmt: skip
            dP = tl.zeros([C, C], tl.float32)
            MU = tl.zeros([C, C], tl.float32)
            m_dot_r = tl.zeros([C], tl.float32)
            dG = tl.zeros([C], tl.float32)
            dG_last = 0.0

    q_norm = tl.full([C], 1.0, tl.float32)
    k_norm = tl.full([C], 1.0, tl.float32)
    if rk is not None:
        q_norm = tl.load(rq + (chunk * H + hk) * C + i_c)
        k_norm = tl.load(rk + (chunk * H + hk) * C + i_c)
    q_t = tl.trans(q_tile)
    k_t = tl.trans(k_tile)
    dq_t = tl.dot(k_t, tl.trans((dQK_sum * k_norm[None, :]).to(dtype)), acc=dq_t, input_precision=PRECISION)
    dk_t = tl.dot(q_t, (dQK_sum * q_norm[:, None]).to(dtype), acc=dk_t, input_precision=PRECISION)
    symmetric = (bE_sum + tl.trans(bE_sum)) * -k_norm[:, None]
    dk_t = tl.dot(k_t, symmetric.to(dtype), acc=dk_t, input_precision=PRECISION)
    if rk is not None:
        # Loaded again: kept from before the loop, these would take registers all along it.
        q_again = load_rows(q + row * stride_qt + hk * stride_qh, 0, n_rows, stride_qt, K, BK, C)
        k_again = load_rows(k + row * stride_kt + hk * stride_kh, 0, n_rows, stride_kt, K, BK, C)
        dq_t = _norm_gradient(dq_t, tl.trans(q_again).to(tl.float32), q_norm)
        dk_t = _norm_gradient(dk_t, tl.trans(k_again).to(tl.float32), k_norm)
    store_rows(dq + (row * H + hk) * K, tl.trans(dq_t), 0, n_rows, H * K, K, BK, C)
    store_rows(dk + (row * H + hk) * K, tl.trans(dk_t), 0, n_rows, H * K, K, BK, C)
