"""Filling and emptying the buffers of `gdn_cp.comm.transport` in Triton, one pass each.

    pack_projection      projection [t, all heads]    ->  shares [P*t, one rank's heads], block p for rank p
    unpack_projection    shares from rank p, block p  ->  gradient of the projection, with that of z beside them
    scatter_rows         natural rows                 ->  rows where a map says
    gather_rows          rows where a map says        ->  natural rows

Columns are cut into tiles that lie in one section (q, k, v or z) of one share, so that every access is a run of
consecutive bytes; beta and alpha, 1/128 of a row, have a tile of their own for all ranks. The kernels are launched on
the current device, which the mixer makes that of its tensors.

Dimensions: P ranks, T rows of the batch, t = T/P local rows, BR rows and BC columns of a tile.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportReturnType=false, reportGeneralTypeIssues=false
# triton.jit hides the options of a launch from a type checker, and triton.cdiv may return a constexpr
from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn_cp.comm.transport import MixerColumns
from gdn_cp.kernels.configs import cdiv, power_of_2
from gdn_cp.launch import run_kernel

if TYPE_CHECKING:
    from gdn_cp.kernels.compile_report import CompileCase

TILE = 4096  # elements: with 128 threads, 4 loads of 16 bytes of bfloat16 in flight for each
MAX_COLUMNS = 512
NUM_WARPS = 4


@triton.jit
def _move(source, target, mask, keep):
    """Copy a tile; zeros where `keep` is false, whose source is not read."""
    tl.store(target, tl.load(source, mask=mask & keep, other=0.0), mask=mask)


@triton.jit
def _move_gates(
    wide, shares, row, m_row, real, t, wide_row,
    P: tl.constexpr, QK: tl.constexpr, V: tl.constexpr, HEADS: tl.constexpr, SHARE: tl.constexpr, BG: tl.constexpr,
    UNPACK: tl.constexpr,
):  # fmt: skip
    """Beta of all heads, then alpha of all heads, between a block of rows of `wide` and everyone's shares."""
    gate = tl.arange(0, BG)
    head = gate % (P * HEADS)
    mask = m_row[:, None] & (gate < 2 * P * HEADS)[None, :]
    column = 2 * QK + V + gate // (P * HEADS) * HEADS + head % HEADS
    in_wide = wide + row[:, None] * wide_row + (P * (2 * QK + 2 * V) + gate)[None, :]
    in_share = shares + ((head // HEADS)[None, :] * t.to(tl.int64) + row[:, None]) * SHARE + column[None, :]
    if UNPACK:
        _move(in_share, in_wide, mask, real[:, None])
    else:
        _move(in_wide, in_share, mask, real[:, None])


@triton.jit
def _move_section(
    wide, shares, z, i_c, row, m_row, real, t, wide_row,
    P: tl.constexpr, QK: tl.constexpr, V: tl.constexpr, SHARE: tl.constexpr, BC: tl.constexpr,
    UNPACK: tl.constexpr, KEEP_Z: tl.constexpr,
):  # fmt: skip
    """Tile i_c of a block of rows: BC columns of one section of one rank's share, or of z."""
    n_qk: tl.constexpr = (QK + BC - 1) // BC
    n_v: tl.constexpr = (V + BC - 1) // BC
    section = tl.minimum(i_c // (P * n_qk), 2)  # q, k, then v and z one after the other
    tile = i_c - section * (P * n_qk)
    n_own = tl.where(section < 2, n_qk, n_v)
    width = tl.where(section < 2, QK, V)
    rank = tile // n_own
    column = tile % n_own * BC + tl.arange(0, BC)
    mask = m_row[:, None] & (column < width)[None, :]
    # Sections of the projection begin at P * QK * section; that of z follows that of v, rank for rank.
    in_wide = wide + row[:, None] * wide_row + (section * (P * QK) + rank * width + column)[None, :]
    if KEEP_Z:
        is_z = i_c >= P * (2 * n_qk + n_v)
        in_z = z + row[:, None] * (P * V) + ((rank - P) * V + column)[None, :]
        if UNPACK:
            _move(in_z, in_wide, mask & is_z, real[:, None])
        else:
            _move(in_wide, in_z, mask & is_z, real[:, None])
        mask = mask & (i_c < P * (2 * n_qk + n_v))
    in_share = shares + (rank * t.to(tl.int64) + row)[:, None] * SHARE + (section * QK + column)[None, :]
    if UNPACK:
        _move(in_share, in_wide, mask, real[:, None])
    else:
        _move(in_wide, in_share, mask, real[:, None])


@triton.jit(do_not_specialize=["t"])
def columns_kernel(
    wide, shares, z, padding, t, wide_row,
    P: tl.constexpr, QK: tl.constexpr, V: tl.constexpr, HEADS: tl.constexpr, SHARE: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr, BG: tl.constexpr,
    UNPACK: tl.constexpr, KEEP_Z: tl.constexpr, HAS_PADDING: tl.constexpr,
):  # fmt: skip
    """One program: BR rows of one tile of columns, from `wide` [t, q|k|v|z|beta|alpha] to `shares` [P, t, SHARE] or
    back (UNPACK, zeros in padded rows). QK, V, HEADS are widths in one share. KEEP_Z: z [t, P*V] is copied
    too, or back.

    With P = 2, QK = V = BC = 512 the tiles of a block of rows are q of rank 0, q of rank 1, k of rank 0, k of rank 1,
    v of rank 0, v of rank 1, (two of z,) and last beta|alpha of all ranks.
    """
    n_qk: tl.constexpr = (QK + BC - 1) // BC
    n_v: tl.constexpr = (V + BC - 1) // BC
    n_sections: tl.constexpr = P * (2 * n_qk + n_v * (2 if KEEP_Z else 1))
    i_t, i_c = tl.program_id(0) // (n_sections + 1), tl.program_id(0) % (n_sections + 1)
    row = i_t * BR + tl.arange(0, BR)
    m_row = row < t
    real = m_row
    if HAS_PADDING:
        real = m_row & (tl.load(padding + row, mask=m_row, other=0) == 0)
    row = row.to(tl.int64)
    if i_c < n_sections:
        _move_section(wide, shares, z, i_c, row, m_row, real, t, wide_row, P, QK, V, SHARE, BC, UNPACK, KEEP_Z)
    else:
        _move_gates(wide, shares, row, m_row, real, t, wide_row, P, QK, V, HEADS, SHARE, BG, UNPACK)


@triton.jit(do_not_specialize=["num_rows"])
def map_rows_kernel(
    source, target, rows, num_rows, source_row, target_row,
    D: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, SCATTER: tl.constexpr,
):  # fmt: skip
    """One program: BR rows, BC columns. SCATTER: target[rows[i]] = source[i]; else target[i] = source[rows[i]].

    Padded rows (r = -1 - rows[i]) become zeros either way: for rows (0, -3, 1), row 1 is padding and stands at 2.
    """
    n_c: tl.constexpr = (D + BC - 1) // BC
    natural = (tl.program_id(0) // n_c) * BR + tl.arange(0, BR)
    column = (tl.program_id(0) % n_c) * BC + tl.arange(0, BC)
    m_row = natural < num_rows
    entry = tl.load(rows + natural, mask=m_row, other=0)
    real = entry >= 0
    place = tl.where(real, entry, -1 - entry)
    if SCATTER:
        begin, end = natural, place
    else:
        begin, end = place, natural
    mask = m_row[:, None] & (column < D)[None, :]
    from_source = source + begin.to(tl.int64)[:, None] * source_row + column[None, :]
    _move(from_source, target + end.to(tl.int64)[:, None] * target_row + column[None, :], mask, real[:, None])


def pack_projection(projected: Tensor, columns: MixerColumns, z: Tensor | None) -> Tensor:
    """The shares [P*t, share_width] of projected [t, width] (last stride 1); z's columns go to z [t, v] if given."""
    shares = projected.new_empty(columns.ranks * projected.shape[0], columns.share_width)
    _run_columns(projected, shares, columns, z, None, unpack=False)
    return shares


def unpack_projection(
    shares: Tensor, columns: MixerColumns, d_projected: Tensor, dz: Tensor | None, padding: Tensor | None
) -> None:
    """Write all columns of d_projected [t, width] from the shares [P*t, share_width], those of z from dz [t, v] if
    given; zeros in padded rows."""
    _run_columns(d_projected, shares, columns, dz, padding, unpack=True)


def scatter_rows(x: Tensor, rows: Tensor) -> Tensor:
    """y [R, D] with y[rows[i]] = x[i]; x [R, D] with last stride 1, rows int32 [R] as in `RowBuffer.rows`."""
    return _map_rows(x, torch.empty(x.shape, dtype=x.dtype, device=x.device), rows, scatter=True)


def gather_rows(x: Tensor, rows: Tensor) -> Tensor:
    """y [R, D] with y[i] = x[rows[i]]; x [R, D] with last stride 1, rows int32 [R] as in `RowBuffer.rows`."""
    return _map_rows(x, torch.empty(x.shape, dtype=x.dtype, device=x.device), rows, scatter=False)


@lru_cache(maxsize=64)
def _tile(width: int) -> tuple[int, int]:
    """(rows, columns) of a tile for sections of at least `width` columns."""
    columns = min(MAX_COLUMNS, power_of_2(width))
    return TILE // columns, columns


@lru_cache(maxsize=64)
def _constants(columns: MixerColumns) -> dict[str, int]:
    """Compile-time sizes of `columns_kernel`."""
    P = columns.ranks
    BR, BC = _tile(min(columns.qk, columns.v) // P)
    return {
        "P": P, "QK": columns.qk // P, "V": columns.v // P, "HEADS": columns.heads // P, "SHARE": columns.share_width,
        "BR": BR, "BC": BC, "BG": power_of_2(2 * columns.heads),
    }  # fmt: skip


def _run_columns(
    wide: Tensor, shares: Tensor, columns: MixerColumns, z: Tensor | None, padding: Tensor | None, *, unpack: bool
) -> None:
    t, sizes = wide.shape[0], _constants(columns)
    assert wide.stride(1) == 1
    if not t:
        return
    n_qk, n_v = cdiv(sizes["QK"], sizes["BC"]), cdiv(sizes["V"], sizes["BC"])
    tiles = columns.ranks * (2 * n_qk + n_v * (1 if z is None else 2)) + 1
    run_kernel(columns_kernel, cdiv(t, sizes["BR"]) * tiles,
        wide, shares, z, None if padding is None else padding.view(torch.uint8), t, wide.stride(0),
        **sizes, UNPACK=unpack, KEEP_Z=z is not None, HAS_PADDING=padding is not None, num_warps=NUM_WARPS,
    )  # fmt: skip


def _map_rows(x: Tensor, y: Tensor, rows: Tensor, *, scatter: bool) -> Tensor:
    assert x.stride(1) == y.stride(1) == 1
    R, D = x.shape
    if y.numel():
        BR, BC = _tile(D)
        run_kernel(map_rows_kernel, cdiv(R, BR) * cdiv(D, BC),
            x, y, rows, R, x.stride(0), y.stride(0), D=D, BR=BR, BC=BC, SCATTER=scatter,
            num_warps=NUM_WARPS,
        )  # fmt: skip
    return y


def compile_cases() -> list[CompileCase]:
    """Qwen3-Next's widths over 4 ranks in bfloat16: packing with z, unpacking with z and padding, rows both ways."""
    from gdn_cp.kernels.compile_report import CompileCase

    sizes = _constants(MixerColumns(2048, 4096, 32, 4))
    tensors = {"wide": "*bf16", "shares": "*bf16", "z": "*bf16", "t": "i32", "wide_row": "i32"}
    pack = sizes | {"UNPACK": False, "KEEP_Z": True, "HAS_PADDING": False, "padding": None}
    unpack = sizes | {"UNPACK": True, "KEEP_Z": True, "HAS_PADDING": True}
    strides = ("source_row", "target_row")
    rows = {"source": "*bf16", "target": "*bf16", "rows": "*i32", "num_rows": "i32", **dict.fromkeys(strides, "i32")}
    BR, BC = _tile(1024)
    return [
        CompileCase("packing.pack", columns_kernel, tensors, pack, NUM_WARPS, divisible=("wide_row",)),
        CompileCase(
            "packing.unpack", columns_kernel, {**tensors, "padding": "*u8"}, unpack, NUM_WARPS, divisible=("wide_row",)
        ),
        *(
            CompileCase(
                f"packing.{'scatter' if scatter else 'gather'}", map_rows_kernel, rows,
                {"D": 1024, "BR": BR, "BC": BC, "SCATTER": scatter}, NUM_WARPS, divisible=strides,
            )
            for scatter in (True, False)
        ),
    ]  # fmt: skip
