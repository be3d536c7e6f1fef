"""The two sequential passes of the delta rule's backward, in one launch: states forward, state gradients backward.

Within a chunk of C = 64 rows, with k and q unit-length where `rk`, `rq` are given, G the running sum of the gate,
gamma = e^G, rho = e^(G_C - G), lam = e^(G_C), Af = (I + stricttril(diag(beta) K K^T * Gam))^-1:

    X = K^T diag(rho) Af [K, C]       Y = scale * tril(Q K^T * Gam) Af [C, C]   (`chunk_prepare`)
    states      R = V - gamma (K S)              S+ = lam S + X (beta R)
    gradients   M = X^T dS+ + Y^T dO             dS = lam dS+ + Q^T (scale gamma dO) - K^T (gamma beta M)

The second line is the first one transposed, with two dependent products a chunk like it. The passes need nothing of
each other, so half of the programs walk one way and half the other. What the parallel kernel of `chunk_bwd_local` needs
is stored: S before each chunk, dS+ after each chunk, and M; and dV, the gradient of v, which is done with that.

Every product takes a tile as it lies in memory as its first factor: `ptxas` up to 13.2 miscompiles products whose first
factor was computed in registers (triton #9433).

Dimensions: B batch, T tokens, H q/k heads, HV value heads, K, V head dims, C = 64, NT chunks, NP pieces, NC chunks of
the slice of chunks [c0, c0 + NC) that a launch works on.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportReturnType=false, reportGeneralTypeIssues=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportAssignmentType=false
# ruff: noqa: SIM102  (an if on a constant is decided when the kernel is compiled, `and` is not)

from __future__ import annotations

import triton
import triton.language as tl

from gdn_cp.kernels.decay_triton import first_end


@triton.jit
def load_rows(base, i_d, n_rows, stride, D: tl.constexpr, BD: tl.constexpr, C: tl.constexpr):
    """Columns i_d*BD.. of C rows that begin `stride` apart from `base` on; zero past row n_rows and column D."""
    rows = tl.arange(0, C)[:, None]
    cols = tl.arange(0, BD)[None, :]
    mask = rows < n_rows
    if D % BD != 0:
        mask = mask & (i_d * BD + cols < D)
    return tl.load(base + i_d * BD + (rows * stride + cols), mask=mask, other=0.0)


@triton.jit
def store_rows(base, tile, i_d, n_rows, stride, D: tl.constexpr, BD: tl.constexpr, C: tl.constexpr):
    """The inverse of `load_rows`."""
    rows = tl.arange(0, C)[:, None]
    cols = tl.arange(0, BD)[None, :]
    mask = rows < n_rows
    if D % BD != 0:
        mask = mask & (i_d * BD + cols < D)
    tl.store(base + i_d * BD + (rows * stride + cols), tile.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _state_offsets(K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, V_FIRST: tl.constexpr):
    """Offsets in a [K, V] state of its first BV columns; the state lies as [V, K] with V_FIRST."""
    i_k = tl.arange(0, BK)[:, None]
    i_v = tl.arange(0, BV)[None, :]
    return i_v * K + i_k if V_FIRST else i_k * V + i_v


@triton.jit
def load_state(base, i_v, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, V_FIRST: tl.constexpr):
    """Columns i_v*BV.. of the state at `base`; zero past row K and column V."""
    pointers = base + i_v * (BV * K if V_FIRST else BV) + _state_offsets(K, V, BK, BV, V_FIRST)
    if K % BK == 0 and V % BV == 0:
        tile = tl.load(pointers)
    else:
        mask = (tl.arange(0, BK)[:, None] < K) & (i_v * BV + tl.arange(0, BV)[None, :] < V)
        tile = tl.load(pointers, mask=mask, other=0.0)
    return tile


@triton.jit
def store_state(
    base, state, i_v, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, V_FIRST: tl.constexpr
):
    """The inverse of `load_state`."""
    pointers = base + i_v * (BV * K if V_FIRST else BV) + _state_offsets(K, V, BK, BV, V_FIRST)
    if K % BK == 0 and V % BV == 0:
        tl.store(pointers, state.to(base.dtype.element_ty))
    else:
        mask = (tl.arange(0, BK)[:, None] < K) & (i_v * BV + tl.arange(0, BV)[None, :] < V)
        tl.store(pointers, state.to(base.dtype.element_ty), mask=mask)


@triton.jit
def token_tile(
    x, row, i_h, i_d, n_rows, stride_t, stride_h, D: tl.constexpr, BD: tl.constexpr, C: tl.constexpr, TMA: tl.constexpr
):
    """[C, BD] tile of head i_h of x [rows, heads, D]. With TMA x is a descriptor, and rows past n_rows are whatever
    follows the sequence in memory: who uses them must make them harmless."""
    if TMA:
        tile = x.load([row.to(tl.int32), i_h.to(tl.int32) * D + i_d * BD])
    else:
        tile = load_rows(x + row * stride_t + i_h * stride_h, i_d, n_rows, stride_t, D, BD, C)
    return tile


@triton.jit
def matrix_tile(x, index, i_d, R: tl.constexpr, D: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr, TMA: tl.constexpr):
    """Columns i_d*BD.. of matrix `index` of x [.., R, D], which is a descriptor with TMA."""
    if TMA:
        tile = x.load([(index * R).to(tl.int32), i_d * BD])
    else:
        tile = load_state(x + index * (R * D), i_d, R, D, BR, BD, False)
    return tile


@triton.jit
def store_matrix_tile(
    x, tile, index, i_d, R: tl.constexpr, D: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr, TMA: tl.constexpr
):
    """The inverse of `matrix_tile`."""
    if TMA:
        x.store([(index * R).to(tl.int32), i_d * BD], tile)
    else:
        store_state(x + index * (R * D), tile, i_d, R, D, BR, BD, False)


@triton.jit
def _row_factors(G, bt, rq, rk, chunk, hk, hv, wanted, H: tl.constexpr, HV: tl.constexpr, C: tl.constexpr):
    """(G, G_C, beta, rq, rk) of a chunk's rows; zeros without loading unless `wanted`; rq = rk = 1 without norms."""
    i_c = tl.arange(0, C)
    at = (chunk * HV + hv) * C
    norm_at = (chunk * H + hk) * C + i_c
    G_i = tl.load(G + at + i_c, mask=wanted, other=0.0)
    G_last = tl.load(G + at + C - 1, mask=wanted, other=0.0)
    beta = tl.load(bt + at + i_c, mask=wanted, other=0.0)
    q_norm = tl.full([C], 1.0, tl.float32)
    k_norm = tl.full([C], 1.0, tl.float32)
    if rk is not None:
        q_norm = tl.load(rq + norm_at, mask=wanted, other=0.0)
        k_norm = tl.load(rk + norm_at, mask=wanted, other=0.0)
    return G_i, G_last, beta, q_norm, k_norm


@triton.jit
def _state_chain(
    k, v, G, bt, rk, X, h, S, hk, hv, i_v, first_row, end_row, first, count, c0,
    stride_kt, stride_kh, stride_vt, stride_vh,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Walk up from state S through chunks first .. first + count - 1, storing the state before each in h."""
    i_c = tl.arange(0, C)
    # Row factors are fetched one step ahead into registers: the pipeline prefetches operands of products only.
    G_i, G_last, beta, _, k_norm = _row_factors(G, bt, rk, rk, first.to(tl.int64), hk, hv, count > 0, H, HV, C)
    for j in tl.range(0, count, num_stages=STAGES):
        chunk = (first + j).to(tl.int64)
        index = (chunk - c0) * HV + hv
        row = (first_row + j * C).to(tl.int64)
        n_rows = end_row - (first_row + j * C)
        decay = tl.exp(G_i) * k_norm
        lam = tl.exp(G_last)
        beta_now = beta
        G_i, G_last, beta, _, k_norm = _row_factors(G, bt, rk, rk, chunk + 1, hk, hv, j + 1 < count, H, HV, C)
        k_tile = token_tile(k, row, hk, 0, n_rows, stride_kt, stride_kh, K, BK, C, TMA)
        v_tile = token_tile(v, row, hv, i_v, n_rows, stride_vt, stride_vh, V, BV, C, TMA)
        x_tile = matrix_tile(X, index, 0, K, C, BK, C, TMA)
        S_b = S.to(x_tile.dtype)
        store_matrix_tile(h, S_b, index, i_v, K, V, BK, BV, TMA)
        R = v_tile.to(tl.float32) - decay[:, None] * tl.dot(k_tile, S_b, input_precision=PRECISION)
        R = beta_now[:, None] * R
        if TMA:
            R = tl.where(i_c[:, None] < n_rows, R, 0.0)
        S = tl.dot(x_tile, R.to(x_tile.dtype), acc=S * lam, input_precision=PRECISION)


@triton.jit
def _gradient_chain(
    q, k, do, G, bt, rq, rk, X, Yt, dh, M, dv, dS, scale, hk, hv, i_v, first_row, end_row, first, count, c0,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_ot, stride_oh,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, TMA: tl.constexpr, SUMMARY: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Walk down from gradient dS through chunks first + count - 1 .. first, storing M and dV, and in dh dS after each.

    Returns the gradient before the first; with SUMMARY that is all it does.
    """
    i_c = tl.arange(0, C)
    top = (first + count - 1).to(tl.int64)
    G_i, G_last, beta, q_norm, k_norm = _row_factors(G, bt, rq, rk, top, hk, hv, count > 0, H, HV, C)
    for step in tl.range(0, count, num_stages=STAGES):
        j = count - 1 - step
        chunk = (first + j).to(tl.int64)
        index = (chunk - c0) * HV + hv
        row = (first_row + j * C).to(tl.int64)
        n_rows = end_row - (first_row + j * C)
        # Zero past the end of the sequence: there q and dO may be another sequence's.
        q_scale = tl.where(i_c < n_rows, scale * tl.exp(G_i) * q_norm, 0.0)
        k_scale = -tl.exp(G_i) * beta * k_norm
        beta_now = beta
        lam = tl.exp(G_last)
        G_i, G_last, beta, q_norm, k_norm = _row_factors(G, bt, rq, rk, chunk - 1, hk, hv, j > 0, H, HV, C)
        y_tile = matrix_tile(Yt, index, 0, C, C, C, C, TMA)
        do_tile = token_tile(do, row, hv, i_v, n_rows, stride_ot, stride_oh, V, BV, C, TMA)
        x_tile = matrix_tile(X, index, 0, K, C, BK, C, TMA)
        q_tile = token_tile(q, row, hk, 0, n_rows, stride_qt, stride_qh, K, BK, C, TMA)
        k_tile = token_tile(k, row, hk, 0, n_rows, stride_kt, stride_kh, K, BK, C, TMA)
        dS_b = dS.to(x_tile.dtype)
        if not SUMMARY:
            store_matrix_tile(dh, dS_b, index, i_v, K, V, BK, BV, TMA)
        M_tile = tl.dot(y_tile, do_tile, input_precision=PRECISION)
        M_tile = tl.dot(tl.trans(x_tile), dS_b, acc=M_tile, input_precision=PRECISION)
        do_scaled = (do_tile.to(tl.float32) * q_scale[:, None]).to(x_tile.dtype)
        dS = tl.dot(tl.trans(q_tile), do_scaled, acc=dS * lam, input_precision=PRECISION)
        M_scaled = (M_tile * k_scale[:, None]).to(x_tile.dtype)
        dS = tl.dot(tl.trans(k_tile), M_scaled, acc=dS, input_precision=PRECISION)
        if not SUMMARY:
            store_matrix_tile(M, M_tile.to(x_tile.dtype), index, i_v, C, V, C, BV, TMA)
            store_rows(dv + (row * HV + hv) * V, beta_now[:, None] * M_tile, i_v, n_rows, HV * V, V, BV, C)
    return dS


@triton.jit
def _add_rounding(
    dS, q, do, G, rq, scale, hk, hv, i_v, first, first_row, end_row, stride_qt, stride_qh, stride_ot, stride_oh,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dS + Q^T of what dO, scaled, lost when it was rounded for the last step of `_gradient_chain`, at chunk `first`.

    That is most of the error of the gradient before a sequence under a strong decay, when little else reaches it.
    """
    i_c = tl.arange(0, C)
    row = first_row.to(tl.int64)
    n_rows = end_row - first_row
    if n_rows > 0:
        G_i, _, _, q_norm, _ = _row_factors(G, G, rq, rq, first.to(tl.int64), hk, hv, n_rows > 0, H, HV, C)
        q_scale = tl.where(i_c < n_rows, scale * tl.exp(G_i) * q_norm, 0.0)
        q_tile = token_tile(q, row, hk, 0, n_rows, stride_qt, stride_qh, K, BK, C, TMA)
        do_tile = token_tile(do, row, hv, i_v, n_rows, stride_ot, stride_oh, V, BV, C, TMA)
        do_scaled = do_tile.to(tl.float32) * q_scale[:, None]
        lost = do_scaled - do_scaled.to(q_tile.dtype).to(tl.float32)
        dS = tl.dot(tl.trans(q_tile), lost.to(q_tile.dtype), acc=dS, input_precision=PRECISION)
    return dS


@triton.jit(do_not_specialize=["c0", "c1", "total_chunks"])
def chains_kernel(
    q, k, v, do, G, bt, rq, rk, X, Yt, pieces, roles, initial_state, starts, checkpoint, dht, ends, carry_in,
    carry_out, h, dh, M, dv, dh0, summaries, scale, c0, c1, total_chunks,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot, stride_oh,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, V_FIRST: tl.constexpr, TMA: tl.constexpr, SUMMARY: tl.constexpr, TRUNCATE: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: one direction (program id odd: gradients), BV columns of the state, one value head, one piece.

    Only chunks c0 .. c1-1 are worked on. A sequence that began in an earlier slice starts from `checkpoint` [HV, K, V]
    and hands its gradient on in `carry_out` [HV, K, V]; one that ends in a later slice takes its gradient from
    `carry_in`. At most one sequence crosses each border of a slice, so one state for each head is enough.
    For example, lengths of 3 and 2 chunks and the slice [2, 4): sequence 0 starts at chunk 2 from the checkpoint, takes
    its own final gradient and writes carry_out; sequence 1 does chunk 3 from its initial state with carry_in, and
    writes dh0.

    Where sequences are cut into pieces, `starts` and `ends` [NP, HV, K, V] hold the state at the start of each piece
    that is not the first of its sequence, and the gradient at the end of each that is not the last. With SUMMARY, all
    programs walk the gradients of pieces that are not the first, from zero unless the last, into `summaries`. Of a
    sequence that a state enters from elsewhere (`roles`, see `chunk_pieces`) the first piece is walked too; with
    `roles`, nothing is walked of the others. With TRUNCATE such a walk begins, from zero, where the gates of the chunks
    before it sum to less than that number.
    """
    NV: tl.constexpr = (V + BV - 1) // BV
    WALKS: tl.constexpr = 1 if SUMMARY else 2
    pid = tl.program_id(0)
    i_v = (pid // WALKS) % NV
    hv = ((pid // (WALKS * NV)) % HV).to(tl.int64)
    i_p = pid // (WALKS * NV * HV)
    piece = pieces + i_p * 8
    seq = tl.load(piece)
    piece_first = tl.load(piece + 1)
    piece_count = tl.load(piece + 2)
    if TRUNCATE is not None:
        # An unused entry of the table has a sequence of -1 and anything else.
        piece_count = first_end(G, piece_first.to(tl.int64), tl.where(seq < 0, 0, piece_count), hv, TRUNCATE, HV)
    piece_end = piece_first + piece_count
    is_first = tl.load(piece + 5) != 0
    is_last = tl.load(piece + 6) != 0
    first = tl.maximum(piece_first, c0)
    count = tl.minimum(piece_end, c1) - first
    # An empty sequence still hands its gradient through; its place may be the end of the last slice.
    empty_here = (piece_count == 0) & (piece_first >= c0) & ((piece_first < c1) | (c1 == total_chunks))
    works = (seq >= 0) & ((count > 0) | empty_here)
    if SUMMARY:
        if roles is not None:
            works = works & ((tl.load(roles + seq, mask=seq >= 0, other=0) & 1) != 0)
        else:
            works = works & (is_first == 0)
    if works:
        hk = hv // (HV // H)
        first_row = tl.load(piece + 3) + (first - piece_first) * C
        end_row = tl.load(piece + 4)
        state_at = (seq.to(tl.int64) * HV + hv) * (K * V)
        piece_at = (i_p.to(tl.int64) * HV + hv) * (K * V)
        own_at = hv * (K * V)
        state = tl.zeros([BK, BV], tl.float32)
        if (pid % 2 == 0) & (WALKS == 2):
            if initial_state is not None:
                if is_first:
                    state = load_state(initial_state + state_at, i_v, K, V, BK, BV, V_FIRST)
            if starts is not None:
                if is_first == 0:
                    state = load_state(starts + piece_at, i_v, K, V, BK, BV, False)
            if checkpoint is not None:
                if piece_first < c0:
                    state = load_state(checkpoint + own_at, i_v, K, V, BK, BV, False)
            if not SUMMARY:
                _state_chain(
                    k, v, G, bt, rk, X, h, state, hk, hv, i_v, first_row, end_row, first, count, c0,
                    stride_kt, stride_kh, stride_vt, stride_vh, H, HV, K, V, BK, BV, C, TMA, PRECISION, STAGES,
                )  # fmt: skip
        else:
            if dht is not None:
                if is_last:
                    state = load_state(dht + state_at, i_v, K, V, BK, BV, V_FIRST)
            if ends is not None:
                if is_last == 0:
                    state = load_state(ends + piece_at, i_v, K, V, BK, BV, False)
            if carry_in is not None:
                if piece_end > c1:
                    state = load_state(carry_in + own_at, i_v, K, V, BK, BV, False)
            state = _gradient_chain(
                q, k, do, G, bt, rq, rk, X, Yt, dh, M, dv, state, scale, hk, hv, i_v, first_row, end_row, first,
                count, c0,
                stride_qt, stride_qh, stride_kt, stride_kh, stride_ot, stride_oh,
                H, HV, K, V, BK, BV, C, TMA, SUMMARY, PRECISION, STAGES,
            )  # fmt: skip
            if SUMMARY:
                store_state(summaries + piece_at, state, i_v, K, V, BK, BV, False)
            if carry_out is not None:
                if piece_first < c0:
                    store_state(carry_out + own_at, state, i_v, K, V, BK, BV, False)
            if dh0 is not None:
                if is_first & (piece_first >= c0):
                    state = _add_rounding(
                        state, q, do, G, rq, scale, hk, hv, i_v, first, first_row, end_row,
                        stride_qt, stride_qh, stride_ot, stride_oh, H, HV, K, V, BK, BV, C, TMA, PRECISION,
                    )  # fmt: skip
                    store_state(dh0 + state_at, state, i_v, K, V, BK, BV, V_FIRST)
