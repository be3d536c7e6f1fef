"""How a packed batch is cut into parts: pure index arithmetic on host-side boundaries, vectorised over sequences.

A cut says which runs of which sequences each part owns, in the order of the part's buffer. The parts are ranks or
groups of neighbouring ranks: a group of a ranks out of P owns what one rank of the same cut with P/a parts owns, so one
function serves both. Under zigzag with 2 groups of 2 ranks (8 chunks of a sequence, by rank, then by group):

    rank   0 1 2 3 3 2 1 0
    group  0 0 1 1 1 1 0 0

Group 1's two runs touch. They stay two, so that every part of every sequence is as many runs of the same length, and a
rank that takes them one by one is busy for as long as the others.

Dimensions: N sequences, P parts, R runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import numpy as np

from gdn_cp.comm.lengths import check_divisible


class Cut(Enum):
    """The ways to cut a batch."""

    ZIGZAG = "zigzag"
    """Each sequence in 2P chunks; part p owns chunks p and 2P-1-p (Megatron, Transformer Engine)."""
    FLAT = "flat"
    """The whole buffer in P equal stretches, wherever the sequences begin (flash-linear-attention)."""
    EACH = "each"
    """Each sequence in P chunks; part p owns chunk p (batched input, contiguous)."""


@dataclass(frozen=True)
class Runs:
    """Stretches of consecutive tokens, sorted by part and within a part by buffer order.

    All arrays are int64. `offsets` [P+1] are each part's bounds in the others, which have one entry per run: the
    sequence's number, where in the sequence the run starts, how long it is, and its place in the sequence's order.
    """

    offsets: np.ndarray
    sequence: np.ndarray
    start: np.ndarray
    length: np.ndarray
    order: np.ndarray

    def part(self, index: int) -> Runs:
        """Return the runs of one part."""
        one = slice(self.offsets[index], self.offsets[index + 1])
        bounds = np.array([0, one.stop - one.start])
        return Runs(bounds, self.sequence[one], self.start[one], self.length[one], self.order[one])

    def rows(self, cu: np.ndarray) -> np.ndarray:
        """Return the natural global row (int64) of every token of these runs, in order."""
        return expand(cu[self.sequence] + self.start, self.length)


def expand(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Concatenate the ranges [start, start + length).

    >>> expand(np.array([7, 2]), np.array([2, 3])).tolist()
    [7, 8, 2, 3, 4]
    """
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if ends.size else 0
    return np.repeat(starts - ends + lengths, lengths) + np.arange(total)


def check_cut(cut: Cut, cu: np.ndarray, parts: int) -> None:
    """Refuse boundaries that do not fall into `parts` equal parts; the message speaks of ranks (`cp_size`)."""
    if parts == 1:
        return
    if cut is Cut.ZIGZAG:
        check_divisible(np.diff(cu), 2 * parts, "2*cp_size")
    elif cut is Cut.EACH:
        check_divisible(np.diff(cu), parts, "cp_size")
    elif cu[-1] % parts:
        raise ValueError(
            f"cu_seqlens: the batch has {cu[-1]} tokens, not divisible by cp_size = {parts}; "
            "pad it with gdn_cp.comm.layout.pad_cu_seqlens"
        )


def cut_batch(cut: Cut, cu: np.ndarray, parts: int) -> Runs:
    """Cut the batch with boundaries `cu` (int64 [N+1]) into `parts` equal parts; `check_cut` must have passed.

    With one part the runs are the sequences themselves, zero-length ones included; else every part has as many runs of
    a sequence, except under FLAT.

    >>> runs = cut_batch(Cut.ZIGZAG, np.array([0, 4, 12]), 2)
    >>> [runs.part(p).rows(np.array([0, 4, 12])).tolist() for p in range(2)]
    [[0, 3, 4, 5, 10, 11], [1, 2, 6, 7, 8, 9]]
    >>> runs.length.tolist()
    [1, 1, 2, 2, 1, 1, 2, 2]
    """
    return {Cut.ZIGZAG: _zigzag, Cut.FLAT: _flat, Cut.EACH: _each}[cut](cu, parts)


def _zigzag(cu: np.ndarray, parts: int) -> Runs:
    if parts == 1:
        return _each(cu, 1)
    lengths = np.diff(cu)
    count = lengths.size
    chunk = lengths // (2 * parts)
    part = np.arange(parts)[:, None]
    start = np.stack([part * chunk, lengths - (part + 1) * chunk], axis=-1)
    order = np.broadcast_to(np.stack([part, 2 * parts - 1 - part], axis=-1), (parts, count, 2))
    return Runs(
        offsets=np.arange(parts + 1) * 2 * count,
        sequence=np.tile(np.repeat(np.arange(count), 2), parts),
        start=start.reshape(-1),
        length=np.tile(np.repeat(chunk, 2), parts),
        order=order.reshape(-1),
    )


def _each(cu: np.ndarray, parts: int) -> Runs:
    lengths = np.diff(cu)
    count = lengths.size
    chunk = lengths // parts
    return Runs(
        offsets=np.arange(parts + 1) * count,
        sequence=np.tile(np.arange(count), parts),
        start=(np.arange(parts)[:, None] * chunk).reshape(-1),
        length=np.tile(chunk, parts),
        order=np.repeat(np.arange(parts), count),
    )


def _flat(cu: np.ndarray, parts: int) -> Runs:
    stretch = int(cu[-1]) // parts
    low = np.arange(parts) * stretch
    begun = np.searchsorted(cu[:-1], low, side="left")  # sequences that start before each part
    # The last of these reaches into the part if it ends after the part's start. A zero-length sequence on a bound
    # belongs to the part that starts there; one at the very end to the last part.
    first = begun - ((begun > 0) & (cu[begun] > low))
    counts = np.append(begun[1:], cu.size - 1) - first
    sequence = expand(first, counts)
    part = np.repeat(np.arange(parts), counts)
    start = np.maximum(cu[sequence], low[part])
    stop = np.minimum(cu[sequence + 1], low[part] + stretch)
    return Runs(
        offsets=np.concatenate([[0], np.cumsum(counts)]),
        sequence=sequence,
        start=start - cu[sequence],
        length=stop - start,
        order=part,
    )
