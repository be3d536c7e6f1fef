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

from gdn_cp.kernels.configs import cdiv, launches, options, power_of_2

if TYPE_CHECKING:
    from gdn_cp.kernels.compile_report import CompileCase

# Columns of the state per program, rows of a step of the product, warps and pipeline stages: forward, and in reverse.
_LAUNCH = {False: (8, 32, 8, 4), True: (16, 32, 8, 1)}


@triton.jit
def merge_kernel(
    ext_ptr, maps_ptr, units_ptr, links_ptr, out_ptr, kept_ptr, marks_ptr, ext_matrix, ext_row, map_matrix, map_row,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BR: tl.constexpr, TRANSPOSE: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Program (chain, block of BV columns): the walk of `merge`, the state in registers.

    The product takes the state's rows BR at a time, which keeps few operands in registers; they are read from `marks`
    [U, 2, K, V], where every thread's share is put before each product. Two places by turns: one barrier lets every
    thread see what all have written, and also says that all have read what was there two links before. M is copied to
    `kept` by slices of BR rows (columns with TRANSPOSE), each by another program of the chain.
    """
    BLOCKS: tl.constexpr = (V + BV - 1) // BV
    unit = tl.program_id(0) // BLOCKS
    block = tl.program_id(0) % BLOCKS
    first = tl.load(units_ptr + unit * 2)
    count = tl.load(units_ptr + unit * 2 + 1)
    d = tl.arange(0, BK)
    r = tl.arange(0, BR)
    e = block * BV + tl.arange(0, BV)
    mask = (d[:, None] < K) & (e[None, :] < V)
    own = d[:, None] * V + e[None, :]
    state = tl.zeros((BK, BV), tl.float32)
    for step in range(0, count):
        link = links_ptr + (first + step) * 4
        law = tl.load(link).to(tl.int64)
        map_at = tl.load(link + 1).to(tl.int64)
        out = tl.load(link + 2).to(tl.int64)
        tl.store(out_ptr + out * (K * V) + own, state, mask=mask & (out >= 0))
        mark = marks_ptr + (unit.to(tl.int64) * 2 + step % 2) * (K * V)
        tl.store(mark + own, state, mask=mask & (map_at >= 0))
        tl.debug_barrier()
        ext = ext_ptr + law * ext_matrix + d[:, None] * ext_row + e[None, :]
        state = tl.load(ext, mask=mask & (law >= 0), other=0.0)
        if map_at >= 0:
            M = maps_ptr + map_at * map_matrix
            for first_row in tl.range(0, K, BR, num_stages=STAGES):  # pyright: ignore[reportGeneralTypeIssues]
                rows = first_row + r
                place = rows[None, :] * map_row + d[:, None] if TRANSPOSE else d[:, None] * map_row + rows[None, :]
                tile = (d[:, None] < K) & (rows[None, :] < K)
                factor = tl.load(M + place, mask=tile, other=0.0)
                part = tl.load(
                    mark + rows[:, None] * V + e[None, :], mask=(rows[:, None] < K) & (e[None, :] < V), other=0.0
                )
                state = tl.dot(factor, part, state, input_precision="ieee")
            if kept_ptr is not None:
                keep = tl.load(link + 3).to(tl.int64)
                copies: tl.constexpr = (K + BR - 1) // BR
                for copy in range(block, copies, BLOCKS):
                    rows = copy * BR + r
                    within = (rows[:, None] < K) & (d[None, :] < K) & (keep >= 0)
                    values = tl.load(M + rows[:, None] * map_row + d[None, :], mask=within, other=0.0)
                    tl.store(kept_ptr + keep * (K * K) + rows[:, None] * K + d[None, :], values, mask=within)


@launches
def launch_merge(
    ext: Tensor, maps: Tensor, units: Tensor, links: Tensor, out: Tensor, kept: Tensor | None, transpose: bool
) -> None:
    """`merge.merge_chains`, with its arguments."""
    K, V = ext.shape[1:]
    if not len(units):
        return
    constants, warps, stages = _constants(K, V, transpose)
    marks = torch.empty(len(units), 2, K, V, dtype=torch.float32, device=ext.device)
    merge_kernel[(len(units) * cdiv(V, constants["BV"]),)](
        ext, maps, units, links, out, kept, marks, ext.stride(0), ext.stride(1), maps.stride(0), maps.stride(1),
        **options(warps, stages, **constants),
    )  # fmt: skip


def _constants(K: int, V: int, transpose: bool) -> tuple[dict[str, int], int, int]:
    """(constants, warps, stages) of a launch."""
    block_v, block_r, warps, stages = _LAUNCH[transpose]
    BK = power_of_2(K)
    sizes = {"K": K, "V": V, "BK": BK, "BV": block_v, "BR": min(block_r, BK)}
    return sizes | {"TRANSPOSE": transpose, "STAGES": stages}, warps, stages


def compile_cases() -> list[CompileCase]:
    """Forward with copies of M, and in reverse, at head dim 128; in reverse at 256."""
    from gdn_cp.kernels.compile_report import CompileCase

    strides = ("ext_matrix", "ext_row", "map_matrix", "map_row")
    types = dict.fromkeys(("ext_ptr", "maps_ptr", "out_ptr", "marks_ptr"), "*fp32") | dict.fromkeys(strides, "i32")
    types |= {"units_ptr": "*i32", "links_ptr": "*i32"}
    cases = []
    for dim, transpose in ((128, False), (128, True), (256, True)):
        constants, warps, stages = _constants(dim, dim, transpose)
        kept = {} if transpose else {"kept_ptr": "*fp32"}
        cases.append(
            CompileCase(
                name=f"merge/{'gradients' if transpose else 'states'}/K{dim}",
                kernel=merge_kernel,
                signature=types | kept,
                constexprs=constants | ({"kept_ptr": None} if transpose else {}),
                num_warps=warps,
                num_stages=stages,
                divisible=strides,
                main=dim == 128,
            )
        )
    return cases
