"""The exchange of segment summaries among the ranks that hold the same heads, and where each chain is composed.

A chain is the way of one head's state through the segments of one sequence, which lie on several ranks. Its states are
composed in one place, its composer: the ranks share the chains out evenly, send each composer the summaries of its
chains, and get back the states that enter their segments. So what a rank sends, receives and keeps depends on its own
segments and not on the number of ranks, unlike an all-gather of summaries. The backward is the same with the gradients
of states; M stays at the composer from the forward.

Example, zigzag on 2 ranks, one sequence, 2 heads: segments A (rank 0), B (rank 1), C (rank 0); rank h composes head h.

    forward    A -> S_ext      B -> S_ext, M                       composer: S_B = A.S_ext, S_C = B.S_ext + M S_B
               B <- S_B        C <- S_C
    backward   B -> dS_ext     C -> dS_ext                         composer: dB = C.dS_ext, dA = B.dS_ext + M^T dB
               A <- dA         B <- dB                             (dX: gradient of the state that leaves X)

The first segment's M, the last segment's summary and segments without tokens are of no use to anyone: they do not
travel, nor does anything of a sequence that lies on one rank.

Dimensions: n segments of this rank, HV heads of this rank, K, V head dims, G ranks of the state group, p = 0..L-1 a
segment's position in a chain of L, unit = one chain of one head.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from gdn_cp.comm.layout import ThdLayout


@dataclass(frozen=True)
class Route:
    """One kind of matrix on its way between the ranks of segments and composers, seen from one rank.

    `rows` int64: where this rank's matrices stand in [n*HV], composer by composer; `to_composers[c]` of them go to
    composer c. As a composer this rank gets `from_members[g]` matrices from rank g; gathered by `to_steps` they stand
    in the order of `merge_states` for the forward, by `to_steps_reverse` in that for the backward.
    """

    rows: Tensor
    to_composers: tuple[int, ...]
    from_members: tuple[int, ...]
    to_steps: Tensor
    to_steps_reverse: Tensor


@dataclass(frozen=True, eq=False)
class StateRoutes:
    """How states travel for one (layout, a2a_size, heads), seen from one rank of the state group.

    `leaving` is for the state (or its gradient) behind a segment, of every segment but a chain's last; `entering` for
    that before a segment, of every one but the first; `transfer` for M, of those that are neither. `active` are the
    units that this rank composes, per step, as `merge_states` takes it. `summarised` is the range of segments [a, b)
    that covers all of which someone needs a summary. `roles` int32 [n] has, for each segment of this rank, 1 if a state
    enters it plus 2 if its state goes on. `travels` is whether any rank sends anything: the same on all.
    """

    segments: int
    heads: int
    leaving: Route
    entering: Route
    transfer: Route
    active: tuple[int, ...]
    summarised: tuple[int, int]
    roles: Tensor
    travels: bool


_routes: WeakKeyDictionary[ThdLayout, dict[tuple[int, int, int], StateRoutes]] = WeakKeyDictionary()


def state_routes(layout: ThdLayout, a2a_size: int, group_index: int, heads: int) -> StateRoutes:
    """Return the routes for the rank of a state group that holds the segments of `group_index`.

    Built on the host from the layout's chains the first time, then kept as long as the layout; index tensors are on its
    device. Every rank gets its part of the same plan without any communication.

    Args:
        layout: the batch's layout.
        a2a_size: size of the all-to-all groups; the state group has cp_size / a2a_size ranks.
        group_index: which of them this is.
        heads: value heads that each of its ranks runs.
    """
    known = _routes.setdefault(layout, {})
    key = (a2a_size, group_index, heads)
    if key not in known:
        known[key] = _build_routes(layout, *key)
    return known[key]


def send_summaries(
    routes: StateRoutes, ext: Tensor, transfer: Tensor, group: dist.ProcessGroup, first: int
) -> tuple[Tensor, Tensor]:
    """Forward, first half: every S_ext and M to its composer, in one all-to-all.

    Args:
        routes: see `state_routes`.
        ext: [b-a, HV, K, V] of the segments [a, b), which cover those of `routes.summarised`.
        transfer: [b-a, HV, K, K].
        group: the state group.
        first: a.

    Returns:
        ext [sum(active), K, V] and transfer [sum(active[1:]), K, K] as `merge_states` takes them.
    """
    skipped = first * routes.heads
    parts = [
        (x.flatten(0, 1).index_select(0, route.rows - skipped if skipped else route.rows), route)
        for x, route in ((ext, routes.leaving), (transfer, routes.transfer))
    ]
    received = _exchange(parts, group, to_composers=True)
    return received[0].index_select(0, routes.leaving.to_steps), received[1].index_select(0, routes.transfer.to_steps)


def return_states(routes: StateRoutes, states: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Forward, second half: [sum(active), K, V] at the composers to [n, HV, K, V], zero at chain starts."""
    return _spread(routes, states, routes.entering, routes.entering.to_steps, group)


def send_gradients(routes: StateRoutes, d_ext: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Backward, first half: dS_ext [n, HV, K, V] of each rank to the composers, [sum(active), K, V] for `merge_states`.

    The chains run backwards: so stand the M that `reverse_transfer` gives.
    """
    sent = d_ext.flatten(0, 1).index_select(0, routes.entering.rows)
    (received,) = _exchange([(sent, routes.entering)], group, to_composers=True)
    return received.index_select(0, routes.entering.to_steps_reverse)


def return_gradients(routes: StateRoutes, gradients: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Backward, second half: the composers' results to each rank's dS_out [n, HV, K, V], zero at chain ends."""
    return _spread(routes, gradients, routes.leaving, routes.leaving.to_steps_reverse, group)


def reverse_transfer(routes: StateRoutes, transfer: Tensor) -> Tensor:
    """Reorder M [sum(active[1:]), K, K] from the steps of the forward to those of the backward."""
    received_order = torch.empty_like(transfer).index_copy_(0, routes.transfer.to_steps, transfer)
    return received_order.index_select(0, routes.transfer.to_steps_reverse)


def _spread(routes: StateRoutes, merged: Tensor, route: Route, to_steps: Tensor, group: dist.ProcessGroup) -> Tensor:
    sent = torch.empty_like(merged).index_copy_(0, to_steps, merged)
    (received,) = _exchange([(sent, route)], group, to_composers=False)
    whole = merged.new_zeros(routes.segments * routes.heads, *merged.shape[1:])
    return whole.index_copy_(0, route.rows, received).unflatten(0, (routes.segments, routes.heads))


def _exchange(parts: list[tuple[Tensor, Route]], group: dist.ProcessGroup, *, to_composers: bool) -> list[Tensor]:
    """One all-to-all of matrices [count_i, K_i, V_i], each kind with its own route; a peer's kinds travel together."""
    sizes = [(r.to_composers, r.from_members) if to_composers else (r.from_members, r.to_composers) for _, r in parts]
    elements = [x.shape[1] * x.shape[2] for x, _ in parts]
    splits_in, splits_out = (
        [
            sum(size[way][peer] * width for size, width in zip(sizes, elements, strict=True))
            for peer in range(group.size())
        ]
        for way in (0, 1)
    )
    if len(parts) == 1:  # stands peer by peer already
        sent = parts[0][0].reshape(-1)
    else:
        pieces = [x.split(count) for (x, _), (count, _) in zip(parts, sizes, strict=True)]
        sent = torch.cat([piece.reshape(-1) for per_peer in zip(*pieces, strict=True) for piece in per_peer])
    received = sent.new_empty(sum(splits_out))
    dist.all_to_all_single(received, sent, splits_out, splits_in, group=group)
    if len(parts) == 1:
        return [received.view(-1, *parts[0][0].shape[1:])]
    by_kind: list[list[Tensor]] = [[] for _ in parts]
    for peer, block in enumerate(received.split(splits_out)):
        counts = [size[1][peer] * width for size, width in zip(sizes, elements, strict=True)]
        for kind, piece in zip(by_kind, block.split(counts), strict=True):
            kind.append(piece)
    return [torch.cat(kind).view(-1, *x.shape[1:]) for kind, (x, _) in zip(by_kind, parts, strict=True)]


@dataclass(frozen=True)
class _Links:
    """All segments of all chains that cross ranks, times heads, as int64 arrays of one entry each."""

    unit: np.ndarray  # number of the chain and head
    position: np.ndarray  # of the segment in its chain
    length: np.ndarray  # segments of its chain
    member: np.ndarray  # rank of the state group that holds the segment
    row: np.ndarray  # slot * heads + head at that rank
    composer: np.ndarray  # rank that composes the unit


def _build_routes(layout: ThdLayout, a2a_size: int, me: int, heads: int) -> StateRoutes:
    groups = layout.cp_size // a2a_size
    links = _build_links(layout, a2a_size, heads)
    mine = links.composer == me
    units, lengths = np.unique(np.stack([links.unit[mine], links.length[mine]]), axis=1)
    longest_first = np.argsort(-lengths, kind="stable")
    place = np.zeros(int(links.unit.max(initial=-1)) + 1, dtype=np.int64)
    place[units[longest_first]] = np.arange(units.size)
    steps = np.arange(int(lengths.max(initial=1)) - 1)
    active = tuple((lengths[:, None] - 1 > steps).sum(0).tolist())

    leaving, entering = links.position < links.length - 1, links.position > 0
    forward, reverse = links.position, links.length - 1 - links.position  # steps of a segment's own law
    build = _RouteBuilder(links, me, groups, place, active, layout.device)
    slots, segments = links.row[leaving & (links.member == me)] // heads, len(layout.segments(a2a_size, me).starts)
    roles = np.zeros(segments, dtype=np.int64)
    roles[links.row[entering & (links.member == me)] // heads] = 1
    roles[slots] += 2  # numpy adds once where a slot is named for each of its heads
    return StateRoutes(
        segments=segments,
        heads=heads,
        leaving=build(leaving, forward, reverse - 1),
        entering=build(entering, forward - 1, reverse),
        transfer=build(leaving & entering, forward, reverse, skipped_steps=1),
        active=active,
        summarised=(int(slots.min()), int(slots.max()) + 1) if slots.size else (0, 0),
        roles=to_device(roles, layout.device).int(),
        travels=links.unit.size > 0,
    )


def _build_links(layout: ThdLayout, a2a_size: int, heads: int) -> _Links:
    groups = layout.cp_size // a2a_size
    lengths = [np.diff(layout.segments(a2a_size, g).cu_seqlens) for g in range(groups)]
    chains = [[(g, slot) for g, slot in chain if lengths[g][slot]] for chain in layout.chains(a2a_size)]
    chains = [chain for chain in chains if len(chain) > 1]
    counts = np.array([len(chain) for chain in chains], dtype=np.int64)
    member, slot = np.array([link for chain in chains for link in chain], dtype=np.int64).reshape(-1, 2).T
    chain = np.repeat(np.arange(counts.size), counts)
    position = np.arange(chain.size) - np.repeat(np.cumsum(counts) - counts, counts)
    head = np.arange(heads)
    # Chains are shared out by the number of steps that composing takes, not by their number.
    work = np.repeat(counts - 1, heads)
    composer = (np.cumsum(work) - work) * groups // max(1, int(work.sum()))
    unit = (chain[:, None] * heads + head).reshape(-1)
    return _Links(
        unit=unit,
        position=np.repeat(position, heads),
        length=np.repeat(counts[chain], heads),
        member=np.repeat(member, heads),
        row=(slot[:, None] * heads + head).reshape(-1),
        composer=composer[unit],
    )


@dataclass(frozen=True)
class _RouteBuilder:
    """Builds the routes of one rank from the links of all."""

    links: _Links
    me: int
    groups: int
    place: np.ndarray  # of each unit among this rank's, the longest chain first
    active: tuple[int, ...]
    device: torch.device

    def __call__(
        self, travels: np.ndarray, step: np.ndarray, step_reverse: np.ndarray, skipped_steps: int = 0
    ) -> Route:
        """The route of the links where `travels`; `step` and `step_reverse` are their places in the two merges."""
        links = self.links
        # Both ends order what one sends the other by (unit, position).
        out = np.flatnonzero(travels & (links.member == self.me))
        out = out[np.lexsort((links.position[out], links.unit[out], links.composer[out]))]
        into = np.flatnonzero(travels & (links.composer == self.me))
        into = into[np.lexsort((links.position[into], links.unit[into], links.member[into]))]
        before = np.array([0, *accumulate(self.active)], dtype=np.int64)
        before -= sum(self.active[:skipped_steps])
        orders = [np.argsort(before[s[into]] + self.place[links.unit[into]]) for s in (step, step_reverse)]
        return Route(
            rows=to_device(links.row[out], self.device),
            to_composers=_counts(links.composer[out], self.groups),
            from_members=_counts(links.member[into], self.groups),
            to_steps=to_device(orders[0], self.device),
            to_steps_reverse=to_device(orders[1], self.device),
        )


def _counts(peers: np.ndarray, groups: int) -> tuple[int, ...]:
    return tuple(np.bincount(peers, minlength=groups).tolist())


@torch.inference_mode(False)
def to_device(table: np.ndarray, device: torch.device) -> Tensor:
    """Return a host table as an int64 tensor on the device, without synchronising."""
    tensor = torch.from_numpy(np.ascontiguousarray(table, dtype=np.int64))
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)  # from pageable memory the copy would synchronise
    return tensor
