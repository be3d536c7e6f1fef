"""Maps of rows for kernels: where a natural row of a batch stands in an exchange buffer, and whether it is padding.

Made on the host once per layout and kept as long as it, like the layout's own tables: ask once before capturing a CUDA
graph.

Dimensions: P ranks, T rows of the batch, t = T/P local rows.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from gdn_cp.comm.layout import ThdLayout, _to_device

# Goes with its layout.
_maps: WeakKeyDictionary[ThdLayout, tuple[Tensor | None]] = WeakKeyDictionary()
_group_maps: WeakKeyDictionary[ThdLayout, dict[tuple[int, int], Tensor | None]] = WeakKeyDictionary()


def rank_major_rows(layout: ThdLayout) -> Tensor | None:
    """int32 [T] on the layout's device: the rank-major row of each natural row, -1 - row where it is padding.

    None where the two orders are the same and nothing is padded. Kernels read padding as zeros and write it as zeros,
    so that whatever stands in padded rows goes nowhere.

    >>> rank_major_rows(ThdLayout.zigzag([0, 8], 2)).tolist()
    [0, 1, 4, 5, 6, 7, 2, 3]
    >>> rank_major_rows(ThdLayout.zigzag([0, 8], 2, seqlens=[6])).tolist()
    [0, 1, 4, 5, 6, 7, -3, -4]
    """
    if layout not in _maps:
        _maps[layout] = (_build(layout),)
    return _maps[layout][0]


@torch.inference_mode(False)  # a map made under inference mode could not be used in training later
def _build(layout: ThdLayout) -> Tensor | None:
    host = layout._host
    if host.to_natural is None and host.padding is None:
        return None
    rows = torch.arange(layout.t_global) if host.to_natural is None else host.to_natural
    if host.padding is not None:
        rows = torch.where(host.padding, -1 - rows, rows)
    return _to_device(rows.to(torch.int32), layout.device)


def group_rows(layout: ThdLayout, a2a_size: int, group_index: int) -> Tensor | None:
    """`rank_major_rows` of what a group of `a2a_size` neighbours holds: int32 [a2a_size * t] or None.

    Row i is the i-th in the order of the group's segments (`layout.segments`), of blocks of rows rank by rank.

    >>> layout = ThdLayout.zigzag([0, 16], 4, seqlens=[14])
    >>> group_rows(layout, 2, 0).tolist(), group_rows(layout, 2, 1)
    ([0, 1, 4, 5, 6, 7, -3, -4], None)
    """
    made = _group_maps.setdefault(layout, {})
    if (a2a_size, group_index) not in made:
        made[a2a_size, group_index] = _build_for_group(layout, a2a_size, group_index)
    return made[a2a_size, group_index]


@torch.inference_mode(False)
def _build_for_group(layout: ThdLayout, a2a_size: int, group_index: int) -> Tensor | None:
    table = layout.segments(a2a_size, group_index)
    ranks = range(group_index * a2a_size, (group_index + 1) * a2a_size)
    parts = [layout.local_padding(rank) for rank in ranks]
    known = [part for part in parts if part is not None]
    if table.to_natural is None and not known:
        return None
    rows = torch.arange(a2a_size * layout.t_local, device=layout.device)
    if table.to_natural is not None:
        rows = table.to_natural
    if known:
        padded = torch.cat(known).index_select(0, rows)
        rows = torch.where(padded, -1 - rows, rows)
    return rows.to(torch.int32)
