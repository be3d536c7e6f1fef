"""The data pipeline: a tokenised corpus, and an endless stream of packs over it whose place is two numbers.

corpus.py reads the text, tokenizer.py turns it into ids, packing.py decides which documents share a pack.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gdn_cp.training.packing import PackedBatch, Piece, build_batch, check_budget, plan_epoch
from gdn_cp.training.tokenizer import Tokenizer


@dataclass(frozen=True)
class Corpus:
    """Tokenised documents: `documents[d]` is int32 [n + 1], n (input, target) pairs between two boundary tokens."""

    documents: tuple[np.ndarray, ...]
    vocab_size: int
    boundary: int

    @classmethod
    def build(cls, texts: Sequence[bytes], tokenizer: Tokenizer) -> Corpus:
        """Tokenise `texts` and put the boundary token before and after each."""
        edge = np.array([tokenizer.boundary], dtype=np.int32)
        documents = tuple(np.concatenate([edge, ids, edge]) for ids in tokenizer.encode(texts))
        return cls(documents, tokenizer.vocab_size, tokenizer.boundary)

    @property
    def lengths(self) -> list[int]:
        """(input, target) pairs of each document."""
        return [len(ids) - 1 for ids in self.documents]

    def unigram_entropy(self) -> float:
        """Entropy of the targets' frequencies in nats: the loss of the best model that reads no context."""
        counts = np.zeros(self.vocab_size, dtype=np.int64)
        for ids in self.documents:
            counts += np.bincount(ids[1:], minlength=self.vocab_size)
        p = counts[counts > 0] / counts.sum()
        return float(-(p * np.log(p)).sum()) + 0.0  # + 0.0: a constant text has entropy 0, not -0

    def digest(self) -> str:
        """A fingerprint of all token ids and boundaries: ranks and resumed runs must agree on it."""
        sha = hashlib.sha256()
        for ids in self.documents:
            sha.update(len(ids).to_bytes(8, "little"))
            sha.update(np.ascontiguousarray(ids).astype("<i4", copy=False).tobytes())
        return sha.hexdigest()[:16]


@dataclass(frozen=True)
class StepPlan:
    """The packs of one optimizer step, all ranks' together; a rank builds the arrays of its own share only."""

    packs: tuple[tuple[Piece, ...], ...]
    epoch: int

    @property
    def num_targets(self) -> int:
        """Real targets of the whole step: what the loss is divided by on every rank."""
        return sum(piece.length for pack in self.packs for piece in pack)

    @property
    def seqlens(self) -> list[int]:
        """Real lengths of all sequences of the step."""
        return [piece.length for pack in self.packs for piece in pack]


class PackStream:
    """An endless stream of packs: epoch after epoch, each shuffled by (seed, epoch) alone.

    Its whole state is the epoch and the position in it, so a run continues where a checkpoint stopped.
    """

    def __init__(self, corpus: Corpus, token_budget: int, pad_multiple: int, seed: int) -> None:
        check_budget(token_budget, pad_multiple)
        self.corpus = corpus
        self.token_budget = token_budget
        self.pad_multiple = pad_multiple
        self.seed = seed
        self._lengths = corpus.lengths
        self._seek(epoch=0, position=0)

    def _seek(self, epoch: int, position: int) -> None:
        rng = np.random.default_rng([self.seed, epoch])
        self._epoch = epoch
        self._packs = plan_epoch(self._lengths, self.token_budget, self.pad_multiple, rng)
        self._position = position

    @property
    def packs_per_epoch(self) -> int:
        """Packs of the current epoch; the next may have a few more or fewer."""
        return len(self._packs)

    def next_step(self, packs_per_step: int) -> StepPlan:
        """The next `packs_per_step` packs; a step may end one epoch and begin the next."""
        packs = []
        for _ in range(packs_per_step):
            if self._position == len(self._packs):
                self._seek(self._epoch + 1, position=0)
            packs.append(tuple(self._packs[self._position]))
            self._position += 1
        return StepPlan(tuple(packs), self._epoch)

    def build(self, pack: Sequence[Piece]) -> PackedBatch:
        """The arrays of one pack of a plan."""
        return build_batch(self.corpus.documents, pack, self.pad_multiple, pad_id=self.corpus.boundary)

    def state_dict(self) -> dict[str, int]:
        """Where the stream stands."""
        return {"epoch": self._epoch, "position": self._position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue where `state_dict` was taken, on the same corpus, budget, padding and seed."""
        self._seek(state["epoch"], state["position"])

    def describe(self) -> str:
        """One line for the log: sizes, documents that are cut, and how full the packs are."""
        pairs = sum(self._lengths)
        cut = sum(length > self.token_budget for length in self._lengths)
        fill = pairs / (len(self._packs) * self.token_budget)
        return (
            f"{len(self._lengths)} documents, {pairs:,} targets; {cut} documents exceed the budget of "
            f"{self.token_budget} tokens and are cut into pieces; {len(self._packs)} packs an epoch, {fill:.1%} full"
        )
