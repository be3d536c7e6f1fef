"""Laws of segments in peers' memory: who takes which of them, told by tables, and what need not be taken.

Where the ranks of a state group share memory, each writes its laws (S_ext | M) into its own slot, and after a barrier
every rank takes what it needs of all slots into memory of its own (`state_peers_triton`). Beside each law stands
whether its M is lost, which is decided on the device (truncation): a lost M is zero. Nobody takes it, nor an S_ext
behind which one is lost before the state reaches a segment of this rank: so with gates that forget, what travels is
the S_ext of the segments right before one's own.

Example, zigzag on 2 ranks, one sequence, one head: its segments are A (rank 0), B and C (rank 1), D (rank 0). For D
rank 0 takes the S_ext of C always, that of B unless the M of C is lost, and that of A, out of its own slot, unless one
of B and C is; and the M of B and C that are not. Rank 1 takes the S_ext of A for B, and its own of B for C.

Dimensions: n segments of this rank, `slots` those of the rank that has most, HV heads of this rank, K, V head dims, G
ranks of the state group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from gdn_cp.comm.layout import ThdLayout
from gdn_cp.comm.state_gather import most_segments
from gdn_cp.comm.states import ChainTable, Links, chain_table, find_links, kept_with, to_device

PEER_BYTES = 64 * 2**20
"""What all laws may take together: one long sequence of 32 heads over the 8 GPUs of a machine. Half of it, the M, has
room on every rank until the backward; with more, composers (`states`) keep and send less."""


class Pull(NamedTuple):
    """What one rank takes of all slots: matrices S_ext, or dS_ext.

    `items` int32 [E, 3]: where the i-th matrix stands, owner * slots * HV + row, and the range [a, b) of kept M of
    which none may be lost if it is to be of use. `longest` is the longest of these ranges.
    """

    items: Tensor
    longest: int


@dataclass(frozen=True, eq=False)
class StatePeers:
    """The tables of one (layout, a2a_size, heads), seen from one rank of the state group.

    `forward` and `reverse` are the chains that touch this rank, up to its last segment of each: their laws are those
    that `laws` and `gradients` take, their M the kept ones, of all middle segments of these chains: `maps` int32
    [kept] says where these stand.
    """

    slots: int
    segments: int
    heads: int
    laws: Pull
    gradients: Pull
    maps: Tensor
    forward: ChainTable
    reverse: ChainTable


_plans: WeakKeyDictionary[ThdLayout, dict[tuple[int, int, int], StatePeers]] = WeakKeyDictionary()


def state_peers(layout: ThdLayout, a2a_size: int, group_index: int, heads: int) -> StatePeers:
    """Return the tables of the rank of a state group that holds the segments of `group_index`.

    Arguments as for `states.state_routes`; built on the host the first time, then kept as long as the layout.
    """
    return kept_with(_plans, layout, (a2a_size, group_index, heads), _build)


def _build(layout: ThdLayout, a2a_size: int, me: int, heads: int) -> StatePeers:
    every, slots = find_links(layout, a2a_size, heads), most_segments(layout, a2a_size)
    mine = np.flatnonzero(np.isin(every.unit, every.unit[every.member == me]))
    links = every.taken(mine[np.lexsort((every.position[mine], every.unit[mine]))])  # chain by chain
    own, middle = links.member == me, links.leaving & links.entering
    kept = np.where(middle, np.cumsum(middle) - 1, -1)
    place = links.member * slots * heads + links.row
    segments, groups = len(layout.segments(a2a_size, me).starts), layout.cp_size // a2a_size
    # What belongs to no chain gets a zero too, so that nothing has to be cleared beforehand.
    zeros = np.setdiff1d(np.arange(segments * heads), links.row[own])

    def direction(reverse: bool) -> tuple[Pull, ChainTable]:
        goal = _next_own(links, own, reverse)
        taken = np.flatnonzero(goal >= 0)
        # From the next rank on, so that no two ranks begin with the same one.
        taken = taken[np.argsort((links.member[taken] - me - 1) % groups, kind="stable")]
        law = np.full(own.size, -1)
        law[taken] = np.arange(taken.size)
        low, high = np.minimum(taken, goal[taken]) + 1, np.maximum(taken, goal[taken])
        begin = np.where(high > low, kept[np.minimum(low, own.size - 1)], 0)
        pull = Pull(
            _table(np.stack([place[taken], begin, begin + high - low], 1), layout.device),
            int((high - low).max(initial=0)),
        )
        columns = (law, np.where(law >= 0, kept, -1), np.where(own, links.row, -1), np.full_like(law, -1))
        used = np.flatnonzero(own | (law >= 0))
        return pull, chain_table(links, used, columns, layout.device, reverse=reverse, zeros=zeros)

    (laws, forward), (gradients, backward) = direction(False), direction(True)
    return StatePeers(
        slots=slots,
        segments=segments,
        heads=heads,
        laws=laws,
        gradients=gradients,
        maps=_table(place[middle], layout.device),
        forward=forward,
        reverse=backward,
    )


def _next_own(links: Links, own: np.ndarray, reverse: bool) -> np.ndarray:
    """For each link, which stand chain by chain, the next one of this rank behind it (before it) in its chain; -1."""
    at, here = np.flatnonzero(own), np.arange(own.size)
    which = np.searchsorted(at, here, side="left") - 1 if reverse else np.searchsorted(at, here, side="right")
    known = (which >= 0) & (which < at.size)
    goal = np.where(known, at[np.clip(which, 0, max(at.size - 1, 0))] if at.size else -1, -1)
    return np.where(known & (links.unit[goal] == links.unit), goal, -1)


@torch.inference_mode(False)
def _table(values: np.ndarray, device: torch.device) -> Tensor:
    return to_device(values, device).int()
