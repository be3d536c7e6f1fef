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

from gdn_cp.kernels.chunk_bwd_chains import load_rows, load_state, store_rows, store_state
from gdn_cp.kernels.gate_triton import softplus


@triton.jit
def _norm_gradient(d_t, x_t, r):
    """Gradient of x from that of x / |x|, both [K, C], with r = 1 / |x| of each column."""
    unit = x_t * r[None, :]
    return r[None, :] * (d_t - unit * tl.sum(unit * d_t, 0)[None, :])


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


@triton.jit
def _scores(
    q_tile, k_tile, v, do, G, bt, rq, rk, Ag, h, M, dv, U, dG, dbeta, scale, chunk, local, row, n_rows, hk,
    stride_vt, stride_vh, stride_ot, stride_oh,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, SIGMOID: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """First pass: dQK and beta E summed over the value heads [C, C]; stores U, dV, dbeta and what S gives to dG."""
    R_HEADS: tl.constexpr = HV // H
    NV: tl.constexpr = (V + BV - 1) // BV
    i_c = tl.arange(0, C)
    strict = i_c[:, None] > i_c[None, :]
    dtype = h.dtype.element_ty
    dQK_sum = tl.zeros([C, C], tl.float32)
    bE_sum = tl.zeros([C, C], tl.float32)
    for j in range(R_HEADS):
        hv = hk * R_HEADS + j
        Ag_tile = load_state(Ag + (chunk * HV + hv) * (C * C), 0, C, C, C, C, False)
        G_i = tl.load(G + (chunk * HV + hv) * C + i_c)
        b = tl.load(bt + (chunk * HV + hv) * C + i_c)
        k_scale = tl.exp(G_i)
        q_scale = scale * k_scale
        if rk is not None:
            k_scale *= tl.load(rk + (chunk * H + hk) * C + i_c)
        dP = tl.zeros([C, C], tl.float32)
        MU = tl.zeros([C, C], tl.float32)
        m_dot_r = tl.zeros([C], tl.float32)
        dr_dot_ks = tl.zeros([C], tl.float32)
        q_dot = tl.zeros([C], tl.float32)
        for i_v in tl.range(0, NV, num_stages=STAGES):
            S = load_state(h + (local * HV + hv) * (K * V), i_v, K, V, BK, BV, False)
            v_tile = load_rows(v + row * stride_vt + hv * stride_vh, i_v, n_rows, stride_vt, V, BV, C)
            do_tile = load_rows(do + row * stride_ot + hv * stride_oh, i_v, n_rows, stride_ot, V, BV, C)
            m_tile = load_rows(M + (row * HV + hv) * V, i_v, n_rows, HV * V, V, BV, C)
            KS = k_scale[:, None] * tl.dot(k_tile, S, input_precision=PRECISION)
            R = v_tile.to(tl.float32) - KS
            m = m_tile.to(tl.float32)
            m_dot_r += tl.sum(m * R, 1)
            dR = b[:, None] * m
            dr_dot_ks += tl.sum(dR * KS, 1)
            store_rows(dv + (row * HV + hv) * V, dR, i_v, n_rows, HV * V, V, BV, C)
            bR = b[:, None] * R
            U_b = tl.dot(Ag_tile, bR.to(dtype), acc=bR, input_precision=PRECISION).to(dtype)
            store_state(U + (local * HV + hv) * (C * V), U_b, i_v, C, V, C, BV, False)
            dP = tl.dot(do_tile, tl.trans(U_b), acc=dP, input_precision=PRECISION)
            MU = tl.dot(m_tile, tl.trans(U_b), acc=MU, input_precision=PRECISION)
            if dG is not None:
                QS = tl.dot(q_tile, S, input_precision=PRECISION)
                q_dot += tl.sum(do_tile.to(tl.float32) * QS, 1)
        Gam = tl.exp(tl.where(i_c[:, None] >= i_c[None, :], G_i[:, None] - G_i[None, :], float("-inf")))
        dQK = dP * (scale * Gam)
        E = tl.where(strict, MU * Gam, 0.0)
        dQK_sum += dQK
        bE_sum += b[:, None] * E
        EKK = E * tl.dot(k_tile, tl.trans(k_tile), input_precision=PRECISION)
        if rk is not None:
            EKK *= tl.load(rk + (chunk * H + hk) * C + i_c)[:, None] * tl.load(rk + (chunk * H + hk) * C + i_c)[None, :]
        if dbeta is not None:
            d = m_dot_r - tl.sum(EKK, 1)
            if SIGMOID:
                d *= b * (1.0 - b)
            tl.store(dbeta + (row + i_c) * HV + hv, d.to(dbeta.dtype.element_ty), mask=i_c < n_rows)
        if dG is not None:
            F = tl.where(strict, dQK * tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION), 0.0)
            q_dot *= q_scale
            if rk is not None:
                q_norm = tl.load(rq + (chunk * H + hk) * C + i_c)
                F *= q_norm[:, None] * tl.load(rk + (chunk * H + hk) * C + i_c)[None, :]
                q_dot *= q_norm
            F -= b[:, None] * EKK
            tl.store(dG + (local * HV + hv) * C + i_c, tl.sum(F, 1) - tl.sum(F, 0) + q_dot - dr_dot_ks)
    return dQK_sum, bE_sum


@triton.jit
def _through_states(
    dq_t, dk_t, k_tile, do, g, G, rk, h, dh, dv, U, dG, A_log, dt_bias, dg, dA_part, ddt_part, scale, chunk, local, row,
    n_rows, hk, stride_ot, stride_oh, stride_gt, stride_gh,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, GATE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Second pass: adds to dQ^T, dK^T [K, C] what comes through S and dS+, and finishes the gradient of the gate."""
    R_HEADS: tl.constexpr = HV // H
    NV: tl.constexpr = (V + BV - 1) // BV
    i_c = tl.arange(0, C)
    dtype = h.dtype.element_ty
    for j in range(R_HEADS):
        hv = hk * R_HEADS + j
        G_i = tl.load(G + (chunk * HV + hv) * C + i_c)
        G_last = tl.load(G + (chunk * HV + hv) * C + C - 1)
        gamma = tl.exp(G_i)
        rho = tl.exp(G_last - G_i)
        k_dot_z = tl.zeros([C], tl.float32)
        state_dot = 0.0
        for i_v in tl.range(0, NV, num_stages=STAGES):
            S = load_state(h + (local * HV + hv) * (K * V), i_v, K, V, BK, BV, False)
            dS = load_state(dh + (local * HV + hv) * (K * V), i_v, K, V, BK, BV, False)
            do_tile = load_rows(do + row * stride_ot + hv * stride_oh, i_v, n_rows, stride_ot, V, BV, C)
            dR = load_rows(dv + (row * HV + hv) * V, i_v, n_rows, HV * V, V, BV, C)
            U_tile = load_state(U + (local * HV + hv) * (C * V), i_v, C, V, C, BV, False)
            do_scaled = ((scale * gamma)[:, None] * do_tile.to(tl.float32)).to(dtype)
            dq_t = tl.dot(S, tl.trans(do_scaled), acc=dq_t, input_precision=PRECISION)
            dR_scaled = (-gamma[:, None] * dR.to(tl.float32)).to(dtype)
            dk_t = tl.dot(S, tl.trans(dR_scaled), acc=dk_t, input_precision=PRECISION)
            U_scaled = rho[:, None] * U_tile.to(tl.float32)
            dk_t = tl.dot(dS, tl.trans(U_scaled.to(dtype)), acc=dk_t, input_precision=PRECISION)
            if dg is not None:
                k_dot_z += tl.sum(U_scaled * tl.dot(k_tile, dS, input_precision=PRECISION), 1)
                state_dot += tl.sum(S.to(tl.float32) * dS.to(tl.float32))
        if dg is not None:
            if rk is not None:
                k_dot_z *= tl.load(rk + (chunk * H + hk) * C + i_c)
            dG_i = tl.load(dG + (local * HV + hv) * C + i_c) - k_dot_z
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
    return dq_t, dk_t


@triton.jit(do_not_specialize=["c0"])
def local_gradients_kernel(
    q, k, v, do, g, G, bt, rq, rk, Ag, h, dh, M, A_log, dt_bias, chunks, U, dG, dq, dk, dv, dg, dbeta, dA_part,
    ddt_part, scale, c0, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot, stride_oh,
    stride_gt, stride_gh,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, GATE: tl.constexpr, SIGMOID: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: chunk c0 + id // H and q/k head id % H, with all value heads of that head.

    Two passes over (value head, BV columns), because one would need more registers than there are. U [C, V] and dG [C]
    of each value head wait in memory between them, which the cache holds. M and dv may be the same memory: each tile is
    read before it is written, and only by this program.
    """
    pid = tl.program_id(0)
    chunk = (c0 + pid // H).to(tl.int64)
    local = (pid // H).to(tl.int64)
    hk = (pid % H).to(tl.int64)
    i_c = tl.arange(0, C)
    seq = tl.load(chunks + chunk * 4)
    if seq < 0:
        if GATE:
            for j in range(HV // H):
                tl.store(dA_part + chunk * HV + hk * (HV // H) + j, 0.0)
                tl.store(ddt_part + chunk * HV + hk * (HV // H) + j, 0.0)
        return
    row = tl.load(chunks + chunk * 4 + 1).to(tl.int64)
    n_rows = tl.load(chunks + chunk * 4 + 2)
    dtype = h.dtype.element_ty
    q_tile = load_rows(q + row * stride_qt + hk * stride_qh, 0, n_rows, stride_qt, K, BK, C)
    k_tile = load_rows(k + row * stride_kt + hk * stride_kh, 0, n_rows, stride_kt, K, BK, C)
    dQK, bE = _scores(
        q_tile, k_tile, v, do, G, bt, rq, rk, Ag, h, M, dv, U, dG, dbeta, scale, chunk, local, row, n_rows, hk,
        stride_vt, stride_vh, stride_ot, stride_oh, H, HV, K, V, BK, BV, C, SIGMOID, PRECISION, STAGES,
    )  # fmt: skip
    q_norm = tl.full([C], 1.0, tl.float32)
    k_norm = tl.full([C], 1.0, tl.float32)
    if rk is not None:
        q_norm = tl.load(rq + (chunk * H + hk) * C + i_c)
        k_norm = tl.load(rk + (chunk * H + hk) * C + i_c)
    dq_t = tl.dot(tl.trans(k_tile), tl.trans((dQK * k_norm[None, :]).to(dtype)), input_precision=PRECISION)
    dk_t = tl.dot(tl.trans(q_tile), (dQK * q_norm[:, None]).to(dtype), input_precision=PRECISION)
    symmetric = ((bE + tl.trans(bE)) * -k_norm[:, None]).to(dtype)
    dk_t = tl.dot(tl.trans(k_tile), symmetric, acc=dk_t, input_precision=PRECISION)
    tl.debug_barrier()  # U, dv and dG were written by other threads
    dq_t, dk_t = _through_states(
        dq_t, dk_t, k_tile, do, g, G, rk, h, dh, dv, U, dG, A_log, dt_bias, dg, dA_part, ddt_part,
        scale, chunk, local, row, n_rows, hk, stride_ot, stride_oh, stride_gt, stride_gh,
        H, HV, K, V, BK, BV, C, GATE, PRECISION, STAGES,
    )  # fmt: skip
    if rk is not None:
        # Loaded again: the tiles above are in shared memory, and would take registers all along.
        q_again = load_rows(q + row * stride_qt + hk * stride_qh, 0, n_rows, stride_qt, K, BK, C)
        k_again = load_rows(k + row * stride_kt + hk * stride_kh, 0, n_rows, stride_kt, K, BK, C)
        dq_t = _norm_gradient(dq_t, tl.trans(q_again).to(tl.float32), tl.load(rq + (chunk * H + hk) * C + i_c))
        dk_t = _norm_gradient(dk_t, tl.trans(k_again).to(tl.float32), tl.load(rk + (chunk * H + hk) * C + i_c))
    store_rows(dq + (row * H + hk) * K, tl.trans(dq_t), 0, n_rows, H * K, K, BK, C)
    store_rows(dk + (row * H + hk) * K, tl.trans(dk_t), 0, n_rows, H * K, K, BK, C)
