"""The exchange in one kernel on peers' memory: each slice of a row goes to, or comes from, its final place.

One kernel serves every move. A `Route` says how a *near* tensor of this rank and the *far* tensor of each peer
correspond, by a table of rows and a table of runs of columns; then

    push          far  <- near     this rank writes into its peers' memory
    pull          near <- far      this rank reads its peers' memory

and rows of one side stand in local order, those of the other in natural order:

    natural far   near row i           <->  far row rows[i]         cp -> hp: my rows, in natural order, at the peers
    natural near  near row rows[p*t+i] <->  far row i               hp -> cp: each peer's rows out of mine

Nothing is computed: bits travel, and padded rows (rows[i] = -1 - row) as zeros, whose source is not read. Signals are
not in here: see `gdn_cp.comm.symmetric`.

Example, P = 2, sections q (4 columns) and v (2), natural far, rank 0, rows (0, 3); what goes where:

    near row 1 = [q0 q1 q2 q3 v0 v1]   ->   peer 0, row 3, columns [q0 q1 v0]    peer 1, row 3, columns [q2 q3 v1]

Dimensions: P ranks, t rows of each rank, T = P*t, BR rows and BC columns of a tile.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportReturnType=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false
# triton.jit hides the options of a launch from a type checker
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn_cp.launch import run_kernel

if TYPE_CHECKING:
    from gdn_cp.kernels.compile_report import CompileCase

VECTOR = 16  # bytes of the widest access
NARROW = 64  # sections with fewer columns in a share are moved by tiles of their own


@dataclass(frozen=True)
class TileShape:
    """How the kernel is launched: tiles of `rows` by `columns`, `num_warps` each, by at most `programs` programs.

    On four H200s anything from 132 programs and 128 bytes of columns up was within 5 % of the best.
    """

    rows: int = 64
    columns: int = 128
    num_warps: int = 8
    programs: int = 264


@triton.jit
def _move_tiles(
    near, peers, rows, runs, first_run, num_runs, t, rank,
    P: tl.constexpr, NEAR_ROW: tl.constexpr, FAR_ROW: tl.constexpr, NATURAL_NEAR: tl.constexpr, PULL: tl.constexpr,
    ALIGN: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, JUMPS: tl.constexpr,
):  # fmt: skip
    """Walk over (peer, run of columns, block of rows), the peer fastest and from the next rank on, so that no two
    ranks start on the same receiver. A run is (near column, its step per peer, far column, width, part, jump): of a
    run that JUMPS, near columns leap by `jump` behind each `part` columns."""
    tiles = (t + BR - 1) // BR * num_runs * P
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        peer = (rank + 1 + tile) % P
        run = runs + (first_run + tile // P % num_runs) * 6
        i = tile // P // num_runs * BR + tl.arange(0, BR)
        m_row = i < t
        place = tl.load(rows + (peer * t + i if NATURAL_NEAR else i), mask=m_row, other=0)
        real = place >= 0
        place = tl.where(real, place, -1 - place).to(tl.int64)
        near_row, far_row = (place, i.to(tl.int64)) if NATURAL_NEAR else (i.to(tl.int64), place)

        column = tl.arange(0, BC)
        near_column = tl.multiple_of(tl.load(run) + peer * tl.load(run + 1), ALIGN)
        far_column = tl.multiple_of(tl.load(run + 2), ALIGN)
        width = tl.multiple_of(tl.load(run + 3), ALIGN)
        # Without the hint on the address, which is a number to the compiler, stores would be two bytes wide.
        far = tl.multiple_of(tl.load(peers + peer).to(near.dtype), 16)
        near_column += column
        if JUMPS:
            near_column += column // tl.load(run + 4) * tl.load(run + 5)
        in_near = near + near_row[:, None] * NEAR_ROW + near_column[None, :]
        in_far = far + far_row[:, None] * FAR_ROW + (far_column + column)[None, :]
        mask = m_row[:, None] & (column < width)[None, :]
        if PULL:
            tl.store(in_near, tl.load(in_far, mask=mask & real[:, None], other=0), mask=mask)
        else:
            tl.store(in_far, tl.load(in_near, mask=mask & real[:, None], other=0), mask=mask)


@triton.jit
def _copy_tiles(
    source, target, t,
    SOURCE_ROW: tl.constexpr, TARGET_ROW: tl.constexpr, WIDTH: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Copy [t, WIDTH] between tensors whose rows are so many elements apart."""
    blocks: tl.constexpr = (WIDTH + BC - 1) // BC
    for tile in range(tl.program_id(0), (t + BR - 1) // BR * blocks, tl.num_programs(0)):
        i = tile // blocks * BR + tl.arange(0, BR)
        column = tile % blocks * BC + tl.arange(0, BC)
        mask = (i < t)[:, None] & (column < WIDTH)[None, :]
        i = i.to(tl.int64)
        x = tl.load(source + i[:, None] * SOURCE_ROW + column[None, :], mask=mask)
        tl.store(target + i[:, None] * TARGET_ROW + column[None, :], x, mask=mask)


@triton.jit(do_not_specialize=["t", "rank", "wide_runs", "narrow_runs"])
def exchange_kernel(
    near, peers, rows, runs, wide_runs, narrow_runs, t, rank, kept,
    P: tl.constexpr, NEAR_ROW: tl.constexpr, FAR_ROW: tl.constexpr, NATURAL_NEAR: tl.constexpr, PULL: tl.constexpr,
    ALIGN: tl.constexpr, ALIGN_NARROW: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
    BR_NARROW: tl.constexpr, BC_NARROW: tl.constexpr, HAS_NARROW: tl.constexpr,
    KEPT_COLUMN: tl.constexpr, KEPT_WIDTH: tl.constexpr,
):  # fmt: skip
    """Each program moves every so many-th tile of the wide runs, then of the narrow ones, which follow them in `runs`.

    `peers` int64 [P]: addresses of the far tensors. NEAR_ROW and FAR_ROW: elements from row to row. Where KEPT_WIDTH is
    not 0, columns KEPT_COLUMN.. of near are copied to `kept` [t, KEPT_WIDTH] on this rank, while the last pushed tiles
    are on the wire; a pull copies them back from there.
    """
    _move_tiles(
        near, peers, rows, runs, 0, wide_runs, t, rank, P, NEAR_ROW, FAR_ROW, NATURAL_NEAR, PULL, ALIGN, BR, BC,
        False,
    )  # fmt: skip
    if HAS_NARROW:
        _move_tiles(
            near, peers, rows, runs, wide_runs, narrow_runs, t, rank, P, NEAR_ROW, FAR_ROW, NATURAL_NEAR, PULL,
            ALIGN_NARROW, BR_NARROW, BC_NARROW, True,
        )  # fmt: skip
    if KEPT_WIDTH:
        if PULL:
            _copy_tiles(kept, near + KEPT_COLUMN, t, KEPT_WIDTH, NEAR_ROW, KEPT_WIDTH, BR, BC)
        else:
            _copy_tiles(near + KEPT_COLUMN, kept, t, NEAR_ROW, KEPT_WIDTH, KEPT_WIDTH, BR, BC)


@dataclass(frozen=True)
class Section:
    """Columns of every share: peer p's are near columns `near + p * near_step` on, far columns `far` on, `width` many.

    Narrow sections that lie side by side in the far tensor may be one of `parts` parts, each of `width` columns and
    `apart` from the one before in the near tensor, so that a row of theirs is one access on the wire.
    """

    near: int
    near_step: int
    far: int
    width: int
    parts: int = 1
    apart: int = 0

    @property
    def whole_width(self) -> int:
        """Of all parts."""
        return self.parts * self.width


@dataclass(frozen=True, eq=False)
class Runs:
    """A route's sections cut into runs of at most a tile's columns."""

    table: Tensor  # int32 [R, 6], the wide ones first
    wide: int
    narrow: int
    wide_divisor: int  # of all numbers of the wide ones
    narrow_divisor: int
    narrow_columns: int  # of their tiles


@dataclass(frozen=True, eq=False)
class Route:
    """How a near tensor and the far ones, [*, far_row], correspond. Make it once: it keeps its tables.

    Attributes:
        sections: see `Section`.
        far_row: elements from row to row of the far tensors, the same on all ranks.
        ranks: P.
        rank: this one.
        natural_near: see the module.
    """

    sections: tuple[Section, ...]
    far_row: int
    ranks: int
    rank: int
    natural_near: bool = False
    _runs: dict[tuple[int, torch.device], Runs] = field(default_factory=dict)

    def runs(self, columns: int, device: torch.device) -> Runs:
        """The runs for tiles of so many columns; copied to the device the first time."""
        key = (columns, device)
        if key not in self._runs:
            with torch.inference_mode(False):
                self._runs[key] = self._cut(columns, device)
        return self._runs[key]

    def _cut(self, columns: int, device: torch.device) -> Runs:
        wide = [s for s in self.sections if s.parts == 1 and s.width >= NARROW]
        narrow = [s for s in self.sections if s not in wide]
        narrow_columns = triton.next_power_of_2(max((s.whole_width for s in narrow), default=1))
        runs = [
            (s.near + start, s.near_step, s.far + start, min(columns, s.width - start), s.width, 0)
            for s in wide
            for start in range(0, s.width, columns)
        ]
        count = len(runs)
        runs += [(s.near, s.near_step, s.far, s.whole_width, s.width, s.apart - s.width) for s in narrow]
        table = torch.tensor(runs, dtype=torch.int32).reshape(-1, 6)
        if device.type == "cuda":
            table = table.pin_memory().to(device, non_blocking=True)  # from pageable memory the copy would synchronise
        return Runs(table, count, len(narrow), _divisor(runs[:count]), _divisor(runs[count:]), narrow_columns)


def _divisor(runs: Sequence[tuple[int, ...]]) -> int:
    """What divides all columns of these runs, the ends of parts among them."""
    return math.gcd(*(number for run in runs for number in run)) if runs else 0


def _alignment(divisor: int, strides: Sequence[int], element_size: int) -> int:
    """The largest power of two of elements, up to a vector, that divides all of these."""
    return math.gcd(divisor, *strides, VECTOR // element_size)


def exchange(
    near: Tensor,
    peers: Tensor,
    route: Route,
    rows: Tensor,
    *,
    pull: bool = False,
    kept: Tensor | None = None,
    kept_column: int = 0,
    shape: TileShape | None = None,
) -> None:
    """Move what `route` says between `near` (2-D, last stride 1, 16-byte aligned) and the far tensors at `peers`.

    Args:
        near: this rank's tensor.
        peers: int64 [P] on near's device, the address of each rank's far tensor, a multiple of 16.
        route: see there.
        rows: int32 [t] (natural far) or [P*t] (natural near): the natural row of each local row, of this rank or of
            all in rank order; -1 - row where it is padding.
        pull: read the far tensors instead of writing them.
        kept: [t, w], contiguous, filled with w columns of near from `kept_column` on; of a pull, what fills those.
        kept_column: see `kept`.
        shape: of the tiles; None: the usual one.
    """
    assert near.stride(1) == 1
    assert kept is None or kept.is_contiguous()
    shape = TileShape() if shape is None else shape
    t = rows.shape[0] // (route.ranks if route.natural_near else 1)
    if not t:
        return
    runs, size = route.runs(shape.columns, near.device), near.element_size()
    tiles = -(-t // shape.rows) * max(runs.wide, 1) * route.ranks
    run_kernel(exchange_kernel, min(tiles, shape.programs),
        near, peers, rows, runs.table, runs.wide, runs.narrow, t, route.rank,
        kept, PULL=pull, KEPT_COLUMN=kept_column,
        KEPT_WIDTH=0 if kept is None else kept.shape[1], num_warps=shape.num_warps,
        **_constants(route, runs, shape, near.stride(0), size),
    )  # fmt: skip


@lru_cache(maxsize=64)
def _constants(route: Route, runs: Runs, shape: TileShape, near_row: int, element_size: int) -> dict[str, Any]:
    """Compile-time sizes of `exchange_kernel` for tensors of this row stride and element size."""
    strides = (near_row, route.far_row)
    narrow_rows = min(1024, max(1, shape.rows * shape.columns // runs.narrow_columns // 4))
    return {
        "P": route.ranks, "NEAR_ROW": near_row, "FAR_ROW": route.far_row, "NATURAL_NEAR": route.natural_near,
        "ALIGN": _alignment(runs.wide_divisor, strides, element_size), "BR": shape.rows, "BC": shape.columns,
        "ALIGN_NARROW": _alignment(runs.narrow_divisor, strides, element_size), "HAS_NARROW": runs.narrow > 0,
        "BR_NARROW": triton.next_power_of_2(narrow_rows), "BC_NARROW": runs.narrow_columns,
    }  # fmt: skip


def compile_cases() -> list[CompileCase]:
    """Qwen3-Next's widths over 4 ranks in bfloat16: the way in (push, with z kept), out (push) and in's gradient
    (pull, with that of z)."""
    from gdn_cp.kernels.compile_report import CompileCase

    shape = TileShape()
    tensors = {"near": "*bf16", "peers": "*i64", "rows": "*i32", "runs": "*i32"}
    numbers = dict.fromkeys(("wide_runs", "narrow_runs", "t", "rank"), "i32")
    sizes = {
        "P": 4, "ALIGN": 8, "ALIGN_NARROW": 8, "BR": shape.rows, "BC": shape.columns, "BR_NARROW": 128, "BC_NARROW": 16,
    }  # fmt: skip
    way_in = {"NATURAL_NEAR": False, "HAS_NARROW": True, "NEAR_ROW": 12352, "FAR_ROW": 2112, "KEPT_COLUMN": 8192}
    way_out = {"NATURAL_NEAR": True, "HAS_NARROW": False, "NEAR_ROW": 1024, "FAR_ROW": 4096, "KEPT_COLUMN": 0}
    moves = {
        "push_in": way_in | {"PULL": False, "KEPT_WIDTH": 4096},
        "push_out": way_out | {"PULL": False, "KEPT_WIDTH": 0},
        "pull_grad": way_in | {"PULL": True, "KEPT_WIDTH": 4096},
    }
    return [
        CompileCase(
            f"peer.{name}",
            exchange_kernel,
            {**tensors, **numbers, **({"kept": "*bf16"} if constants["KEPT_WIDTH"] else {})},
            sizes | constants | ({} if constants["KEPT_WIDTH"] else {"kept": None}),
            shape.num_warps,
        )
        for name, constants in moves.items()
    ]
