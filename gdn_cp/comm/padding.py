"""Padding a packed batch to what a layout needs: every sequence keeps its tokens and gets unused rows at its end.

Dimensions: N sequences, T real tokens, Tp padded rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gdn_cp.comm.cuts import expand
from gdn_cp.comm.lengths import MAX_RANKS, MAX_TOKENS, IntVector, read_cu_seqlens, read_size


@dataclass(frozen=True, eq=False)
class PaddedBatch:
    """Where a batch's tokens stand after padding; made by `pad_cu_seqlens`.

    `cu_seqlens` (N+1 ints) are the padded boundaries and `seqlens` (N ints) the real lengths: exactly the two
    arguments that `ThdLayout.zigzag` and `ThdLayout.contiguous` take. `row_map` int64 [T] is the padded row of each
    real token and `mask` bool [Tp] is True on padded rows; both are on the CPU.
    """

    cu_seqlens: tuple[int, ...]
    seqlens: tuple[int, ...]
    row_map: Tensor
    mask: Tensor

    def pad(self, x: Tensor, value: float = 0) -> Tensor:
        """Return x [T, ...] with `value` on the padded rows: [Tp, ...]."""
        if x.shape[0] != self.row_map.numel():
            raise ValueError(f"x: has {x.shape[0]} rows; the batch has {self.row_map.numel()} real tokens")
        padded = x.new_full((self.mask.numel(), *x.shape[1:]), value)
        return padded.index_copy(0, self.row_map.to(x.device), x)

    def unpad(self, x: Tensor) -> Tensor:
        """Return the real rows of x [Tp, ...]: [T, ...]."""
        if x.shape[0] != self.mask.numel():
            raise ValueError(f"x: has {x.shape[0]} rows; the padded batch has {self.mask.numel()}")
        return x.index_select(0, self.row_map.to(x.device))


def pad_cu_seqlens(
    cu_seqlens: IntVector,
    cp_size: int,
    kind: str = "zigzag",
    *,
    local_multiple: int = 1,
    total: int | None = None,
) -> PaddedBatch:
    """Return the smallest padding that makes a batch fit a layout.

    Args:
        cu_seqlens: N+1 boundaries of the unpadded sequences, starting at 0.
        cp_size: number of context-parallel ranks.
        kind: "zigzag" rounds every length up to a multiple of 2*cp_size (cp_size 1 needs none); "contiguous" only the
            total to a multiple of cp_size, at the end of the last sequence.
        local_multiple: rows per rank shall be a multiple of this (sequence parallelism needs the tensor-parallel size);
            what is missing is added to the last sequence.
        total: pad the batch to exactly this many rows, at the end of the last sequence (constant shapes).

    Raises ValueError for boundaries that are no boundaries, an unknown kind, or a `total` too small or not divisible.

    >>> padded = pad_cu_seqlens([0, 3, 8], cp_size=2)
    >>> padded.cu_seqlens, padded.seqlens, padded.row_map.tolist()
    ((0, 4, 12), (3, 5), [0, 1, 2, 4, 5, 6, 7, 8])
    """
    cu = read_cu_seqlens(cu_seqlens)
    ranks = read_size(cp_size, "cp_size", MAX_RANKS)
    if kind not in ("zigzag", "contiguous"):
        raise ValueError(f'kind: got {kind!r}; choose "zigzag" or "contiguous"')
    each = 2 * ranks if kind == "zigzag" and ranks > 1 else 1
    whole = math.lcm(each, ranks * read_size(local_multiple, "local_multiple"))
    real = np.diff(cu)
    lengths = -(-real // each) * each
    rows = int(lengths.sum())
    if total is None:
        target = -(-rows // whole) * whole
    else:
        target = read_size(total, "total")
        if target < rows or target % whole:
            raise ValueError(f"total: got {target}; it must be at least {rows} and a multiple of {whole}")
    if target > MAX_TOKENS:
        raise ValueError(
            f"cu_seqlens: padded for cp_size={ranks} and local_multiple={local_multiple} the batch has {target} rows, "
            f"above {MAX_TOKENS} (int32 boundaries); use smaller batches"
        )
    lengths[-1] += target - rows
    padded = np.concatenate([[0], np.cumsum(lengths)])
    row_map = torch.from_numpy(expand(padded[:-1], real))
    mask = torch.ones(target, dtype=torch.bool).index_fill_(0, row_map, False)
    return PaddedBatch(tuple(padded.tolist()), tuple(real.tolist()), row_map, mask)
