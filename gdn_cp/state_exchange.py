"""States across the ranks of a state group, forward and backward: laws in, what enters (or leaves) each segment out.

Two ways, of which `state_exchange` takes one for a batch, the same on every rank:

    gather       all laws to all ranks, each composes its own      one all-gather, one kernel each way
    composers    each chain composed on one rank                   two all-to-alls each way, bytes that no number of
                                                                   ranks makes more

Dimensions: n segments of this rank, HV heads of this rank, K, V head dims.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch.distributed as dist
from torch import Tensor

from gdn_cp.comm import states
from gdn_cp.comm.groups import CpGroups
from gdn_cp.comm.layout import ThdLayout
from gdn_cp.comm.state_gather import GATHER_BYTES, StateGather, begin_gather, gathered_bytes, state_gather
from gdn_cp.comm.states import ChainTable
from gdn_cp.kernels.merge import merge_chains


class StateExchange(Protocol):
    """One way."""

    @property
    def slots(self) -> int:
        """The number of segments, at least n, for which laws have room; those past n hold anything."""
        ...

    def forward(self, laws: Tensor, V: int, kernels: bool) -> tuple[Tensor, Tensor]:
        """The states [n, HV, K, V] that enter this rank's segments, zero where none does, and the M to be kept.

        laws [slots, HV, K, V + K] contiguous: (S_ext | M) of each segment, where its state goes on. `kernels`: whether
        Triton composes.
        """
        ...

    def backward(self, d_ext: Tensor, maps: Tensor, kernels: bool, meanwhile: Callable[[], object]) -> Tensor:
        """The gradients [n, HV, K, V] of the states that leave this rank's segments, zero where none does.

        d_ext [slots, HV, K, V] contiguous: dS_ext of each segment that a state enters. `maps`: what the forward kept.
        `meanwhile` may be called, once, to launch work that needs none of it while gradients travel.
        """
        ...


def state_exchange(
    layout: ThdLayout, groups: CpGroups, heads: int, K: int, V: int, routes: states.StateRoutes
) -> StateExchange:
    """How a batch's states travel among ranks that run `heads` value heads each; `routes` are the composers'."""
    assert groups.states is not None
    if gathered_bytes(layout, groups.a2a_size, heads, K, V) <= GATHER_BYTES:
        plan = state_gather(layout, groups.a2a_size, groups.group_index, heads)
        return GatheredStates(plan, groups.states)
    return ComposedStates(routes, groups.states)


@dataclass(frozen=True, eq=False)
class GatheredStates:
    """See the module."""

    plan: StateGather
    group: dist.ProcessGroup

    @property
    def slots(self) -> int:
        """See `StateExchange`."""
        return self.plan.slots

    def forward(self, laws: Tensor, V: int, kernels: bool) -> tuple[Tensor, Tensor]:
        """See `StateExchange`."""
        plan, K = self.plan, laws.shape[2]
        gathered, work = begin_gather(laws, plan.members, self.group)
        entering = laws.new_empty(plan.segments, plan.heads, K, V)
        kept = laws.new_empty(plan.kept, K, K)
        if work is not None:
            work.wait()
        flat = gathered.view(-1, K, laws.shape[3])
        _merge(flat[..., :V], flat[..., V:], plan.forward, entering.view(-1, K, V), kernels, kept=kept)
        return entering, kept

    def backward(self, d_ext: Tensor, maps: Tensor, kernels: bool, meanwhile: Callable[[], object]) -> Tensor:
        """See `StateExchange`."""
        plan, (K, V) = self.plan, d_ext.shape[2:]
        gathered, work = begin_gather(d_ext, plan.members, self.group)
        meanwhile()
        leaving = d_ext.new_empty(plan.segments, plan.heads, K, V)
        if work is not None:
            work.wait()
        _merge(gathered.view(-1, K, V), maps, plan.reverse, leaving.view(-1, K, V), kernels, transpose=True)
        return leaving


@dataclass(frozen=True, eq=False)
class ComposedStates:
    """See the module, and `gdn_cp.comm.states`."""

    routes: states.StateRoutes
    group: dist.ProcessGroup

    @property
    def slots(self) -> int:
        """See `StateExchange`."""
        return self.routes.segments

    def forward(self, laws: Tensor, V: int, kernels: bool) -> tuple[Tensor, Tensor]:
        """See `StateExchange`."""
        routes, K = self.routes, laws.shape[2]
        ext, maps = states.send_summaries(routes, laws[..., :V], laws[..., V:], self.group)
        composed = laws.new_empty(sum(routes.entering.from_members), K, V)
        _merge(ext, maps, routes.forward, composed, kernels)
        return states.return_states(routes, composed, self.group), maps

    def backward(self, d_ext: Tensor, maps: Tensor, kernels: bool, meanwhile: Callable[[], object]) -> Tensor:
        """See `StateExchange`."""
        routes = self.routes
        received = states.send_gradients(routes, d_ext, self.group)
        composed = d_ext.new_empty(sum(routes.leaving.from_members), *d_ext.shape[2:])
        _merge(received, maps, routes.reverse, composed, kernels, transpose=True)
        return states.return_gradients(routes, composed, self.group)


def _merge(
    ext: Tensor, maps: Tensor, table: ChainTable, out: Tensor, kernels: bool, *, kept: Tensor | None = None,
    transpose: bool = False,
) -> None:  # fmt: skip
    merge_chains(
        ext, maps, table.units, table.links, out, steps=table.steps, transpose=transpose, kept=kept, kernels=kernels
    )
