"""The Triton kernel of `state_peers`: this rank's part of the laws in all ranks' slots, taken into its own memory.

A slot begins with the matrices of `slots` segments and HV heads, (S_ext | M) side by side forward, dS_ext backward; one
int32 for each of them follows forward, 1 if its M is lost.

Dimensions: K, V head dims, BR rows of a matrix and BC >= K, V columns of a tile, LANES flags looked at together.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# triton.jit hides the options of a launch from a type checker
from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn_cp.launch import run_kernel

if TYPE_CHECKING:
    from gdn_cp.comm.state_peers import Pull
    from gdn_cp.kernels.compile_report import CompileCase

TILE = 4096  # elements: with 128 threads, 8 loads of 16 bytes for each
NUM_WARPS = 4


@triton.jit
def _lost_at(peers, place, mask, matrices, K: tl.constexpr, WIDTH: tl.constexpr):
    """The flags of laws in all ranks' slots, 0 where masked."""
    slot = tl.load(peers + place // matrices, mask=mask, other=0)
    flag = slot + ((matrices * (K * WIDTH)).to(tl.int64) + place % matrices) * 4
    return tl.load(flag.to(tl.pointer_type(tl.int32)), mask=mask, other=0)


@triton.jit
def _take(
    peers, place, matrices, first_column, out, row,
    K: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Some rows of COLUMNS columns of one matrix of a slot, to `out` [K, COLUMNS]."""
    slot = tl.multiple_of(tl.load(peers + place // matrices).to(tl.pointer_type(tl.float32)), 16)
    column = tl.arange(0, BC)
    mask = (row < K)[:, None] & (column < COLUMNS)[None, :]
    source = slot + (place % matrices).to(tl.int64) * (K * WIDTH) + first_column
    x = tl.load(source + row[:, None] * WIDTH + column[None, :], mask=mask)
    tl.store(out + row[:, None] * COLUMNS + column[None, :], x, mask=mask)


@triton.jit(do_not_specialize=["num_items", "matrices"])
def pull_states_kernel(
    peers, items, maps, ext, kept, lost, num_items, matrices,
    K: tl.constexpr, V: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, LANES: tl.constexpr,
    LAWS: tl.constexpr,
):  # fmt: skip
    """Program (matrix, block of BR rows): S_ext (dS_ext without LAWS) number i of `items` to ext[i] if it is of use;
    behind these, with LAWS, M number k of `maps` to kept[k] unless it is lost, and whether it is to lost[k].

    For example, item (place, 3, 5) is of use if M number 3 and 4 are not lost; items (place, 0, 0) always are.
    """
    BLOCKS: tl.constexpr = (K + BR - 1) // BR
    WIDTH: tl.constexpr = V + K if LAWS else V
    number, block = tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS
    row = block * BR + tl.arange(0, BR)
    if number < num_items:
        place = tl.load(items + number * 3)
        begin, end = tl.load(items + number * 3 + 1), tl.load(items + number * 3 + 2)
        between = begin + tl.arange(0, LANES)
        if LAWS:
            its_place = tl.load(maps + between, mask=between < end, other=0)
            flags = _lost_at(peers, its_place, between < end, matrices, K, WIDTH)
        else:
            flags = tl.load(lost + between, mask=between < end, other=0)
        if tl.sum(flags, 0) == 0:
            _take(peers, place, matrices, 0, ext + number.to(tl.int64) * (K * V), row, K, WIDTH, V, BC)
    elif LAWS:
        k = number - num_items
        place = tl.load(maps + k)
        flag = _lost_at(peers, place, True, matrices, K, WIDTH)
        if block == 0:
            tl.store(lost + k, flag)
        if flag == 0:
            _take(peers, place, matrices, V, kept + k.to(tl.int64) * (K * K), row, K, WIDTH, K, BC)


def pull_laws(peers: Tensor, pull: Pull, maps: Tensor, matrices: int, K: int, V: int) -> tuple[Tensor, Tensor, Tensor]:
    """What a rank needs of the laws in all slots; what it does not need is not written.

    Args:
        peers: int64 [G] addresses of the slots: `matrices` laws [K, V + K] float32, and as many flags int32.
        pull: which S_ext.
        maps: int32 [kept], which M.
        matrices: laws of a slot.

    Returns:
        S_ext [E, K, V], M [kept, K, K], and int32 [kept], 1 for an M that is lost.
    """
    ext = torch.empty(len(pull.items), K, V, dtype=torch.float32, device=maps.device)
    kept = torch.empty(len(maps), K, K, dtype=torch.float32, device=maps.device)
    lost = torch.empty(len(maps), dtype=torch.int32, device=maps.device)
    _launch(peers, pull, maps, ext, kept, lost, matrices, laws=True)
    return ext, kept, lost


def pull_gradients(peers: Tensor, pull: Pull, lost: Tensor, matrices: int, K: int, V: int) -> Tensor:
    """dS_ext [E, K, V] likewise, out of slots of `matrices` of these; `lost` is what `pull_laws` returned."""
    ext = torch.empty(len(pull.items), K, V, dtype=torch.float32, device=lost.device)
    _launch(peers, pull, None, ext, None, lost, matrices, laws=False)
    return ext


def _launch(
    peers: Tensor, pull: Pull, maps: Tensor | None, ext: Tensor, kept: Tensor | None, lost: Tensor, matrices: int, *,
    laws: bool,
) -> None:  # fmt: skip
    (items, longest), (K, V) = pull, ext.shape[1:]
    taken = len(items) + (0 if maps is None else len(maps))
    if taken:
        sizes = _sizes(K, V, longest)
        run_kernel(pull_states_kernel, taken * -(-K // sizes["BR"]),
            peers, items, maps, ext, kept, lost, len(items), matrices, **sizes, LAWS=laws, num_warps=NUM_WARPS,
        )  # fmt: skip


def _sizes(K: int, V: int, longest: int) -> dict[str, int]:
    columns, lanes = (1 << (max(size, 16) - 1).bit_length() for size in (max(K, V), longest))
    return {"K": K, "V": V, "BR": max(1, TILE // columns), "BC": columns, "LANES": lanes}


def compile_cases() -> list[CompileCase]:
    """Laws and gradients at head dim 128."""
    from gdn_cp.kernels.compile_report import CompileCase

    types = {"peers": "*i64", "items": "*i32", "maps": "*i32", "ext": "*fp32", "kept": "*fp32", "lost": "*i32"}
    types |= {"num_items": "i32", "matrices": "i32"}
    constants: dict[str, Any] = _sizes(128, 128, 6)
    only = {name: kind for name, kind in types.items() if name not in ("maps", "kept")}
    absent = {"maps": None, "kept": None}
    return [
        CompileCase("states.pull/laws", pull_states_kernel, types, constants | {"LAWS": True}, NUM_WARPS),
        CompileCase("states.pull/gradients", pull_states_kernel, only, constants | absent | {"LAWS": False}, NUM_WARPS),
    ]
