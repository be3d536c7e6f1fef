"""Triton kernels of the causal depthwise convolution with SiLU over packed rows; `conv1d_triton` launches them.

The work is cut along the chunk table of the batch: the rows of a chunk belong to one sequence, so that only a chunk's
first rows need rows before it (those of the chunk before, unless the chunk is its sequence's first) and its last rows
need gradients behind it. A program walks down its chunks a row at a time with the last W - 1 rows in registers, so that
a row is read once and no row asks where its sequence starts.

Rows may stand anywhere: a map says at which row of x (of dx) the i-th row of the batch stands, and where x holds more
than q|k|v, a last block of programs copies the columns of beta and alpha, so that an exchange buffer is read and
written in place. Channels may be one of several equal shares of the parameters' channels, section by section.

A sequence may be the continuation of one whose last rows came from another rank: `halo_at` [N, W - 1] says which row
of `halo` stands how far before it (entry j: the row j + 1 before its first; -1: none, zeros). The backward writes what
such rows get of the gradient to the rows of `d_halo` that `d_halo_at` names alike.

Dimensions: T rows, D = 2 * QK + V channels (QK = 0: one section), W taps (2 to 8), C rows of a chunk (64), BD channels
of a program, P row programs, GATES columns of beta and alpha.
"""

# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# triton.jit hides the tuples of a kernel from a type checker
# ruff: noqa: RUF005 -- triton.jit joins tuples but does not unpack one inside another
# ruff: noqa: SIM102 -- a condition of the compiler's, and one of the program's
from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from gdn_cp.kernels.activations_triton import sigmoid

if TYPE_CHECKING:
    from gdn_cp.kernels.compile_report import CompileCase


@triton.jit
def _place(rows, row, valid, MAPPED: tl.constexpr):
    """(where a row of the batch stands, in 64 bits; whether it is to be read). Every load and store of rows of x and dx
    passes here.

    With the map (4, -1 - 7, 2) row 0 stands at 4; row 1 at 7, where it is padding: read as zeros, written as zeros.
    """
    place, real = row, valid
    if MAPPED:
        entry = tl.load(rows + row, mask=valid, other=0)
        real = valid & (entry >= 0)
        place = tl.where(entry < 0, -1 - entry, entry)
    return place.to(tl.int64), real


@triton.jit
def _columns(i_d, share, QK: tl.constexpr, V: tl.constexpr, SHARES: tl.constexpr, BD: tl.constexpr):
    """Block i_d of channels, in one section: (section, channel within it, mask, channel of x, channel of parameters).

    With QK = V = BD = 64 and share 1 of 2, block 1 is k: channels 64..127 of x, 192..255 of the parameters.
    """
    if QK == 0:
        column = i_d * BD + tl.arange(0, BD)
        return 2, column, column < V, column, share * V + column
    else:
        n_qk: tl.constexpr = (QK + BD - 1) // BD
        section = tl.minimum(i_d // n_qk, 2)
        column = (i_d - section * n_qk) * BD + tl.arange(0, BD)
        width = tl.where(section < 2, QK, V)
        return section, column, column < width, section * QK + column, section * (QK * SHARES) + share * width + column


@triton.jit
def _pushed(newest, window, N: tl.constexpr):
    """The window of the last N values after one more: (newest, window[0], ..., window[N - 2])."""
    moved = (newest,)
    for j in tl.static_range(N - 1):
        moved = moved + (window[j],)
    return moved


@triton.jit
def _zeros(N: tl.constexpr, BD: tl.constexpr):
    """N float32 vectors of zeros."""
    vectors = ()
    for j in tl.static_range(N):  # noqa: B007 (a compiled loop variable must not be called _, which keeps its type)
        vectors = vectors + (tl.zeros([BD], tl.float32),)
    return vectors


@triton.jit
def _load_taps(weight, o_p, m_d, W: tl.constexpr, WP: tl.constexpr):
    """Float32 taps of channels o_p [BD] as a tuple: entry j, [BD], multiplies the row j before, weight[:, W - 1 - j].

    Weight rows are read whole and taken apart in registers; reading a tap at a time would fetch each sector W times.
    """
    o_w = tl.arange(0, WP)
    mask = m_d[:, None] & (o_w[None, :] < W)
    tile = tl.load(weight + o_p[:, None] * W + o_w[None, :], mask=mask, other=0.0).to(tl.float32)
    taps = ()
    for j in tl.static_range(W):
        taps = taps + (tl.sum(tl.where(o_w[None, :] == W - 1 - j, tile, 0.0), axis=1),)
    return taps


@triton.jit
def _load_bias(bias, o_p, m_d, HAS_BIAS: tl.constexpr, BD: tl.constexpr):
    b = tl.zeros([BD], tl.float32)
    if HAS_BIAS:
        b += tl.load(bias + o_p, mask=m_d, other=0.0).to(tl.float32)
    return b


@triton.jit
def _chunk(chunks, i_t):
    """(sequence, first row, valid rows, whether rows of the sequence come before) of a chunk; unused: no valid rows."""
    sequence = tl.load(chunks + i_t * 4)
    unused = sequence < 0
    first = tl.where(unused, 0, tl.load(chunks + i_t * 4 + 1))
    count = tl.where(unused, 0, tl.load(chunks + i_t * 4 + 2))
    return sequence, first, count, (tl.load(chunks + i_t * 4 + 3) > 0) & (count > 0)


@triton.jit
def _load_row(x, rows, row, valid, o_d, m_d, x_row, MAPPED: tl.constexpr):
    """One row of x, zeros where it is not valid or padding."""
    place, real = _place(rows, row, valid, MAPPED)
    return tl.load(x + place * x_row + o_d, mask=m_d & real, other=0.0)


@triton.jit
def _load_rows(
    x, rows, first, k, count, o_d, m_d, x_row, GROUP: tl.constexpr, MAPPED: tl.constexpr
):  # fmt: skip
    """Rows k .. k + GROUP - 1 of a chunk, zeros behind its end."""
    loaded = ()
    for u in tl.static_range(GROUP):
        loaded = loaded + (_load_row(x, rows, first + k + u, k + u < count, o_d, m_d, x_row, MAPPED),)
    return loaded


@triton.jit
def _rows_before(
    x, rows, halo, halo_at, kept_halo, sequence, first, has_past, begins, o_d, m_d, x_row, halo_row, W: tl.constexpr,
    D: tl.constexpr, MAPPED: tl.constexpr, HALO: tl.constexpr,
):  # fmt: skip
    """Rows first - 1, ..., first - (W - 1) in float32; where the sequence begins at `first` the halo's, or zeros.

    What is read of the halo is copied to `kept_halo` [N, W - 1, D], if there is one.
    """
    window = ()
    for j in tl.static_range(1, W):
        place, real = _place(rows, first - j, has_past, MAPPED)
        row = x + place * x_row
        if HALO:
            # One load for both sources, whose address alone differs: a second load, added to the first, made all but
            # the few chunks that begin a sequence wait for each row in turn.
            at = tl.load(halo_at + sequence * (W - 1) + j - 1, mask=begins, other=-1)
            row = tl.where(begins, at, place).to(tl.int64) * tl.where(begins, halo_row, x_row)
            row = tl.where(begins, halo, x) + row
            real = real | (at >= 0)
        window = window + (tl.load(row + o_d, mask=m_d & real, other=0.0).to(tl.float32),)
    if kept_halo is not None:
        if begins:
            for j in tl.static_range(W - 1):
                # The number of the row in 32 bits: as a wider one it would stay in registers that there are not.
                kept = kept_halo + (sequence * (W - 1) + j).to(tl.int64) * D + o_d
                tl.store(kept, window[j].to(kept_halo.dtype.element_ty), mask=m_d)
    return window


@triton.jit
def _convolved(newest, window, taps, b, W: tl.constexpr):
    """b + taps[0] * newest + sum over j of taps[j] * window[j - 1], float32 [BD], in this order."""
    y = b + taps[0] * newest
    for j in tl.static_range(1, W):
        y += taps[j] * window[j - 1]
    return y


@triton.jit
def _copy_gates(
    x, rows, gates, chunks, begin, end, gate_column, x_row,
    GATES: tl.constexpr, BG: tl.constexpr, C: tl.constexpr, MAPPED: tl.constexpr,
):  # fmt: skip
    """gates [T, GATES] from columns gate_column, ... of x, for chunks begin .. end - 1."""
    o_t, o_g = tl.arange(0, C), tl.arange(0, BG)
    for i_t in range(begin, end):
        _sequence, first, count, _has_past = _chunk(chunks, i_t)
        row = first + o_t
        place, real = _place(rows, row, o_t < count, MAPPED)
        m_g = o_g[None, :] < GATES
        source = x + place[:, None] * x_row + gate_column + o_g[None, :]
        values = tl.load(source, mask=real[:, None] & m_g, other=0.0)
        target = gates + row.to(tl.int64)[:, None] * GATES + o_g[None, :]
        tl.store(target, values, mask=(o_t < count)[:, None] & m_g)


@triton.jit(do_not_specialize=["num_chunks", "chunks_per_program", "share", "gate_column"])
def conv1d_forward_kernel(
    x, rows, halo, halo_at, weight, bias, y, kept, kept_halo, gates, chunks, num_chunks, chunks_per_program, x_row,
    halo_row, y_row, share, gate_column,
    QK: tl.constexpr, V: tl.constexpr, SHARES: tl.constexpr, W: tl.constexpr, WP: tl.constexpr, BD: tl.constexpr,
    GROUP: tl.constexpr, C: tl.constexpr, GATES: tl.constexpr, BG: tl.constexpr,
    HAS_BIAS: tl.constexpr, SILU: tl.constexpr, MAPPED: tl.constexpr, KEEP: tl.constexpr, HALO: tl.constexpr,
):  # fmt: skip
    """One program: BD channels of `chunks_per_program` consecutive chunks, or with GATES the columns behind them.

    For W = 4 and a chunk of rows 64..127 of a sequence it loads rows 63, 62, 61, then walks: row 64 with them, row 65
    with 64, 63, 62, and so on, GROUP rows between two rounds of loads. y and gates [T, GATES] are in the order of the
    batch, and so is kept [T, D], what was read of x (KEEP). `kept_halo` [N, W - 1, D] receives what was read of the
    halo, entry j of a sequence the row j + 1 before its first.
    """
    D: tl.constexpr = 2 * QK + V
    n_d: tl.constexpr = 2 * ((QK + BD - 1) // BD) + (V + BD - 1) // BD
    n_blocks: tl.constexpr = n_d + (1 if GATES > 0 else 0)
    i_p, i_d = tl.program_id(0) // n_blocks, tl.program_id(0) % n_blocks
    begin, end = i_p * chunks_per_program, tl.minimum((i_p + 1) * chunks_per_program, num_chunks)
    if GATES > 0:
        if i_d == n_d:
            _copy_gates(x, rows, gates, chunks, begin, end, gate_column, x_row, GATES, BG, C, MAPPED)
            return
    _section, _column, m_d, o_d, o_p = _columns(i_d, share, QK, V, SHARES, BD)
    taps = _load_taps(weight, o_p, m_d, W, WP)
    b = _load_bias(bias, o_p, m_d, HAS_BIAS, BD)
    for i_t in range(begin, end):
        sequence, first, count, has_past = _chunk(chunks, i_t)
        begins = (count > 0) & (has_past == 0)
        window = _rows_before(
            x, rows, halo, halo_at, kept_halo, sequence, first, has_past, begins, o_d, m_d, x_row, halo_row, W, D,
            MAPPED, HALO,
        )  # fmt: skip
        for k in range(0, count, GROUP):
            x_rows = _load_rows(x, rows, first, k, count, o_d, m_d, x_row, GROUP, MAPPED)
            for u in tl.static_range(GROUP):
                newest = x_rows[u].to(tl.float32)
                out = _convolved(newest, window, taps, b, W)
                if SILU:
                    out *= sigmoid(out)
                m_row = m_d & (k + u < count)
                row = (first + k + u).to(tl.int64)
                tl.store(y + row * y_row + o_d, out.to(y.dtype.element_ty), mask=m_row)
                if KEEP:
                    tl.store(kept + row * D + o_d, x_rows[u], mask=m_row)
                window = _pushed(newest, window, W - 1)


@triton.jit
def _step_back(newest, dy, window, behind, taps, b, W: tl.constexpr, SILU: tl.constexpr):
    """Backward of one row: its gradient before the activation, the finished dx of the row W - 1 before, and the
    unfinished dx of the W - 1 rows between.

    behind[j] is what later rows gave so far to the dx of the row j + 1 before this one. With W = 3 and d_t the gradient
    before the activation, row 7 starts dx_7 = taps[0] d_7, adds taps[1] d_7 to dx_6 and finishes dx_5 with taps[2] d_7.
    """
    d = dy.to(tl.float32)
    if SILU:
        y = _convolved(newest, window, taps, b, W)
        s = sigmoid(y)
        d *= s * (1.0 + y * (1.0 - s))
    unfinished = (taps[0] * d,)
    for j in tl.static_range(1, W - 1):
        unfinished = unfinished + (behind[j - 1] + taps[j] * d,)
    return d, behind[W - 2] + taps[W - 1] * d, unfinished


@triton.jit
def _rows_after(chunks, i_t, num_chunks, sequence, count, C: tl.constexpr, W: tl.constexpr):
    """How many of the W - 1 rows behind a chunk belong to its sequence: those of the next chunk, if it does."""
    has_next = (i_t + 1 < num_chunks) & (count == C)
    next_sequence = tl.load(chunks + (i_t + 1) * 4, mask=has_next, other=-1)
    next_count = tl.load(chunks + (i_t + 1) * 4 + 2, mask=has_next, other=0)
    return tl.where(has_next & (next_sequence == sequence), tl.minimum(next_count, W - 1), 0)


@triton.jit
def _store_gate_gradients(
    d_beta, d_alpha, dx, dx_rows, chunks, begin, end, gate_column, dx_row,
    GATES: tl.constexpr, BG: tl.constexpr, C: tl.constexpr, DX_MAPPED: tl.constexpr,
):  # fmt: skip
    """Columns gate_column, ... of dx from d_beta and d_alpha [T, GATES / 2], for chunks begin .. end - 1."""
    HEADS: tl.constexpr = GATES // 2
    o_t, o_g = tl.arange(0, C), tl.arange(0, BG)
    is_beta = (o_g < HEADS)[None, :]
    for i_t in range(begin, end):
        _sequence, first, count, _has_past = _chunk(chunks, i_t)
        place, real = _place(dx_rows, first + o_t, o_t < count, DX_MAPPED)
        mask = (o_t < count)[:, None] & (o_g < GATES)[None, :]
        source = (first + o_t).to(tl.int64)[:, None] * HEADS + o_g[None, :]
        beta = tl.load(d_beta + source, mask=mask & real[:, None] & is_beta, other=0.0)
        alpha = tl.load(d_alpha + (source - HEADS), mask=mask & real[:, None] & (o_g >= HEADS)[None, :], other=0.0)
        target = dx + place[:, None] * dx_row + gate_column + o_g[None, :]
        tl.store(target, tl.where(is_beta, beta, alpha.to(beta.dtype)), mask=mask)


@triton.jit
def _store_row(dx, dx_rows, row, valid, values, o_d, m_d, dx_row, DX_MAPPED: tl.constexpr):
    """One row of dx, zeros where it is padding."""
    place, real = _place(dx_rows, row, valid, DX_MAPPED)
    if DX_MAPPED:
        values = tl.where(real, values, 0.0)
    tl.store(dx + place * dx_row + o_d, values.to(dx.dtype.element_ty), mask=m_d & valid)


@triton.jit
def _store_halo(d_halo, d_halo_at, sequence, done, values, o_d, m_d, d_halo_row, W: tl.constexpr):
    """The gradient of the row -done before a sequence's first, if there is such a row."""
    at = tl.load(d_halo_at + sequence * (W - 1) - done - 1).to(tl.int64)
    tl.store(d_halo + at * d_halo_row + o_d, values.to(d_halo.dtype.element_ty), mask=m_d & (at >= 0))


@triton.jit(do_not_specialize=["num_chunks", "chunks_per_program", "share", "gate_column"])
def conv1d_backward_kernel(
    dq, dk, dv, d_beta, d_alpha, x, rows, halo, halo_at, weight, bias, dx, dx_rows, d_halo, d_halo_at, partial, chunks,
    num_chunks, chunks_per_program, x_row, halo_row, dq_row, dk_row, dv_row, dx_row, d_halo_row, share, gate_column,
    QK: tl.constexpr, V: tl.constexpr, SHARES: tl.constexpr, W: tl.constexpr, WP: tl.constexpr, BD: tl.constexpr,
    GROUP: tl.constexpr, C: tl.constexpr, GATES: tl.constexpr, BG: tl.constexpr,
    HAS_BIAS: tl.constexpr, SILU: tl.constexpr, PARAMETERS: tl.constexpr, MAPPED: tl.constexpr, DX_MAPPED: tl.constexpr,
    HALO: tl.constexpr,
):  # fmt: skip
    """One program: BD channels of `chunks_per_program` consecutive chunks, or with GATES the columns behind them.

    dq, dk [T, QK] and dv [T, V] are the sections of the gradient of y, in the order of the batch (all of it is dv if
    QK = 0). partial is [P, W + 1, D] float32: the sums of tap W - 1 - j in row j, that of the bias in row W; left alone
    unless PARAMETERS.

    With d_t = dy_t * silu'(y_t), dx_t = sum_j taps[j] d_{t+j} and dtaps[j] = sum_t d_t x_{t-j}. dx of row t is finished
    W - 1 rows later, so a chunk's walk goes on for W - 1 rows behind it, whose own sums belong to the next chunk.
    """
    D: tl.constexpr = 2 * QK + V
    n_d: tl.constexpr = 2 * ((QK + BD - 1) // BD) + (V + BD - 1) // BD
    n_blocks: tl.constexpr = n_d + (1 if GATES > 0 else 0)
    i_p, i_d = tl.program_id(0) // n_blocks, tl.program_id(0) % n_blocks
    begin, end = i_p * chunks_per_program, tl.minimum((i_p + 1) * chunks_per_program, num_chunks)
    if GATES > 0:
        if i_d == n_d:
            _store_gate_gradients(
                d_beta, d_alpha, dx, dx_rows, chunks, begin, end, gate_column, dx_row, GATES, BG, C, DX_MAPPED
            )
            return
    section, column, m_d, o_d, o_p = _columns(i_d, share, QK, V, SHARES, BD)
    dy, dy_row = dv, dv_row
    if QK > 0:
        dy = tl.where(section == 0, dq, tl.where(section == 1, dk, dv))
        dy_row = tl.where(section == 0, dq_row, tl.where(section == 1, dk_row, dv_row))
    taps = _load_taps(weight, o_p, m_d, W, WP)
    b = _load_bias(bias, o_p, m_d, HAS_BIAS, BD)
    sums = _zeros(W + 1, BD)
    for i_t in range(begin, end):
        sequence, first, count, has_past = _chunk(chunks, i_t)
        after = _rows_after(chunks, i_t, num_chunks, sequence, count, C, W)
        begins = (count > 0) & (has_past == 0)
        window = _rows_before(
            x, rows, halo, halo_at, None, sequence, first, has_past, begins, o_d, m_d, x_row, halo_row, W, D, MAPPED,
            HALO,
        )  # fmt: skip
        behind = _zeros(W - 1, BD)
        x_rows = _load_rows(x, rows, first, 0, count, o_d, m_d, x_row, GROUP, MAPPED)
        dy_rows = _load_rows(dy, rows, first, 0, count, column, m_d, dy_row, GROUP, False)
        for k in range(0, count, GROUP):
            next_x = _load_rows(x, rows, first, k + GROUP, count, o_d, m_d, x_row, GROUP, MAPPED)
            next_dy = _load_rows(dy, rows, first, k + GROUP, count, column, m_d, dy_row, GROUP, False)
            for u in tl.static_range(GROUP):
                newest = x_rows[u].to(tl.float32)
                d, finished, behind = _step_back(newest, dy_rows[u], window, behind, taps, b, W, SILU)
                done = k + u - (W - 1)
                m_done = (done >= 0) & (done < count)
                _store_row(dx, dx_rows, first + done, m_done, finished, o_d, m_d, dx_row, DX_MAPPED)
                if HALO and u < W - 1:
                    if begins & (done < 0):
                        _store_halo(d_halo, d_halo_at, sequence, done, finished, o_d, m_d, d_halo_row, W)
                if PARAMETERS:
                    sums = _added(sums, d, newest, window, W)
                window = _pushed(newest, window, W - 1)
            x_rows, dy_rows = next_x, next_dy
        walked = tl.cdiv(count, GROUP) * GROUP
        for u in tl.static_range(W - 1):
            valid = walked + u < count + after
            newest = _load_row(x, rows, first + walked + u, valid, o_d, m_d, x_row, MAPPED).to(tl.float32)
            dy_next = _load_row(dy, rows, first + walked + u, valid, column, m_d, dy_row, False)
            d, finished, behind = _step_back(newest, dy_next, window, behind, taps, b, W, SILU)
            done = walked + u - (W - 1)
            m_done = (done >= 0) & (done < count)
            _store_row(dx, dx_rows, first + done, m_done, finished, o_d, m_d, dx_row, DX_MAPPED)
            if HALO:
                if begins & (done < 0):
                    _store_halo(d_halo, d_halo_at, sequence, done, finished, o_d, m_d, d_halo_row, W)
            window = _pushed(newest, window, W - 1)
    if PARAMETERS:
        for j in tl.static_range(W + 1):
            tl.store(partial + (i_p.to(tl.int64) * (W + 1) + j) * D + o_d, sums[j], mask=m_d)


@triton.jit
def _added(sums, d, newest, window, W: tl.constexpr):
    """The sums of the taps and, last, of the bias after one more row: d times the rows that each tap multiplied."""
    added = (sums[0] + d * newest,)
    for j in tl.static_range(1, W):
        added = added + (sums[j] + d * window[j - 1],)
    return added + (sums[W] + d,)


def compile_cases() -> list[CompileCase]:
    """None: `conv1d_triton` launches these kernels and knows their configurations."""
    return []
