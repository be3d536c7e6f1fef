"""Blocks of memory that are needed together do not overlap, and little is wasted."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gdn_cp.memory_plan import ALIGNMENT, Lifetime, place_blocks

LIFETIMES = st.builds(
    lambda size, born, length: Lifetime(size, born, born + length),
    st.integers(0, 5000),
    st.integers(0, 9),
    st.integers(1, 9),
)


def rounded(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


@given(st.lists(LIFETIMES, max_size=12))
def test_blocks_of_one_time_lie_apart(blocks: list[Lifetime]):
    offsets, whole = place_blocks(blocks)
    assert len(offsets) == len(blocks)
    for index, (block, offset) in enumerate(zip(blocks, offsets, strict=True)):
        assert offset % ALIGNMENT == 0
        assert 0 <= offset <= whole - block.num_bytes
        for other, start in zip(blocks[:index], offsets[:index], strict=True):
            together = block.born < other.died and other.born < block.died
            assert not together or offset + block.num_bytes <= start or start + other.num_bytes <= offset
    in_use = [sum(rounded(b.num_bytes) for b in blocks if b.born <= time < b.died) for time in range(20)]
    assert max(in_use) <= whole <= sum(rounded(b.num_bytes) for b in blocks)


@given(st.lists(LIFETIMES, max_size=12))
def test_blocks_one_after_another_need_the_largest_alone(blocks: list[Lifetime]):
    apart = [Lifetime(block.num_bytes, index, index + 1) for index, block in enumerate(blocks)]
    assert place_blocks(apart)[1] == max((rounded(block.num_bytes) for block in blocks), default=0)


def test_the_largest_come_first_and_gaps_are_filled_to_the_byte():
    """The middle one is needed with both others, which are not together: the last goes below it."""
    assert place_blocks([Lifetime(1024, 0, 2), Lifetime(512, 1, 3), Lifetime(1000, 2, 4)]) == ([0, 1024, 0], 1536)
    assert place_blocks([Lifetime(1536, 0, 2), Lifetime(1536, 1, 5), Lifetime(1536, 3, 4)]) == ([0, 1536, 0], 3072)
