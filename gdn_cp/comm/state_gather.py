"""Every rank gets all laws and composes by itself what enters its own segments: for few bytes among few ranks.

Beside composers (`states`), which need two all-to-alls each way and whose bytes do not grow with the number of ranks,
this needs one all-gather each way, nothing packed before it and nothing spread behind it: the laws travel as the
kernel that makes them leaves them, and whoever composes reads them where they arrive. The prices are bytes, G times
a rank's laws, and that M of all chains that touch a rank is kept there. So it is taken where all laws together are at
most `GATHER_BYTES`.

Dimensions: n segments of this rank, `slots` those of the rank that has most, HV heads of this rank, K, V head dims, G
ranks of the state group.
"""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
import torch.distributed as dist
from torch import Tensor

from gdn_cp.comm.layout import ThdLayout
from gdn_cp.comm.states import ChainTable, chain_table, find_links, kept_with

GATHER_BYTES = 40 * 2**20
"""What all laws may take together: one more small all-to-all and its packing cost about as long as these bytes."""


@dataclass(frozen=True, eq=False)
class StateGather:
    """How laws are gathered for one (layout, a2a_size, heads), seen from one rank of the state group.

    Every rank sends `slots` segments' laws. `forward` and `reverse` are the chains that touch this rank; their laws
    stand in what has arrived, flattened to [G * slots * HV], what they hand out in [n * HV], and the `kept` M that the
    forward copies for the backward side by side.
    """

    slots: int
    segments: int
    heads: int
    members: int
    kept: int
    forward: ChainTable
    reverse: ChainTable


_plans: WeakKeyDictionary[ThdLayout, dict[tuple[int, int, int], StateGather]] = WeakKeyDictionary()


def gathered_bytes(layout: ThdLayout, a2a_size: int, heads: int, K: int, V: int, element_size: int = 4) -> int:
    """Bytes of all laws (S_ext | M) that a rank would receive, its own included."""
    members = layout.cp_size // a2a_size
    return members * most_segments(layout, a2a_size) * heads * K * (V + K) * element_size


def most_segments(layout: ThdLayout, a2a_size: int) -> int:
    """Segments of the rank that has most of them."""
    return max(len(layout.segments(a2a_size, g).starts) for g in range(layout.cp_size // a2a_size))


def state_gather(layout: ThdLayout, a2a_size: int, group_index: int, heads: int) -> StateGather:
    """Return how the rank of a state group that holds the segments of `group_index` gathers laws.

    Arguments as for `states.state_routes`; built on the host the first time, then kept as long as the layout.
    """
    return kept_with(_plans, layout, (a2a_size, group_index, heads), _build)


# PyTorch's name for the one-tensor all-gather; the older one warns from 2.13 on.
_ALL_GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"


def begin_gather(part: Tensor, members: int, group: dist.ProcessGroup) -> tuple[Tensor, dist.Work | None]:
    """Begin to gather [rows, ...] of every rank into [members * rows, ...]; whoever reads it waits for the second."""
    gathered = part.new_empty(members * part.shape[0], *part.shape[1:])
    return gathered, getattr(dist, _ALL_GATHER)(gathered, part, group=group, async_op=True)


def _build(layout: ThdLayout, a2a_size: int, me: int, heads: int) -> StateGather:
    links, slots = find_links(layout, a2a_size, heads), most_segments(layout, a2a_size)
    segments = len(layout.segments(a2a_size, me).starts)
    own = links.member == me
    mine = np.flatnonzero(np.isin(links.unit, links.unit[own]))
    both = np.zeros(links.unit.size, dtype=bool)
    both[mine] = (links.leaving & links.entering)[mine]
    law = links.member * slots * heads + links.row
    kept = np.where(both, np.cumsum(both) - 1, -1)
    out = np.where(own, links.row, -1)
    # What belongs to no chain gets a zero too, so that nothing has to be cleared beforehand.
    zeros = np.setdiff1d(np.arange(segments * heads), links.row[own])
    nowhere = np.full_like(kept, -1)
    forward = (np.where(links.leaving, law, -1), np.where(both, law, -1), out, kept)
    reverse = (np.where(links.entering, law, -1), kept, out, nowhere)
    return StateGather(
        slots=slots,
        segments=segments,
        heads=heads,
        members=layout.cp_size // a2a_size,
        kept=int(both.sum()),
        forward=chain_table(links, mine, forward, layout.device, zeros=zeros),
        reverse=chain_table(links, mine, reverse, layout.device, reverse=True, zeros=zeros),
    )
