"""Where blocks of memory lie that are needed at different times: one piece of memory for all, as small as we find.

Dimensions: n blocks; times are numbers of events, counted by whoever asks.
"""

from __future__ import annotations

from typing import NamedTuple

ALIGNMENT = 512
"""Bytes; what PyTorch's allocator aligns to."""


class Lifetime(NamedTuple):
    """A block's size in bytes, when it is first needed, and when no longer."""

    num_bytes: int
    born: int
    died: int


def place_blocks(blocks: list[Lifetime]) -> tuple[list[int], int]:
    """The offset of each block, a multiple of ALIGNMENT, and the bytes of the whole.

    Blocks of which both are needed at a time do not overlap. The largest are placed first, each at the lowest offset
    where it fits: what is best is hard to say, and for a few blocks of few sizes this finds it nearly always.

    >>> place_blocks([Lifetime(1024, 0, 2), Lifetime(512, 1, 3), Lifetime(1000, 2, 4)])
    ([0, 1024, 0], 1536)
    """
    offsets, placed, whole = [0] * len(blocks), [], 0
    for index in sorted(range(len(blocks)), key=lambda index: -blocks[index].num_bytes):
        block, offset = blocks[index], 0
        size = -(-block.num_bytes // ALIGNMENT) * ALIGNMENT
        for start, end, other in sorted(placed):
            if offset + size <= start:
                break
            if block.born < other.died and other.born < block.died:
                offset = max(offset, end)
        offsets[index] = offset
        placed.append((offset, offset + size, block))
        whole = max(whole, offset + size)
    return offsets, whole
