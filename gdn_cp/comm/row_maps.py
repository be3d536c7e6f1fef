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
