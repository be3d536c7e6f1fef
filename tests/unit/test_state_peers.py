"""Laws taken out of peers' slots: what is taken against a walk along each chain, kernels against tables."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gdn_cp.comm.layout import ThdLayout
from gdn_cp.comm.state_gather import state_gather
from gdn_cp.comm.state_peers import Pull, StatePeers, state_peers
from gdn_cp.kernels.merge import merge_chains
from gdn_cp.state_exchange import Maps, PeerStates
from tests.host_peers import HostArena, HostMemory
from tests.state_cases import build, divisors, packs

KINDS = ("zigzag", "contiguous", "batched")


class Laws(NamedTuple):
    """Of all ranks' slots, [G, slots, HV, ..]: S_ext, M, dS_ext, and whether M is lost."""

    ext: Tensor
    maps: Tensor
    d_ext: Tensor
    lost: Tensor


def draw_laws(plans: list[StatePeers], K: int, V: int, share: float, dtype: torch.dtype = torch.float64) -> Laws:
    shape = len(plans), plans[0].slots, plans[0].heads
    normal = [torch.randn(*shape, K, width, dtype=dtype) for width in (V, K, V)]
    lost = torch.rand(shape) < share
    return Laws(normal[0], normal[1].mul_(K**-0.5).masked_fill_(lost[..., None, None], 0), normal[2], lost)


def walks(layout: ThdLayout, a2a_size: int, laws: Laws) -> tuple[list[Tensor], list[Tensor], list[int], list[int]]:
    """What enters and what leaves each segment of each rank, and how many S_ext and dS_ext each has use for."""
    groups = layout.cp_size // a2a_size
    bounds = [layout.segments(a2a_size, g).cu_seqlens for g in range(groups)]
    entering, leaving = ([torch.zeros_like(laws.ext[g, : len(bounds[g]) - 1]) for g in range(groups)] for _ in "io")
    counts = [0] * groups, [0] * groups
    for chain in layout.chains(a2a_size):
        chain = [(g, slot) for g, slot in chain if bounds[g][slot + 1] > bounds[g][slot]]
        for head in range(laws.lost.shape[2] if len(chain) > 1 else 0):
            for way, (links, ext, out) in enumerate(((chain, laws.ext, entering), (chain[::-1], laws.d_ext, leaving))):
                state = torch.zeros_like(ext[0, 0, 0])
                for number, (g, slot) in enumerate(links):
                    out[g][slot, head] = state
                    M = laws.maps[g, slot, head] if number else torch.zeros_like(laws.maps[0, 0, 0])
                    state = ext[g, slot, head] + (M.mT if way else M) @ state
                    reached = set()
                    for other, at in links[number + 1 :]:
                        if other not in reached:
                            counts[way][other] += 1
                        reached.add(other)
                        if laws.lost[other, at, head]:
                            break
    return entering, leaving, *counts


def take(pull: Pull, source: Tensor, lost: Tensor) -> Tensor:
    """The plain way: matrices of `source` [G * slots * HV, ..] that are of use, NaN for others."""
    out = torch.full((len(pull.items), *source.shape[1:]), torch.nan, dtype=source.dtype)
    for item, (place, begin, end) in enumerate(pull.items.tolist()):
        if not lost[begin:end].any():
            out[item] = source[place]
    return out


def merge(ext: Tensor, maps: Tensor, plan: StatePeers, lost: Tensor, reverse: bool) -> Tensor:
    table = plan.reverse if reverse else plan.forward
    out = torch.full((plan.segments * plan.heads, *ext.shape[1:]), torch.nan, dtype=ext.dtype)
    merge_chains(ext, maps, table.units, table.links, out, steps=table.steps, transpose=reverse, lost=lost)
    return out.view(plan.segments, plan.heads, *ext.shape[1:])


def check(layout: ThdLayout, a2a_size: int, share: float) -> None:
    plans = [state_peers(layout, a2a_size, g, 2) for g in range(layout.cp_size // a2a_size)]
    laws = draw_laws(plans, 3, 2, share)
    entering, leaving, used, used_back = walks(layout, a2a_size, laws)
    ext, maps, d_ext, lost = (x.flatten(0, 2) for x in laws)
    for g, plan in enumerate(plans):
        flags = lost[plan.maps.long()]
        kept = maps[plan.maps.long()].masked_fill(flags[:, None, None], torch.nan)
        for pull, source, wanted, count, reverse in (
            (plan.laws, ext, entering[g], used[g], False),
            (plan.gradients, d_ext, leaving[g], used_back[g], True),
        ):
            taken = take(pull, source, flags)
            assert int((~taken.isnan()).all(-1).all(-1).sum()) == count
            found = merge(taken, kept, plan, flags.int(), reverse)
            torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_what_is_of_use_is_taken_and_nothing_else(data):
    world, kind = data.draw(st.sampled_from([2, 4, 6])), data.draw(st.sampled_from(KINDS))
    layout = build(kind, data.draw(packs(world, kind)), world)
    torch.manual_seed(data.draw(st.integers(0, 2**20)))
    for a2a_size in divisors(world)[:-1]:
        check(layout, a2a_size, data.draw(st.sampled_from([0.0, 0.3, 1.0])))


def test_example():
    layout = ThdLayout.zigzag([0, 8], 2)
    first, second = (state_peers(layout, 1, g, 1) for g in range(2))
    assert state_peers(layout, 1, 0, 1) is first
    assert first.slots == 2
    assert (first.maps.tolist(), second.maps.tolist()) == ([2, 3], [2, 3])
    assert first.laws.items.tolist() == [[2, 1, 2], [3, 0, 0], [0, 0, 2]]
    assert second.laws.items.tolist() == [[0, 0, 0], [2, 0, 0]]
    assert first.gradients.items.tolist() == [[2, 0, 0], [3, 0, 1], [1, 0, 2]]
    assert second.gradients.items.tolist() == [[1, 0, 0], [3, 0, 0]]


def gathered(layout: ThdLayout, g: int, laws: Laws) -> tuple[Tensor, Tensor]:
    """What enters and leaves by way of a gather, whose kernel knows of no lost M."""
    plan = state_gather(layout, 1, g, laws.lost.shape[2])
    (ext, maps, d_ext, _), (K, V) = (x.flatten(0, 2) for x in laws), laws.ext.shape[-2:]
    kept, found = torch.empty(plan.kept, K, K), []
    for table, source, matrices, copies in ((plan.forward, ext, maps, kept), (plan.reverse, d_ext, kept, None)):
        out = torch.empty(plan.segments, plan.heads, K, V)
        options = {"steps": table.steps, "transpose": copies is None, "kept": copies, "kernels": True}
        merge_chains(source, matrices, table.units, table.links, out.view(-1, K, V), **options)
        found.append(out)
    return found[0], found[1]


@pytest.mark.parametrize(("K", "V", "share"), [(16, 32, 0.5), (48, 16, 1.0), (16, 16, 0.0)])
def test_the_kernels_give_the_bits_of_a_gather(K, V, share):
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("slots lie in host memory; see tests/gpu/test_states_peers.py")
    torch.manual_seed(3)
    layout = ThdLayout.contiguous([0, 7, 12, 30], 3)
    plans = [state_peers(layout, 1, g, 2) for g in range(3)]
    laws = draw_laws(plans, K, V, share, torch.float32)
    expected = [gathered(layout, g, laws) for g in range(3)]
    memory = HostMemory(3, 2**18)
    ways = [PeerStates(plan, HostArena(memory, g)) for g, plan in enumerate(plans)]
    rooms = [way.law_room(K, V) for way in ways]
    for g, room in enumerate(rooms):
        maps = laws.maps[g].masked_fill(laws.lost[g][..., None, None], torch.nan)  # nobody reads a lost one
        room.laws.copy_(torch.cat([laws.ext[g], maps], -1))
        room.lost.copy_(laws.lost[g])
    found: list[tuple[Tensor, Maps]] = [way.forward(room.laws, V, True) for way, room in zip(ways, rooms, strict=True)]
    gradients = [way.gradient_room(K, V).copy_(laws.d_ext[g]) for g, way in enumerate(ways)]
    for way, (entering, maps), d_ext, wanted in zip(ways, found, gradients, expected, strict=True):
        assert torch.equal(entering, wanted[0])
        called: list[int] = []
        assert torch.equal(way.backward(d_ext, maps, True, partial(called.append, 1)), wanted[1])
        assert called == []  # on one stream nothing runs beside a barrier
