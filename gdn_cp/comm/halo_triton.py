"""Triton kernels of the halo: a few rows taken out of a buffer to be sent, and sums of gradients added to some rows.

Where ranks share memory (`gdn_cp.comm.symmetric`), the rows are written to all peers' slots as they are taken out, and
gradients are read from the slots of whoever has them: `peers` int64 [G] are the slots' addresses.

Dimensions: S rows sent, O rows with a sum, C addends at most, D columns, BD columns of a program, G ranks.
"""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false
# triton.jit hides the options of a launch from a type checker
from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn_cp.comm.packing_triton import NUM_WARPS
from gdn_cp.launch import run_kernel

if TYPE_CHECKING:
    from gdn_cp.kernels.compile_report import CompileCase

BLOCK = 1024  # columns: with 128 threads, one load of 16 bytes of bfloat16 for each


@triton.jit
def _slot_of(peers, rank, like):
    """The beginning of a rank's slot, for elements as those of `like`."""
    return tl.multiple_of(tl.load(peers + rank).to(like.dtype), 16)


@triton.jit(do_not_specialize=["first"])
def take_rows_kernel(x, places, taken, peers, first, x_row, G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """One program: BD columns of row i of `taken` [S, D] from row places[i] of x; zeros where that is negative. With
    `peers`, of row first + i of all G slots instead."""
    BLOCKS: tl.constexpr = (D + BD - 1) // BD
    i = (tl.program_id(0) // BLOCKS).to(tl.int64)
    column = tl.program_id(0) % BLOCKS * BD + tl.arange(0, BD)
    place = tl.load(places + i).to(tl.int64)
    values = tl.load(x + place * x_row + column, mask=(column < D) & (place >= 0), other=0.0)
    if peers is not None:
        for rank in tl.static_range(G):
            tl.store(_slot_of(peers, rank, x) + (first + i) * D + column, values, mask=column < D)
    else:
        tl.store(taken + i * D + column, values, mask=column < D)


@triton.jit(do_not_specialize=["returns"])
def add_rows_kernel(
    x, places, arrived, peers, addends, returns, x_row, C: tl.constexpr, D: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    """One program: BD columns of row places[i] of x, to which the rows addends[i] of `arrived` [.., D] are added in
    float32, in order, up to the first that is negative. Nothing where places[i] is. With `peers`, row number r is row
    r % returns of slot r // returns."""
    BLOCKS: tl.constexpr = (D + BD - 1) // BD
    i = (tl.program_id(0) // BLOCKS).to(tl.int64)
    column = tl.program_id(0) % BLOCKS * BD + tl.arange(0, BD)
    place = tl.load(places + i).to(tl.int64)
    mask = (column < D) & (place >= 0)
    total = tl.load(x + place * x_row + column, mask=mask, other=0.0).to(tl.float32)
    for j in tl.static_range(C):
        addend = tl.load(addends + i * C + j).to(tl.int64)
        if peers is not None:
            arrived = _slot_of(peers, tl.maximum(addend, 0) // returns, x)
            addend = tl.where(addend < 0, addend, addend % returns)
        total += tl.load(arrived + addend * D + column, mask=mask & (addend >= 0), other=0.0).to(tl.float32)
    tl.store(x + place * x_row + column, total.to(x.dtype.element_ty), mask=mask)


def take_rows(x: Tensor, places: Tensor, columns: int) -> Tensor:
    """Rows `places` int32 [S] of x [R, at least `columns`] (last stride 1), as [S, columns]; zeros for -1."""
    taken = torch.empty(len(places), columns, dtype=x.dtype, device=x.device)
    if taken.numel():
        blocks = -(-columns // BLOCK)
        run_kernel(take_rows_kernel, len(places) * blocks,
            x, places, taken, None, 0, x.stride(0), G=0, D=columns, BD=BLOCK, num_warps=NUM_WARPS
        )  # fmt: skip
    return taken


def push_rows(x: Tensor, places: Tensor, columns: int, peers: Tensor, first: int) -> None:
    """The same rows to rows `first`, .. of all slots [.., columns] at `peers`."""
    if len(places) and columns:
        blocks = -(-columns // BLOCK)
        run_kernel(take_rows_kernel, len(places) * blocks,
            x, places, None, peers, first, x.stride(0), G=len(peers), D=columns, BD=BLOCK, num_warps=NUM_WARPS
        )  # fmt: skip


def add_rows(x: Tensor, places: Tensor, arrived: Tensor, addends: Tensor, peers: Tensor | None = None) -> None:
    """Add rows of `arrived` [.., D] to rows `places` int32 [O] (-1: none) of x [R, at least D] (last stride 1).

    `addends` int32 [O, C]: which, in the order of the sum; -1 behind the last. No place occurs twice. With `peers`, the
    slots of all ranks each begin with as many rows as `arrived` has, which is this rank's, and rows are numbered slot
    by slot.
    """
    returns, D = arrived.shape
    if len(places) and D:
        blocks = -(-D // BLOCK)
        run_kernel(add_rows_kernel, len(places) * blocks,
            x, places, arrived, peers, addends, returns, x.stride(0), C=addends.shape[1], D=D, BD=BLOCK,
            num_warps=NUM_WARPS,
        )  # fmt: skip


def compile_cases() -> list[CompileCase]:
    """Qwen3-Next's channels in bfloat16, in one rank's memory and between four; sums of up to three."""
    from gdn_cp.kernels.compile_report import CompileCase

    types = {"x": "*bf16", "places": "*i32", "x_row": "i32"}
    sizes = {"D": 8192, "BD": BLOCK}
    take = types | {"first": "i32"}
    add = types | {"arrived": "*bf16", "addends": "*i32", "returns": "i32"}
    alone, shared = {"peers": None}, {"peers": "*i64"}
    few, rows = sizes | {"C": 3}, ("x_row",)
    return [
        CompileCase("halo.take", take_rows_kernel, take | {"taken": "*bf16"}, sizes | alone | {"G": 0}, divisible=rows),
        CompileCase("halo.push", take_rows_kernel, take | shared, sizes | {"taken": None, "G": 4}, divisible=rows),
        CompileCase("halo.add", add_rows_kernel, add, few | alone, divisible=rows),
        CompileCase("halo.add/peers", add_rows_kernel, add | shared, few, divisible=rows),
    ]
