"""The fused mixer with states through peers' memory against one rank with the whole batch, any a2a_size, any cut.

Ranks are threads (tests/host_peers.py); as in test_fused_mixer.py all is float32 in Triton's interpreter. What the
backward needs has to survive a second micro-batch that comes before it.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("threads share one GPU's memory here; see tests/gpu/test_fused_states_gpu.py", allow_module_level=True)

from gdn_cp import GdnDims, ThdLayout, fused_mixer
from gdn_cp.comm.groups import CpGroups
from gdn_cp.comm.symmetric import PeerTransport
from gdn_cp.fused_mixer import FusedCall, fused_call
from gdn_cp.state_exchange import PeerStates
from tests.host_peers import HostArena, run_threads
from tests.unit.test_fused_mixer import composed, layer, parameters_of
from tests.unit.test_symmetric_mixer import close

RANKS, BYTES = 4, 2**19
CASES = {
    # The second sequence ends inside rank 0's first segment of it: whole segments, and halos, are padding.
    "padded zigzag": (partial(ThdLayout.zigzag, [0, 24, 32], seqlens=[17, 2]), GdnDims(2, 2, 16, 16, 4)),
    # Segments shorter than the halo, a sequence that lies on one rank, no sequence at all.
    "contiguous": (partial(ThdLayout.contiguous, [0, 2, 2, 3, 20, 24]), GdnDims(1, 4, 16, 16, 4)),
}


class Group:
    """A process group's size and rank, and its memory."""

    def __init__(self, arena: HostArena | None, rank: int, size: int) -> None:
        self.arena, self.rank, self.size = arena, (lambda: rank), (lambda: size)


def partitions(a2a_size: int) -> tuple[list[list[int]], ...]:
    """State groups and, with more than one rank, a2a groups."""
    states = [list(range(first, RANKS, a2a_size)) for first in range(a2a_size)]
    neighbours = [list(range(first, first + a2a_size)) for first in range(0, RANKS, a2a_size)]
    return (states,) if a2a_size == 1 else (states, neighbours)


def groups_of(states: HostArena, near: HostArena | None = None) -> CpGroups:
    size = 1 if near is None else near.size
    rank = states.rank * size + (0 if near is None else near.rank)
    a2a = None if near is None else Group(near, near.rank, size)
    made: Any = (Group(None, rank, RANKS), size, a2a, Group(states, states.rank, states.size))
    return CpGroups(*made)


def micro_batches(
    *arenas: HostArena, layout: ThdLayout, dims: GdnDims, batches: list[tuple[Tensor, Tensor]], truncate: bool
) -> list[Any]:
    """All forwards, then all backwards."""
    groups, module, forwards = groups_of(*arenas), layer(dims), []
    rank = groups.full.rank()
    for x, _ in batches:
        leaf = layout.shard(x, rank).requires_grad_()
        call = fused_call(leaf, parameters_of(module), dims, layout=layout, group=None, eps=1e-6, groups=groups)
        check(call, groups)
        forwards.append((leaf, fused_mixer.fused_mixer(leaf, parameters_of(module), truncated(call, truncate))))
    found = []
    for (leaf, out), (_, dy) in zip(forwards, batches, strict=True):
        module.zero_grad(set_to_none=True)
        out.backward(layout.shard(dy, rank))
        found.append([out.detach(), leaf.grad, [p.grad for p in parameters_of(module) if p is not None]])
    return found


def check(call: FusedCall, groups: CpGroups) -> None:
    """Everything travels through peers' memory."""
    assert call.states is not None
    assert isinstance(call.states.rule.exchange, PeerStates)
    assert (groups.a2a is not None) == isinstance(call.transport, PeerTransport)


def truncated(call: FusedCall, truncate: bool) -> FusedCall:
    assert call.states is not None
    return replace(call, states=replace(call.states, rule=replace(call.states.rule, truncate=truncate)))


@pytest.mark.parametrize(
    ("name", "a2a_size", "truncate", "count"), [("padded zigzag", 2, True, 2), ("contiguous", 1, False, 1)]
)
def test_micro_batches_in_flight_equal_one_rank(name, a2a_size, truncate, count, monkeypatch):
    monkeypatch.setattr(fused_mixer, "peer_memory", lambda group, device: group.arena)
    cut, dims = CASES[name]
    layout, whole = cut(cp_size=RANKS), cut(cp_size=1)
    padding = layout.global_padding()
    torch.manual_seed(1)
    widths = dims.in_proj_dim, dims.sections[3]
    batches: Any = [tuple(torch.randn(layout.t_global, width) for width in widths) for _ in range(count)]
    if padding is not None:
        batches = [tuple(x.masked_fill(padding[:, None], torch.nan) for x in batch) for batch in batches]
    run = partial(micro_batches, layout=layout, dims=dims, batches=batches, truncate=truncate)
    ranks = run_threads(run, RANKS, BYTES, partitions=partitions(a2a_size))
    for index, (x, dy) in enumerate(batches):
        module, leaf = layer(dims), x.clone().requires_grad_()
        out = composed(module, leaf, whole, None)
        out.backward(dy)
        close(layout.unshard([rank[index][0] for rank in ranks]), out.detach())
        close(layout.unshard([rank[index][1] for rank in ranks]), leaf.grad)
        for parameter, *parts in zip(parameters_of(module), *(rank[index][2] for rank in ranks), strict=True):
            close(sum(parts), parameter.grad, 10)
