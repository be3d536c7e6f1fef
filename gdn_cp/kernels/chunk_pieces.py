"""Composing the laws of consecutive pieces: states forward, gradients of states backward, and the law of the whole.

Over a piece of a sequence the state obeys S_out = S_ext + M S_in, and its gradient dS_in = dS_ext + M^T dS_out. One
kernel walks over the pieces of each sequence, up or down, in float32, and serves

    intra-card pieces      the state at the start of every piece; the gradient at the end of every piece
    segments of a chain    that lie on several ranks and are cut into pieces: the law (S_ext, M) or dS_ext of the whole
                           segment, and later the pieces' states from the one that has arrived for the segment

What a segment is to its chain is its *role*: `ENTERED` if a state enters it from elsewhere, `LEFT` if its state goes on
elsewhere. Where neither holds, a sequence begins and ends on this card, the first piece's M is not known nor the last
piece's law, and neither is read.

Dimensions: N sequences (segments), NP pieces (bound), HV value heads, K, V head dims.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn_cp.kernels.configs import options

if TYPE_CHECKING:
    from gdn_cp.kernels.compile_report import CompileCase

ENTERED = 1
LEFT = 2
# Columns of the state per program, rows of a step of the product, warps and pipeline stages: forward, and in reverse.
_LAUNCH = {False: (8, 32, 8, 4), True: (16, 32, 8, 1)}


@triton.jit
def compose_kernel(
    ext_ptr, maps_ptr, given_ptr, marks_ptr, whole_ptr, pieces_ptr, roles_ptr,
    HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, COLUMNS: tl.constexpr, EXT_WIDTH: tl.constexpr,
    MAP_WIDTH: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BR: tl.constexpr, REVERSE: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Program (first piece p of a sequence, value head, BV columns): X := ext + M X over the pieces, M^T in REVERSE.

    X starts from `given` [N, HV, K, V], else from zero in the first V columns and from the identity in the others.
    It is left in `marks` [NP, HV, K, COLUMNS] before each piece is applied (so also before the first), from where the
    product reads it by BR rows, which keeps few operands in registers; the barrier lets every thread see what all have
    written. `whole` [N, HV, K, COLUMNS] gets what comes out of the last piece; without it that piece is not applied.
    """
    BLOCKS: tl.constexpr = (COLUMNS + BV - 1) // BV
    pid = tl.program_id(0)
    block = pid % BLOCKS
    hv = (pid // BLOCKS) % HV
    p = (pid // (BLOCKS * HV)).to(tl.int64)
    n = tl.load(pieces_ptr + p * 8).to(tl.int64)
    if (n < 0) | (tl.load(pieces_ptr + p * 8 + 5) == 0):
        return
    left = tl.load(pieces_ptr + p * 8 + 7)
    entered = False
    leaves = False
    if roles_ptr is not None:
        role = tl.load(roles_ptr + n)
        entered = (role & 1) != 0
        leaves = (role & 2) != 0
    if whole_ptr is not None:  # nobody asks for the law of other segments
        if REVERSE:
            if entered == 0:
                return
        elif (leaves == 0) | ((entered == 0) & (block * BV >= V)):
            return
    first_has_map = leaves if REVERSE else entered
    d = tl.arange(0, BK)
    r = tl.arange(0, BR)
    e = block * BV + tl.arange(0, BV)
    mask = (d[:, None] < K) & (e[None, :] < COLUMNS)
    state = tl.where(d[:, None] == e[None, :] - V, 1.0, 0.0)
    if given_ptr is not None:
        state = tl.load(given_ptr + (n * HV + hv) * (K * V) + d[:, None] * V + e[None, :], mask=mask, other=0.0)
    for step in range(0, left + 1):
        piece = p + left - step if REVERSE else p + step
        applied = (step < left) | (whole_ptr is not None)
        has_map = applied & ((step > 0) | first_has_map)
        mark = marks_ptr + (piece * HV + hv) * (K * COLUMNS)
        tl.store(mark + d[:, None] * COLUMNS + e[None, :], state, mask=mask)
        tl.debug_barrier()
        ext = ext_ptr + (piece * HV + hv) * (K * EXT_WIDTH)
        state = tl.load(
            ext + d[:, None] * EXT_WIDTH + e[None, :],
            mask=(d[:, None] < K) & (e[None, :] < V) & applied,
            other=0.0,
        )
        M = maps_ptr + (piece * HV + hv) * (K * MAP_WIDTH)
        for first in tl.range(0, K, BR, num_stages=STAGES):  # pyright: ignore[reportGeneralTypeIssues]
            rows = first + r
            along, across = (1, MAP_WIDTH) if REVERSE else (MAP_WIDTH, 1)
            tile = M + d[:, None] * along + rows[None, :] * across
            factor = tl.load(tile, mask=(d[:, None] < K) & (rows[None, :] < K) & has_map, other=0.0)
            part = tl.load(
                mark + rows[:, None] * COLUMNS + e[None, :],
                mask=(rows[:, None] < K) & (e[None, :] < COLUMNS),
                other=0.0,
            )
            state = tl.dot(factor, part, state, input_precision="ieee")
    if whole_ptr is not None:
        whole = whole_ptr + (n * HV + hv) * (K * COLUMNS)
        tl.store(whole + d[:, None] * COLUMNS + e[None, :], state, mask=mask)


def piece_states(
    sums: Tensor, pieces: Tensor, V: int, given: Tensor | None = None, roles: Tensor | None = None
) -> Tensor:
    """The state [NP, HV, K, V] at the start of each piece, from the summaries `sums` [NP, HV, K, V + K].

    Args:
        sums: (S_ext | M) of each piece.
        pieces: the table of `tables.ChunkTables`.
        V: columns of S_ext.
        given: [N, HV, K, V] the states that enter, if the first pieces were summarised from zero. Without it they were
            walked from the initial states.
        roles: int32 [N] with `given`.
    """
    marks = sums.new_empty(*sums.shape[:3], V)
    _compose(sums, sums[..., V:], given, marks, None, pieces, roles, V, V, False)
    return marks


def piece_gradients(ext: Tensor, sums: Tensor, pieces: Tensor) -> Tensor:
    """The gradient [NP, HV, K, V] of the state at the end of each piece but the last of its sequence.

    Args:
        ext: [NP, HV, K, V] the gradient before each piece if the one behind it is zero, or, for the last piece, known.
        sums: the forward's, for M.
        pieces: the table of `tables.ChunkTables`.
    """
    V = ext.shape[-1]
    marks = torch.empty_like(ext)
    _compose(ext, sums[..., V:], None, marks, None, pieces, None, V, V, True)
    return marks


def whole_laws(sums: Tensor, pieces: Tensor, roles: Tensor, V: int, rows: int = 0) -> Tensor:
    """(S_ext | M) [max(N, rows), HV, K, V + K] of whole segments; written for those that are LEFT, M if they are
    ENTERED too."""
    K = sums.shape[2]
    whole = sums.new_empty(max(len(roles), rows), *sums.shape[1:])
    _compose(sums, sums[..., V:], None, torch.empty_like(sums), whole, pieces, roles, V, V + K, False)
    return whole


def whole_gradients(ext: Tensor, sums: Tensor, pieces: Tensor, roles: Tensor, rows: int = 0) -> Tensor:
    """dS_ext [max(N, rows), HV, K, V] of whole segments; written for those that are ENTERED. Arguments as
    `piece_gradients`."""
    V = ext.shape[-1]
    whole = ext.new_empty(max(len(roles), rows), *ext.shape[1:])
    _compose(ext, sums[..., V:], None, torch.empty_like(ext), whole, pieces, roles, V, V, True)
    return whole


def _compose(
    ext: Tensor, maps: Tensor, given: Tensor | None, marks: Tensor, whole: Tensor | None, pieces: Tensor,
    roles: Tensor | None, V: int, columns: int, reverse: bool,
) -> None:  # fmt: skip
    NP, HV, K = ext.shape[:3]
    block_v, _, warps, stages = _LAUNCH[reverse]
    if NP:
        compose_kernel[(NP * HV * -(-columns // block_v),)](
            ext, maps, given, marks, whole, pieces, roles,
            **options(warps, stages, **_constants(HV, K, V, columns, ext.stride(2), maps.stride(2), reverse)),
        )  # fmt: skip


def _constants(HV: int, K: int, V: int, columns: int, ext_width: int, map_width: int, reverse: bool) -> dict[str, int]:
    block_v, block_r, _, stages = _LAUNCH[reverse]
    BK = 1 << (K - 1).bit_length()
    return {
        "HV": HV, "K": K, "V": V, "COLUMNS": columns, "EXT_WIDTH": ext_width, "MAP_WIDTH": map_width, "BK": BK,
        "BV": block_v, "BR": min(block_r, BK), "REVERSE": reverse, "STAGES": stages,
    }  # fmt: skip


def compile_cases() -> list[CompileCase]:
    """States of pieces, laws of whole segments, and gradients of both, at head dim 128; gradients at 256."""
    from gdn_cp.kernels.compile_report import CompileCase

    floats = dict.fromkeys(("ext_ptr", "maps_ptr", "marks_ptr"), "*fp32") | {"pieces_ptr": "*i32"}
    cases = []
    for name, dim, columns, reverse, absent in (
        ("states", 128, 128, False, ("given_ptr", "whole_ptr", "roles_ptr")),
        ("laws", 128, 256, False, ("given_ptr",)),
        ("gradients", 128, 128, True, ("given_ptr", "whole_ptr", "roles_ptr")),
        ("whole gradients", 128, 128, True, ("given_ptr",)),
        ("gradients", 256, 256, True, ("given_ptr", "whole_ptr", "roles_ptr")),
    ):
        signature = floats | {"given_ptr": "*fp32", "whole_ptr": "*fp32", "roles_ptr": "*i32"}
        constants = _constants(4, dim, dim, columns, dim if reverse else 2 * dim, 2 * dim, reverse)
        cases.append(
            CompileCase(
                name=f"chunk_pieces.{name}/K{dim}",
                kernel=compose_kernel,
                signature={key: kind for key, kind in signature.items() if key not in absent},
                constexprs=constants | dict.fromkeys(absent),
                num_warps=_LAUNCH[reverse][2],
                num_stages=_LAUNCH[reverse][3],
                main=dim == 128,
            )
        )
    return cases
