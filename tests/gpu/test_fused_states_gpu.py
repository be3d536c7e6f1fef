"""The fused mixer with state passing on one GPU: ranks are threads that exchange through a barrier.

Several GPUs are not needed to see whether the kernels, tables and routes of every rank are right on CUDA in bfloat16.
What would be memory of other GPUs is this one's (tests/host_peers.py).
Forward and backward are called as autograd calls them: its one thread for each GPU cannot wait for four ranks.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from gdn_cp import fused_mixer as module
from gdn_cp import state_exchange
from gdn_cp.comm import halo_tables, state_gather
from gdn_cp.comm.groups import CpGroups
from gdn_cp.fused_mixer import MixerParameters, fused_call
from gdn_cp.state_exchange import PeerStates
from tests.gpu.test_segments_multi_gpu import BATCHES, DIMS, GATE, SHARE, batch, parameters, run_mixer, sizes
from tests.host_peers import HostArena, HostMemory
from tests.state_cases import build, relative_error

pytestmark = pytest.mark.gpu
RANKS, PEER_BYTES = 4, 2**26


class Exchange:
    """What the threads of one group share."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=60)
        self.sent: list[Any] = [None] * size

    def meet(self) -> None:
        """What any thread enqueued before runs before what this one enqueues after: all use one stream."""
        self.barrier.wait()


class ThreadGroup:
    """A process group's size and rank, its exchange, and what its ranks share if they do."""

    def __init__(self, exchange: Exchange, rank: int, memory: HostMemory | None = None) -> None:
        self.exchange, self._rank = exchange, rank
        self.arena = None if memory is None else HostArena(memory, rank, exchange.meet)

    def size(self) -> int:
        return len(self.exchange.sent)

    def rank(self) -> int:
        return self._rank


class Done:
    def wait(self) -> None:
        """Nothing is on its way."""


def all_to_all(received: Tensor, sent: Tensor, out_splits=None, in_splits=None, group: Any = None, async_op=False):
    """`dist.all_to_all_single` among threads, which share one stream."""
    exchange, rank, size = group.exchange, group.rank(), group.size()
    even = [len(sent) // size] * size
    exchange.sent[rank] = sent.split(in_splits or even)
    exchange.barrier.wait()
    for part, parts in zip(received.split(out_splits or even), exchange.sent, strict=True):
        part.copy_(parts[rank])
    exchange.barrier.wait()
    return Done() if async_op else None


def all_gather(gathered: Tensor, part: Tensor, group: Any = None, async_op=False):
    """The one-tensor all-gather among threads, which share one stream."""
    exchange, rank = group.exchange, group.rank()
    exchange.sent[rank] = part
    exchange.barrier.wait()
    torch.cat(exchange.sent, out=gathered)
    exchange.barrier.wait()
    return Done() if async_op else None


class Context:
    """What `_FusedMixer` uses of autograd's context."""

    needs_input_grad = (False, *(True,) * 6)

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors

    def maybe_clear_saved_tensors(self) -> None:
        """Nothing is let go of."""


def make_groups(a2a_size: int, peers: bool) -> list[CpGroups]:
    def make(count: int, size: int) -> list[tuple[Exchange, HostMemory | None]]:
        return [(Exchange(size), HostMemory(size, PEER_BYTES, "cuda") if peers else None) for _ in range(count)]

    full, near, far = Exchange(RANKS), make(RANKS // a2a_size, a2a_size), make(a2a_size, RANKS // a2a_size)
    found = []
    for rank in range(RANKS):
        index, head = divmod(rank, a2a_size)
        (near_exchange, near_memory), (far_exchange, far_memory) = near[index], far[head]
        a2a = None if a2a_size == 1 else ThreadGroup(near_exchange, head, near_memory)
        states = ThreadGroup(far_exchange, index, far_memory)
        found.append(CpGroups(ThreadGroup(full, rank), a2a_size, a2a, states))  # type: ignore[arg-type]
    return found


@pytest.mark.parametrize("way", ["peers", "gathered", "composed"])
@pytest.mark.parametrize("a2a_size", [1, 2])
@pytest.mark.parametrize(("kind", "cu"), BATCHES)
def test_every_rank_errs_no_more_than_one_rank(kind, cu, a2a_size, way, monkeypatch):
    gather = way != "composed"
    monkeypatch.setattr(module, "peer_memory", lambda group, device: group.arena)
    monkeypatch.setattr(dist, "all_to_all_single", all_to_all)
    monkeypatch.setattr(dist, state_gather._ALL_GATHER, all_gather)
    for place in (state_exchange, halo_tables):
        monkeypatch.setattr(place, "GATHER_BYTES", 2**40 if gather else 0)
    whole, uncut = batch(cu[-1]), build(kind, cu, 1).to("cuda")
    exact = run_mixer(*(x.double() for x in whole), layout=uncut)
    single = run_mixer(*whole, layout=uncut)
    layout = build(kind, cu, RANKS).to("cuda")
    made = {name: x.requires_grad_() for name, x in parameters(torch.bfloat16).items()}
    order = ("conv1d_weight", "conv1d_bias", "A_log", "dt_bias", "out_norm_weight")
    of_layer = MixerParameters(*(made[name] for name in order))

    def run(groups: CpGroups) -> dict[str, Tensor]:
        rank, ctx = groups.full.rank(), Context()
        x, d_out = (layout.shard(t, rank) for t in whole)
        call = fused_call(x, of_layer, DIMS, layout=layout, group=None, eps=1e-6, groups=groups)
        assert call.states is not None
        assert isinstance(call.states.rule.exchange, PeerStates) == (way == "peers")
        call = call.with_rule(call.states.rule.options, truncate=gather)  # either way within the tolerance
        with torch.no_grad():
            out = module._forward(ctx, call, x, of_layer)
            projected, *gradients = module._backward(ctx, d_out)
        return {"out": out, "projected": projected} | dict(zip(order, gradients, strict=True))

    with ThreadPoolExecutor(RANKS) as pool:
        ranks = list(pool.map(run, make_groups(a2a_size, way == "peers")))
    gate_sizes = sizes(exact)
    for name, wanted in exact.items():
        parts = [found[name] for found in ranks]
        limit = 1.2 * relative_error(single[name], wanted)
        if name in ("out", "projected"):
            error = relative_error(layout.unshard(parts), wanted)
        else:
            total = torch.stack([part.detach().double() for part in parts]).sum(0)
            error, limit = relative_error(total, wanted), limit + SHARE
            if name in gate_sizes:
                error, limit = float((total - wanted).norm()) / gate_sizes[name], GATE
        assert error <= limit, f"{name}: {error}, allowed {limit}"
