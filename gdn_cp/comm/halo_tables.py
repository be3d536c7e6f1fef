"""The halo for kernels that read it where it arrives: which rows go out, which of the arriving stand before a segment.

The routes of `halo`, told by tables of places: the rows to be sent are taken out of the convolution's input in one
launch, the convolution reads the rows before its segments from what arrives, and its backward writes their gradients
into what is sent back; who gets them adds them to its rows in one launch. A few rows are gathered by all ranks, which
is one collective of less latency, or none where ranks write to each other's memory; many go to whoever wants them in an
all-to-all.

Example, zigzag of 8 tokens on 2 ranks, W = 4: rank 0 holds 0 1 | 6 7, rank 1 2 3 | 4 5. Gathered, each sends four rows:

    rank 0    sends 0 1 - -, gets (0 1 - - | 2 3 4 5); before its second segment stand, the nearest first, rows 7 6 5
    rank 1    sends 2 3 4 5; before its first segment stand rows 1 0 and none, before its second 5 4 1

Dimensions: n segments of this rank, W taps, S rows sent, O rows of this rank that anyone's halo has, C how often at
most.
"""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from gdn_cp.comm.cuts import expand
from gdn_cp.comm.halo import halo_lengths, locate_rows, wanted_rows
from gdn_cp.comm.layout import ThdLayout
from gdn_cp.comm.state_gather import begin_gather
from gdn_cp.comm.states import to_device

GATHER_BYTES = 4 * 2**20
"""What all ranks' rows may take together to be gathered by each."""


@dataclass(frozen=True, eq=False)
class HaloTables:
    """How the halo travels for one (layout, a2a_size, W, buffer), seen from one rank of the state group; all int32.

    `sent` [S]: rows of the buffer, -1 for zeros. `before` [n, W - 1]: which arriving row stands j + 1 rows before each
    segment, -1: none; `in_order` likewise where the rows of all segments stand side by side, W - 1 of each. `returned`
    [n, W - 1]: where its gradient goes in the `returns` rows that are sent back.
    `owners` [O]: rows of the buffer that get a sum of gradients, -1 for padding, and `addends` [O, C] which of the
    arriving gradients, -1 behind the last. `counts`: rows sent to each rank and got from it, forward; None where all
    `members` gather.
    """

    sent: Tensor
    before: Tensor
    in_order: Tensor
    returned: Tensor
    returns: int
    owners: Tensor
    addends: Tensor
    counts: tuple[list[int], list[int]] | None
    members: int

    def exchange(self, rows: Tensor, group: dist.ProcessGroup) -> Tensor:
        """What arrives of the rows [S, D] that all ranks send, on the current stream."""
        return self._travel(rows, group, forward=True)

    def exchange_gradients(self, rows: Tensor, group: dist.ProcessGroup) -> Tensor:
        """What arrives of the gradients [returns, D] that all ranks send back, on the current stream."""
        return self._travel(rows, group, forward=False)

    def _travel(self, rows: Tensor, group: dist.ProcessGroup, *, forward: bool) -> Tensor:
        if self.counts is None:
            arrived, work = begin_gather(rows, self.members, group)
            if work is not None:
                work.wait()
            return arrived
        out, back = self.counts if forward else self.counts[::-1]
        arrived = rows.new_empty(sum(back), rows.shape[1])
        dist.all_to_all_single(arrived, rows, back, out, group=group)
        return arrived


_Key = tuple[int, int, int, int, int]
# Goes with its layout. With each entry the map of rows that it was made for, so that its id stays its own.
_made: WeakKeyDictionary[ThdLayout, dict[_Key, tuple[Tensor | None, HaloTables | None]]] = WeakKeyDictionary()


def halo_tables(
    layout: ThdLayout, a2a_size: int, group_index: int, width: int, rows: Tensor | None, row_bytes: int
) -> HaloTables | None:
    """Return the tables for the `width` - 1 rows before each segment of `group_index`; None where no rank has a halo.

    Built on the host the first time, then kept as long as the layout. The same way on all ranks.

    Args:
        layout, a2a_size, group_index: as for `halo.halo_routes`.
        width: taps W.
        rows: int32, where the group's rows stand in the buffer, -1 - place for padding; None: in order.
        row_bytes: of a row that travels.
    """
    known = _made.setdefault(layout, {})
    key = (a2a_size, group_index, width, id(rows), row_bytes)
    if key not in known:
        known[key] = rows, _build(layout, a2a_size, group_index, width, rows, row_bytes)
    return known[key][1]


def _build(
    layout: ThdLayout, a2a_size: int, me: int, width: int, rows: Tensor | None, row_bytes: int
) -> HaloTables | None:
    members = layout.cp_size // a2a_size
    wanted = [wanted_rows(layout, a2a_size, g, width) for g in range(members)]
    if not any(part.size for part in wanted):
        return None
    owners = [locate_rows(layout, a2a_size, part)[0] for part in wanted]
    counts, returns = None, max(part.size for part in wanted)
    distinct = np.unique(np.concatenate(wanted))
    holder, place = locate_rows(layout, a2a_size, distinct)
    most = int(np.bincount(holder).max())
    if members * max(most, returns) * row_bytes <= GATHER_BYTES:
        sent = np.full(most, -1)
        mine = place[holder == me]
        sent[: mine.size] = mine
        by_holder = np.argsort(holder, kind="stable")
        among_holders = np.empty_like(holder)  # where each distinct row stands among those of its holder
        among_holders[by_holder] = expand(np.zeros(members, dtype=np.int64), np.bincount(holder, minlength=members))
        arriving = (holder * most + among_holders)[np.searchsorted(distinct, wanted[me])]
        leaving = np.arange(wanted[me].size)
        got = [g * returns + np.flatnonzero(owners[g] == me) for g in range(members)]
    else:
        # Both ends order what one sends the other as the receiver's halo does.
        order = np.argsort(owners[me], kind="stable")
        arriving = leaving = np.argsort(order)
        parts = [part[owner == me] for part, owner in zip(wanted, owners, strict=True)]
        sent = locate_rows(layout, a2a_size, np.concatenate(parts))[1]
        counts = [part.size for part in parts], np.bincount(owners[me], minlength=members).tolist()
        returns = wanted[me].size
        bounds = np.cumsum([0, *counts[0]])
        got = [np.arange(bounds[g], bounds[g + 1]) for g in range(members)]
    received = np.concatenate([part[owner == me] for part, owner in zip(wanted, owners, strict=True)])
    own_rows, addends = _addends(received, np.concatenate(got))
    own_places = locate_rows(layout, a2a_size, own_rows)[1]
    before = _places_before(layout, a2a_size, me, width)
    return HaloTables(
        sent=_in_buffer(sent, rows, layout.device),
        before=_table(np.where(before >= 0, np.append(arriving, -1)[before], -1), layout.device),
        in_order=_table(np.where(before >= 0, np.arange(before.size).reshape(before.shape), -1), layout.device),
        returned=_table(np.where(before >= 0, np.append(leaving, -1)[before], -1), layout.device),
        returns=returns,
        owners=_in_buffer(own_places, rows, layout.device),
        addends=_table(addends, layout.device),
        counts=counts,
        members=members,
    )


def _places_before(layout: ThdLayout, a2a_size: int, me: int, width: int) -> np.ndarray:
    """[n, width - 1]: which row of this rank's halo, as `wanted_rows` has them, stands j + 1 before each segment."""
    places = np.full((len(layout.segments(a2a_size, me).starts), width - 1), -1)
    end = 0
    for slot, length in halo_lengths(layout, a2a_size, me, width):
        end += length
        places[slot, :length] = np.arange(end - 1, end - 1 - length, -1)
    return places


def _addends(rows: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct rows, sorted, and for each the places of all its occurrences, in order, filled up with -1.

    >>> _addends(np.array([5, 3, 5]), np.array([10, 11, 12]))
    (array([3, 5]), array([[11, -1],
           [10, 12]]))
    """
    distinct, counts = np.unique(rows, return_counts=True)
    table = np.full((distinct.size, int(counts.max(initial=1))), -1)
    column = np.arange(rows.size) - np.repeat(np.cumsum(counts) - counts, counts)
    table[np.repeat(np.arange(distinct.size), counts), column] = places[np.argsort(rows, kind="stable")]
    return distinct, table


def _table(values: np.ndarray, device: torch.device) -> Tensor:
    return to_device(values, device).int()


@torch.inference_mode(False)
def _in_buffer(places: np.ndarray, rows: Tensor | None, device: torch.device) -> Tensor:
    """Where rows of the group stand in the buffer; -1 for padding and for -1."""
    table = _table(places, device)
    if rows is None or not places.size:
        return table
    return torch.where(table < 0, -1, rows.index_select(0, table.clamp(min=0)).clamp(min=-1)).int()
