"""Sums over programs: kernels that see a part of a batch leave float32 partial sums, which are added here in a fixed
order, without atomics.

Several such sums can wait for one another (`LaterSums`) and are one launch then: the gradients of the norm's weight, of
the gate's parameters and of the convolution are a few programs each, and a launch costs the host as long as any other.

Dimensions: P partial sums, HV value heads, D channels of the convolution, W taps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn_cp.kernels.configs import cdiv, launches, power_of_2
from gdn_cp.launch import run_kernel

if TYPE_CHECKING:
    from gdn_cp.kernels.compile_report import CompileCase

COLUMNS = 32  # of a program, whatever the width: a head's sum has the same order among few heads and among many
ROWS = 64


@triton.jit
def _sum_columns(
    block, partial, total, count, share,
    WIDTH: tl.constexpr, HEADS: tl.constexpr, SHARES: tl.constexpr, ROWS: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """sum over i of partial[i, j] for BW columns j, in the order of i: blocks of ROWS, then one tree.

    With SHARES the sum of column j goes to its place among the heads of all shares, and 0 to the other shares' places:
    for WIDTH = 4, HEADS = 2, SHARES = 2 and share 1, columns 0 1 2 3 go to 2 3 6 7. Only the stores know of that: loads
    through computed places would be laid out after HEADS, and a head's sum would depend on how many there are.
    """
    o_w = block * BW + tl.arange(0, BW)
    o_r = tl.arange(0, ROWS)
    sums = tl.zeros([ROWS, BW], tl.float32)
    for start in range(0, count, ROWS):
        mask = (start + o_r[:, None] < count) & (o_w[None, :] < WIDTH)
        sums += tl.load(partial + (start + o_r[:, None]) * WIDTH + o_w[None, :], mask=mask, other=0.0)
    summed = tl.sum(sums, axis=0)
    for other in tl.static_range(SHARES):
        place = (o_w // HEADS * SHARES + other) * HEADS + o_w % HEADS
        value = tl.where(other == share, summed, 0.0)
        tl.store(total + place, value.to(total.dtype.element_ty), mask=o_w < WIDTH)


@triton.jit
def _sum_taps(
    block, partial, dweight, dbias, count, share,
    QK: tl.constexpr, V: tl.constexpr, SHARES: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The sum over the first dimension of partial [P, W + 1, D] for one tap (or the bias) and BD channels of the
    parameters, blocks of ROWS partials one after the other, then one tree. dweight is [SHARES * D, W]; channels of
    other shares become zeros."""
    D: tl.constexpr = 2 * QK + V
    n_d: tl.constexpr = (SHARES * D + BD - 1) // BD
    j, i_d = block // n_d, block % n_d
    o_p, o_r = i_d * BD + tl.arange(0, BD), tl.arange(0, ROWS)
    m_p = o_p < SHARES * D
    section = (o_p >= SHARES * QK).to(tl.int32) + (o_p >= SHARES * 2 * QK).to(tl.int32)
    width = tl.where(section < 2, QK if QK > 0 else 1, V)
    column = o_p - section * (SHARES * QK)
    own = m_p & (column // width == share)
    o_d = section * QK + column - share * width
    sums = tl.zeros([ROWS, BD], tl.float32)
    for start in range(0, count, ROWS):
        row = (start + o_r[:, None]).to(tl.int64) * (W + 1) + j
        mask = (start + o_r[:, None] < count) & own[None, :]
        sums += tl.load(partial + row * D + o_d[None, :], mask=mask, other=0.0)
    total = tl.sum(sums, axis=0)
    tl.store(dweight + o_p * W + (W - 1 - j), total.to(dweight.dtype.element_ty), mask=m_p & (j < W))
    if dbias is not None:
        tl.store(dbias + o_p, total.to(dbias.dtype.element_ty), mask=m_p & (j == W))


@triton.jit(do_not_specialize=["share", "other_share", "taps_share"])
def sums_kernel(
    partial, total, count, share, other_partial, other_total, other_count, other_share,
    taps, dweight, dbias, taps_count, taps_share,
    WIDTH: tl.constexpr, HEADS: tl.constexpr, SHARES: tl.constexpr,
    OTHER_WIDTH: tl.constexpr, OTHER_HEADS: tl.constexpr, OTHER_SHARES: tl.constexpr,
    QK: tl.constexpr, V: tl.constexpr, TAPS_SHARES: tl.constexpr, W: tl.constexpr,
    ROWS: tl.constexpr, BW: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Programs of two sums of columns, then those of the taps. Of what there is not, tensors are None and widths 0."""
    pid = tl.program_id(0)
    FIRST: tl.constexpr = (WIDTH + BW - 1) // BW
    OTHER: tl.constexpr = (OTHER_WIDTH + BW - 1) // BW
    if partial is not None:  # noqa: SIM102 - decided by the compiler, unlike the inner one
        if pid < FIRST:
            _sum_columns(pid, partial, total, count, share, WIDTH, HEADS, SHARES, ROWS, BW)
    if other_partial is not None:  # noqa: SIM102
        if (pid >= FIRST) & (pid < FIRST + OTHER):
            _sum_columns(
                pid - FIRST, other_partial, other_total, other_count, other_share,
                OTHER_WIDTH, OTHER_HEADS, OTHER_SHARES, ROWS, BW,
            )  # fmt: skip
    if taps is not None:  # noqa: SIM102
        if pid >= FIRST + OTHER:
            block = pid - FIRST - OTHER
            _sum_taps(block, taps, dweight, dbias, taps_count, taps_share, QK, V, TAPS_SHARES, W, ROWS, BD)


@dataclass(frozen=True, eq=False)
class ColumnSums:
    """partial [n, ..., heads] float32, whose sum over the first dimension goes to `total` [..., shares * heads]."""

    partial: Tensor
    total: Tensor
    shares: int = 1
    share: int = 0


@dataclass(frozen=True, eq=False)
class TapSums:
    """partial [P, W + 1, 2 * qk + v] float32, the bias last, to dweight [shares * D, W] and dbias [shares * D] or None;
    sections of `qk`, `qk` and `v` channels, of which these are the share-th."""

    partial: Tensor
    dweight: Tensor
    dbias: Tensor | None
    qk: int
    v: int
    shares: int
    share: int


class LaterSums:
    """Sums that wait: what `sum_partials` and the convolution's backward gave out is filled by `launch`."""

    def __init__(self) -> None:
        self.columns: list[ColumnSums] = []
        self._taps: TapSums | None = None

    def add(self, job: ColumnSums | TapSums) -> None:
        """One more, at most two sums of columns and one of taps."""
        if isinstance(job, TapSums):
            assert self._taps is None
            self._taps = job
        else:
            assert len(self.columns) < 2
            self.columns.append(job)

    def launch(self) -> None:
        """Fill the results, on the current stream."""
        if self.columns or self._taps is not None:
            _launch(self.columns, self._taps)
        self.columns, self._taps = [], None


@dataclass(frozen=True, eq=False)
class SharedSums:
    """Sums that wait, over heads that are the share-th of `shares`: see `sum_partials`."""

    later: LaterSums
    shares: int = 1
    share: int = 0


def sum_partials(
    partial: Tensor, dtype: torch.dtype = torch.float32, shares: int = 1, share: int = 0,
    later: LaterSums | None = None,
) -> Tensor:  # fmt: skip
    """Sum of float32 partial sums [n, ..., heads] over the first dimension, always in the same order, as `dtype`.

    The result [..., shares * heads] has zeros in all places but those of the share-th of `shares` ranks' heads. With
    `later` it is filled when that is launched.
    """
    *dims, heads = partial.shape[1:]
    total = torch.empty(*dims, shares * heads, dtype=dtype, device=partial.device)
    if partial.shape[0] == 0:
        return total.zero_()
    job = ColumnSums(partial, total, shares, share)
    if later is None:
        _launch([job], None)
    else:
        later.add(job)
    return total


def sum_taps(job: TapSums, later: LaterSums | None = None) -> None:
    """Fill the gradients of a convolution's parameters, with `later` when that is launched."""
    if later is None:
        _launch([], job)
    else:
        later.add(job)


def _launch(columns: list[ColumnSums], taps: TapSums | None) -> None:
    first, other = [*columns, None, None][:2]
    device_of = first.partial if first is not None else taps.partial if taps is not None else None
    assert device_of is not None
    _run(device_of, first, other, taps)


@launches
def _run(_: Tensor, first: ColumnSums | None, other: ColumnSums | None, taps: TapSums | None) -> None:
    of_columns, arguments = [], []
    for job in (first, other):
        if job is None:
            of_columns.append((0, 1, 1))
            arguments += [None, None, 0, 0]
        else:
            count, *dims = job.partial.shape
            of_columns.append((math.prod(dims), dims[-1], job.shares))
            arguments += [job.partial, job.total, count, job.share]
    of_taps, with_bias = (0, 0, 1, 0), False
    if taps is None:
        arguments += [None, None, None, 0, 0]
    else:
        count, rows, _D = taps.partial.shape
        of_taps, with_bias = (taps.qk, taps.v, taps.shares, rows - 1), taps.dbias is not None
        arguments += [taps.partial, taps.dweight, taps.dbias, count, taps.share]
    programs, constants = _sizes(*of_columns, of_taps, with_bias)
    run_kernel(sums_kernel, programs, *arguments, **constants)


@lru_cache(maxsize=64)
def _sizes(
    first: tuple[int, int, int], other: tuple[int, int, int], taps: tuple[int, int, int, int], with_bias: bool
) -> tuple[int, dict[str, int]]:
    """Programs and constants for (width, heads, shares) of sums of columns and (qk, v, shares, W) of taps."""
    qk, v, shares, W = taps
    width = shares * (2 * qk + v)
    block = min(32, power_of_2(max(width, 1)))
    programs = cdiv(first[0], COLUMNS) + cdiv(other[0], COLUMNS) + (W + with_bias) * cdiv(width, block)
    constants = dict(zip(("WIDTH", "HEADS", "SHARES"), first, strict=True))
    constants |= dict(zip(("OTHER_WIDTH", "OTHER_HEADS", "OTHER_SHARES"), other, strict=True))
    constants |= dict(zip(("QK", "V", "TAPS_SHARES", "W"), taps, strict=True))
    return programs, constants | {"ROWS": ROWS, "BW": COLUMNS, "BD": block, "num_warps": 4}


def compile_cases() -> list[CompileCase]:
    """A sum alone, and those of a layer's backward at Qwen3-Next's widths over 4 ranks."""
    from gdn_cp.kernels.compile_report import CompileCase

    numbers = dict.fromkeys(("count", "share", "other_count", "other_share", "taps_count", "taps_share"), "i32")
    first = {"partial": "*fp32", "total": "*fp32"}
    others = {"other_partial": "*fp32", "other_total": "*fp32", "taps": "*fp32", "dweight": "*bf16", "dbias": "*bf16"}
    sizes = {"WIDTH": 16, "HEADS": 8, "SHARES": 4, "OTHER_WIDTH": 128, "OTHER_HEADS": 128, "OTHER_SHARES": 1}
    sizes |= {"QK": 512, "V": 1024, "TAPS_SHARES": 4, "W": 4, "ROWS": ROWS, "BW": COLUMNS, "BD": 32}
    return [
        CompileCase("sums.columns", sums_kernel, first | numbers, sizes | dict.fromkeys(others)),
        CompileCase("sums.layer", sums_kernel, first | others | numbers, sizes),
    ]
