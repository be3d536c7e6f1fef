"""The walk along the sequence of the chunked delta rule: outputs, final states, and summaries of pieces.

`chunk_prepare` has left for every chunk two matrices X [K, C] and Y [C, C] (stored transposed), so that a step is

    R = beta (V - (rk gamma) K S)      S+ = e^(G_C) S + X R      O = s (rq gamma) Q S + Y R

with two products that wait for each other (K S, then X R) and two beside them. A program walks over one *piece* of one
sequence, for one value head and BV columns of the state: columns are independent of each other. Where there are too few
programs to fill the card, sequences are cut into several pieces (`tables.chunk_tables`), in three launches. Over a
piece the state obeys S_out = S_ext + M S_in, so

    1. each piece but the last of its sequence is summarised: S_ext from a zero state, and M, column by column, from the
       columns of the identity with V = 0, by the same walk. A first piece starts from the initial state and needs no M;
    2. the summaries are composed in order into the state at the start of each piece, in float32;
    3. all pieces are walked at once from those states.

Dimensions: B batch, T tokens, H query/key heads, HV value heads, K, V head dims, N sequences, C = 64 rows of a chunk,
NT chunks (bound), NP pieces (bound).
"""

from __future__ import annotations

# ruff: noqa: SIM102  (a nested if on a tl.constexpr is decided when the kernel is compiled, `and` is not)
import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn_cp.kernels.chunk_prepare import Prepared
from gdn_cp.kernels.configs import ChainLaunch, chain_config
from gdn_cp.kernels.tables import ChunkTables


@triton.jit
def _chain_kernel(
    q_ptr, k_ptr, v_ptr, X_ptr, Yt_ptr, G_ptr, bt_ptr, rq_ptr, rk_ptr, pieces_ptr, initial_ptr, starts_ptr,
    o_ptr, final_ptr, sums_ptr,
    scale, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    STATE_K: tl.constexpr, STATE_V: tl.constexpr, NORM: tl.constexpr, HAS_INITIAL: tl.constexpr,
    HAS_STARTS: tl.constexpr, STORE_FINAL: tl.constexpr, SUMMARY: tl.constexpr, DOT: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Program (piece p, value head hv, column block b), b fastest.

    With SUMMARY, the columns of block b come from S_ext for b < V / BV and from M above, into sums [NP, HV, K, V + K].
    """
    V_BLOCKS: tl.constexpr = (V + BV - 1) // BV
    BLOCKS: tl.constexpr = V_BLOCKS + ((K + BV - 1) // BV if SUMMARY else 0)
    pid = tl.program_id(0)
    block = pid % BLOCKS
    hv = (pid // BLOCKS) % HV
    p = (pid // (BLOCKS * HV)).to(tl.int64)
    n = tl.load(pieces_ptr + p * 8).to(tl.int64)
    if n < 0:
        return
    chunk = tl.load(pieces_ptr + p * 8 + 1).to(tl.int64)
    steps = tl.load(pieces_ptr + p * 8 + 2)
    row = tl.load(pieces_ptr + p * 8 + 3).to(tl.int64)
    end = tl.load(pieces_ptr + p * 8 + 4)
    is_first = tl.load(pieces_ptr + p * 8 + 5) != 0
    is_last = tl.load(pieces_ptr + p * 8 + 6) != 0
    if SUMMARY:
        if is_last | (is_first & (block >= V_BLOCKS)):
            return
    h = (hv // (HV // H)).to(tl.int64)
    i = tl.arange(0, 64)
    d = tl.arange(0, BK)
    e = block * BV + tl.arange(0, BV)
    state_mask = (d[:, None] < K) & (e[None, :] < V)

    S = tl.zeros((BK, BV), tl.float32)
    if HAS_INITIAL:
        if is_first:
            initial = initial_ptr + (n * HV + hv) * (K * V) + d[:, None] * STATE_K + e[None, :] * STATE_V
            S = tl.load(initial, mask=state_mask, other=0.0)
    if HAS_STARTS:
        if not is_first:
            start = starts_ptr + (p * HV + hv) * (K * V) + d[:, None] * V + e[None, :]
            S = tl.load(start, mask=state_mask, other=0.0)
    if SUMMARY:
        if block >= V_BLOCKS:
            S = tl.where(d[:, None] == (e - V_BLOCKS * BV)[None, :], 1.0, 0.0)

    qk_mask = d[None, :] < K
    k_tile = k_ptr + row * stride_kt + h * stride_kh + i[:, None] * stride_kt + d[None, :]
    v_tile = v_ptr + row * stride_vt + hv.to(tl.int64) * stride_vh + i[:, None] * stride_vt + e[None, :]
    q_tile = q_ptr + row * stride_qt + h * stride_qh + i[:, None] * stride_qt + d[None, :]
    o_tile = o_ptr + (row * HV + hv) * V + i[:, None] * (HV * V) + e[None, :]
    rows_left = (end - row).to(tl.int32)
    for _ in tl.range(0, steps, num_stages=STAGES):
        valid = i[:, None] < rows_left
        k = tl.load(k_tile, mask=valid & qk_mask, other=0.0)
        v = tl.load(v_tile, mask=valid & (e[None, :] < V), other=0.0)
        X_tile = X_ptr + (chunk * HV + hv) * (K * 64) + d[:, None] * 64 + i[None, :]
        X = tl.load(X_tile) if BK == K else tl.load(X_tile, mask=d[:, None] < K, other=0.0)
        G = tl.load(G_ptr + (chunk * HV + hv) * 64 + i)
        G_last = tl.load(G_ptr + (chunk * HV + hv) * 64 + 63)
        beta = tl.load(bt_ptr + (chunk * HV + hv) * 64 + i)
        decay = tl.exp(G)
        k_factor = decay
        q_factor = decay * scale
        if NORM:
            k_factor = decay * tl.load(rk_ptr + (chunk * H + h) * 64 + i)
        S16 = S.to(k.dtype)
        KS = tl.dot(k, S16, input_precision=DOT)
        if not SUMMARY:
            q = tl.load(q_tile, mask=valid & qk_mask, other=0.0)
            QS = tl.dot(q, S16, input_precision=DOT)
        R = ((v.to(tl.float32) - KS * k_factor[:, None]) * beta[:, None]).to(k.dtype)
        S = tl.dot(X, R, S * tl.exp(G_last), input_precision=DOT)
        if not SUMMARY:
            if NORM:
                q_factor = q_factor * tl.load(rq_ptr + (chunk * H + h) * 64 + i)
            Yt = tl.load(Yt_ptr + (chunk * HV + hv) * 4096 + i[:, None] * 64 + i[None, :])
            out = tl.dot(tl.trans(Yt), R, QS * q_factor[:, None], input_precision=DOT)
            tl.store(o_tile, out.to(o_ptr.dtype.element_ty), mask=valid & (e[None, :] < V))
        chunk += 1
        rows_left -= 64
        k_tile += 64 * stride_kt
        q_tile += 64 * stride_qt
        v_tile += 64 * stride_vt
        o_tile += 64 * (HV * V)

    if SUMMARY:
        width: tl.constexpr = V + K
        column = tl.where(block < V_BLOCKS, e, V + e - V_BLOCKS * BV)
        limit = tl.where(block < V_BLOCKS, V, width)
        sums = sums_ptr + (p * HV + hv) * (K * width) + d[:, None] * width + column[None, :]
        tl.store(sums, S, mask=(d[:, None] < K) & (column[None, :] < limit))
    if STORE_FINAL:
        if is_last:
            final = final_ptr + (n * HV + hv) * (K * V) + d[:, None] * STATE_K + e[None, :] * STATE_V
            tl.store(final, S, mask=state_mask)


def chain_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prepared: Prepared,
    tables: ChunkTables,
    *,
    scale: float,
    initial_state: Tensor | None,
    output_final_state: bool,
    state_v_first: bool,
    launch: ChainLaunch | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Outputs [B, T, HV, V] in v's dtype and, if asked for, final states, float32 in the layout of `initial_state`.

    `prepared` and `tables` belong to the same batch; q, k, v need a contiguous last dimension and evenly spaced rows.
    """
    H, K = q.shape[2], q.shape[3]
    B, T, HV, V = v.shape
    N = tables.num_sequences
    launch = launch or chain_config(q.device, q.dtype, K, V)
    o = torch.empty(B, T, HV, V, dtype=v.dtype, device=v.device)
    state_shape = (N, HV, V, K) if state_v_first else (N, HV, K, V)
    final = torch.empty(state_shape, dtype=torch.float32, device=v.device) if output_final_state else None
    initial = None if initial_state is None else initial_state.contiguous()
    block_v = min(launch.block_v, max(16, triton.next_power_of_2(V)))
    if tables.num_pieces:
        _chain_kernel[(tables.num_pieces * HV * triton.cdiv(V, block_v),)](
            q, k, v, prepared.X, prepared.Yt, prepared.G, prepared.bt, prepared.rq, prepared.rk, tables.pieces, initial,
            None, o, final, None, scale,
            q.stride(1), q.stride(2), k.stride(1), k.stride(2), v.stride(1), v.stride(2),
            H=H, HV=HV, K=K, V=V, BK=triton.next_power_of_2(K), BV=block_v,
            STATE_K=1 if state_v_first else V, STATE_V=K if state_v_first else 1, NORM=prepared.rk is not None,
            HAS_INITIAL=initial is not None, HAS_STARTS=False, STORE_FINAL=final is not None, SUMMARY=False,
            DOT=launch.precision, STAGES=launch.num_stages, num_warps=launch.num_warps, num_stages=launch.num_stages,
        )  # fmt: skip
    return o, final
