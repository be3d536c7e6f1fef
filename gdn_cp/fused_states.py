"""State passing inside the fused mixer: the convolution's edges and the rule over segments that other ranks continue.

The fused mixer convolves a rank's rows as if sequences began at its segments. Here the first W-1 rows of each segment
are convolved anew with the halo from other ranks before them, in place; the rule runs in the halves between which
states travel (`gdn_cp.state_passing`); and the backward of both keeps to the few rows that differ.

Dimensions: T rows of this rank's group, D channels of the convolution, W taps, E rows of halos and edges together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gdn_cp.comm.halo import HaloRoutes, PendingRows, halo_routes, return_halo, send_halo
from gdn_cp.kernels.conv1d_triton import Channels, SectionGradients, convolve_rows, convolve_rows_backward
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
    halo: HaloRoutes
    group: dist.ProcessGroup
    channels: Channels

    def edge_rows(self, x: Tensor, rows: Tensor | None) -> Tensor:
        """Halos and edges [E, D], each halo right before its edge; a collective where any rank has a halo.

        x [R, at least D] and `rows` as for `convolve_rows`.
        """
        D, edges = self.channels.count, self.halo.edges
        if not self.halo.travels:
            return x.new_empty(0, D)
        arriving = send_halo(_take(x, rows, self.halo.send_rows, D), self.halo, self.group)
        own = _take(x, rows, edges.rows, D)
        return torch.cat([arriving.wait(), own]).index_select(0, edges.order)

    def convolve_edges(self, edge_rows: Tensor, weight: Tensor, bias: Tensor | None, qkv: Tensor) -> None:
        """Put the edges' convolution in its place in qkv [T, D]."""
        edges = self.halo.edges
        anew, _, _ = convolve_rows(edge_rows, weight, bias, edges.cu_seqlens, self.channels, len(edge_rows))
        qkv.index_copy_(0, edges.rows, anew.index_select(0, edges.results))

    def begin_edge_gradients(
        self, edge_rows: Tensor, gradients: SectionGradients, weight: Tensor, bias: Tensor | None, parameters: bool
    ) -> EdgeGradients | None:
        """The backward of `convolve_edges` and of `edge_rows`, begun: sets the edges' gradients in `gradients` to zero.

        None where no rank has a halo.
        """
        if not self.halo.travels:
            return None
        edges = self.halo.edges
        parts = []
        for whole in (gradients.dq, gradients.dk, gradients.dv):
            part = whole.index_select(0, edges.rows)
            parts.append(whole.new_zeros(len(edge_rows), whole.shape[1]).index_copy_(0, edges.results, part))
            whole.index_fill_(0, edges.rows, 0)
        (dq, dk, dv), none = parts, edge_rows.new_empty(0)
        d_rows = torch.empty_like(edge_rows)
        sums = convolve_rows_backward(
            edge_rows, SectionGradients(dq, dk, dv, none, none), weight, bias, edges.cu_seqlens, self.channels, d_rows,
            parameters=parameters,
        )  # fmt: skip
        by_kind = torch.empty_like(d_rows).index_copy_(0, edges.order, d_rows)
        d_halo, d_edges = by_kind.split((len(by_kind) - len(edges.rows), len(edges.rows)))
        return EdgeGradients(self.halo, d_edges, return_halo(d_halo, self.halo, self.group), *sums)


@dataclass(frozen=True, eq=False)
class EdgeGradients:
    """Gradients of the edges' rows, of rows that are others' halo (on their way), and of the parameters."""

    halo: HaloRoutes
    d_edges: Tensor
    arriving: PendingRows
    d_weight: Tensor
    d_bias: Tensor

    def add_to(self, buffer: RowBuffer) -> None:
        """Add what belongs to this rank's rows to the gradient of the convolution's input."""
        for at, more in ((self.halo.edges.rows, self.d_edges), (self.halo.owners, self.arriving.wait())):
            data = buffer.data.narrow(1, 0, more.shape[1])
            place, padded = _place(buffer.rows, at)
            if padded is not None:
                more = more.masked_fill(padded[:, None], 0)
            data.index_copy_(0, place, data.index_select(0, place) + more)


def fused_states(
    layout: ThdLayout, groups: CpGroups, channels: Channels, heads: tuple[int, int, int], taps: int,
    options: RuleOptions,
) -> FusedStates | None:  # fmt: skip
    """State passing of a call on ranks that hold `heads` (value heads, K, V) each; None where nothing crosses ranks."""
    rule = passing_call(options, layout, groups, heads)
    if rule is None:
        return None
    assert groups.states is not None
    halo = halo_routes(layout, groups.a2a_size, groups.group_index, taps)
    return FusedStates(rule, halo, groups.states, channels)


def _place(rows: Tensor | None, at: Tensor) -> tuple[Tensor, Tensor | None]:
    """Where rows `at` of the group stand in a buffer with the map `rows`, and which of them are padding."""
    if rows is None:
        return at, None
    place = rows.index_select(0, at).long()
    padded = place < 0
    return torch.where(padded, -1 - place, place), padded


def _take(x: Tensor, rows: Tensor | None, at: Tensor, columns: int) -> Tensor:
    """Rows `at` of the group, the first `columns` columns; zeros where they are padding."""
    place, padded = _place(rows, at)
    taken = x.narrow(1, 0, columns).index_select(0, place)
    return taken if padded is None else taken.masked_fill_(padded[:, None], 0)
