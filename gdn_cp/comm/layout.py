"""Who owns which token: the layout of one packed (THD) batch over the ranks of a context-parallel group.

A `ThdLayout` is built once per batch from host-side boundaries and handed to every layer. It knows three row orders:

- natural: the batch as packed, sequence after sequence, all tokens;
- local: one rank's rows, in the order in which that rank holds them;
- rank-major: the local rows of rank 0, then of rank 1, and so on. That is how a plain all-to-all leaves them.

Example: one sequence of 8 tokens, zigzag, cp_size 2. Rank 0 holds tokens 0 1 6 7, rank 1 tokens 2 3 4 5, so rank-major
is 0 1 6 7 2 3 4 5, and gathering rank-major rows 0 1 4 5 6 7 2 3 gives the natural order back.

Dimensions: N sequences, T tokens of the batch (padded rows included), P = cp_size ranks, T/P local rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gdn_cp.comm.cuts import Cut, check_cut, cut_batch, expand
from gdn_cp.comm.lengths import (
    MAX_RANKS,
    MAX_TOKENS,
    IntVector,
    read_cu_seqlens,
    read_index,
    read_real_lengths,
    read_size,
)
from gdn_cp.comm.padding import PaddedBatch, pad_cu_seqlens
from gdn_cp.comm.segments import Chains, SegmentTable, build_chains

__all__ = ["Chains", "PaddedBatch", "SegmentTable", "ThdLayout", "pad_cu_seqlens"]


class _Tables(NamedTuple):
    """A layout's tensors; None where the table would say nothing."""

    cu_seqlens: Tensor  # int32 [N+1]
    to_rank_major: Tensor | None  # int64 [T], the natural row of each rank-major row; None: the orders are the same
    to_natural: Tensor | None  # int64 [T], its inverse
    padding: Tensor | None  # bool [T], natural order; None: nothing is padded
    padding_rank_major: Tensor | None  # bool [T], rank-major order

    def to(self, device: torch.device) -> _Tables:
        return _Tables(_to_device(self.cu_seqlens, device), *(_copy(table, device) for table in self[1:]))


@dataclass(frozen=True, eq=False, repr=False)
class ThdLayout:
    """The layout of one batch: immutable, compared by identity, shared by all layers and all consumers.

    Build it with `zigzag`, `contiguous` or `batched`. Building reads host values only (a CUDA tensor of boundaries is
    accepted, and synchronises once); device copies are asynchronous, and no method synchronises, except that
    `segments` builds a table on the host the first time that it is asked for it: ask once before capturing a graph.

    Attributes:
        kind: "zigzag" (Megatron, Transformer Engine: each sequence in 2P chunks, rank r holds chunks r and 2P-1-r) or
            "contiguous" (flash-linear-attention: the buffer in P stretches; for `batched` each sequence in P chunks).
        cp_size: number of ranks P.
        cu_seqlens: boundaries of the sequences in natural order, padded rows included (N+1 ints).
        seqlens: real tokens of each sequence (N ints); rows beyond them are padding.
        device: where the tensors are.
    """

    kind: str
    cp_size: int
    cu_seqlens: tuple[int, ...]
    seqlens: tuple[int, ...]
    device: torch.device
    _cut: Cut
    _host: _Tables
    _tables: _Tables
    _segments: dict[tuple[int, int], SegmentTable] = field(default_factory=dict)
    _chains: dict[int, Chains] = field(default_factory=dict)

    @classmethod
    def zigzag(
        cls,
        cu_seqlens: IntVector,
        cp_size: int,
        *,
        seqlens: IntVector | None = None,
        device: torch.device | str = "cpu",
    ) -> ThdLayout:
        """Cut every sequence in 2P equal chunks; rank r holds chunks r and 2P-1-r of each, sequence by sequence.

        Args:
            cu_seqlens: N+1 boundaries, starting at 0; each length a multiple of 2*cp_size (any length if cp_size is 1).
            cp_size: number of ranks P.
            seqlens: the real length of each sequence where some rows are padding (`pad_cu_seqlens` gives both).
            device: where the layout's tensors shall be.

        Raises ValueError, naming the remedy, for boundaries that do not start at 0, decrease or cannot be cut.

        >>> layout = ThdLayout.zigzag([0, 8, 12], 2)
        >>> layout.local_rows(0).tolist(), layout.local_rows(1).tolist()
        ([0, 1, 6, 7, 8, 11], [2, 3, 4, 5, 9, 10])
        """
        return _build("zigzag", Cut.ZIGZAG, cu_seqlens, cp_size, seqlens, device)

    @classmethod
    def contiguous(
        cls,
        cu_seqlens: IntVector,
        cp_size: int,
        *,
        seqlens: IntVector | None = None,
        device: torch.device | str = "cpu",
    ) -> ThdLayout:
        """Cut the flat buffer in P equal stretches, wherever the sequences begin; T must be a multiple of cp_size.

        Arguments and errors as for `zigzag`.

        >>> ThdLayout.contiguous([0, 3, 8], 2).local_rows(1).tolist()
        [4, 5, 6, 7]
        """
        return _build("contiguous", Cut.FLAT, cu_seqlens, cp_size, seqlens, device)

    @classmethod
    def batched(
        cls, batch: int, seqlen: int, cp_size: int, *, kind: str = "zigzag", device: torch.device | str = "cpu"
    ) -> ThdLayout:
        """Lay out `batch` equal sequences, each cut by itself; local rows are [batch, seqlen/P] flattened.

        Args:
            batch: number of sequences.
            seqlen: tokens of each, a multiple of 2*cp_size ("zigzag") or of cp_size ("contiguous").
            cp_size: number of ranks P.
            kind: "zigzag" or "contiguous" (rank r holds the r-th chunk of every sequence).
            device: where the layout's tensors shall be.

        >>> ThdLayout.batched(2, 4, 2, kind="contiguous").local_rows(0).tolist()
        [0, 1, 4, 5]
        """
        if kind not in ("zigzag", "contiguous"):
            raise ValueError(f'kind: got {kind!r}; choose "zigzag" or "contiguous"')
        cut, chunks, rule = (Cut.ZIGZAG, 2, "2*cp_size") if kind == "zigzag" else (Cut.EACH, 1, "cp_size")
        count, length = read_size(batch, "batch"), read_size(seqlen, "seqlen")
        ranks = read_size(cp_size, "cp_size", MAX_RANKS)
        if ranks > 1 and length % (chunks * ranks):
            raise ValueError(
                f"seqlen: got {length}, not divisible by {rule} = {chunks * ranks}; pad to a multiple of it"
            )
        if count * length > MAX_TOKENS:
            raise ValueError(
                f"batch: {count} sequences of seqlen={length} are more than {MAX_TOKENS} tokens (int32 boundaries); "
                "use smaller batches"
            )
        cu = np.arange(count + 1) * length
        return _build(kind, cut, cu, ranks, None, device)

    @property
    def t_global(self) -> int:
        """Rows of the whole batch, padded rows included."""
        return self.cu_seqlens[-1]

    @property
    def t_local(self) -> int:
        """Rows that each rank holds."""
        return self.t_global // self.cp_size

    @property
    def num_sequences(self) -> int:
        """Sequences of the batch, zero-length ones included."""
        return len(self.seqlens)

    @property
    def to_natural(self) -> Tensor | None:
        """int64 [T]: gathers rank-major rows into natural order. None where the two are the same."""
        return self._tables.to_natural

    @property
    def to_rank_major(self) -> Tensor | None:
        """int64 [T]: gathers natural rows into rank-major order. None where the two are the same."""
        return self._tables.to_rank_major

    def local_rows(self, rank: int) -> Tensor:
        """Return int64 [T/P]: the natural row of each of a rank's rows."""
        return self._local_rows(rank, self._tables, self.device)

    def local_positions(self, rank: int) -> Tensor:
        """Return int64 [T/P]: the position within its sequence of each of a rank's rows (rotary embeddings need it)."""
        rows, cu = self.local_rows(rank), self._tables.cu_seqlens
        return rows - cu[torch.searchsorted(cu, rows, right=True) - 1]

    def local_padding(self, rank: int) -> Tensor | None:
        """Return bool [T/P], True on a rank's padded rows; None if no row of the whole batch is padded."""
        start = read_index(rank, self.cp_size, "rank") * self.t_local
        mask = self._tables.padding_rank_major
        return None if mask is None else mask[start : start + self.t_local]

    def global_padding(self) -> Tensor | None:
        """Return bool [T], True on padded rows in natural order; None if no row is padded."""
        return self._tables.padding

    def cu_seqlens_tensor(self) -> Tensor:
        """Return the boundaries of the padded sequences, int32 [N+1]."""
        return self._tables.cu_seqlens

    def segments(self, a2a_size: int, group_index: int) -> SegmentTable:
        """Return what the group of ranks [group_index * a2a_size, (group_index + 1) * a2a_size) owns.

        Built on the host the first time, then kept. With one group the segments are the sequences themselves.
        """
        groups = self._groups(a2a_size)
        key = (self.cp_size // groups, read_index(group_index, groups, "group_index"))
        if key not in self._segments:
            self._segments[key] = self._build_segments(*key)
        return self._segments[key]

    def chains(self, a2a_size: int) -> Chains:
        """Return per sequence the ordered (group_index, slot) of its segments."""
        groups = self._groups(a2a_size)
        if groups not in self._chains:
            self._chains[groups] = build_chains(cut_batch(self._cut, np.asarray(self.cu_seqlens), groups))
        return self._chains[groups]

    def shard(self, x: Tensor, rank: int) -> Tensor:
        """Return a rank's rows of x [T, ...]: [T/P, ...]. x may be on the CPU or on the layout's device."""
        if not isinstance(x, Tensor) or x.dim() < 1:
            raise TypeError(f"x: expected a tensor [{self.t_global}, ...], got {x!r}")
        if x.shape[0] != self.t_global:
            raise ValueError(f"x: has {x.shape[0]} rows; the layout has {self.t_global} (shard takes the whole batch)")
        tables = self._host if x.device.type == "cpu" else self._tables
        return x.index_select(0, self._local_rows(rank, tables, x.device))

    def unshard(self, parts: Sequence[Tensor]) -> Tensor:
        """Return the whole batch [T, ...] in natural order from every rank's rows [T/P, ...], in rank order."""
        if not isinstance(parts, Sequence) or not all(isinstance(part, Tensor) and part.dim() > 0 for part in parts):
            raise TypeError(
                f"parts: expected a sequence of {self.cp_size} tensors [{self.t_local}, ...], got {parts!r}"
            )
        rows = [part.shape[0] for part in parts]
        if rows != [self.t_local] * self.cp_size:
            raise ValueError(f"parts: got rows {rows}; expected {self.cp_size} tensors of {self.t_local} rows each")
        whole = torch.cat(list(parts))
        to_natural = (self._host if whole.device.type == "cpu" else self._tables).to_natural
        return whole if to_natural is None else whole.index_select(0, to_natural)

    def to(self, device: torch.device | str) -> ThdLayout:
        """Return this layout with its tensors on `device`: itself if they are there, else a new one (no sync)."""
        target = _full_device(device)
        if target == self.device:
            return self
        tables = self._host.to(target)
        return ThdLayout(self.kind, self.cp_size, self.cu_seqlens, self.seqlens, target, self._cut, self._host, tables)

    def digest(self) -> int:
        """Return a signed 64-bit number that depends on all of the layout's values (and on no device)."""
        words = hashlib.blake2b(
            f"{self.kind} {self._cut.value} {self.cp_size} {self.num_sequences} ".encode(), digest_size=8
        )
        words.update(np.asarray(self.cu_seqlens + self.seqlens, dtype="<i8").tobytes())
        return int.from_bytes(words.digest(), "little", signed=True)

    def __repr__(self) -> str:
        return (
            f"ThdLayout({self.kind}, cp_size={self.cp_size}, {self.num_sequences} sequences, "
            f"{self.t_global} rows of which {self.t_global - sum(self.seqlens)} padded, {self.device})"
        )

    def _groups(self, a2a_size: int) -> int:
        size = read_size(a2a_size, "a2a_size")
        if self.cp_size % size:
            divisors = [d for d in range(1, self.cp_size + 1) if self.cp_size % d == 0]
            raise ValueError(f"a2a_size: got {size}; it must divide cp_size = {self.cp_size}: one of {divisors}")
        return self.cp_size // size

    def _local_rows(self, rank: int, tables: _Tables, device: torch.device) -> Tensor:
        start = read_index(rank, self.cp_size, "rank") * self.t_local
        if tables.to_rank_major is None:
            return torch.arange(start, start + self.t_local, device=device)
        return tables.to_rank_major[start : start + self.t_local]

    @torch.inference_mode(False)
    def _build_segments(self, a2a_size: int, group_index: int) -> SegmentTable:
        cu = np.asarray(self.cu_seqlens)
        runs = cut_batch(self._cut, cu, self.cp_size // a2a_size).part(group_index)
        bounds = np.concatenate([[0], np.cumsum(runs.length)])
        if a2a_size == self.cp_size:
            to_natural, to_rank_major = self.to_natural, self.to_rank_major
        elif self._host.to_natural is None:
            to_natural = to_rank_major = None
        else:
            places = self._host.to_natural.numpy()[runs.rows(cu)] - group_index * a2a_size * self.t_local
            to_natural, to_rank_major = (_copy(table, self.device) for table in _permutation(places))
        return SegmentTable(
            a2a_size=a2a_size,
            group_index=group_index,
            cu_seqlens=tuple(bounds.tolist()),
            cu_seqlens_tensor=_to_device(torch.from_numpy(bounds.astype(np.int32)), self.device),
            sequence_ids=tuple(runs.sequence.tolist()),
            starts=tuple(runs.start.tolist()),
            to_natural=to_natural,
            to_rank_major=to_rank_major,
        )


@torch.inference_mode(False)  # tensors made under inference mode could not be used in training later
def _build(kind: str, cut: Cut, cu_seqlens: Any, cp_size: Any, seqlens: Any, device: torch.device | str) -> ThdLayout:
    cu = read_cu_seqlens(cu_seqlens)
    ranks = read_size(cp_size, "cp_size", MAX_RANKS)
    check_cut(cut, cu, ranks)
    real = read_real_lengths(seqlens, cu)
    rank_major = cut_batch(cut, cu, ranks).rows(cu)
    to_rank_major, to_natural = _permutation(rank_major)
    padding = padding_rank_major = None
    if real.sum() < cu[-1]:
        padding = torch.ones(int(cu[-1]), dtype=torch.bool)
        padding[torch.from_numpy(expand(cu[:-1], real))] = False
        padding_rank_major = padding[torch.from_numpy(rank_major)]
    host = _Tables(torch.from_numpy(cu.astype(np.int32)), to_rank_major, to_natural, padding, padding_rank_major)
    target = _full_device(device)
    return ThdLayout(kind, ranks, tuple(cu.tolist()), tuple(real.tolist()), target, cut, host, host.to(target))


def _permutation(gather: np.ndarray) -> tuple[Tensor | None, Tensor | None]:
    """Return a permutation and its inverse as tensors, or twice None if it moves nothing."""
    natural = np.arange(gather.size)
    if np.array_equal(gather, natural):
        return None, None
    inverse = np.empty_like(gather)
    inverse[gather] = natural
    return torch.from_numpy(gather), torch.from_numpy(inverse)


def _full_device(device: torch.device | str) -> torch.device:
    try:
        target = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f'device: {device!r} is no device; pass a torch.device, "cpu" or "cuda"') from None
    if target.type == "cuda" and not (torch.cuda.is_initialized() or torch.cuda.is_available()):
        raise ValueError(f"device: got {device!r}, but torch sees no CUDA device here; use the CPU")
    if target.type == "cuda" and target.index is None:
        return torch.device("cuda", torch.cuda.current_device())  # as tensors name it
    return target


def _to_device(table: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda":
        return table.pin_memory().to(device, non_blocking=True)  # from pageable memory the copy would synchronise
    return table.to(device)


def _copy(table: Tensor | None, device: torch.device) -> Tensor | None:
    return None if table is None else _to_device(table, device)


def _build_thd_cp_a2a_perm(cu_seqlens: IntVector, cp_size: int, t_global: int) -> tuple[Tensor, Tensor]:
    """Return (idx, inv): how rows stand after a plain all-to-all of a zigzag batch, and back.

    `idx` int64 [t_global] gathers rank-major rows into natural order (natural = rank_major[idx]); `inv` is its inverse
    (rank_major = natural[inv]). Both are on the device of `cu_seqlens` if that is a tensor, else on the CPU.

    Raises ValueError where `ThdLayout.zigzag` does, and if `cu_seqlens` does not end at `t_global`.

    >>> idx, inv = _build_thd_cp_a2a_perm([0, 8], 2, 8)
    >>> idx.tolist(), inv.tolist()
    ([0, 1, 4, 5, 6, 7, 2, 3], [0, 1, 6, 7, 2, 3, 4, 5])
    """
    cu = read_cu_seqlens(cu_seqlens)
    if cu[-1] != t_global:
        raise ValueError(
            f"cu_seqlens: ends at {cu[-1]}, but t_global is {t_global}; they must be equal, padded rows included"
        )
    device = cu_seqlens.device if isinstance(cu_seqlens, Tensor) else torch.device("cpu")
    layout = ThdLayout.zigzag(cu, cp_size, device=device)
    if layout.to_natural is None or layout.to_rank_major is None:
        same = torch.arange(t_global, device=device)
        return same, same.clone()
    return layout.to_natural, layout.to_rank_major


def _build_head_perm_for_split_sections(
    split_sections: Sequence[int], cp_size: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Return the channel order int64 [sum(split_sections)] that makes one all-to-all do the work of one per section.

    Gathered by it, the channels stand rank by rank: all that rank 0 shall receive (its share of each section, in order
    of sections), then rank 1's, and so on. So rank r's own channels, for instance of a parameter, are the r-th of
    cp_size equal stretches of the result. Cached: the same arguments give the same tensor, do not write to it.

    Raises ValueError for a section that cp_size does not divide.

    >>> _build_head_perm_for_split_sections([4, 2], 2, "cpu").tolist()
    [0, 1, 4, 2, 3, 5]
    """
    sections = tuple(int(width) for width in split_sections)
    return _head_perm(sections, read_size(cp_size, "cp_size"), _full_device(device))


@lru_cache(maxsize=256)
@torch.inference_mode(False)
def _head_perm(sections: tuple[int, ...], cp_size: int, device: torch.device) -> Tensor:
    for index, width in enumerate(sections):
        if width < 0 or width % cp_size:
            raise ValueError(
                f"split_sections: section {index} has width {width}, not divisible by cp_size = {cp_size}; "
                "the number of heads must be a multiple of cp_size"
            )
    channels = torch.arange(sum(sections)).split(list(sections))
    shares = [section.view(cp_size, -1) for section in channels]
    perm = torch.cat(shares, dim=1).reshape(-1) if shares else torch.arange(0)
    return _to_device(perm, device)
