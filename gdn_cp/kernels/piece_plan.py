"""Into how many pieces the Triton rule cuts sequences on one card: a small model of its walks, forward and backward.

Few heads and few sequences leave multiprocessors idle, since a walk along a sequence is one program for each value head
and block of columns of the state. Cut into pieces, a sequence is walked by several programs at once, at the price of
summaries (see `chunk_fwd`). A walk of `steps` chunks by n programs on P multiprocessors takes

    step time * steps * ceil(n / P)

where the time of a step depends on the columns that a program carries, and on whether others take turns with it.

Each pass is decided by its own prediction. The forward's cut is the same whether a backward follows or not, and so are
its bits; between cuts that are alike to the forward the backward decides. The backward needs the states and maps of the
forward's pieces, and takes the same cut or none. The constants are an H200's at K = V = 128, fitted to
`benchmarks/results/segments-h200.json`. Only shapes and the card enter: lengths are on the device, and sequences are
taken to be of one length.

Dimensions: HV value heads, K, V head dims, BV columns of the state that one program carries.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

from gdn_cp.kernels.bwd_slices import chain_columns, concurrent_pieces, slice_chunks, summary_chunks
from gdn_cp.kernels.configs import ChainLaunch, chain_config, multiprocessors

PIECES_VARIABLE = "GDN_CP_PIECE_CHUNKS"
# Microseconds of one step of a walk by columns per program: while every program has a multiprocessor, and of each round
# when they take turns. Forward: for the output; for summaries, of which two fit on a multiprocessor then.
_FORWARD = {64: (1.77, 1.94), 32: (1.38, 3.29)}
_FORWARD_SUMMARY = {64: (1.80, 1.86), 32: (1.23, 1.46)}
# Backward, where rounds overlap: both directions; the gradients alone.
_BACKWARD = {64: (1.98, 2.39), 32: (1.39, 2.34), 16: (1.15, 1.45)}
_BACKWARD_SUMMARY = {64: (1.34, 1.37), 32: (0.9, 0.85), 16: (0.7, 0.7)}
_MERGE, _MERGE_STEP, _MERGE_COLUMNS = 10.0, 2.3, 16  # composition: its launch, one piece, columns of a program
_WALK = 8.0  # a walk of no steps: launch, tables, first loads, last stores
_PRODUCTS = 0.016  # the products of one chunk and head, which a sliced backward makes once more for summaries
_PART = 0.85  # the longest part of a sequence in a slice, where borders of sequences lie in some slices
_LOCAL_FORWARD, _LOCAL_BACKWARD = 0.039, 0.157  # what is the same under every cut, of one chunk and head
_DOUBT = 1.02  # what a cut has to bring at least
_ALIKE = 1.04  # forward times between which the backward decides
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

    @property
    def all_chunks(self) -> int:
        """Chunks of the batch."""
        return math.ceil(self.chunks * self.sequences)

    def programs(self, block_v: int, with_map: bool = False) -> int:
        """Programs that walk over one piece, for the state or for its whole law."""
        return self.heads * (-(-self.V // block_v) + (-(-self.K // block_v) if with_map else 0))

    def walks(self, block_v: int, with_map: bool = False) -> int:
        """Programs that walk over one piece of every sequence."""
        return self.sequences * self.programs(block_v, with_map)


class ChainPlan(NamedTuple):
    """Settings of the forward chain, and the chunks of a piece in forward and backward (0: sequences stay whole)."""

    launch: ChainLaunch
    cut: int
    backward_cut: int


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
) -> ChainPlan:
    """How the rule walks over one batch.

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
    return _plan(device, dtype, max(num_sequences, 1), num_rows, heads, K, V, intra_card, summarised)


@lru_cache(maxsize=256)
def _plan(
    device: torch.device, dtype: torch.dtype, sequences: int, num_rows: int, heads: int, K: int, V: int,
    intra_card: int | None, summarised: bool,
) -> ChainPlan:  # fmt: skip
    """`chain_plan` behind its variable."""
    chunks = math.ceil(num_rows / sequences / 64)
    shape = Shape(multiprocessors(device), sequences, chunks, heads, K, V, summarised)
    tensor_cores = chain_config(device, dtype, K, V).tma and K <= 128 and device.type == "cuda"
    if intra_card is None and not tensor_cores:
        intra_card = 0
    block_v, cut, backward_cut = best_cut(shape, intra_card)
    return ChainPlan(chain_config(device, dtype, K, V, block_v), cut, backward_cut)


@lru_cache(maxsize=256)
def best_cut(shape: Shape, fixed: int | None = None) -> tuple[int, int, int]:
    """Columns per forward program, and chunks of a piece forward and backward (0: no cut), of the least predicted time.

    With `fixed` chunks to a piece only the columns are chosen. For 132 processors, one sequence of 1024 chunks, 4 heads
    and K = V = 128, whole sequences make 8 programs of 64 columns, and 16 pieces make 128.
    """
    if fixed is not None:
        pieces = 1 if fixed == 0 else max(1, math.ceil(shape.chunks / fixed))
        return min(_FORWARD, key=lambda columns: predict_forward(shape, pieces, columns)), fixed, fixed
    times = {
        (pieces, columns): predict_forward(shape, pieces, columns) * (_DOUBT if pieces > 1 else 1.0)
        for pieces in _PIECES
        for columns in _FORWARD
        if pieces == 1 or shape.chunks >= _LEAST_STEPS * pieces
    }
    whole = predict_backward(shape, 1)

    def backward(pieces: int) -> float:
        return whole if pieces == 1 else min(whole, _DOUBT * predict_backward(shape, pieces))

    good = [choice for choice, time in times.items() if time <= _ALIKE * min(times.values())]
    pieces, columns = min(good, key=lambda choice: (backward(choice[0]), times[choice]))
    cut = 0 if pieces == 1 else math.ceil(shape.chunks / pieces)
    return columns, cut, cut if backward(pieces) < whole else 0


def predict_forward(shape: Shape, pieces: int, block_v: int) -> float:
    """Microseconds of the forward with every sequence in `pieces` pieces, BV columns to a program."""
    steps = shape.chunks / pieces
    one, each = _FORWARD[block_v]
    rounds = -(-shape.walks(block_v) * pieces // shape.processors)
    total = _LOCAL_FORWARD * shape.all_chunks * shape.heads + _WALK + steps * (one if rounds == 1 else each * rounds)
    if pieces == 1 and not shape.summarised:
        return total
    programs = shape.walks(block_v, True) * pieces
    if not shape.summarised:  # no piece that is the last of its sequence, and no map of one that is the first
        programs -= shape.walks(block_v, True) + shape.walks(block_v, True) - shape.walks(block_v)
    one, each = _FORWARD_SUMMARY[block_v]
    rounds = -(-programs // (2 * shape.processors))
    total += _WALK + steps * (one if programs <= shape.processors else each * rounds)
    if pieces > 1:
        total += _merge(shape, pieces) * (2 if shape.summarised else 1)
    return total


def predict_backward(shape: Shape, pieces: int) -> float:
    """Microseconds of the backward with every sequence in `pieces` pieces."""
    all_chunks = shape.all_chunks
    length = slice_chunks(all_chunks, shape.heads, shape.K, shape.V, shape.element_size) or all_chunks
    parts = concurrent_pieces(shape.sequences * pieces, all_chunks, length)
    columns = chain_columns(parts * shape.heads, shape.V, shape.processors)
    total = _LOCAL_BACKWARD * all_chunks * shape.heads
    total += _backward_walk(shape, pieces, length, 2 * shape.programs(columns), _BACKWARD[columns])
    summaries = int(pieces > 1) + int(shape.summarised)
    if summaries:
        at_once = summary_chunks(all_chunks, shape.heads, shape.K, shape.element_size)
        again = _backward_walk(shape, pieces, at_once, shape.programs(columns), _BACKWARD_SUMMARY[columns])
        if length < all_chunks:
            again += _PRODUCTS * all_chunks * shape.heads
        total += summaries * (again + (_merge(shape, pieces) if pieces > 1 else 0.0))
    return total


def _backward_walk(shape: Shape, pieces: int, length: int, programs: int, step: tuple[float, float]) -> float:
    """All slices of `length` chunks, with `programs` for each part of a sequence or piece that lies in a slice."""
    all_chunks = shape.all_chunks
    longest = min(shape.chunks / pieces, length)
    if longest == length < all_chunks and shape.sequences * pieces > 1:
        longest *= _PART
    walked = programs * min(length, all_chunks)  # steps of all programs of a slice
    one, each = step
    time = longest * one
    if walked > shape.processors * longest:
        time = max(time, walked / shape.processors * each)
    return -(-all_chunks // length) * (_WALK + time)


def _merge(shape: Shape, pieces: int) -> float:
    rounds = -(-shape.programs(_MERGE_COLUMNS) * shape.sequences // shape.processors)
    return _MERGE + _MERGE_STEP * (pieces - 1) * rounds
