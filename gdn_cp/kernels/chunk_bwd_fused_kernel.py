"""`chunk_bwd_local`'s three kernels in one, for Hopper, 16-bit types and K = V = 128: written in Gluon.

Triton alone decides which products take their first factor from registers, and which tiles stay in shared memory. Here
every factor is in shared memory, where the next product finds it: of U, W, D and F of `chunk_bwd_local`'s notation,
which its kernels hand on through the card's memory (104 of the 370 KB that they move for each chunk and value head),
nothing leaves the multiprocessor, and S, dO, q and k are read once.

A program is one multiprocessor's, and works through chunks and q/k heads. One warp of it fetches tiles as soon as their
places are free, eight multiply. Places are freed in four groups, each with a barrier for "full" and one for "free":

    0   k, q                  once for all value heads of a q/k head
    1   S, M, Ag, dO, and the rows' G and beta
    2   V
    3   dS+

What is added up over rows, over K or over V is first added inside each thread and then, eight sums at once, between
threads. Sums are defined as there, but for state_dots: here C numbers, <S, dS+> by rows, less what `scores_kernel`
takes off the last row of dG.

Numbers agree with those three kernels to float32's rounding before they are rounded to be stored: the same products of
the same rounded factors, but dO S^T is added up for each value head alone.

Dimensions: H q/k heads, HV value heads, D = K = V = 128, C = 64 rows of a chunk, NT chunks.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportReturnType=false, reportGeneralTypeIssues=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportPossiblyUnboundVariable=false
# pyright: reportOperatorIssue=false, reportOptionalMemberAccess=false, reportAssignmentType=false
# pyright: reportUnboundVariable=false

from __future__ import annotations

from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from gdn_cp.kernels.activations_triton import exp

_barrier: Any = getattr(gl, "thread_barrier", None) or getattr(gl, "barrier", None)  # renamed in Triton 3.7


@gluon.jit
def _publish():
    """What threads wrote to shared memory is there for the tensor cores and the bulk copy engine."""
    fence_async_shared()
    _barrier()


@gluon.jit
def _add_eight(a, b, c, d, e, f, g, h, i, j, k, m, n, o, p, q):
    return a + i, b + j, c + k, d + m, e + n, f + o, g + p, h + q


@gluon.jit
def _in_threads(x):
    """Sums [C, 8] of a product's result x [C, N], which add up to its rows' sums: what each thread has of a row."""
    y = x.reshape([x.shape[0], 2, x.shape[1] // 16, 4, 2])
    return gl.sum(gl.sum(y, 4), 2).reshape([x.shape[0], 8])


@gluon.jit
def _rounded(x, ty: gl.constexpr):
    """x, float32, rounded to `ty`, as float32."""
    if ty == gl.bfloat16:
        # Two at a time: a number alone is converted at an eighth of the speed.
        y = gl.inline_asm_elementwise(
            "{.reg .b32 p; cvt.rn.bf16x2.f32 p, $3, $2; shl.b32 $0, p, 16; and.b32 $1, p, 0xffff0000;}",
            "=r,=r,r,r", [x], gl.float32, True, 2,
        )  # fmt: skip
    else:
        y = x.to(ty).to(gl.float32)
    return y


@gluon.jit
def _fetch(desc, row, column, place, full):
    tma.async_copy_global_to_shared(desc, [row, column], full, place)


@gluon.jit
def _vector(place):
    """A place [1, C] of float32 as [C]."""
    return place._reinterpret(gl.float32, [place.shape[1]], gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.jit
def _rows_of(chunks, chunk, wanted):
    """(first row, number of rows) of a chunk; no rows where it is not wanted or there is none. Chunks that are not
    there stand behind all others."""
    entry = chunks + chunk * 4
    there = gl.load(entry, mask=wanted, other=-1) >= 0
    row = gl.load(entry + 1, mask=wanted, other=0)
    n_rows = gl.load(entry + 2, mask=wanted, other=0)
    n_rows = gl.where(there, n_rows, 0)
    return row, n_rows


@gluon.jit
def _fetch_all(
    q, k, v, do, h, dh, M, Ag, G, bt, chunks, c0, items, q_place, k_place, v_place, do_place, m_place, a_place,
    s_place, ds_place, g_place, b_place, full0, full1, full2, full3, free0, free1, free2, free3,
    H: gl.constexpr, HV: gl.constexpr, D: gl.constexpr, C: gl.constexpr, PROGRAMS: gl.constexpr,
):  # fmt: skip
    """The warp that fetches: everything in the order in which the others free its places."""
    R: gl.constexpr = HV // H
    TILE: gl.constexpr = C * D * 2
    item = gl.program_id(0)
    chunk = c0 + item // H
    row, n_rows = _rows_of(chunks, chunk, item < items)
    item_phase = 1
    phase = 1
    while n_rows > 0:
        hk = item % H
        for j in range(R):
            hv = hk * R + j
            own = (chunk - c0) * HV + hv
            mbarrier.wait(free2, phase)
            mbarrier.expect(full2, TILE)
            _fetch(v, row, hv * D, v_place, full2)
            mbarrier.wait(free1, phase)
            mbarrier.expect(full1, 4 * TILE + C * C * 2 + 2 * C * 4)
            _fetch(h, own * D, 0, s_place, full1)
            _fetch(M, own * C, 0, m_place, full1)
            _fetch(Ag, (chunk * HV + hv) * C, 0, a_place, full1)
            _fetch(do, row, hv * D, do_place, full1)
            _fetch(G, chunk * HV + hv, 0, g_place, full1)
            _fetch(bt, chunk * HV + hv, 0, b_place, full1)
            mbarrier.wait(free3, phase)
            mbarrier.expect(full3, 2 * TILE)
            _fetch(dh, own * D, 0, ds_place, full3)
            phase ^= 1
            if j == 0:
                mbarrier.wait(free0, item_phase)
                mbarrier.expect(full0, 2 * TILE)
                _fetch(k, row, hk * D, k_place, full0)
                _fetch(q, row, hk * D, q_place, full0)
                item_phase ^= 1
        item += PROGRAMS
        chunk = c0 + item // H
        row, n_rows = _rows_of(chunks, chunk, item < items)


@gluon.jit
def _score_sums(E, D_tile, KK, QK, b, off_diagonal, rows: gl.constexpr):
    """Sums, as `_in_threads`, over the diagonal of D * Q K^T, over rows of the rest less beta E * K K^T, over rows of
    E * K K^T; and over columns of the second, [C]."""
    EKK = E * KK
    decayed = D_tile * QK
    diagonal = _in_threads(gl.where(off_diagonal, 0.0, decayed))
    decayed = gl.where(off_diagonal, decayed, 0.0) - b[:, None] * EKK
    along = _in_threads(decayed)
    ekk = _in_threads(EKK)
    columns = gl.convert_layout(gl.sum(decayed, 0), rows)
    return diagonal, along, ekk, columns


@gluon.jit
def _store_sums(
    dG, db, q_dots, k_dots, state_dots, at, i_c, valid, b, G_last, columns, m_dot_r, w_dot_ks, q_dot, k_dot, state_dot,
    diagonal, along, ekk, LEAST_BETA: gl.constexpr, rows: gl.constexpr,
):  # fmt: skip
    """Add up what threads have of sums, [C, 8] each but for `columns`, and store what `row_gradients_kernel` takes."""
    sums = gl.reduce((m_dot_r, w_dot_ks, q_dot, k_dot, state_dot, diagonal, along, ekk), 1, _add_eight)
    m_dot_r = gl.convert_layout(sums[0], rows)
    w_dot_ks = gl.convert_layout(sums[1], rows)
    state_dot = gl.convert_layout(sums[4], rows)
    if q_dots is not None:
        gl.store(q_dots + at + i_c, gl.convert_layout(sums[2], rows))
    gl.store(k_dots + at + i_c, gl.convert_layout(sums[3], rows))
    gl.store(state_dots + at + i_c, gl.exp(G_last) * state_dot - 0.5 * gl.where(valid, w_dot_ks, 0.0))
    if dG is not None:
        along = gl.convert_layout(sums[6], rows)
        gl.store(dG + at + i_c, gl.where(valid, along - columns + w_dot_ks, 0.0))
    if db is not None:
        # `second_share`
        counts = gl.abs(b) >= LEAST_BETA
        share = gl.where(counts, 0.5 / gl.where(counts, b, 1.0), 0.0)
        first = (1.0 - share * b) * (m_dot_r - gl.convert_layout(sums[7], rows))
        second = columns + gl.convert_layout(sums[5], rows) - 0.5 * w_dot_ks
        gl.store(db + at + i_c, first + share * second)


@gluon.jit
def _store_gradients(
    dq_out, dk_out, dq, dk, dq_place, dk_place, row, n_rows, hk, stride_dt, stride_dh,
    H: gl.constexpr, D: gl.constexpr, C: gl.constexpr, flat: gl.constexpr,
):  # fmt: skip
    """Whole tiles by the bulk copy engine; of others their own rows, for those behind are another sequence's."""
    if n_rows == C:
        tma.async_copy_shared_to_global(dq_out, [row, hk * D], dq_place)
        tma.async_copy_shared_to_global(dk_out, [row, hk * D], dk_place)
    else:
        t = gl.arange(0, C, layout=gl.SliceLayout(1, flat))
        d = gl.arange(0, D, layout=gl.SliceLayout(0, flat))
        mask = (t[:, None] < n_rows) & (d[None, :] < D)
        dq_rows = dq + row.to(gl.int64) * stride_dt + hk * stride_dh
        dk_rows = dk + (row.to(gl.int64) * H + hk) * D
        gl.store(dq_rows + t[:, None] * stride_dt + d[None, :], dq_place.load(flat), mask=mask)
        gl.store(dk_rows + t[:, None] * (H * D) + d[None, :], dk_place.load(flat), mask=mask)


@gluon.jit
def _multiply_all(
    dq_out, dk_out, rq, rk, chunks, dq, dk, dG, db, q_dots, k_dots, state_dots, scale, c0, items,
    stride_dt, stride_dh, q_places, k_places, v_places, do_places, m_places, a_places, s_places, ds_places,
    g_places, b_places, one_places, two_places, three_places, four_places,
    full0, full1, full2, full3, free0, free1, free2, free3,
    H: gl.constexpr, HV: gl.constexpr, D: gl.constexpr, C: gl.constexpr, LEAST_BETA: gl.constexpr,
    PROGRAMS: gl.constexpr, num_warps: gl.constexpr, ty: gl.constexpr,
):  # fmt: skip
    """The warps that multiply. Of every row factor a thread holds those of two rows, whatever product it is for."""
    R: gl.constexpr = HV // H
    SUMS: gl.constexpr = k_dots is not None
    across: gl.constexpr = num_warps // 4
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, across], [16, D // across, 16])
    square: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, across], [16, C // across, 16])
    flat: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [num_warps, 1], [1, 0])
    rows: gl.constexpr = gl.SliceLayout(1, wide)
    square_rows: gl.constexpr = gl.SliceLayout(1, square)
    square_columns: gl.constexpr = gl.SliceLayout(0, square)
    i_c = gl.arange(0, C, layout=rows)
    i_square = gl.arange(0, C, layout=square_rows)
    j_square = gl.arange(0, C, layout=square_columns)
    item = gl.program_id(0)
    chunk = c0 + item // H
    row, n_rows = _rows_of(chunks, chunk, item < items)
    k_norm = gl.full([C], 1.0, gl.float32, rows)
    q_norm = gl.full([C], 1.0, gl.float32, rows)
    if rk is not None:
        norms = (chunk.to(gl.int64) * H + item % H) * C
        k_norm = gl.load(rk + norms + i_c, mask=n_rows > 0, other=0.0)
        q_norm = gl.load(rq + norms + i_c, mask=n_rows > 0, other=0.0)
    item_phase = 0
    phase = 0
    while n_rows > 0:
        hk = item % H
        norms = (chunk.to(gl.int64) * H + hk) * C
        valid = i_c < n_rows
        dk_all = gl.zeros([C, D], gl.float32, wide)
        dq_all = gl.zeros([C, D], gl.float32, wide)
        mbarrier.wait(full0, item_phase)
        item_phase ^= 1
        for j in range(R):
            # Zeros, which the compiler does not know as such, so that it computes addresses of places where they are
            # used: kept over the loop, they would take more registers than there are.
            zero = gl.minimum(n_rows + j, 0)
            k_place = k_places.index(zero)
            s_place = s_places.index(zero)
            m_place = m_places.index(zero)
            v_place = v_places.index(zero)
            one = one_places.index(zero)
            two = two_places.index(zero)
            hv = hk * R + j
            at = (chunk.to(gl.int64) * HV + hv) * C
            g_place = _vector(g_places.index(zero))

            # R, W and beta R.
            mbarrier.wait(full1, phase)
            G_i = g_place.load(rows)
            G_last = g_place.slice(C - 1, 1).load(rows)
            b = _vector(b_places.index(zero)).load(rows)
            nothing = gl.zeros([C, D], gl.float32, wide)
            KS = warpgroup_mma(k_place, s_place, nothing, use_acc=False, is_async=True)
            from_start = gl.exp(G_i) * k_norm
            to_end = gl.exp(G_last - G_i) * k_norm
            mbarrier.wait(full2, phase)
            if SUMS:
                k_before = _in_threads(k_place.load(wide).to(gl.float32) * dk_all)
            KS = warpgroup_mma_wait(0, deps=[KS])
            w = -(from_start * b)[:, None] * m_place.load(wide).to(gl.float32)
            w_stored = _rounded(w, ty)
            # With W as it is stored and before, see `scores_kernel`.
            w_dot_ks = _in_threads((w + w_stored) * KS)
            tma.store_wait(0)
            one.store(w_stored.to(ty))
            r = v_place.load(wide).to(gl.float32) - from_start[:, None] * KS
            m_dot_r = _in_threads(m_place.load(wide).to(gl.float32) * r)
            br = gl.where(valid[:, None], b[:, None] * r, 0.0)
            two.store(br.to(ty))
            _publish()
            mbarrier.arrive(free2, count=1)

            # U, and what S makes of dO and W.
            zero = gl.minimum(row + j, 0)
            a_place = a_places.index(zero)
            two = two_places.index(zero)
            do_place = do_places.index(zero)
            s_place = s_places.index(zero)
            one = one_places.index(zero)
            three = three_places.index(zero)
            four = four_places.index(zero)
            u = warpgroup_mma(a_place, two, br, is_async=True)
            dq_own = warpgroup_mma(do_place, s_place.permute((1, 0)), nothing, use_acc=False, is_async=True)
            dk_all = warpgroup_mma(one, s_place.permute((1, 0)), dk_all, is_async=True)
            u = warpgroup_mma_wait(2, deps=[u])
            _barrier()
            u_b = _rounded(u, ty)
            two.store(u_b.to(ty))
            # What rounding U took is most of the error of sums over the rows of dP, and so of the gate's gradient.
            three.store((u - u_b).to(ty))
            four.store((to_end[:, None] * u).to(ty))
            _publish()

            # dP, M U^T, and what dS+ makes of U.
            zero = gl.minimum(chunk + j, 0)
            m_place = m_places.index(zero)
            s_place = s_places.index(zero)
            two = two_places.index(zero)
            do_place = do_places.index(zero)
            three = three_places.index(zero)
            four = four_places.index(zero)
            ds_place = ds_places.index(zero)
            q_place = q_places.index(zero)
            mbarrier.wait(full3, phase)
            none = gl.zeros([C, C], gl.float32, square)
            MU = warpgroup_mma(m_place, two.permute((1, 0)), none, use_acc=False, is_async=True)
            dP = warpgroup_mma(do_place, two.permute((1, 0)), none, use_acc=False, is_async=True)
            dP = warpgroup_mma(do_place, three.permute((1, 0)), dP, is_async=True)
            dk_all = warpgroup_mma(four, ds_place.permute((1, 0)), dk_all, is_async=True)
            dq_own = warpgroup_mma_wait(4, deps=[dq_own])
            # Meanwhile the query's share, and the states'.
            G_j = _vector(g_places.index(zero)).load(square_columns)
            k_norm_j = gl.full([C], 1.0, gl.float32, square_columns)
            if rk is not None:
                k_norm_j = gl.load(rk + norms + j_square)
            dq_own = dq_own * gl.where(valid, gl.exp(G_i) * scale * q_norm, 0.0)[:, None]
            if SUMS:
                q_dot = _in_threads(q_place.load(wide).to(gl.float32) * dq_own)
            dq_all += dq_own
            if SUMS:
                upper = s_place.slice(0, C, dim=0).load(wide).to(gl.float32)
                state_dot = _in_threads(upper * ds_place.slice(0, C, dim=0).load(wide).to(gl.float32))
                lower = s_place.slice(C, C, dim=0).load(wide).to(gl.float32)
                state_dot += _in_threads(lower * ds_place.slice(C, C, dim=0).load(wide).to(gl.float32))
            off_diagonal = i_square[:, None] != j_square[None, :]
            kept = (i_square[:, None] >= j_square[None, :]) & gl.convert_layout(valid, square_rows)[:, None]
            b_i = gl.convert_layout(b, square_rows)
            difference = gl.convert_layout(G_i, square_rows)[:, None] - G_j[None, :]
            Gam = exp(gl.where(kept, difference, float("-inf"))) * k_norm_j[None, :]
            MU, dP = warpgroup_mma_wait(1, deps=[MU, dP])
            _barrier()
            mbarrier.arrive(free1, count=1)

            # D and F, and the sums over their products with Q K^T and K K^T.
            zero = gl.minimum(chunk + hv, 0)
            k_place = k_places.index(zero)
            q_place = q_places.index(zero)
            D_place = three_places.index(zero).slice(0, C, dim=1)
            F_place = three_places.index(zero).slice(C, C, dim=1)
            if SUMS:
                KK = warpgroup_mma(k_place, k_place.permute((1, 0)), none, use_acc=False, is_async=True)
                QK = warpgroup_mma(q_place, k_place.permute((1, 0)), none, use_acc=False, is_async=True)
            E = gl.where(off_diagonal, MU * Gam * gl.convert_layout(k_norm, square_rows)[:, None], 0.0)
            F_place.store((-b_i[:, None] * E).to(ty))
            D_tile = dP * Gam * (gl.convert_layout(q_norm, square_rows) * scale)[:, None]
            D_place.store(D_tile.to(ty))
            if SUMS:
                dk_all, KK, QK = warpgroup_mma_wait(0, deps=[dk_all, KK, QK])
            else:
                dk_all = warpgroup_mma_wait(0, deps=[dk_all])
            _publish()
            mbarrier.arrive(free3, count=1)
            dq_all = warpgroup_mma(D_place, k_place, dq_all, is_async=True)
            if SUMS:
                diagonal, along, ekk, columns = _score_sums(E, D_tile, KK, QK, b_i, off_diagonal, rows)
                k_dot = _in_threads(k_place.load(wide).to(gl.float32) * dk_all) - k_before
            zero = gl.minimum(row + hv, 0)
            k_place = k_places.index(zero)
            q_place = q_places.index(zero)
            D_place = three_places.index(zero).slice(0, C, dim=1)
            F_place = three_places.index(zero).slice(C, C, dim=1)
            dk_all = warpgroup_mma(D_place.permute((1, 0)), q_place, dk_all, is_async=True)
            dk_all = warpgroup_mma(F_place, k_place, dk_all, is_async=True)
            dk_all = warpgroup_mma(F_place.permute((1, 0)), k_place, dk_all, is_async=True)
            if SUMS:
                _store_sums(
                    dG, db, q_dots, k_dots, state_dots, at, i_c, valid, b, G_last, columns, m_dot_r, w_dot_ks, q_dot,
                    k_dot, state_dot, diagonal, along, ekk, LEAST_BETA, rows,
                )  # fmt: skip
            phase ^= 1
            dq_all, dk_all = warpgroup_mma_wait(0, deps=[dq_all, dk_all])

        # The norms' part, and out.
        next_item = item + PROGRAMS
        next_chunk = c0 + next_item // H
        next_row, next_n_rows = _rows_of(chunks, next_chunk, next_item < items)
        zero = gl.minimum(row + hk, 0)
        two = two_places.index(zero)
        three = three_places.index(zero)
        if rk is None:
            mbarrier.arrive(free0, count=1)
        else:
            q_unit = q_places.index(zero).load(wide).to(gl.float32) * q_norm[:, None]
            k_unit = k_places.index(zero).load(wide).to(gl.float32) * k_norm[:, None]
            mbarrier.arrive(free0, count=1)
            norms = (next_chunk.to(gl.int64) * H + next_item % H) * C
            k_norm = gl.load(rk + norms + i_c, mask=next_item < items, other=0.0)
            q_norm = gl.load(rq + norms + i_c, mask=next_item < items, other=0.0)
            q_share = gl.sum(_in_threads(q_unit * dq_all), 1)
            dq_all -= q_unit * gl.convert_layout(q_share, rows)[:, None]
            k_share = gl.sum(_in_threads(k_unit * dk_all), 1)
            dk_all -= k_unit * gl.convert_layout(k_share, rows)[:, None]
        two.store(dq_all.to(ty))
        three.store(dk_all.to(ty))
        _publish()
        _store_gradients(
            dq_out, dk_out, dq, dk, two, three, row, n_rows, hk, stride_dt, stride_dh, H, D, C, flat
        )  # fmt: skip
        item = next_item
        chunk = next_chunk
        row = next_row
        n_rows = next_n_rows
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["c0", "items"])
def fused_kernel(
    q, k, v, do, h, dh, M, Ag, dq_out, dk_out, G, bt, rq, rk, chunks, dq, dk, dG, db, q_dots, k_dots, state_dots,
    scale, c0, items, stride_dt, stride_dh,
    H: gl.constexpr, HV: gl.constexpr, D: gl.constexpr, C: gl.constexpr, LEAST_BETA: gl.constexpr,
    PROGRAMS: gl.constexpr, REGISTERS: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """Program p: items p, p + PROGRAMS, ... Item i: chunk c0 + i // H and q/k head i % H, dQ and dK over all value
    heads of that head, and of each value head the sums for `row_gradients_kernel`.

    Arguments up to bt are descriptors; dq_out and dk_out describe dq and dk, of which TMA writes whole tiles.
    """
    ty: gl.constexpr = q.dtype
    tile: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, D], ty)
    square: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, C], ty)
    state: gl.constexpr = gl.NVMMASharedLayout.get_default_for([D, D], ty)
    q_places = gl.allocate_shared_memory(ty, [1, C, D], tile)
    k_places = gl.allocate_shared_memory(ty, [1, C, D], tile)
    v_places = gl.allocate_shared_memory(ty, [1, C, D], tile)
    do_places = gl.allocate_shared_memory(ty, [1, C, D], tile)
    m_places = gl.allocate_shared_memory(ty, [1, C, D], tile)
    a_places = gl.allocate_shared_memory(ty, [1, C, C], square)
    s_places = gl.allocate_shared_memory(ty, [1, D, D], state)
    ds_places = gl.allocate_shared_memory(ty, [1, D, D], state)
    vector: gl.constexpr = gl.NVMMASharedLayout(0, 32, 2)
    g_places = gl.allocate_shared_memory(gl.float32, [1, 1, C], vector)
    b_places = gl.allocate_shared_memory(gl.float32, [1, 1, C], vector)
    one_places = gl.allocate_shared_memory(ty, [1, C, D], tile)  # W
    two_places = gl.allocate_shared_memory(ty, [1, C, D], tile)  # beta R, then U, at last dQ
    three_places = gl.allocate_shared_memory(ty, [1, C, D], tile)  # what rounding U took, then D and F, at last dK
    four_places = gl.allocate_shared_memory(ty, [1, C, D], tile)  # U as dS+ takes it
    full0 = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    full1 = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    full2 = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    full3 = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    free0 = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    free1 = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    free2 = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    free3 = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(full0, count=1)
    mbarrier.init(full1, count=1)
    mbarrier.init(full2, count=1)
    mbarrier.init(full3, count=1)
    mbarrier.init(free0, count=1)
    mbarrier.init(free1, count=1)
    mbarrier.init(free2, count=1)
    mbarrier.init(free3, count=1)
    _publish()
    gl.warp_specialize(
        [
            (_multiply_all, (
                dq_out, dk_out, rq, rk, chunks, dq, dk, dG, db, q_dots, k_dots, state_dots, scale, c0, items,
                stride_dt, stride_dh, q_places, k_places, v_places, do_places, m_places, a_places, s_places, ds_places,
                g_places, b_places, one_places, two_places, three_places, four_places,
                full0, full1, full2, full3, free0, free1, free2, free3,
                H, HV, D, C, LEAST_BETA, PROGRAMS, num_warps, ty,
            )),
            (_fetch_all, (
                q, k, v, do, h, dh, M, Ag, G, bt, chunks, c0, items, q_places.index(0), k_places.index(0),
                v_places.index(0), do_places.index(0), m_places.index(0), a_places.index(0), s_places.index(0),
                ds_places.index(0), g_places.index(0), b_places.index(0),
                full0, full1, full2, full3, free0, free1, free2, free3, H, HV, D, C, PROGRAMS,
            )),
        ],
        [1],
        [REGISTERS],
    )  # fmt: skip
