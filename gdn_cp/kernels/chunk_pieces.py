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

# ruff: noqa: SIM102  (an if on a pointer that may be None is decided when the kernel is compiled, `and` is not)
from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn_cp.kernels.configs import cdiv, options, power_of_2
from gdn_cp.launch import run_kernel

if TYPE_CHECKING:
    from gdn_cp.kernels.compile_report import CompileCase

ENTERED = 1
LEFT = 2
COLUMNS_PER_PROGRAM = 16


@triton.jit
def _split(x):
    """x as the sum of two numbers: a tf32 product reads 11 bits of each, which together lack less than 2^-21 x."""
    bits = x.to(tl.int32, bitcast=True)
    high = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return high, x - high


@triton.jit
def float32_product(x, m, added):
    """x m + added to float32's rounding by three products of tf32, whose sums do not wait for each other."""
    x_high, x_low = _split(x)  # pyright: ignore[reportGeneralTypeIssues]
    m_high, m_low = _split(m)  # pyright: ignore[reportGeneralTypeIssues]
    rest = tl.dot(x_low, m_high, input_precision="tf32")
    other = tl.dot(x_high, m_low, input_precision="tf32")
    return tl.dot(x_high, m_high, added, input_precision="tf32") + (rest + other)


@triton.jit
def compose_kernel(
    ext_ptr, maps_ptr, given_ptr, marks_ptr, whole_ptr, pieces_ptr, roles_ptr, lost_ptr, whole_lost_ptr,
    HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, COLUMNS: tl.constexpr, EXT_WIDTH: tl.constexpr,
    MAP_WIDTH: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BR: tl.constexpr, REVERSE: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Program (first piece p of a sequence, value head, BV columns): X := ext + M X over the pieces, M^T in REVERSE.

    X starts from `given` [N, HV, K, V], else from zero in the first V columns and from the identity in the others.
    It is left in `marks` [NP, HV, K, COLUMNS] before each piece is applied (so also before the first). `whole` [N, HV,
    K, COLUMNS] gets what comes out of the last piece; without it that piece is not applied. `whole_lost` [N, HV] gets
    1 if any of the pieces is `lost` [NP, HV], else 0.

    X is held transposed, [BV, K], and multiplied from the right: products of 16 rows run as warp-level `mma`, which may
    take operands from registers. M, which waits for nothing, is fetched some pieces ahead where it fits (BR >= K);
    else X is read back from `marks` by BR rows, and the barrier lets every thread see what all have written.
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
    if whole_lost_ptr is not None:
        if block == V // BV:
            lost = 0
            for begin in range(0, left + 1, 64):
                number = begin + tl.arange(0, 64)
                flags = tl.load(lost_ptr + (p + number) * HV + hv, mask=number <= left, other=0)
                lost = tl.maximum(lost, tl.max(flags, 0))
            tl.store(whole_lost_ptr + n * HV + hv, lost)
    first_has_map = leaves if REVERSE else entered
    d = tl.arange(0, BK)
    r = tl.arange(0, BR)
    e = block * BV + tl.arange(0, BV)
    mask = (d[None, :] < K) & (e[:, None] < COLUMNS)
    ext_mask = (d[None, :] < K) & (e[:, None] < V)
    along, across = (1, MAP_WIDTH) if REVERSE else (MAP_WIDTH, 1)
    state = tl.where(d[None, :] == e[:, None] - V, 1.0, 0.0)
    if given_ptr is not None:
        state = tl.load(given_ptr + (n * HV + hv) * (K * V) + d[None, :] * V + e[:, None], mask=mask, other=0.0)
    applied = left if whole_ptr is None else left + 1
    for step in tl.range(0, applied, num_stages=STAGES):  # pyright: ignore[reportGeneralTypeIssues]
        piece = p + left - step if REVERSE else p + step
        has_map = (step > 0) | first_has_map
        at = piece * HV + hv
        mark = marks_ptr + at * (K * COLUMNS)
        tl.store(mark + d[None, :] * COLUMNS + e[:, None], state, mask=mask)
        ext = ext_ptr + at * (K * EXT_WIDTH) + d[None, :] * EXT_WIDTH + e[:, None]
        moved = tl.load(ext, mask=ext_mask, other=0.0)
        M = maps_ptr + at * (K * MAP_WIDTH) + d[None, :] * along
        if BR >= K:
            factor = tl.load(M + r[:, None] * across, mask=(d[None, :] < K) & (r[:, None] < K) & has_map, other=0.0)
            state = float32_product(state, factor, moved)
        else:
            tl.debug_barrier()
            for first in range(0, K, BR):
                rows = (first + r)[:, None]
                factor = tl.load(M + rows * across, mask=(d[None, :] < K) & (rows < K) & has_map, other=0.0)
                part = tl.load(
                    mark + (first + r)[None, :] * COLUMNS + e[:, None],
                    mask=((first + r)[None, :] < K) & (e[:, None] < COLUMNS),
                    other=0.0,
                )
                moved = float32_product(part, factor, moved)
            state = moved
    if whole_ptr is not None:
        whole = whole_ptr + (n * HV + hv) * (K * COLUMNS)
        tl.store(whole + d[None, :] * COLUMNS + e[:, None], state, mask=mask)
    else:
        last = marks_ptr + ((p if REVERSE else p + left) * HV + hv) * (K * COLUMNS)
        tl.store(last + d[None, :] * COLUMNS + e[:, None], state, mask=mask)


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


def whole_laws(
    sums: Tensor, pieces: Tensor, roles: Tensor, V: int, rows: int = 0, out: Tensor | None = None,
    lost: tuple[Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """(S_ext | M) [max(N, rows), HV, K, V + K] of whole segments; written for those that are LEFT, M if they are
    ENTERED too.

    `out`: where to write, instead of `rows`. `lost`: int32 [NP, HV], 1 where a piece's M is lost, and [N, HV], which
    gets 1 for segments, LEFT and ENTERED, that have such a piece, else 0.
    """
    K = sums.shape[2]
    whole = sums.new_empty(max(len(roles), rows), *sums.shape[1:]) if out is None else out
    _compose(sums, sums[..., V:], None, torch.empty_like(sums), whole, pieces, roles, V, V + K, False, lost)
    return whole


def whole_gradients(
    ext: Tensor, sums: Tensor, pieces: Tensor, roles: Tensor, rows: int = 0, out: Tensor | None = None
) -> Tensor:
    """dS_ext [max(N, rows), HV, K, V] of whole segments; written for those that are ENTERED. Arguments as
    `piece_gradients`; `out`: where to write, instead of `rows`."""
    V = ext.shape[-1]
    whole = ext.new_empty(max(len(roles), rows), *ext.shape[1:]) if out is None else out
    _compose(ext, sums[..., V:], None, torch.empty_like(ext), whole, pieces, roles, V, V, True)
    return whole


def _compose(
    ext: Tensor, maps: Tensor, given: Tensor | None, marks: Tensor, whole: Tensor | None, pieces: Tensor,
    roles: Tensor | None, V: int, columns: int, reverse: bool, lost: tuple[Tensor, Tensor] | None = None,
) -> None:  # fmt: skip
    NP, HV, K = ext.shape[:3]
    if NP:
        warps, stages, constants = _settings(HV, K, V, columns, ext.stride(2), maps.stride(2), reverse)
        programs = NP * HV * cdiv(columns, COLUMNS_PER_PROGRAM)
        arguments = (ext, maps, given, marks, whole, pieces, roles, *(lost or (None, None)))
        run_kernel(compose_kernel, programs, *arguments, **options(warps, stages, **constants))


def _settings(
    HV: int, K: int, V: int, columns: int, ext_width: int, map_width: int, reverse: bool
) -> tuple[int, int, dict[str, Any]]:
    """Warps, pipeline stages and constants: a warp for 16 rows of M, and M of two pieces ahead if it fits."""
    BK = max(16, power_of_2(K))
    fits = BK <= 128
    stages = 3 if fits else 1
    return max(BK // 16, 1), stages, {
        "HV": HV, "K": K, "V": V, "COLUMNS": columns, "EXT_WIDTH": ext_width, "MAP_WIDTH": map_width, "BK": BK,
        "BV": COLUMNS_PER_PROGRAM, "BR": BK if fits else 32, "REVERSE": reverse, "STAGES": stages,
    }  # fmt: skip


def compile_cases() -> list[CompileCase]:
    """States of pieces, laws of whole segments, and gradients of both, at head dim 128; gradients at 256."""
    from gdn_cp.kernels.compile_report import CompileCase

    floats = dict.fromkeys(("ext_ptr", "maps_ptr", "marks_ptr"), "*fp32") | {"pieces_ptr": "*i32"}
    cases, flags = [], ("lost_ptr", "whole_lost_ptr")
    for name, dim, columns, reverse, absent in (
        ("states", 128, 128, False, ("given_ptr", "whole_ptr", "roles_ptr", *flags)),
        ("laws", 128, 256, False, ("given_ptr",)),
        ("gradients", 128, 128, True, ("given_ptr", "whole_ptr", "roles_ptr", *flags)),
        ("whole gradients", 128, 128, True, ("given_ptr", *flags)),
        ("gradients", 256, 256, True, ("given_ptr", "whole_ptr", "roles_ptr", *flags)),
    ):
        signature = floats | {"given_ptr": "*fp32", "whole_ptr": "*fp32", "roles_ptr": "*i32"}
        signature |= dict.fromkeys(flags, "*i32")
        settings = _settings(4, dim, dim, columns, dim if reverse else 2 * dim, 2 * dim, reverse)
        warps, stages, constants = settings
        cases.append(
            CompileCase(
                name=f"chunk_pieces.{name}/K{dim}",
                kernel=compose_kernel,
                signature={key: kind for key, kind in signature.items() if key not in absent},
                constexprs=constants | dict.fromkeys(absent),
                num_warps=warps,
                num_stages=stages,
                main=dim == 128,
            )
        )
    return cases
