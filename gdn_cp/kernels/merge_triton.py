"""The Triton kernel of `merge`: states composed along chains, each column of the state by itself, in float32.

Dimensions: U chains of one head each, K, V head dims, BV columns of the state of a program, BR rows of a step of the
product.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn_cp.kernels.chunk_pieces import float32_product
from gdn_cp.kernels.configs import cdiv, launches, options, power_of_2
from gdn_cp.launch import run_kernel

if TYPE_CHECKING:
    from gdn_cp.kernels.compile_report import CompileCase

COLUMNS_PER_PROGRAM = 16
# Stages of the pipeline over links, where a whole M (64 KiB at K = 128) is fetched: measured on an H200 for 32 chains
# of 7 links, 51 us where M is copied to `kept` too, which fetching ahead made slower, and 41 where it is not.
_STAGES = {True: 1, False: 3}


@triton.jit
def merge_kernel(
    ext_ptr, maps_ptr, units_ptr, links_ptr, out_ptr, kept_ptr, lost_ptr, marks_ptr, ext_matrix, ext_row, map_matrix,
    map_row,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BR: tl.constexpr, TRANSPOSE: tl.constexpr,
    STAGES: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Program (chain, block of BV columns): the walk of `merge`, the state in registers.

    As in `chunk_pieces`, X is held transposed, [BV, K], and multiplied from the right: products of 16 rows run as
    warp-level `mma`, which may take operands from registers. M, which waits for nothing, is fetched some links ahead
    where it fits (BR >= K). Else X is read back by BR rows from `marks` [U, 2, K, V], in two places by turns: one
    barrier lets every thread see what all have written, and says that all have read what was there two links before.
    Each program of a chain copies a part of M to `kept`.

    Where `lost` says which M are zero, a chain that has no other is not walked: the law right before it is what enters
    a segment. Of any other chain lost M are not read.
    """
    BLOCKS: tl.constexpr = (V + BV - 1) // BV
    SHARE: tl.constexpr = (K + BLOCKS - 1) // BLOCKS
    unit = tl.program_id(0) // BLOCKS
    block = tl.program_id(0) % BLOCKS
    first = tl.load(units_ptr + unit * 2)
    count = tl.load(units_ptr + unit * 2 + 1)
    d = tl.arange(0, BK)
    r = tl.arange(0, BR)
    e = block * BV + tl.arange(0, BV)
    mask = (d[None, :] < K) & (e[:, None] < V)
    own = d[None, :] * V + e[:, None]
    along, across = (1, map_row) if TRANSPOSE else (map_row, 1)
    kept_along, kept_across = (1, K) if TRANSPOSE else (K, 1)
    walked = count
    gone = tl.zeros((LANES,), tl.int32)
    number = tl.arange(0, LANES)
    if lost_ptr is not None:
        of_link = tl.load(links_ptr + (first + number) * 4 + 1, mask=number < count, other=-1)
        gone = tl.load(lost_ptr + of_link, mask=of_link >= 0, other=1)
        walked = tl.where(tl.sum(gone, 0) < LANES, count, 0)
        if walked == 0:
            for step in range(0, count):
                out = tl.load(links_ptr + (first + step) * 4 + 2).to(tl.int64)
                if out >= 0:
                    law = tl.load(links_ptr + (first + step - 1) * 4, mask=step > 0, other=-1).to(tl.int64)
                    ext = ext_ptr + law * ext_matrix + d[None, :] * ext_row + e[:, None]
                    # A product with zeros would be added otherwise, which makes -0 0.
                    alone = tl.load(ext, mask=mask & (law >= 0), other=0.0) + 0.0
                    tl.store(out_ptr + out * (K * V) + own, alone, mask=mask)
    state = tl.zeros((BV, BK), tl.float32)
    for step in tl.range(0, walked, num_stages=STAGES):  # pyright: ignore[reportGeneralTypeIssues]
        link = links_ptr + (first + step) * 4
        law = tl.load(link).to(tl.int64)
        map_at = tl.load(link + 1).to(tl.int64)
        out = tl.load(link + 2).to(tl.int64)
        keep = tl.load(link + 3).to(tl.int64)
        has_map = map_at >= 0
        tl.store(out_ptr + out * (K * V) + own, state, mask=mask & (out >= 0))
        ext = ext_ptr + law * ext_matrix + d[None, :] * ext_row + e[:, None]
        moved = tl.load(ext, mask=mask & (law >= 0), other=0.0)
        if lost_ptr is not None:
            # Out of registers: to load it here would be one more load for that of M to wait for.
            has_map = tl.sum(tl.where(number == step, gone, 0), 0) == 0
            state = tl.where(has_map, state, 0.0)
        M = maps_ptr + map_at * map_matrix
        if BR >= K:
            tile = (d[None, :] < K) & (r[:, None] < K) & has_map
            factor = tl.load(M + d[None, :] * along + r[:, None] * across, mask=tile, other=0.0)
            if kept_ptr is not None:
                copied = tile & (keep >= 0) & (r[:, None] // SHARE == block)
                copy = kept_ptr + keep * (K * K) + d[None, :] * kept_along + r[:, None] * kept_across
                tl.store(copy, factor, mask=copied)
            state = float32_product(state, factor, moved)
        else:
            mark = marks_ptr + (unit.to(tl.int64) * 2 + step % 2) * (K * V)
            tl.store(mark + own, state, mask=mask)
            tl.debug_barrier()
            for first_row in range(0, K, BR):
                rows = first_row + r
                tile = (d[None, :] < K) & (rows[:, None] < K) & has_map
                factor = tl.load(M + d[None, :] * along + rows[:, None] * across, mask=tile, other=0.0)
                if kept_ptr is not None:
                    copied = tile & (keep >= 0) & (rows[:, None] // SHARE == block)
                    copy = kept_ptr + keep * (K * K) + d[None, :] * kept_along + rows[:, None] * kept_across
                    tl.store(copy, factor, mask=copied)
                within = (rows[None, :] < K) & (e[:, None] < V)
                part = tl.load(mark + rows[None, :] * V + e[:, None], mask=within, other=0.0)
                moved = float32_product(part, factor, moved)
            state = moved


@launches
def launch_merge(
    ext: Tensor, maps: Tensor, units: Tensor, links: Tensor, out: Tensor, kept: Tensor | None,
    lost: Tensor | None, transpose: bool, steps: int,
) -> None:  # fmt: skip
    """`merge.merge_chains`, with its arguments."""
    K, V = ext.shape[1:]
    if not len(units):
        return
    constants, warps, stages = _constants(K, V, transpose, kept is not None, 1 if lost is None else steps)
    marks = None
    if constants["BR"] < K:
        marks = torch.empty(len(units), 2, K, V, dtype=torch.float32, device=ext.device)
    run_kernel(merge_kernel, len(units) * cdiv(V, COLUMNS_PER_PROGRAM),
        ext, maps, units, links, out, kept, lost, marks, ext.stride(0), ext.stride(1), maps.stride(0), maps.stride(1),
        **options(warps, stages, **constants),
    )  # fmt: skip


def _constants(
    K: int, V: int, transpose: bool, copies: bool, steps: int
) -> tuple[dict[str, int], int, int]:  # fmt: skip
    """(constants, warps, stages) of a launch: a warp for 16 rows of M. `steps`: at most so many flags of a chain."""
    BK = max(16, power_of_2(K))
    fits = BK <= 128
    sizes = {"K": K, "V": V, "BK": BK, "BV": COLUMNS_PER_PROGRAM, "BR": BK if fits else 32}
    stages = _STAGES[copies] if fits else 1
    sizes |= {"TRANSPOSE": transpose, "STAGES": stages, "LANES": max(16, power_of_2(steps))}
    return sizes, BK // 16, stages


def compile_cases() -> list[CompileCase]:
    """Forward with copies of M, in reverse, and both where M may be lost, at head dims 128 and 256."""
    from gdn_cp.kernels.compile_report import CompileCase

    strides = ("ext_matrix", "ext_row", "map_matrix", "map_row")
    types = dict.fromkeys(("ext_ptr", "maps_ptr", "out_ptr"), "*fp32") | dict.fromkeys(strides, "i32")
    types |= dict.fromkeys(("units_ptr", "links_ptr"), "*i32")
    kinds = {"kept_ptr": "*fp32", "marks_ptr": "*fp32", "lost_ptr": "*i32"}
    cases = []
    for name, transpose, copies, flags in (
        ("states", False, True, False),
        ("gradients", True, False, False),
        ("states or lost", False, False, True),
        ("gradients or lost", True, False, True),
    ):
        for dim in (128, 256):
            constants, warps, stages = _constants(dim, dim, transpose, copies, 8)
            given = {"kept_ptr": copies, "marks_ptr": constants["BR"] < dim, "lost_ptr": flags}
            cases.append(
                CompileCase(
                    name=f"merge/{name}/K{dim}",
                    kernel=merge_kernel,
                    signature=types | {pointer: kinds[pointer] for pointer, there in given.items() if there},
                    constexprs=constants | {pointer: None for pointer, there in given.items() if not there},
                    num_warps=warps,
                    num_stages=stages,
                    divisible=strides,
                    main=dim == 128,
                )
            )
    return cases
