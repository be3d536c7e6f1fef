"""Packing whole documents into rows of tokens: who shares a batch with whom, and the arrays that the model reads.

Nothing in here knows how many ranks there are: lengths are padded to a fixed multiple, so the same seed gives the same
packs, and the same losses, under any tensor, context or data parallelism.

A document of n + 1 tokens is a sequence of n (input, target) pairs: pair i reads token i and is asked for token i + 1.
A pair is the unit of everything below: lengths, pieces, budgets.

Dimensions: T tokens of a pack, padding included; N sequences (pieces of documents) in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_OPEN_PACKS = 32  # packs that wait for a fitting piece at a time; more fill better, and mix distant documents less


@dataclass(frozen=True)
class Piece:
    """Pairs [start, stop) of one document: a whole document, unless that is longer than the budget."""

    document: int
    start: int
    stop: int

    @property
    def length(self) -> int:
        """Number of pairs."""
        return self.stop - self.start


@dataclass(frozen=True)
class PackedBatch:
    """One pack as arrays over its T rows, sequences one after the other, each followed by its padding.

    tokens, labels, position_ids: int64 [T]; loss_mask: bool [T], True where the label is a real target. On padded rows
    tokens and labels hold `pad_id`, and positions count on. cu_seqlens: N + 1 padded offsets; seqlens: N real lengths.
    """

    tokens: np.ndarray
    labels: np.ndarray
    position_ids: np.ndarray
    loss_mask: np.ndarray
    cu_seqlens: tuple[int, ...]
    seqlens: tuple[int, ...]

    @property
    def num_targets(self) -> int:
        """Number of real targets, over which the loss is averaged."""
        return sum(self.seqlens)


def pad_up(length: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is no less than `length`: pad_up(9, 8) == 16."""
    return -(-length // multiple) * multiple


def check_budget(token_budget: int, pad_multiple: int) -> None:
    """Raise ValueError unless the budget is a positive multiple of a positive `pad_multiple`."""
    if pad_multiple < 1:
        raise ValueError(f"pad_multiple={pad_multiple} must be at least 1")
    if token_budget < 1 or token_budget % pad_multiple:
        nearest = max(pad_multiple, pad_up(token_budget, pad_multiple))
        raise ValueError(
            f"token_budget={token_budget} must be a positive multiple of pad_multiple={pad_multiple}; use {nearest}"
        )


def cut_into_pieces(lengths: Sequence[int], token_budget: int) -> list[Piece]:
    """Every document as one piece, or as budget-sized pieces (the last one shorter) where it exceeds the budget."""
    return [
        Piece(document, start, min(start + token_budget, length))
        for document, length in enumerate(lengths)
        for start in range(0, length, token_budget)
    ]


def plan_epoch(
    lengths: Sequence[int], token_budget: int, pad_multiple: int, rng: np.random.Generator
) -> list[list[Piece]]:
    """The packs of one pass over the documents, in training order.

    Shuffled pieces go, one by one, to the fullest open pack with room (best fit among 32 open packs). A pack's padded
    tokens never exceed `token_budget`. A pure function of its arguments and the generator's state: an epoch can be
    planned again from (seed, epoch), and a position in it is one number.

    lengths: pairs per document. Returns a list of packs, each a non-empty list of pieces. Raises ValueError as
    `check_budget`.
    """
    check_budget(token_budget, pad_multiple)
    pieces = cut_into_pieces(lengths, token_budget)
    closed: list[list[Piece]] = []
    open_packs: list[tuple[int, list[Piece]]] = []  # (room, pieces)
    for index in rng.permutation(len(pieces)):
        piece = pieces[index]
        needed = pad_up(piece.length, pad_multiple)
        fitting = [slot for slot, (room, _) in enumerate(open_packs) if room >= needed]
        if fitting:
            room, pack = open_packs.pop(min(fitting, key=lambda slot: open_packs[slot][0]))
        else:
            room, pack = token_budget, []
        pack.append(piece)
        if room == needed:
            closed.append(pack)
            continue
        open_packs.append((room - needed, pack))
        if len(open_packs) > _OPEN_PACKS:
            fullest = min(range(len(open_packs)), key=lambda slot: open_packs[slot][0])
            closed.append(open_packs.pop(fullest)[1])
    closed.extend(pack for _, pack in open_packs)
    return [closed[index] for index in rng.permutation(len(closed))]


def build_batch(documents: Sequence[np.ndarray], pack: Sequence[Piece], pad_multiple: int, pad_id: int) -> PackedBatch:
    """The arrays of one pack. `documents[d]` are the token ids of document d, its pairs plus one."""
    padded = [pad_up(piece.length, pad_multiple) for piece in pack]
    cu_seqlens = np.concatenate([[0], np.cumsum(padded, dtype=np.int64)])
    total = int(cu_seqlens[-1])
    tokens = np.full(total, pad_id, dtype=np.int64)
    labels = np.full(total, pad_id, dtype=np.int64)
    position_ids = np.empty(total, dtype=np.int64)
    loss_mask = np.zeros(total, dtype=bool)
    for piece, begin, rows in zip(pack, cu_seqlens, padded, strict=False):  # cu_seqlens holds one more: the end
        ids = documents[piece.document]
        real = slice(begin, begin + piece.length)
        tokens[real] = ids[piece.start : piece.stop]
        labels[real] = ids[piece.start + 1 : piece.stop + 1]
        loss_mask[real] = True
        position_ids[begin : begin + rows] = np.arange(rows)
    return PackedBatch(
        tokens,
        labels,
        position_ids,
        loss_mask,
        cu_seqlens=tuple(cu_seqlens.tolist()),
        seqlens=tuple(piece.length for piece in pack),
    )
