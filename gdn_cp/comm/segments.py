"""Segments and chains: what a group of ranks owns of every sequence once its ranks have traded tokens for heads.

A group of a = `a2a_size` neighbouring ranks ends its all-to-all with all of its tokens on each rank (and 1/a of the
heads). Its segments are the runs of consecutive tokens it then holds (zigzag: two of every sequence, also where they
touch; with one group the sequences themselves). A sequence's chain is the order in which the
state visits segments: through groups and, inside a group's buffer, slots.

Example: zigzag, 4 ranks, a = 2, one sequence of 16 tokens. Group 0 owns tokens 0-3 and 12-15, group 1 tokens 4-11:

    group 0   cu_seqlens (0, 4, 8)   starts (0, 12)
    group 1   cu_seqlens (0, 4, 8)   starts (4, 8)
    chain     (0, 0) -> (1, 0) -> (1, 1) -> (0, 1)

Dimensions: N sequences, S segments of one group, Tg tokens of one group.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from torch import Tensor

from gdn_cp.comm.cuts import Runs

Chains = tuple[tuple[tuple[int, int], ...], ...]
"""Per sequence, in the order of its tokens: (group_index, slot), slot being the segment's number in that group."""


@dataclass(frozen=True, eq=False)
class SegmentTable:
    """The segments of one group, in buffer order.

    `cu_seqlens` (S+1 ints) bound the segments in the group's buffer, `cu_seqlens_tensor` is the same as int32 on the
    layout's device. `sequence_ids` and `starts` (S ints each) say which sequence a segment is of and at which token of
    it it begins. `to_natural` int64 [Tg] gathers rows that stand rank by rank into buffer order, `to_rank_major` is its
    inverse; both are None where the two orders are the same.
    """

    a2a_size: int
    group_index: int
    cu_seqlens: tuple[int, ...]
    cu_seqlens_tensor: Tensor
    sequence_ids: tuple[int, ...]
    starts: tuple[int, ...]
    to_natural: Tensor | None
    to_rank_major: Tensor | None


def build_chains(runs: Runs) -> Chains:
    """Return the chains of a batch that was cut into groups."""
    parts = np.diff(runs.offsets)
    group = np.repeat(np.arange(parts.size), parts)
    slot = np.arange(group.size) - np.repeat(runs.offsets[:-1], parts)
    by_sequence = np.lexsort((runs.order, runs.sequence))
    links = list(zip(group[by_sequence].tolist(), slot[by_sequence].tolist(), strict=True))
    counts = np.bincount(runs.sequence)  # every sequence has a segment somewhere, if only an empty one
    bounds = np.concatenate([[0], np.cumsum(counts)]).tolist()
    return tuple(tuple(links[a:b]) for a, b in pairwise(bounds))
