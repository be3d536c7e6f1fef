"""The convolution's halo: the W-1 tokens before each segment, fetched from whichever ranks hold them.

A causal convolution of W taps reads up to W-1 tokens back. Where a segment begins inside its sequence they are in other
segments, on other ranks as a rule and, where segments are shorter than W-1, on several. A segment that begins d < W-1
tokens into its sequence has only d tokens before it; what would lie before the sequence is zero and does not travel.

Example, W = 4, one sequence of 8 tokens, zigzag on 2 ranks: rank 0 holds 0 1 | 6 7, rank 1 holds 2 3 | 4 5.

    halo of rank 0   tokens 3 4 5 (all of rank 1), before its second segment; the first begins the sequence
    halo of rank 1   tokens 0 1 (of rank 0) before its first segment, for the sequence has no more; 1 2 3 before its
                     second, of which two are its own

The backward sends each halo row's gradient to the row's owner, who adds what it gets in a fixed order.

Dimensions: T rows of this rank, n segments, W taps, D columns, R halo rows of this rank, G ranks of the state group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from gdn_cp.comm.cuts import expand
from gdn_cp.comm.layout import SegmentTable, ThdLayout
from gdn_cp.comm.states import to_device


@dataclass(frozen=True, eq=False)
class Edges:
    """The rows that read a halo, the first W-1 of each segment that has one, and how to convolve them.

    Gathered by `order` out of [halo rows; this rank's rows `rows`], each halo stands right before its segment's edge,
    in stretches bounded by `cu_seqlens` (int32); the results that count are then at `results`.
    """

    rows: Tensor
    order: Tensor
    cu_seqlens: Tensor
    results: Tensor


@dataclass(frozen=True, eq=False)
class HaloRoutes:
    """How the halo travels for one (layout, a2a_size, width), seen from one rank of the state group.

    Halo rows stand segment by segment (those that begin inside a sequence and have tokens), within a segment in the
    order of their tokens. `lengths` has, for each such segment, (its slot, its halo rows), as host values.

    `send_rows` int64: the rows of this rank's buffer that go out, receiver by receiver, `send_counts[g]` to rank g (to
    itself too). `receive_counts[g]` come from rank g; gathered by `to_halo` they stand as halo rows, `from_halo` is
    the inverse. For the backward: the i-th of `owners` (rows of this rank, each once) gets the sum of the gradients at
    `contributions[i]` among the returned rows, filled up with an index one past them. `edges` says which rows need the
    halo. `travels` is whether any rank has a halo: the same on all.
    """

    lengths: tuple[tuple[int, int], ...]
    send_rows: Tensor
    send_counts: tuple[int, ...]
    receive_counts: tuple[int, ...]
    to_halo: Tensor
    from_halo: Tensor
    owners: Tensor
    contributions: Tensor
    edges: Edges
    travels: bool


_routes: WeakKeyDictionary[ThdLayout, dict[tuple[int, int, int], HaloRoutes]] = WeakKeyDictionary()


def halo_routes(layout: ThdLayout, a2a_size: int, group_index: int, width: int) -> HaloRoutes:
    """Return the routes of the `width` - 1 rows before each segment of `group_index`.

    Built on the host the first time, then kept as long as the layout; tensors are on its device. Every rank gets its
    part of the same plan without any communication.
    """
    known = _routes.setdefault(layout, {})
    key = (a2a_size, group_index, width)
    if key not in known:
        known[key] = _build_routes(layout, *key)
    return known[key]


def fetch_halo(x: Tensor, routes: HaloRoutes, group: dist.ProcessGroup) -> Tensor:
    """Return the halo rows [R, D] of x, in the order that `HaloRoutes` states.

    Args:
        x: [T, D], rows in the order of this rank's segments.
        routes: see `halo_routes`.
        group: the state group; every rank of it calls, or none does (`routes.travels`). A rank must let its loss
            depend on the result even where that has no rows, or it misses the exchange of the backward.

    Differentiable: one all-to-all forward, one backward.
    """
    return _FetchHalo.apply(x, routes, group)


class PendingRows:
    """Rows on their way: `wait()` gives them, on the current stream; once. Until then other work may be launched."""

    def __init__(self, received: Tensor, sent: Tensor, work: dist.Work | None, finish: Callable[[Tensor], Tensor]):
        self._sent = sent  # alive until it has been sent
        self._received, self._work, self._finish = received, work, finish

    def wait(self) -> Tensor:
        """The rows, in the order that the sender's function states."""
        if self._work is not None:
            self._work.wait()
        return self._finish(self._received)


def send_halo(sent: Tensor, routes: HaloRoutes, group: dist.ProcessGroup) -> PendingRows:
    """`fetch_halo` without autograd, begun, from this rank's rows `routes.send_rows`; `wait()` gives the halo."""
    return _start(
        sent, routes.receive_counts, routes.send_counts, group, lambda rows: rows.index_select(0, routes.to_halo)
    )


def return_halo(grad: Tensor, routes: HaloRoutes, group: dist.ProcessGroup) -> PendingRows:
    """The backward of `send_halo`, begun, from the halo's gradient [R, D].

    `wait()` gives [len(routes.owners), D], what is to be added to the gradient of this rank's rows `routes.owners`.
    """

    def add_up(returned: Tensor) -> Tensor:
        # A gather and a sum along one dimension, not a scatter: the order of additions is fixed.
        padded = torch.cat([returned, returned.new_zeros(1, returned.shape[1])])
        return padded[routes.contributions].sum(1)

    sent = grad.index_select(0, routes.from_halo)
    return _start(sent, routes.send_counts, routes.receive_counts, group, add_up)


class _FetchHalo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, routes: HaloRoutes, group: dist.ProcessGroup) -> Tensor:
        ctx.routes, ctx.group, ctx.rows = routes, group, x.shape[0]
        return send_halo(x.index_select(0, routes.send_rows), routes, group).wait()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        routes: HaloRoutes = ctx.routes
        summed = return_halo(grads[0], routes, ctx.group).wait()
        return summed.new_zeros(ctx.rows, summed.shape[1]).index_copy_(0, routes.owners, summed), None, None


def _start(
    sent: Tensor,
    receive_counts: Sequence[int],
    send_counts: Sequence[int],
    group: dist.ProcessGroup,
    finish: Callable[[Tensor], Tensor],
) -> PendingRows:
    received = sent.new_empty(sum(receive_counts), sent.shape[1])
    assert sent.is_contiguous()
    counts = list(receive_counts), list(send_counts)
    work = dist.all_to_all_single(received, sent, *counts, group=group, async_op=True)
    return PendingRows(received, sent, work, finish)


def _build_routes(layout: ThdLayout, a2a_size: int, me: int, width: int) -> HaloRoutes:
    groups = layout.cp_size // a2a_size
    wanted = [wanted_rows(layout, a2a_size, g, width) for g in range(groups)]
    located = [locate_rows(layout, a2a_size, rows) for rows in wanted]
    # Both ends order what one sends the other as the receiver's halo does.
    outgoing = [place[owner == me] for owner, place in located]
    send_rows = np.concatenate(outgoing)
    owner_of_mine, _ = located[me]
    from_halo = np.argsort(owner_of_mine, kind="stable")
    owners, contributions = _sum_table(send_rows)
    device = layout.device
    return HaloRoutes(
        lengths=halo_lengths(layout, a2a_size, me, width),
        send_rows=to_device(send_rows, device),
        send_counts=tuple(rows.size for rows in outgoing),
        receive_counts=tuple(np.bincount(owner_of_mine, minlength=groups).tolist()),
        to_halo=to_device(np.argsort(from_halo), device),
        from_halo=to_device(from_halo, device),
        owners=to_device(owners, device),
        contributions=to_device(contributions, device),
        edges=_build_edges(layout, a2a_size, me, width),
        travels=any(rows.size for rows in wanted),
    )


def halo_lengths(layout: ThdLayout, a2a_size: int, group_index: int, width: int) -> tuple[tuple[int, int], ...]:
    """(slot, halo rows) of each segment of a group that has a halo of up to `width` - 1 rows."""
    table = layout.segments(a2a_size, group_index)
    rows = zip(table.starts, np.diff(table.cu_seqlens).tolist(), strict=True)
    lengths = [min(width - 1, start) if tokens else 0 for start, tokens in rows]
    return tuple((slot, length) for slot, length in enumerate(lengths) if length)


def _build_edges(layout: ThdLayout, a2a_size: int, group_index: int, width: int) -> Edges:
    bounds = np.asarray(layout.segments(a2a_size, group_index).cu_seqlens)
    slots, halo = np.array(halo_lengths(layout, a2a_size, group_index, width), dtype=np.int64).reshape(-1, 2).T
    edge = np.minimum(width - 1, np.diff(bounds)[slots])
    rows = expand(bounds[slots], edge)
    halo_start, edge_start = np.cumsum(halo) - halo, np.cumsum(edge) - edge + halo.sum()
    # Halo, edge, halo, edge, ...
    starts, lengths = np.stack([halo_start, edge_start], 1).reshape(-1), np.stack([halo, edge], 1).reshape(-1)
    ends = np.cumsum(halo + edge)
    cu_seqlens = np.concatenate([[0], ends if ends.size else [0]])  # without edges one empty stretch
    return Edges(
        rows=to_device(rows, layout.device),
        order=to_device(expand(starts, lengths), layout.device),
        cu_seqlens=to_device(cu_seqlens, layout.device).int(),
        results=to_device(expand(ends - edge, edge), layout.device),
    )


def wanted_rows(layout: ThdLayout, a2a_size: int, group_index: int, width: int) -> np.ndarray:
    """The natural rows of a group's halo, in order."""
    lengths = np.array(halo_lengths(layout, a2a_size, group_index, width), dtype=np.int64).reshape(-1, 2)
    starts = _segment_starts(layout, layout.segments(a2a_size, group_index))[lengths[:, 0]]
    return expand(starts - lengths[:, 1], lengths[:, 1])


def locate_rows(layout: ThdLayout, a2a_size: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each of some natural rows, the group that holds it and where it stands in the group's buffer."""
    parts = []
    for group in range(layout.cp_size // a2a_size):
        table = layout.segments(a2a_size, group)
        begins = np.asarray(table.cu_seqlens[:-1], dtype=np.int64)
        some = np.diff(table.cu_seqlens) > 0
        starts = _segment_starts(layout, table)
        parts.append(np.stack([starts, begins, np.full_like(starts, group)])[:, some])
    starts, begins, groups = (found := np.concatenate(parts, 1))[:, np.argsort(found[0])]
    segment = np.searchsorted(starts, rows, side="right") - 1
    return groups[segment], begins[segment] + rows - starts[segment]


def _segment_starts(layout: ThdLayout, table: SegmentTable) -> np.ndarray:
    """The natural row at which each segment begins."""
    sequences, starts = (np.asarray(x, dtype=np.int64) for x in (table.sequence_ids, table.starts))
    return np.asarray(layout.cu_seqlens)[sequences] + starts


def _sum_table(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the distinct rows, sorted, and for each where it occurs, filled up with rows.size.

    >>> _sum_table(np.array([5, 3, 5]))
    (array([3, 5]), array([[1, 3],
           [0, 2]]))
    """
    distinct, counts = np.unique(rows, return_counts=True)
    table = np.full((distinct.size, int(counts.max(initial=1))), rows.size)
    column = expand(np.zeros_like(counts), counts)
    table[np.repeat(np.arange(distinct.size), counts), column] = np.argsort(rows, kind="stable")
    return distinct, table
