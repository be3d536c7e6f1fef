"""The exchange of segment summaries among the ranks that hold the same heads, and where each chain is composed.

A chain is the way of one head's state through the segments of one sequence, which lie on several ranks. Its states are
composed in one place, its composer: the ranks share the chains out evenly, send each composer the summaries of its
chains, and get back the states that enter their segments. So what a rank sends, receives and keeps depends on its own
segments and not on the number of ranks, unlike an all-gather of summaries. The backward is the same with the gradients
of states; M stays at the composer from the forward.

Example, contiguous on 3 ranks, one sequence, 3 heads: segments A, B, C on ranks 0, 1, 2; rank h composes head h.

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

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from gdn_cp.comm.layout import ThdLayout


class ChainTable(NamedTuple):
    """Chains in the order of a walk, as `gdn_cp.kernels.merge` takes them.

    `units` int32 [U, 2] has each chain's first link and number of links, `steps` is the largest of these. `links` int32
    [L, 4] has, of each link, where its law stands, its M, the state that it hands out, a copy of its M; -1: nowhere.
    """

    units: Tensor
    links: Tensor
    steps: int


@dataclass(frozen=True)
class Route:
    """One kind of matrix on its way between the ranks of segments and composers, seen from one rank.

    `rows` int64: where this rank's matrices stand in [n*HV], composer by composer; `to_composers[c]` of them go to
    composer c. As a composer this rank gets `from_members[g]` matrices from rank g.
    """

    rows: Tensor
    to_composers: tuple[int, ...]
    from_members: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class StateRoutes:
    """How states travel for one (layout, a2a_size, heads), seen from one rank of the state group.

    `leaving` is for the state (or its gradient) behind a segment, of every segment but a chain's last; `entering` for
    that before a segment, of every one but the first; `transfer` for M, of those that are neither. `forward` and
    `reverse` are the chains that this rank composes: a link's places are those in what has arrived, or is to be sent.
    `summarised` is the range of segments [a, b) that covers all of which someone needs a summary. `roles` int32 [n]
    has, for each segment of this rank, 1 if a state enters it plus 2 if its state goes on. `travels` is whether any
    rank sends anything: the same on all.
    """

    segments: int
    heads: int
    leaving: Route
    entering: Route
    transfer: Route
    forward: ChainTable
    reverse: ChainTable
    summarised: tuple[int, int]
    roles: Tensor
    travels: bool


_routes: WeakKeyDictionary[ThdLayout, dict[tuple[int, int, int], StateRoutes]] = WeakKeyDictionary()


_Made = TypeVar("_Made")


def kept_with(
    known: WeakKeyDictionary[ThdLayout, dict[tuple[int, int, int], _Made]],
    layout: ThdLayout,
    key: tuple[int, int, int],
    build: Callable[[ThdLayout, int, int, int], _Made],
) -> _Made:
    """What `build` makes of the layout and the key, made once and kept as long as the layout."""
    made = known.setdefault(layout, {})
    if key not in made:
        made[key] = build(layout, *key)
    return made[key]


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
    return kept_with(_routes, layout, (a2a_size, group_index, heads), _build_routes)


def send_summaries(
    routes: StateRoutes, ext: Tensor, transfer: Tensor, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Forward, first half: every S_ext and M to its composer, in one all-to-all.

    Args:
        routes: see `state_routes`.
        ext: [n, HV, K, V].
        transfer: [n, HV, K, K].
        group: the state group.

    Returns:
        S_ext [.., K, V] and M [.., K, K], as `routes.forward` numbers them.
    """
    parts = [
        (x.flatten(0, 1).index_select(0, route.rows), route)
        for x, route in ((ext, routes.leaving), (transfer, routes.transfer))
    ]
    received = _exchange(parts, group, to_composers=True)
    return received[0], received[1]


def return_states(routes: StateRoutes, states: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Forward, second half: the states [.., K, V] that `routes.forward` hands out to [n, HV, K, V], zero at chain
    starts."""
    return _spread(routes, states, routes.entering, group)


def send_gradients(routes: StateRoutes, d_ext: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Backward, first half: dS_ext [n, HV, K, V] of each rank to the composers, as `routes.reverse` numbers them."""
    sent = d_ext.flatten(0, 1).index_select(0, routes.entering.rows)
    return _exchange([(sent, routes.entering)], group, to_composers=True)[0]


def return_gradients(routes: StateRoutes, gradients: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Backward, second half: what `routes.reverse` hands out to each rank's dS_out [n, HV, K, V], zero at ends."""
    return _spread(routes, gradients, routes.leaving, group)


def _spread(routes: StateRoutes, sent: Tensor, route: Route, group: dist.ProcessGroup) -> Tensor:
    (received,) = _exchange([(sent, route)], group, to_composers=False)
    whole = sent.new_zeros(routes.segments * routes.heads, *sent.shape[1:])
    return whole.index_copy_(0, route.rows, received).unflatten(0, (routes.segments, routes.heads))


def _exchange(parts: list[tuple[Tensor, Route]], group: dist.ProcessGroup, *, to_composers: bool) -> list[Tensor]:
    """One all-to-all of matrices [count_i, K_i, V_i], each kind with its own route; a peer's kinds travel together."""
    sizes = [(r.to_composers, r.from_members) if to_composers else (r.from_members, r.to_composers) for _, r in parts]
    elements = [x.shape[1] * x.shape[2] for x, _ in parts]
    splits_in, splits_out = (
        [
            sum(size[way][peer] * width for size, width in zip(sizes, elements, strict=True))
            for peer in range(len(sizes[0][0]))
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
class Links:
    """All segments of all chains that cross ranks, times heads, as int64 arrays of one entry each."""

    unit: np.ndarray  # number of the chain and head
    position: np.ndarray  # of the segment in its chain
    length: np.ndarray  # segments of its chain
    member: np.ndarray  # rank of the state group that holds the segment
    row: np.ndarray  # slot * heads + head at that rank
    composer: np.ndarray  # rank that composes the unit

    def taken(self, which: np.ndarray) -> Links:
        """Some of the links, in the order of `which`."""
        return Links(*(getattr(self, name)[which] for name in self.__dataclass_fields__))

    @property
    def leaving(self) -> np.ndarray:
        """Whether the state goes on."""
        return self.position < self.length - 1

    @property
    def entering(self) -> np.ndarray:
        """Whether a state enters."""
        return self.position > 0


def _build_routes(layout: ThdLayout, a2a_size: int, me: int, heads: int) -> StateRoutes:
    links = find_links(layout, a2a_size, heads)
    own = links.member == me
    slots, segments = links.row[links.leaving & own] // heads, len(layout.segments(a2a_size, me).starts)
    roles = np.zeros(segments, dtype=np.int64)
    roles[links.row[links.entering & own] // heads] = 1
    roles[slots] += 2  # numpy adds once where a slot is named for each of its heads
    build = _RouteBuilder(links, me, layout.cp_size // a2a_size, layout.device)
    leaving, at_leaving = build(links.leaving)
    entering, at_entering = build(links.entering)
    transfer, at_transfer = build(links.leaving & links.entering)
    mine = np.flatnonzero(links.composer == me)
    nowhere = np.full(links.unit.size, -1)
    return StateRoutes(
        segments=segments,
        heads=heads,
        leaving=leaving,
        entering=entering,
        transfer=transfer,
        forward=chain_table(links, mine, (at_leaving, at_transfer, at_entering, nowhere), layout.device),
        reverse=chain_table(links, mine, (at_entering, at_transfer, at_leaving, nowhere), layout.device, reverse=True),
        summarised=(int(slots.min()), int(slots.max()) + 1) if slots.size else (0, 0),
        roles=to_device(roles, layout.device).int(),
        travels=links.unit.size > 0,
    )


def find_links(layout: ThdLayout, a2a_size: int, heads: int) -> Links:
    """Every segment with tokens of every sequence that crosses the ranks of a state group."""
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
    return Links(
        unit=unit,
        position=np.repeat(position, heads),
        length=np.repeat(counts[chain], heads),
        member=np.repeat(member, heads),
        row=(slot[:, None] * heads + head).reshape(-1),
        composer=composer[unit],
    )


def chain_table(
    links: Links, mine: np.ndarray, places: tuple[np.ndarray, ...], device: torch.device, *, reverse: bool = False,
    zeros: np.ndarray | None = None,
) -> ChainTable:  # fmt: skip
    """The links numbered `mine`, chain by chain; `places` has the columns of `ChainTable.links` for all links.

    With `reverse` chains are walked from their ends. `zeros`: rows to be handed out as zero, by chains of one link.
    """
    position = -links.position[mine] if reverse else links.position[mine]
    order = mine[np.lexsort((position, links.unit[mine]))]
    table = np.stack([column[order] for column in places], 1)
    _, counts = np.unique(links.unit[order], return_counts=True)
    if zeros is not None:
        alone = np.full((zeros.size, 4), -1)
        alone[:, 2] = zeros
        table, counts = np.concatenate([table, alone]), np.concatenate([counts, np.ones_like(zeros)])
    units = np.stack([np.cumsum(counts) - counts, counts], 1)
    return ChainTable(to_device(units, device).int(), to_device(table, device).int(), int(counts.max(initial=0)))


@dataclass(frozen=True)
class _RouteBuilder:
    """Builds the routes of one rank from the links of all."""

    links: Links
    me: int
    groups: int
    device: torch.device

    def __call__(self, travels: np.ndarray) -> tuple[Route, np.ndarray]:
        """The route of the links where `travels`, and for every link where it stands at its composer, if that is me."""
        links = self.links
        # Both ends order what one sends the other by (unit, position).
        out = np.flatnonzero(travels & (links.member == self.me))
        out = out[np.lexsort((links.position[out], links.unit[out], links.composer[out]))]
        into = np.flatnonzero(travels & (links.composer == self.me))
        into = into[np.lexsort((links.position[into], links.unit[into], links.member[into]))]
        places = np.full(links.unit.size, -1)
        places[into] = np.arange(into.size)
        route = Route(
            rows=to_device(links.row[out], self.device),
            to_composers=_counts(links.composer[out], self.groups),
            from_members=_counts(links.member[into], self.groups),
        )
        return route, places


def _counts(peers: np.ndarray, groups: int) -> tuple[int, ...]:
    return tuple(np.bincount(peers, minlength=groups).tolist())


@torch.inference_mode(False)
def to_device(table: np.ndarray, device: torch.device) -> Tensor:
    """Return a host table as an int64 tensor on the device, without synchronising."""
    tensor = torch.from_numpy(np.ascontiguousarray(table, dtype=np.int64))
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)  # from pageable memory the copy would synchronise
    return tensor
