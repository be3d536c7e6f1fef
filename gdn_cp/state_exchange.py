"""States across the ranks of a state group, forward and backward: laws in, what enters (or leaves) each segment out.

Three ways, of which `state_exchange` takes one for a batch, the same on every rank:

    peers        laws are written where all ranks read them,       a barrier and two kernels each way
                 each takes what it needs and composes its own
    gather       all laws to all ranks, each composes its own      one all-gather, one kernel each way
    composers    each chain composed on one rank                   two all-to-alls each way, bytes that no number of
                                                                   ranks makes more

Dimensions: n segments of this rank, HV heads of this rank, K, V head dims.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from gdn_cp.comm import states
from gdn_cp.comm.groups import CpGroups
from gdn_cp.comm.layout import ThdLayout
from gdn_cp.comm.state_gather import GATHER_BYTES, StateGather, begin_gather, gathered_bytes, state_gather
from gdn_cp.comm.state_peers import PEER_BYTES, StatePeers, state_peers
from gdn_cp.comm.states import ChainTable
from gdn_cp.kernels.merge import merge_chains
from gdn_cp.kernels.segments import LawRoom

if TYPE_CHECKING:
    from gdn_cp.comm.symmetric import Arena


class StateExchange(Protocol):
    """One way."""

    @property
    def slots(self) -> int:
        """The number of segments, at least n, for which laws have room; those past n hold anything."""
        ...

    def law_room(self, K: int, V: int) -> LawRoom | None:
        """Where the laws have to be written before `forward`, and nothing else exchanged between; None: anywhere."""
        ...

    def gradient_room(self, K: int, V: int) -> Tensor | None:
        """Likewise for dS_ext [slots, HV, K, V] before `backward`."""
        ...

    def forward(self, laws: Tensor, V: int, kernels: bool) -> tuple[Tensor, Maps]:
        """The states [n, HV, K, V] that enter this rank's segments, zero where none does, and the M to be kept.

        laws [slots, HV, K, V + K] contiguous: (S_ext | M) of each segment, where its state goes on. `kernels`: whether
        Triton composes.
        """
        ...

    def backward(self, d_ext: Tensor, maps: Maps, kernels: bool, meanwhile: Callable[[], object]) -> Tensor:
        """The gradients [n, HV, K, V] of the states that leave this rank's segments, zero where none does.

        d_ext [slots, HV, K, V] contiguous: dS_ext of each segment that a state enters. `maps`: what the forward kept.
        `meanwhile` may be called, once, to launch work that needs none of it while gradients travel.
        """
        ...


class Maps(NamedTuple):
    """What is kept of M from forward to backward: matrices [.., K, K], and int32 [..], 1 for each that is lost, where
    that is known."""

    matrices: Tensor
    lost: Tensor | None = None


def state_exchange(
    layout: ThdLayout, groups: CpGroups, heads: int, K: int, V: int, routes: states.StateRoutes,
    memory: Arena | None = None,
) -> StateExchange:  # fmt: skip
    """How a batch's states travel among ranks that run `heads` value heads each; `routes` are the composers'.

    `memory` is the state group's, where its ranks share some and Triton makes the laws.
    """
    assert groups.states is not None
    received = gathered_bytes(layout, groups.a2a_size, heads, K, V)
    if memory is not None and received <= PEER_BYTES:
        return PeerStates(state_peers(layout, groups.a2a_size, groups.group_index, heads), memory)
    if received <= GATHER_BYTES:
        plan = state_gather(layout, groups.a2a_size, groups.group_index, heads)
        return GatheredStates(plan, groups.states)
    return ComposedStates(routes, groups.states)


@dataclass(frozen=True, eq=False)
class PeerStates:
    """See the module, and `gdn_cp.comm.state_peers`. Laws lie in the slot of the move, flags behind them."""

    plan: StatePeers
    memory: Arena

    @property
    def slots(self) -> int:
        """See `StateExchange`."""
        return self.plan.slots

    @property
    def _matrices(self) -> int:
        return self.plan.slots * self.plan.heads

    def law_room(self, K: int, V: int) -> LawRoom:
        """See `StateExchange`."""
        shape, elements = (self.plan.slots, self.plan.heads), self._matrices * K * (V + K)
        slot = self.memory.acquire(4 * (elements + self._matrices))
        laws = slot.view(self._matrices * K, V + K, torch.float32).view(*shape, K, V + K)
        return LawRoom(laws, slot.view(*shape, torch.int32, elements))

    def gradient_room(self, K: int, V: int) -> Tensor:
        """See `StateExchange`."""
        slot = self.memory.acquire(4 * self._matrices * K * V)
        return slot.view(self._matrices * K, V, torch.float32).view(self.plan.slots, self.plan.heads, K, V)

    def forward(self, laws: Tensor, V: int, kernels: bool) -> tuple[Tensor, Maps]:
        """See `StateExchange`."""
        from gdn_cp.comm.state_peers_triton import pull_laws

        assert kernels
        plan, K, slot = self.plan, laws.shape[2], self.memory.slot_of(laws)
        self.memory.settle()
        ext, *kept = pull_laws(slot.addresses, plan.laws, plan.maps, self._matrices, K, V)
        entering, maps = ext.new_empty(plan.segments, plan.heads, K, V), Maps(*kept)
        _merge(ext, maps.matrices, plan.forward, entering.view(-1, K, V), kernels, lost=maps.lost)
        return entering, maps

    def backward(self, d_ext: Tensor, maps: Maps, kernels: bool, meanwhile: Callable[[], object]) -> Tensor:
        """See `StateExchange`. `meanwhile` is left out: on one stream nothing runs beside a barrier."""
        from gdn_cp.comm.state_peers_triton import pull_gradients

        assert kernels
        assert maps.lost is not None
        plan, (K, V), slot = self.plan, d_ext.shape[2:], self.memory.slot_of(d_ext)
        self.memory.settle()
        ext = pull_gradients(slot.addresses, plan.gradients, maps.lost, self._matrices, K, V)
        leaving = ext.new_empty(plan.segments, plan.heads, K, V)
        flat = leaving.view(-1, K, V)
        _merge(ext, maps.matrices, plan.reverse, flat, kernels, lost=maps.lost, transpose=True)
        return leaving


class _AnyRoom:
    """Laws and gradients may be written anywhere."""

    def law_room(self, K: int, V: int) -> None:
        """See `StateExchange`."""

    def gradient_room(self, K: int, V: int) -> None:
        """See `StateExchange`."""


@dataclass(frozen=True, eq=False)
class GatheredStates(_AnyRoom):
    """See the module."""

    plan: StateGather
    group: dist.ProcessGroup

    @property
    def slots(self) -> int:
        """See `StateExchange`."""
        return self.plan.slots

    def forward(self, laws: Tensor, V: int, kernels: bool) -> tuple[Tensor, Maps]:
        """See `StateExchange`."""
        plan, K = self.plan, laws.shape[2]
        gathered, work = begin_gather(laws, plan.members, self.group)
        entering = laws.new_empty(plan.segments, plan.heads, K, V)
        kept = laws.new_empty(plan.kept, K, K)
        if work is not None:
            work.wait()
        flat = gathered.view(-1, K, laws.shape[3])
        _merge(flat[..., :V], flat[..., V:], plan.forward, entering.view(-1, K, V), kernels, kept=kept)
        return entering, Maps(kept)

    def backward(self, d_ext: Tensor, maps: Maps, kernels: bool, meanwhile: Callable[[], object]) -> Tensor:
        """See `StateExchange`."""
        plan, (K, V) = self.plan, d_ext.shape[2:]
        gathered, work = begin_gather(d_ext, plan.members, self.group)
        meanwhile()
        leaving = d_ext.new_empty(plan.segments, plan.heads, K, V)
        if work is not None:
            work.wait()
        _merge(gathered.view(-1, K, V), maps.matrices, plan.reverse, leaving.view(-1, K, V), kernels, transpose=True)
        return leaving


@dataclass(frozen=True, eq=False)
class ComposedStates(_AnyRoom):
    """See the module, and `gdn_cp.comm.states`."""

    routes: states.StateRoutes
    group: dist.ProcessGroup

    @property
    def slots(self) -> int:
        """See `StateExchange`."""
        return self.routes.segments

    def forward(self, laws: Tensor, V: int, kernels: bool) -> tuple[Tensor, Maps]:
        """See `StateExchange`."""
        routes, K = self.routes, laws.shape[2]
        ext, maps = states.send_summaries(routes, laws[..., :V], laws[..., V:], self.group)
        composed = laws.new_empty(sum(routes.entering.from_members), K, V)
        _merge(ext, maps, routes.forward, composed, kernels)
        return states.return_states(routes, composed, self.group), Maps(maps)

    def backward(self, d_ext: Tensor, maps: Maps, kernels: bool, meanwhile: Callable[[], object]) -> Tensor:
        """See `StateExchange`."""
        routes = self.routes
        received = states.send_gradients(routes, d_ext, self.group)
        composed = d_ext.new_empty(sum(routes.leaving.from_members), *d_ext.shape[2:])
        _merge(received, maps.matrices, routes.reverse, composed, kernels, transpose=True)
        return states.return_gradients(routes, composed, self.group)


def _merge(
    ext: Tensor, maps: Tensor, table: ChainTable, out: Tensor, kernels: bool, *, kept: Tensor | None = None,
    lost: Tensor | None = None, transpose: bool = False,
) -> None:  # fmt: skip
    options = {"steps": table.steps, "transpose": transpose, "kept": kept, "lost": lost, "kernels": kernels}
    merge_chains(ext, maps, table.units, table.links, out, **options)
