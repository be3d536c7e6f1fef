"""Segment and chain tables: whatever the cut, a chain walks through all tokens of its sequence, once and in order."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gdn_cp.comm.layout import SegmentTable, ThdLayout
from tests.unit.test_layout import CP_SIZES, batches, build, rank_rows


def tokens(table: SegmentTable, slot: int) -> tuple[int, list[int]]:
    """A segment's sequence and its tokens' positions in it."""
    length = table.cu_seqlens[slot + 1] - table.cu_seqlens[slot]
    return table.sequence_ids[slot], list(range(table.starts[slot], table.starts[slot] + length))


def natural_rows(table: SegmentTable, cu: tuple[int, ...]) -> list[int]:
    rows = []
    for slot in range(len(table.starts)):
        sequence, positions = tokens(table, slot)
        rows += [cu[sequence] + position for position in positions]
    return rows


def divisors(size: int) -> list[int]:
    return [d for d in range(1, size + 1) if size % d == 0]


def check_layout(made: ThdLayout, ranks: list[list[int]]) -> None:
    """Check all tables of a layout against `ranks`, each rank's natural rows in local order."""
    for a2a_size in divisors(made.cp_size):
        tables = [made.segments(a2a_size, group) for group in range(made.cp_size // a2a_size)]
        for group, table in enumerate(tables):
            held = [row for rows in ranks[group * a2a_size : (group + 1) * a2a_size] for row in rows]
            rows = natural_rows(table, made.cu_seqlens)
            gathered = held if table.to_natural is None else [held[place] for place in table.to_natural.tolist()]
            assert gathered == rows == sorted(held)
            back = rows if table.to_rank_major is None else [rows[place] for place in table.to_rank_major.tolist()]
            assert back == held
            assert table.cu_seqlens_tensor.tolist() == list(table.cu_seqlens)
            assert (table.a2a_size, table.group_index) == (a2a_size, group)
        for sequence, chain in enumerate(made.chains(a2a_size)):
            walked = [tokens(tables[group], slot) for group, slot in chain]
            assert {owner for owner, _ in walked} == {sequence}
            length = made.cu_seqlens[sequence + 1] - made.cu_seqlens[sequence]
            assert [position for _, positions in walked for position in positions] == list(range(length))
        links = [link for chain in made.chains(a2a_size) for link in chain]
        assert sorted(links) == [(g, s) for g, table in enumerate(tables) for s in range(len(table.starts))]


@pytest.mark.parametrize("kind", ["zigzag", "flat"])
def test_chains_walk_every_token_once_for_every_a2a_size(kind):
    @settings(max_examples=40, deadline=None)
    @given(batches(kind))
    def check(batch):
        cu, cp_size = batch
        check_layout(build(kind, cu, cp_size), rank_rows(cu, cp_size, kind))

    check()


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(CP_SIZES), st.integers(1, 3), st.integers(1, 3), st.sampled_from(["zigzag", "contiguous"]))
def test_chains_of_batched_layouts(cp_size, batch, chunk, kind):
    seqlen = 2 * cp_size * chunk
    cu = [index * seqlen for index in range(batch + 1)]
    made = ThdLayout.batched(batch, seqlen, cp_size, kind=kind)
    check_layout(made, rank_rows(cu, cp_size, "zigzag" if kind == "zigzag" else "each"))


@settings(max_examples=40, deadline=None)
@given(batches("zigzag"))
def test_a_zigzag_group_is_one_rank_of_a_smaller_zigzag(batch):
    cu, cp_size = batch
    made = ThdLayout.zigzag(cu, cp_size)
    for a2a_size in divisors(cp_size):
        groups = cp_size // a2a_size
        smaller = ThdLayout.zigzag(cu, groups)
        for group in range(groups):
            table = made.segments(a2a_size, group)
            assert natural_rows(table, made.cu_seqlens) == smaller.local_rows(group).tolist()
            # As many segments as long for every group, also for the last, which holds the middle of every sequence.
            assert len(table.starts) == made.num_sequences * (1 if groups == 1 else 2)
            assert table.cu_seqlens == made.segments(a2a_size, 0).cu_seqlens


@pytest.mark.parametrize("kind", ["zigzag", "flat"])
def test_one_group_has_the_sequences_themselves_as_segments(kind):
    made = build(kind, [0, 0, 8, 8, 24, 24], 4)
    table = made.segments(4, 0)
    assert table.cu_seqlens == made.cu_seqlens
    assert table.sequence_ids == (0, 1, 2, 3, 4)
    assert table.starts == (0, 0, 0, 0, 0)
    assert made.chains(4) == (((0, 0),), ((0, 1),), ((0, 2),), ((0, 3),), ((0, 4),))
    assert made.segments(4, 0) is table


def test_example_of_the_module():
    made = ThdLayout.zigzag([0, 16], 4)
    first, second = made.segments(2, 0), made.segments(2, 1)
    assert (first.cu_seqlens, first.starts) == ((0, 4, 8), (0, 12))
    assert (second.cu_seqlens, second.starts) == ((0, 4, 8), (4, 8))
    assert made.chains(2) == (((0, 0), (1, 0), (1, 1), (0, 1)),)


def test_contiguous_groups_cut_sequences_and_keep_empty_ones():
    made = ThdLayout.contiguous([0, 3, 3, 4, 8, 8], 2)
    first, second = made.segments(1, 0), made.segments(1, 1)
    assert (first.sequence_ids, first.starts, first.cu_seqlens) == ((0, 1, 2), (0, 0, 0), (0, 3, 3, 4))
    assert (second.sequence_ids, second.starts, second.cu_seqlens) == ((3, 4), (0, 0), (0, 4, 4))
    cut = ThdLayout.contiguous([0, 6, 8], 2).segments(1, 1)
    assert (cut.sequence_ids, cut.starts, cut.cu_seqlens) == ((0, 1), (4, 0), (0, 2, 4))
