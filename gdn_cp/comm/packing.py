"""Filling and emptying the buffer of one exchange between context-parallel (cp) and head-parallel (hp) order.

The buffer is [P*t, W]: block p (t rows) of what a rank sends goes to rank p, block p of what it receives came from rank
p. A row holds one rank's share of all sections of all tensors, side by side. Each function here is one pass over the
data: a copy (or a gather, where rows change their order) per tensor or section, straight between tensors and buffer.

Example, P = 2, one tensor with sections (4, 2), columns named by letter; what a row looks like in the two blocks:

    cp   a b c d | e f        block 0   a b e        block 1   c d f

Dimensions: P ranks, T tokens of the batch, t = T/P local rows, W columns per rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Widths = tuple[tuple[int, ...], ...]
"""Per tensor the full widths (over all ranks) of its sections."""


def _spans(widths: Widths, ranks: int) -> list[list[tuple[int, int]]]:
    """Return per tensor and section (start, width) of its columns in a buffer row."""
    spans, start = [], 0
    for sections in widths:
        spans.append([])
        for width in sections:
            spans[-1].append((start, width // ranks))
            start += width // ranks
    return spans


def pack_cp(tensors: Sequence[Tensor], widths: Widths, ranks: int) -> Tensor:
    """Return the buffer from tensors [t, D_i]: each rank's columns to its block."""
    rows, columns = tensors[0].shape[0], sum(map(sum, widths)) // ranks
    buffer = tensors[0].new_empty(ranks * rows, columns)
    blocks = buffer.view(ranks, rows, columns)
    for x, sections, spans in zip(tensors, widths, _spans(widths, ranks), strict=True):
        for section, (start, width) in zip(x.split(list(sections), 1), spans, strict=True):
            share = section.unflatten(1, (ranks, width)).transpose(0, 1)
            blocks.narrow(2, start, width).copy_(share)
    return buffer


def unpack_hp(buffer: Tensor, widths: Widths, ranks: int, to_natural: Tensor | None) -> list[Tensor]:
    """Return tensors [T, D_i/P] in natural row order from the received buffer; one alone may be the buffer itself."""
    if to_natural is None and len(widths) == 1:
        return [buffer]
    tensors = []
    for spans in _spans(widths, ranks):
        columns = buffer.narrow(1, spans[0][0], sum(width for _, width in spans))
        if to_natural is not None:
            tensors.append(columns.index_select(0, to_natural))
        else:  # not contiguous(), which may give a view, and autograd lets nobody write in place to a view given out
            tensors.append(columns.clone(memory_format=torch.contiguous_format))
    return tensors


def pack_hp(tensors: Sequence[Tensor], widths: Widths, ranks: int, to_rank_major: Tensor | None) -> Tensor:
    """Return the buffer from tensors [T, D_i/P]: each rank's rows, in its local order, to its block."""
    buffer = tensors[0].new_empty(tensors[0].shape[0], sum(map(sum, widths)) // ranks)
    for x, spans in zip(tensors, _spans(widths, ranks), strict=True):
        target = buffer.narrow(1, spans[0][0], x.shape[1])
        if to_rank_major is None:
            target.copy_(x)
        else:
            torch.index_select(x, 0, to_rank_major, out=target)
    return buffer


def unpack_cp(buffer: Tensor, widths: Widths, ranks: int) -> list[Tensor]:
    """Return tensors [t, D_i] from the received buffer: every rank's columns to their place."""
    blocks = buffer.unflatten(0, (ranks, buffer.shape[0] // ranks))
    tensors = []
    for sections, spans in zip(widths, _spans(widths, ranks), strict=True):
        x = buffer.new_empty(blocks.shape[1], sum(sections))
        for section, (start, width) in zip(x.split(list(sections), 1), spans, strict=True):
            share = blocks.narrow(2, start, width).transpose(0, 1)
            section.unflatten(1, (ranks, width)).copy_(share)
        tensors.append(x)
    return tensors
