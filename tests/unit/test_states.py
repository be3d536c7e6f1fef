"""The exchange of states against a loop over each chain, and what travels against its formula."""

from __future__ import annotations

from itertools import accumulate
from types import SimpleNamespace
from typing import cast

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gdn_cp.comm import states
from gdn_cp.comm.groups import CpGroups, cp_groups
from gdn_cp.comm.layout import ThdLayout
from gdn_cp.comm.state_gather import GATHER_BYTES, gathered_bytes, state_gather
from gdn_cp.comm.states import state_routes
from gdn_cp.state_exchange import ComposedStates, GatheredStates, state_exchange
from tests.state_cases import Case, build, divisors, few_worlds, packs

K, V = 3, 2
KINDS = ("zigzag", "contiguous", "batched")


def summaries(layout: ThdLayout, a2a_size: int, heads: int) -> tuple[dict, dict]:
    """Random (S_ext, M) and dS_ext of every segment (group, slot), the same on every rank."""
    draw = torch.Generator().manual_seed(11)
    links = [link for chain in layout.chains(a2a_size) for link in chain]

    def normal(*shape: int) -> Tensor:
        return torch.randn(heads, *shape, generator=draw, dtype=torch.float64)

    laws = {link: (normal(K, V), normal(K, K)) for link in links}
    return laws, {link: normal(K, V) for link in links}


def brute_force(layout: ThdLayout, a2a_size: int, heads: int) -> tuple[dict, dict]:
    """Per segment the state that enters it and the gradient of the state that leaves it, chain by chain."""
    laws, d_exts = summaries(layout, a2a_size, heads)
    entering, leaving = {}, {}
    bounds = [layout.segments(a2a_size, g).cu_seqlens for g in range(layout.cp_size // a2a_size)]
    for chain in layout.chains(a2a_size):
        chain = [(g, s) for g, s in chain if bounds[g][s + 1] > bounds[g][s]]
        state = d_state = torch.zeros(heads, K, V, dtype=torch.float64)
        for link in chain:
            entering[link] = state
            state = laws[link][0] + laws[link][1] @ state
        for link in reversed(chain):
            leaving[link] = d_state
            d_state = d_exts[link] + laws[link][1].mT @ d_state
    return entering, leaving


def stacked(table: dict, group: int, segments: int, heads: int, *shape: int) -> Tensor:
    zero = torch.zeros(heads, *shape, dtype=torch.float64)
    whole = [table.get((group, slot), zero) for slot in range(segments)]
    return torch.stack(whole) if whole else zero.new_zeros(0, heads, *shape)


def exchange_states(rank: int, world: int, cases: list[Case], heads: int) -> list[float]:
    """Largest difference from brute force of each case, by composers and by a gather."""
    errors = []
    for kind, cu, a2a_size in cases:
        layout, groups = build(kind, cu, world), cp_groups(dist.group.WORLD, a2a_size)
        me = groups.group_index
        routes = state_routes(layout, a2a_size, me, heads)
        if not routes.travels:
            errors.append(0.0)
            continue
        assert groups.states is not None
        laws, d_exts = summaries(layout, a2a_size, heads)
        expected = [stacked(table, me, routes.segments, heads, K, V) for table in brute_force(layout, a2a_size, heads)]
        whole = {link: torch.cat(law, -1) for link, law in laws.items()}
        for way in (
            ComposedStates(routes, groups.states),
            GatheredStates(state_gather(layout, a2a_size, me, heads), groups.states),
        ):
            sent, d_sent = stacked(whole, me, way.slots, heads, K, V + K), stacked(d_exts, me, way.slots, heads, K, V)
            entering, maps = way.forward(sent, V, kernels=False)
            leaving = way.backward(d_sent, maps, kernels=False, meanwhile=list)
            found = zip((entering, leaving), expected, strict=True)
            errors.append(max(float((a - b).abs().max()) if b.numel() else 0.0 for a, b in found))
    return errors


@pytest.mark.parametrize("world", [2, 6])
def test_states_and_gradients_are_those_of_the_chain(run_ranks, world):
    @few_worlds
    @given(st.data())
    def check(data):
        cases = [(kind, data.draw(packs(world, kind)), a2a_size) for kind in KINDS for a2a_size in divisors(world)]
        for errors in run_ranks(exchange_states, world, cases, data.draw(st.integers(1, 5))):
            assert max(errors) < 1e-10  # sums of a dozen products of random matrices, in float64

    check()


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_ranks_agree_on_counts_and_every_chain_has_one_composer(data):
    world = data.draw(st.sampled_from([2, 3, 4, 8]))
    kind, a2a_size = data.draw(st.sampled_from(KINDS)), data.draw(st.sampled_from(divisors(world)))
    layout = build(kind, data.draw(packs(world, kind)), world)
    heads, groups = data.draw(st.integers(1, 5)), world // a2a_size
    ranks = [state_routes(layout, a2a_size, g, heads) for g in range(groups)]
    assert len({routes.travels for routes in ranks}) == 1
    for name in ("leaving", "entering", "transfer"):
        routes = [getattr(rank, name) for rank in ranks]
        for g in range(groups):
            assert [r.from_members[g] for r in routes] == list(routes[g].to_composers)
            assert len(routes[g].rows) == sum(routes[g].to_composers)
    links = [len([1 for g, s in chain if _tokens(layout, a2a_size, g, s)]) for chain in layout.chains(a2a_size)]
    steps = sum(max(0, count - 1) for count in links) * heads
    composed = [len(rank.forward.links) - len(rank.forward.units) for rank in ranks]
    assert sum(composed) == steps
    assert [len(rank.reverse.links) for rank in ranks] == [len(rank.forward.links) for rank in ranks]
    # No composer has more than its share, but for the last chain that it began.
    longest = max([count - 1 for count in links], default=0)
    assert all(found <= steps / groups + max(longest, 0) for found in composed)


def _tokens(layout: ThdLayout, a2a_size: int, group: int, slot: int) -> int:
    bounds = layout.segments(a2a_size, group).cu_seqlens
    return bounds[slot + 1] - bounds[slot]


def test_what_travels_does_not_grow_with_the_number_of_ranks():
    heads = 32
    sent = []
    for world in (4, 8, 16, 32):
        layout = ThdLayout.zigzag([0, 64 * world], world)
        ranks = [state_routes(layout, 1, r, heads) for r in range(world)]
        sent.append(max(len(r.leaving.rows) + len(r.transfer.rows) for r in ranks))
        # Two segments a rank: a summary (S_ext, M) of each leaves, no more than one state each comes back.
        assert max(len(r.entering.rows) for r in ranks) == 2 * heads
        # A composer gets its share of all, to within one chain of one head.
        assert max(sum(r.leaving.from_members) for r in ranks) <= 2 * heads + 2 * world
    assert sent == [4 * heads] * 4


def test_few_bytes_are_gathered_and_many_composed():
    group = cast(dist.ProcessGroup, object())
    for sequences, expected in ((1, GatheredStates), (16, ComposedStates)):
        layout = ThdLayout.zigzag(range(0, 64 * sequences + 1, 64), 4)
        # Zigzag leaves a rank two segments of a sequence at most: 2 * 32 heads of 128 KiB from each of 4 ranks.
        assert gathered_bytes(layout, 1, 32, 128, 128) == sequences * 2**25
        assert (sequences * 2**25 <= GATHER_BYTES) == (expected is GatheredStates)
        groups = SimpleNamespace(states=group, a2a_size=1, group_index=0)
        routes = state_routes(layout, 1, 0, 32)
        assert isinstance(state_exchange(layout, cast(CpGroups, groups), 32, 128, 128, routes), expected)


def test_a_gather_keeps_the_maps_of_chains_that_touch_the_rank():
    layout = ThdLayout.contiguous([0, 5, 12], 3)  # ranks 0 and 1 share the first sequence, 1 and 2 the second
    for rank, (own, chains) in enumerate(((1, 1), (2, 2), (1, 1))):
        plan = state_gather(layout, 1, rank, 4)
        assert (plan.slots, plan.segments) == (2, own)
        assert len(plan.forward.units) == 4 * chains
        assert plan.kept == 0  # no segment lies between two others
    assert state_gather(ThdLayout.zigzag([0, 16], 4), 1, 2, 4).kept == 4 * 6  # of a chain of eight segments


def test_only_what_someone_needs_travels():
    # Zigzag on 2 ranks: A (rank 0), B, C (rank 1), D (rank 0). D's summary and A's M are of no use; a sequence of
    # zero length adds nothing.
    layout = ThdLayout.zigzag([0, 0, 8], 2)
    first, second = (state_routes(layout, 1, g, 2) for g in range(2))
    assert (len(first.leaving.rows), len(first.transfer.rows), len(first.entering.rows)) == (2, 0, 2)
    assert (len(second.leaving.rows), len(second.transfer.rows), len(second.entering.rows)) == (4, 4, 4)
    assert (first.summarised, second.summarised) == ((2, 3), (2, 4))  # slots; the empty sequence has its own
    local = ThdLayout.contiguous([0, 4, 8], 2)  # no sequence crosses the cut
    assert not any(state_routes(local, 1, g, 2).travels for g in range(2))
    assert not state_routes(ThdLayout.zigzag([0, 8], 2), 2, 0, 2).travels  # one group, no cut


def test_routes_are_built_once_and_go_with_their_layout():
    layout = ThdLayout.zigzag([0, 16], 2)
    assert state_routes(layout, 1, 0, 4) is state_routes(layout, 1, 0, 4)
    assert state_routes(layout, 1, 0, 4) is not state_routes(layout, 1, 0, 2)
    kept = len(states._routes)
    del layout
    assert len(states._routes) == kept - 1


def make_groups(rank: int, world: int) -> dict:
    full = dist.group.WORLD
    seen = {}
    for a2a_size in divisors(world):
        groups = cp_groups(full, a2a_size)
        assert groups == cp_groups(full, a2a_size)  # no new groups
        seen[a2a_size] = [
            None if group is None else dist.get_process_group_ranks(group) for group in (groups.a2a, groups.states)
        ] + [groups.group_index, groups.head_index]
    half = dist.new_group([0, 2] if rank in (0, 2) else [1, 3], use_local_synchronization=True)
    inside = cp_groups(half, 1)
    seen["half"] = (dist.get_process_group_ranks(inside.states), inside.group_index)
    messages = []
    for refused in (
        lambda: cp_groups(full, 3),
        lambda: CpGroups(full, 2, full, full),
        lambda: CpGroups(full, 4, None, None),
    ):
        try:
            refused()
        except ValueError as error:
            messages.append(str(error))
    assert "divide cp_size = 4: one of [1, 2, 4]" in messages[0]
    assert "states: has 4 rank(s), expected 2" in messages[1] or "a2a: has 4 rank(s), expected 2" in messages[1]
    assert "a2a: has 1 rank(s), expected 4" in messages[2]
    return seen


def test_groups_of_neighbours_and_of_same_heads(run_ranks):
    for rank, seen in enumerate(run_ranks(make_groups, 4)):
        assert seen[1] == [None, [0, 1, 2, 3], rank, 0]
        assert seen[2] == [[[0, 1], [2, 3]][rank // 2], [[0, 2], [1, 3]][rank % 2], rank // 2, rank % 2]
        assert seen[4] == [[0, 1, 2, 3], None, 0, rank]
        assert seen["half"] == ([0, 2] if rank % 2 == 0 else [1, 3], rank // 2)


def test_accumulated_bounds_are_what_the_cases_say():
    assert build("batched", [0, *accumulate([8, 8])], 2).cu_seqlens == (0, 8, 16)


def sum_over(group: dist.ProcessGroup | None) -> int:
    assert group is not None
    number = torch.tensor(2 ** dist.get_rank())
    dist.all_reduce(number, group=group)
    return int(number)


def make_groups_anew(rank: int, world: int) -> list[tuple[int, int]]:
    """Sums of 2^rank over both groups, made three times over for a group that comes and goes."""
    if rank == 3:  # is in more groups than the others
        dist.new_group([3], use_local_synchronization=True)
    sums = []
    for _ in range(3):
        parent = dist.new_group(list(range(world)))
        assert parent is not None
        groups = cp_groups(parent, 2)
        sums.append((sum_over(groups.a2a), sum_over(groups.states)))
        for group in (groups.a2a, groups.states, parent):
            dist.destroy_process_group(group)
        del groups, parent
    return sums


def test_groups_are_made_anew_and_where_ranks_are_in_different_numbers_of_groups(run_ranks):
    for rank, sums in enumerate(run_ranks(make_groups_anew, 4, timeout=60.0)):
        assert sums == [([3, 12][rank // 2], [5, 10][rank % 2])] * 3
