"""The exchange in the slowest obvious way: one token, one section, one chunk at a time. The oracle of comm's tests.

`owners` says for each natural row which rank holds it at which local row; everything else follows from it by indexing,
so that autograd through these functions is the oracle of the gradients too.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor


def owners(cu_seqlens: Sequence[int], cp_size: int, kind: str) -> list[tuple[int, int]]:
    """Return (rank, local row) of each natural row; `kind` is zigzag, flat or each (sequences in cp_size chunks)."""
    held = [0] * cp_size  # rows that each rank has so far
    found: dict[int, tuple[int, int]] = {}

    def give(rank: int, rows: range) -> None:
        for row in rows:
            found[row] = (rank, held[rank])
            held[rank] += 1

    if kind == "flat":
        stretch = cu_seqlens[-1] // cp_size
        for rank in range(cp_size):
            give(rank, range(rank * stretch, (rank + 1) * stretch))
    else:
        for start, stop in pairwise(cu_seqlens):
            count = 1 if cp_size == 1 else cp_size if kind == "each" else 2 * cp_size
            chunk = (stop - start) // count
            for index in range(count):
                rank = index if index < cp_size else 2 * cp_size - 1 - index
                give(rank, range(start + index * chunk, start + (index + 1) * chunk))
    return [found[row] for row in range(cu_seqlens[-1])]


def cp_to_hp(local: Sequence[Tensor], held_by: list[tuple[int, int]], sections: Sequence[int]) -> list[list[Tensor]]:
    """Return per rank and section the tensor [T, width/P] from every rank's rows [T/P, sum(sections)]."""
    ranks = len(local)
    results = []
    for rank in range(ranks):
        tensors, start = [], 0
        for width in sections:
            mine = slice(start + rank * width // ranks, start + (rank + 1) * width // ranks)
            rows = [local[owner][row, mine] for owner, row in held_by]
            tensors.append(torch.stack(rows) if rows else local[0][:, mine])
            start += width
        results.append(tensors)
    return results


def hp_to_cp(shares: Sequence[Sequence[Tensor]], held_by: list[tuple[int, int]]) -> list[list[Tensor]]:
    """Return per rank and section the tensor [T/P, width] from every rank's sections [T, width/P]."""
    ranks = len(shares)
    results = []
    for rank in range(ranks):
        mine = sorted((row, natural) for natural, (owner, row) in enumerate(held_by) if owner == rank)
        tensors = []
        for section in range(len(shares[0])):
            columns = [share[section] for share in shares]
            rows = [torch.cat([column[natural] for column in columns]) for _, natural in mine]
            tensors.append(torch.stack(rows) if rows else torch.cat(columns, dim=1)[:0])
        results.append(tensors)
    return results
