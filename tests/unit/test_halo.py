"""The convolution's halo against the whole batch's rows: values, gradients, segments shorter than the halo."""

from __future__ import annotations

import doctest

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gdn_cp.comm import halo
from gdn_cp.comm.groups import cp_groups
from gdn_cp.comm.halo import fetch_halo, halo_routes
from gdn_cp.comm.layout import ThdLayout
from tests.state_cases import Case, build, divisors, few_worlds, group_rows, packs

KINDS = ("zigzag", "contiguous", "batched")
D = 3


def wanted_rows(layout: ThdLayout, a2a_size: int, group: int, width: int) -> list[int]:
    """The natural rows before each of a group's segments, one by one."""
    table = layout.segments(a2a_size, group)
    rows = []
    for slot, (sequence, start) in enumerate(zip(table.sequence_ids, table.starts, strict=True)):
        if table.cu_seqlens[slot + 1] > table.cu_seqlens[slot]:
            begin = layout.cu_seqlens[sequence]
            rows += [begin + position for position in range(max(0, start - width + 1), start)]
    return rows


def exchange_halo(rank: int, world: int, cases: list[Case], width: int) -> list[tuple[bool, float]]:
    """Per case whether the halo's values are right to the bit, and the largest error of the gradient."""
    results = []
    for kind, cu, a2a_size in cases:
        layout, groups = build(kind, cu, world), cp_groups(dist.group.WORLD, a2a_size)
        routes = halo_routes(layout, a2a_size, groups.group_index, width)
        everyone = [wanted_rows(layout, a2a_size, g, width) for g in range(world // a2a_size)]
        assert routes.travels == any(everyone)
        if not routes.travels:
            continue
        x = torch.randn(cu[-1], D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        rows = group_rows(layout, a2a_size, groups.group_index)
        local = x[rows].requires_grad_()
        fetched = fetch_halo(local, routes, groups.states)
        same = torch.equal(fetched, x[everyone[groups.group_index]])

        # The gradient at halo row i of group g is a number that says so; owners must find the sum of all of theirs.
        expected = torch.zeros_like(x)
        for g, wanted in enumerate(everyone):
            for i, row in enumerate(wanted):
                expected[row] += _mark(g, i)
        marks = [_mark(groups.group_index, i) for i in range(len(fetched))]
        fetched.backward(torch.stack(marks) if marks else torch.zeros_like(fetched))
        assert local.grad is not None
        results.append((same, float((local.grad - expected[rows]).abs().max()) if len(rows) else 0.0))
    return results


def _mark(group: int, index: int) -> Tensor:
    return torch.arange(1, D + 1, dtype=torch.float64) * (1000 * group + index + 1)


@pytest.mark.parametrize(("world", "width"), [(2, 4), (6, 3)])
def test_halo_and_its_gradient_on_random_packs(run_ranks, world, width):
    @few_worlds
    @given(st.data())
    def check(data):
        cases = [(kind, data.draw(packs(world, kind)), a2a_size) for kind in KINDS for a2a_size in divisors(world)[:-1]]
        for results in run_ranks(exchange_halo, world, cases, width):
            assert all(same for same, _ in results)
            assert all(error == 0 for _, error in results)  # sums of whole numbers

    check()


def test_halo_spans_segments_of_several_ranks(run_ranks):
    # Chunks of one token: the three tokens before a segment lie on three ranks, or on the rank itself.
    cases: list[Case] = [("zigzag", [0, 8, 16], 1), ("zigzag", [0, 8], 2), ("contiguous", [0, 1, 4], 1)]
    for results in run_ranks(exchange_halo, 4, cases, 4):
        assert results == [(True, 0.0)] * 3


def test_halo_of_the_docstring():
    layout = ThdLayout.zigzag([0, 8], 2)
    first, second = (halo_routes(layout, 1, g, 4) for g in range(2))
    assert (first.lengths, second.lengths) == (((1, 3),), ((0, 2), (1, 3)))
    assert (first.send_rows.tolist(), first.send_counts) == ([0, 1, 1], (0, 3))
    assert (second.send_rows.tolist(), second.send_counts) == ([1, 2, 3, 0, 1], (3, 2))
    assert doctest.testmod(halo).failed == 0


def test_edges_stand_behind_their_halo():
    layout = ThdLayout.zigzag([0, 16], 2)  # rank 0: tokens 0-3, 12-15
    edges = halo_routes(layout, 1, 0, 4).edges
    assert edges.rows.tolist() == [4, 5, 6]
    assert edges.order.tolist() == [0, 1, 2, 3, 4, 5]
    assert (edges.cu_seqlens.tolist(), edges.results.tolist()) == ([0, 6], [3, 4, 5])
    assert edges.cu_seqlens.dtype == torch.int32


def test_nothing_travels_where_nothing_is_cut():
    assert not halo_routes(ThdLayout.contiguous([0, 4, 8], 2), 1, 1, 4).travels
    assert not halo_routes(ThdLayout.zigzag([0, 8], 2), 2, 0, 4).travels
    assert not halo_routes(ThdLayout.zigzag([0, 8], 2), 1, 0, 1).travels  # one tap reads no other token
    layout = ThdLayout.zigzag([0, 16], 2)
    assert halo_routes(layout, 1, 0, 4) is halo_routes(layout, 1, 0, 4)
