"""State passing inside the fused mixer: the convolution's halo, and the rule over segments that other ranks continue.

The convolution reads the rows before a rank's segments where they arrive, and its backward writes their gradients where
they are sent from; the rule runs in the halves between which states travel (`gdn_cp.state_passing`). Where the ranks of
the state group share memory, both go through it, by the rule of reuse of `gdn_cp.comm.symmetric`.

Dimensions: T rows of this rank's group, D channels of the convolution, W taps, n segments of this rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gdn_cp.comm.halo_tables import HaloTables, halo_tables
from gdn_cp.comm.halo_triton import add_rows, push_rows, take_rows
from gdn_cp.kernels.conv1d_triton import Channels, Halo
from gdn_cp.state_passing import PassingCall, passing_call

if TYPE_CHECKING:
    import torch.distributed as dist

    from gdn_cp.comm.groups import CpGroups
    from gdn_cp.comm.layout import ThdLayout
    from gdn_cp.comm.symmetric import Arena
    from gdn_cp.comm.transport import RowBuffer
    from gdn_cp.kernels.segments import RuleOptions


@dataclass(frozen=True, eq=False)
class FusedStates:
    """What state passing adds to one call: the rule over segments, and how the convolution's halo travels."""

    rule: PassingCall
    layout: ThdLayout
    groups: CpGroups
    channels: Channels
    taps: int
    memory: Arena | None = None

    def fetch_halo(self, buffer: RowBuffer) -> Halo | None:
        """What stands before this rank's segments of the convolution's input; a collective if any rank has a halo."""
        x, D = buffer.data, self.channels.count
        tables = self._tables(buffer.rows, x.element_size())
        if tables is None:
            return None
        memory = self._memory(tables)
        if memory is None:
            return Halo(tables.exchange(take_rows(x, tables.sent, D), self._group), tables.before)
        sent = len(tables.sent)
        slot = memory.acquire(memory.size * sent * D * x.element_size())
        push_rows(x, tables.sent, D, slot.addresses, memory.rank * sent)
        memory.settle()
        return Halo(slot.view(memory.size * sent, D, x.dtype), tables.before, transient=True)

    def room_for_halo(self, buffer: RowBuffer) -> Halo:
        """Memory in which the convolution leaves for the backward what it reads of the halo of `buffer`."""
        tables = self._tables(buffer.rows, buffer.data.element_size())
        assert tables is not None
        return Halo(self._empty(tables.in_order.numel(), buffer), tables.in_order)

    def halo_gradient(self, buffer: RowBuffer) -> Halo | None:
        """Memory for the halo's gradient; `buffer` is for the gradient of the convolution's input. Nothing else may be
        exchanged in the state group before `return_halo_gradient`."""
        tables = self._tables(buffer.rows, buffer.data.element_size())
        if tables is None:
            return None
        memory, returns = self._memory(tables), tables.returns
        if memory is None:
            return Halo(self._empty(returns, buffer), tables.returned)
        slot = memory.acquire(returns * self.channels.count * buffer.data.element_size())
        return Halo(slot.view(returns, self.channels.count, buffer.data.dtype), tables.returned)

    def return_halo_gradient(self, gradient: Halo, buffer: RowBuffer) -> None:
        """Send the halo's gradient to the ranks of its rows, and add what arrives to this rank's rows in `buffer`."""
        tables = self._tables(buffer.rows, buffer.data.element_size())
        assert tables is not None
        memory, arrived, peers = self._memory(tables), gradient.rows, None
        if memory is None:
            arrived = tables.exchange_gradients(arrived, self._group)
        else:
            memory.settle()
            peers = memory.slot_of(arrived).addresses
        add_rows(buffer.data, tables.owners, arrived, tables.addends, peers)

    def _memory(self, tables: HaloTables) -> Arena | None:
        """The ranks' memory, for rows that all gather."""
        return self.memory if tables.counts is None else None

    def _empty(self, rows: int, buffer: RowBuffer) -> Tensor:
        return torch.empty(rows, self.channels.count, dtype=buffer.data.dtype, device=buffer.data.device)

    @property
    def _group(self) -> dist.ProcessGroup:
        assert self.groups.states is not None
        return self.groups.states

    def _tables(self, rows: Tensor | None, element_size: int) -> HaloTables | None:
        row_bytes = self.channels.count * element_size
        return halo_tables(
            self.layout, self.groups.a2a_size, self.groups.group_index, self.taps, rows, row_bytes
        )  # fmt: skip


def fused_states(
    layout: ThdLayout, groups: CpGroups, channels: Channels, heads: tuple[int, int, int], taps: int,
    options: RuleOptions, memory: Arena | None = None,
) -> FusedStates | None:  # fmt: skip
    """State passing of a call on ranks that hold `heads` (value heads, K, V) each; None where nothing crosses ranks.

    `memory`: what the ranks of the state group share, if they do.
    """
    # The fused mixer serves no calls but checked ones.
    rule = passing_call(options, layout, groups, heads, checked=True, memory=memory)
    return None if rule is None else FusedStates(rule, layout, groups, channels, taps, memory)
