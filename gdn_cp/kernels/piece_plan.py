"""Into how many pieces the Triton rule cuts sequences on one card: a small model of its walks, forward and backward.

Few heads and few sequences leave multiprocessors idle, since a walk along a sequence is one program for each value head
and block of columns of the state. Cut into pieces, a sequence is walked by several programs at once, at the price of
summaries (see `chunk_fwd`). A walk of `steps` chunks by n programs on P multiprocessors takes

    step time * steps * ceil(n / P)

where the time of a step depends on the columns that a program carries. Forward and backward are predicted together,
since training needs both under one cut; what is the same for every cut (all that is local to a chunk) is left out. The
constants are an H200's at K = V = 128, from `benchmarks/results/segments-h200.json` and kernel profiles. Only shapes
and the card enter: lengths are on the device, and sequences are taken to be of one length.

Dimensions: HV value heads, K, V head dims, BV columns of the state that one program carries.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from functools import lru_cache

import torch

from gdn_cp.kernels.chunk_bwd import slice_chunks, summary_chunks
from gdn_cp.kernels.configs import ChainLaunch, chain_config, multiprocessors

PIECES_VARIABLE = "GDN_CP_PIECE_CHUNKS"
# Microseconds of one step of a walk, by columns per program: (for the output, for summaries).
_FORWARD = {64: (1.8, 1.1), 32: (1.3, 0.8)}
_BACKWARD = {64: (2.05, 1.4), 32: (1.47, 1.05), 16: (1.2, 0.85)}
_MERGE = (7.5, 5.0)  # to compose one more piece, forward and backward, as long as all programs run at once
_MERGE_BLOCKS = (16, 8)  # programs of a merge for each sequence and head, at V = 128
_WALK = 12.0  # a walk of no steps: launch, tables, first loads, last stores
_PRODUCTS = 0.018  # the products of one chunk and head, which a sliced backward makes once more for summaries
_DOUBT = 1.1  # walks of pieces took up to so much longer than predicted, those of whole sequences hardly at all
_LEAST_STEPS = 4  # chunks of a piece
_PIECES = (*range(1, 17), *(part << level for level in range(2, 6) for part in range(5, 9)))


@dataclass(frozen=True)
class Shape:
    """What the model knows of a batch and the card; `chunks` are those of one of the equal `sequences`."""

    processors: int
    sequences: int
    chunks: float
    heads: int
    K: int
    V: int
    summarised: bool = False
    element_size: int = 2

    def walks(self, block_v: int, with_map: bool = False) -> int:
        """Programs that walk over one piece of every sequence, for the state or for its whole law."""
        blocks = -(-self.V // block_v) + (-(-self.K // block_v) if with_map else 0)
        return self.sequences * self.heads * blocks


def chain_plan(
    device: torch.device,
    dtype: torch.dtype,
    num_sequences: int,
    num_rows: int,
    heads: int,
    K: int,
    V: int,
    *,
    intra_card: int | None = None,
    summarised: bool = False,
) -> tuple[ChainLaunch, int]:
    """Settings of the forward chain, and the chunks of a piece it is cut into (0: sequences stay whole).

    It depends on shapes and on the card alone: lengths are on the device. `intra_card`, or else the environment
    variable GDN_CP_PIECE_CHUNKS, fixes the pieces (0: never cut). Columns of the state do not depend on each other, so
    with that set results have the same bits whatever the number of heads on a card.

    Args:
        device, dtype: of q. num_sequences: N. num_rows: B*T. heads: HV. K, V: head dims.
        intra_card: chunks of a piece; None: see above.
        summarised: sequences are segments whose laws are needed too, cut or not.

    Raises:
        ValueError: if GDN_CP_PIECE_CHUNKS is not a number.
    """
    override = os.environ.get(PIECES_VARIABLE)
    if override is not None and not override.isdigit():
        raise ValueError(f"{PIECES_VARIABLE} is {override!r}: set it to a number of chunks >= 0, or unset it")
    if intra_card is None and override is not None:
        intra_card = int(override)
    sequences = max(num_sequences, 1)
    chunks = math.ceil(num_rows / sequences / 64)
    shape = Shape(multiprocessors(device), sequences, chunks, heads, K, V, summarised)
    tensor_cores = chain_config(device, dtype, K, V).tma and K <= 128 and device.type == "cuda"
    if intra_card is None and not tensor_cores:
        intra_card = 0
    block_v, cut = best_cut(shape, intra_card)
    return chain_config(device, dtype, K, V, block_v), cut


@lru_cache(maxsize=256)
def best_cut(shape: Shape, fixed: int | None = None) -> tuple[int, int]:
    """Columns per forward program and chunks of a piece (0: no cut) of the least predicted time.

    With `fixed` chunks to a piece only the columns are chosen. For 132 processors, one sequence of 1024 chunks, 4 heads
    and K = V = 128, whole sequences make 8 programs of 64 columns, and 16 pieces make 128.
    """
    if fixed is not None:
        candidates = [1 if fixed == 0 else max(1, math.ceil(shape.chunks / fixed))]
    else:
        candidates = [pieces for pieces in _PIECES if pieces == 1 or shape.chunks >= _LEAST_STEPS * pieces]
    pieces, block_v = min(
        ((pieces, block_v) for pieces in candidates for block_v in _FORWARD),
        key=lambda choice: predict(shape, *choice) * (_DOUBT if choice[0] > 1 else 1.0),
    )
    if fixed is not None:
        return block_v, fixed
    return block_v, 0 if pieces == 1 else math.ceil(shape.chunks / pieces)


def predict(shape: Shape, pieces: int, block_v: int) -> float:
    """Microseconds of the walks of forward and backward with every sequence in `pieces` pieces."""
    return _forward(shape, pieces, block_v) + _backward(shape, pieces)


def _forward(shape: Shape, pieces: int, block_v: int) -> float:
    steps, (main, summary) = shape.chunks / pieces, _FORWARD[block_v]
    total = _walk(shape, main, steps, shape.walks(block_v) * pieces)
    if shape.summarised:
        total += _walk(shape, summary, steps, shape.walks(block_v, True) * pieces)
        total += 2 * _merge(shape, pieces, 0) if pieces > 1 else 0.0
    elif pieces > 1:
        total += _walk(shape, summary, steps, shape.walks(block_v) + shape.walks(block_v, True) * (pieces - 2))
        total += _merge(shape, pieces, 0)
    return total


def _backward(shape: Shape, pieces: int) -> float:
    steps, columns = shape.chunks / pieces, 64
    while columns > 16 and shape.walks(columns // 2) * pieces * 2 <= shape.processors:
        columns //= 2
    main, summary = _BACKWARD[columns]
    all_chunks = int(shape.chunks * shape.sequences)
    length = slice_chunks(all_chunks, shape.heads, shape.K, shape.V, shape.element_size)
    walks = shape.walks(columns)
    summaries = int(pieces > 1) + int(shape.summarised)
    merges = summaries * _merge(shape, pieces, 1) if pieces > 1 else 0.0
    if not length:
        rest = summaries and _walk(shape, summary, steps, walks * max(1, pieces - 1))
        return _walk(shape, main, steps, 2 * walks * pieces) + summaries * rest + merges
    # A slice holds parts of some pieces: as long as its longest part, or as all its parts one after the other.
    slices = -(-all_chunks // length)
    path = min(steps, length)
    work = walks / shape.sequences * length / shape.processors
    total = slices * (_WALK + main * max(path, 2 * work))
    if not summaries:
        return total
    length = summary_chunks(all_chunks, shape.heads, shape.K, shape.element_size)
    slices, work = -(-all_chunks // length), walks / shape.sequences * length / shape.processors
    again = slices * (_WALK + summary * max(min(steps, length), work)) + _PRODUCTS * all_chunks * shape.heads
    return total + summaries * again + merges


def _walk(shape: Shape, step: float, steps: float, programs: int) -> float:
    return _WALK + step * steps * -(-programs // shape.processors)


def _merge(shape: Shape, pieces: int, direction: int) -> float:
    programs = shape.sequences * shape.heads * _MERGE_BLOCKS[direction]
    return _WALK + _MERGE[direction] * pieces * max(1.0, programs / (2 * shape.processors))
