"""State passing inside the fused mixer: the convolution's halo, and the rule over segments that other ranks continue.

The convolution reads the rows before a rank's segments where they arrive, and its backward writes their gradients where
they are sent from; the rule runs in the halves between which states travel (`gdn_cp.state_passing`).

Dimensions: T rows of this rank's group, D channels of the convolution, W taps, n segments of this rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gdn_cp.comm.halo_tables import HaloTables, halo_tables
from gdn_cp.comm.halo_triton import add_rows, take_rows
from gdn_cp.kernels.conv1d_triton import Channels, Halo
from gdn_cp.state_passing import PassingCall, passing_call

if TYPE_CHECKING:
    import torch.distributed as dist

    from gdn_cp.comm.groups import CpGroups
    from gdn_cp.comm.layout import ThdLayout
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

    def fetch_halo(self, buffer: RowBuffer) -> Halo | None:
        """What stands before this rank's segments of the convolution's input; a collective if any rank has a halo."""
        tables = self._tables(buffer.rows, buffer.data.element_size())
        if tables is None:
            return None
        sent = take_rows(buffer.data, tables.sent, self.channels.count)
        return Halo(tables.exchange(sent, self._group), tables.before)

    def halo_gradient(self, buffer: RowBuffer) -> Halo | None:
        """Memory for the halo's gradient; `buffer` is for the gradient of the convolution's input."""
        tables = self._tables(buffer.rows, buffer.data.element_size())
        if tables is None:
            return None
        shape = (tables.returns, self.channels.count)
        return Halo(torch.empty(shape, dtype=buffer.data.dtype, device=buffer.data.device), tables.returned)

    def return_halo_gradient(self, gradient: Halo, buffer: RowBuffer) -> None:
        """Send the halo's gradient to the ranks of its rows, and add what arrives to this rank's rows in `buffer`."""
        tables = self._tables(buffer.rows, buffer.data.element_size())
        assert tables is not None
        arrived = tables.exchange_gradients(gradient.rows, self._group)
        add_rows(buffer.data, tables.owners, arrived, tables.addends)

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
    options: RuleOptions,
) -> FusedStates | None:  # fmt: skip
    """State passing of a call on ranks that hold `heads` (value heads, K, V) each; None where nothing crosses ranks."""
    rule = passing_call(options, layout, groups, heads, checked=True)  # the fused mixer serves no other calls
    return None if rule is None else FusedStates(rule, layout, groups, channels, taps)
