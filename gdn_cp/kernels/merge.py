"""Composing states along chains of segments that a table names: states that enter segments, or gradients that leave.

A chain is walked link by link. X begins as zero; each link hands X out, then takes it through its segment:

    out[link.out] = X        X := ext[link.law] + maps[link.map] X        (M^T with `transpose`)

Forward, ext = S_ext and X is the state that enters a segment; backward, the chain reversed, ext = dS_ext and X is the
gradient of the state that leaves it. Where matrices stand is the table's business, so that what has arrived from other
ranks is read in place and what is to be sent is written in place.

Example, a chain of three segments A, B, C of one head, whose laws stand at 0, 1, 2, M of B alone, A and C on this rank:

    units (0, 3)       links (law 0, map -1, out 0, keep -1) (1, 1, -1, 0) (-1, -1, 1, -1)

writes out[0] = 0, what enters A, and out[1] = S_ext[1] + M[1] S_ext[0], what enters C, and copies M[1] to kept[0].

Dimensions: U chains of one head each, L links, E matrices S_ext, K, V head dims.
"""

from __future__ import annotations

import torch
from torch import Tensor

LAW, MAP, OUT, KEEP = range(4)
"""Columns of a link."""


def merge_chains(
    ext: Tensor,
    maps: Tensor,
    units: Tensor,
    links: Tensor,
    out: Tensor,
    *,
    steps: int,
    transpose: bool = False,
    kept: Tensor | None = None,
    lost: Tensor | None = None,
    kernels: bool = False,
) -> None:
    """Walk all chains; see the module. Writes the rows of `out` and `kept` that links name, and no other.

    Args:
        ext: [E, K, V] float32 (float64 in plain torch), last stride 1.
        maps: [.., K, K] likewise.
        units: int32 [U, 2], the first link of a chain and how many it has.
        links: int32 [L, 4], for each link the number of its S_ext in `ext` (-1: the chain's last, X ends here), of its
            M in `maps` (-1: none, X is zero before it), of what it hands out in `out` and of its M in `kept` (-1: not).
        out: [.., K, V], contiguous.
        steps: links of the longest chain.
        transpose: multiply by M^T.
        kept: [.., K, K], contiguous: receives copies of M.
        lost: int32 [..], 1 for each of `maps` that is zero, which then holds anything. What it is multiplied with goes
            no further, were it NaN, and may be anything too.
        kernels: one Triton kernel instead of plain torch; float32 only.
    """
    if kernels:
        from gdn_cp.kernels.merge_triton import launch_merge

        launch_merge(ext, maps, units, links, out, kept, lost, transpose, steps)
        return
    first, count = units.long().unbind(1)
    states = ext.new_zeros(len(units), *ext.shape[1:])
    with torch.autocast(ext.device.type, enabled=False):  # which would multiply states in half precision
        for step in range(steps):
            live = (count > step).nonzero()[:, 0]
            link, state = links[first[live] + step].long(), states[live]
            has_law, has_map, goes_out, stays = (link >= 0).unbind(1)
            if lost is not None:
                has_map = has_map.index_put((has_map,), lost[link[has_map, MAP]] == 0)
            out[link[goes_out, OUT]] = state[goes_out]
            following = torch.zeros_like(state)
            following[has_law] = ext[link[has_law, LAW]]
            factor = maps[link[has_map, MAP]]
            following[has_map] += (factor.mT if transpose else factor) @ state[has_map]
            states[live] = following
            if kept is not None:
                stays = stays & has_map
                kept[link[stays, KEEP]] = maps[link[stays, MAP]]
