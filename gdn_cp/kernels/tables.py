"""Which rows each program of the delta-rule kernels works on: chunk and piece tables, built on the device.

A packed batch is cut twice. A *chunk* is up to 64 rows of one sequence, the unit of the parallel kernels; chunks start
at the start of their sequence. A *piece* is a run of chunks of one sequence, the unit of kernels that walk along it.
The sequence lengths are on the device and the host must not wait for them, so tables are sized by a bound that follows
from shapes alone, and entries past the end carry sequence -1: programs that meet one return at once.

Dimensions: B batch, T tokens of a row of the batch, N sequences, NT chunks (bound), NP pieces (bound).
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn_cp.kernels.configs import on_device, options
from gdn_cp.launch import raw_stream, run_kernel, thread

if TYPE_CHECKING:
    from gdn_cp.kernels.compile_report import CompileCase

CHUNK = 64


@dataclass(frozen=True)
class ChunkTables:
    """Tables of one batch. `chunks` and `pieces` are int32 on the device of the batch.

    chunks [NT, 4]: sequence (-1: none), first row, number of valid rows (1..64), index of the chunk in its sequence.
    pieces [NP, 8]: sequence (-1: none), first chunk, number of chunks (0 for an empty sequence), first row, end row,
        1 if first of its sequence, 1 if last of its sequence, number of pieces after it in its sequence.
    Rows count through the flattened batch: row b*T + t. For example lengths 100 and 70 with pieces of one chunk give
        chunks (0,0,64,0) (0,64,36,1) (1,100,64,0) (1,164,6,1); pieces (0,0,1,0,64,1,0,1) (0,1,1,64,100,0,1,0) ...
    """

    chunks: Tensor
    pieces: Tensor
    num_sequences: int

    @cached_property
    def num_chunks(self) -> int:
        """Bound on the number of chunks."""
        return self.chunks.shape[0]

    @cached_property
    def num_pieces(self) -> int:
        """Bound on the number of pieces."""
        return self.pieces.shape[0]


@triton.jit
def _boundary(pointer, mask, seqlen):
    """Entries of cu_seqlens as int32, cut to 0..seqlen."""
    return tl.minimum(tl.maximum(tl.load(pointer, mask=mask, other=0), 0), seqlen).to(tl.int32)


@triton.jit(do_not_specialize=["seqlen", "n_seq", "nt", "n_pieces", "piece_chunks"])
def _tables_kernel(
    cu_ptr, chunks_ptr, pieces_ptr, seqlen, n_seq, nt, n_pieces, piece_chunks,
    VARLEN: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program n writes the entries of sequence n, after counting those of the sequences before it; the last one also
    marks the unused entries. Every program repeats the count: a sum over n lengths is cheaper than a second launch.

    The host has not seen cu_seqlens: boundaries are cut to 0..seqlen and entries to the tables, so that wrong ones
    give wrong numbers but let no kernel leave its memory.
    """
    n = tl.program_id(0)
    first_chunk = 0
    first_piece = 0
    if VARLEN:
        for start in range(0, n, BLOCK):
            ids = start + tl.arange(0, BLOCK)
            mask = ids < n
            lengths = _boundary(cu_ptr + ids + 1, mask, seqlen) - _boundary(cu_ptr + ids, mask, seqlen)
            counts = (tl.maximum(lengths, 0) + CHUNK - 1) // CHUNK
            pieces = tl.maximum((counts + piece_chunks - 1) // piece_chunks, 1)
            first_chunk += tl.sum(counts, 0)
            first_piece += tl.sum(tl.where(mask, pieces, 0), 0)
        first_row = _boundary(cu_ptr + n, True, seqlen)
        end_row = tl.maximum(_boundary(cu_ptr + n + 1, True, seqlen), first_row)
        count = (end_row - first_row + CHUNK - 1) // CHUNK
    else:
        count = (seqlen + CHUNK - 1) // CHUNK
        first_row = n * seqlen
        end_row = first_row + seqlen
        first_chunk = n * count
        first_piece = n * tl.maximum((count + piece_chunks - 1) // piece_chunks, 1)
    n_own = tl.maximum((count + piece_chunks - 1) // piece_chunks, 1)
    for start in range(0, count, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        mask = (ids < count) & (first_chunk + ids < nt)
        rows = first_row + ids * CHUNK
        entry = chunks_ptr + (first_chunk + ids) * 4
        tl.store(entry, tl.zeros_like(ids) + n, mask=mask)
        tl.store(entry + 1, rows, mask=mask)
        tl.store(entry + 2, tl.minimum(end_row - rows, CHUNK), mask=mask)
        tl.store(entry + 3, ids, mask=mask)
    for start in range(0, n_own, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        mask = (ids < n_own) & (first_piece + ids < n_pieces)
        entry = pieces_ptr + (first_piece + ids) * 8
        chunk = ids * piece_chunks
        size = tl.minimum(count - chunk, piece_chunks)
        row = first_row + chunk * CHUNK
        tl.store(entry, tl.zeros_like(ids) + n, mask=mask)
        tl.store(entry + 1, first_chunk + chunk, mask=mask)
        tl.store(entry + 2, size, mask=mask)
        tl.store(entry + 3, row, mask=mask)
        tl.store(entry + 4, tl.minimum(row + size * CHUNK, end_row), mask=mask)
        tl.store(entry + 5, (ids == 0).to(tl.int32), mask=mask)
        tl.store(entry + 6, (ids == n_own - 1).to(tl.int32), mask=mask)
        tl.store(entry + 7, n_own - 1 - ids, mask=mask)
    if n == n_seq - 1:
        for start in range(first_chunk + count, nt, BLOCK):
            ids = start + tl.arange(0, BLOCK)
            tl.store(chunks_ptr + ids * 4, tl.full((BLOCK,), -1, tl.int32), mask=ids < nt)
        for start in range(first_piece + n_own, n_pieces, BLOCK):
            ids = start + tl.arange(0, BLOCK)
            tl.store(pieces_ptr + ids * 8, tl.full((BLOCK,), -1, tl.int32), mask=ids < n_pieces)


_Key = tuple[object, ...]
_cache: OrderedDict[_Key, tuple[weakref.ref[Tensor] | None, ChunkTables]] = OrderedDict()
_CACHE_SIZE = 16
# Tables that a CUDA graph reads: its replays know nothing of the cache's.
_captured: dict[_Key, ChunkTables] = {}


def even_rows(x: Tensor) -> Tensor:
    """x [B, T, ...] with a contiguous last dimension and rows b*T + t at distance x.stride(1); a copy where needed."""
    if x.stride(-1) == 1 and (x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1)):
        return x
    # Not contiguous(), to which the stride of a dimension of size 1 is all the same: with T = 1 it may be any.
    return x.clone(memory_format=torch.contiguous_format)


def dense(x: Tensor | None) -> Tensor | None:
    """x as a kernel reads a parameter or a state, without strides; None stays None."""
    return None if x is None else x.contiguous()


def _stream(device: torch.device) -> int:
    return raw_stream(device) if device.type == "cuda" else 0


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def chunk_tables(
    batch: int, seqlen: int, cu_seqlens: Tensor | None, device: torch.device, piece_chunks: int = 0
) -> ChunkTables:
    """Tables of a batch, without a host synchronisation.

    Args:
        batch: B; 1 with `cu_seqlens`.
        seqlen: T, tokens of one row of the batch.
        cu_seqlens: int32 or int64 [N+1] on `device`, or None for B sequences of T tokens.
        device: where the tables go.
        piece_chunks: chunks of a piece; 0: a sequence is one piece.

    Tables are cached by the identity and version of `cu_seqlens`, so that the layers of a model share them. A cached
    table is not taken while a CUDA graph is captured if it was built from `cu_seqlens`: a replay may change its values.
    Another that is taken then, one per shape and device, is never freed: the graph goes on reading it.
    """
    recorder = thread.recorder
    if recorder is not None:
        find = partial(_find, batch, seqlen, device, piece_chunks)
        chunks, pieces = recorder.look_up(find, cu_seqlens)
        return ChunkTables(chunks, pieces, batch if cu_seqlens is None else cu_seqlens.numel() - 1)
    capturing = _is_capturing(device)
    shape_key = (batch, seqlen, piece_chunks, device, _stream(device))
    if cu_seqlens is None:
        key: _Key | None = shape_key
    elif capturing or cu_seqlens.is_inference():  # no version counter: a change would go unseen
        key = None
    else:
        key = (*shape_key, id(cu_seqlens), cu_seqlens._version)
    if key is not None and key in _cache:
        owner, tables = _cache[key]
        if owner is None or owner() is cu_seqlens:
            _cache.move_to_end(key)
            if capturing:
                _captured[key] = tables
            return tables
    tables = _build(batch, seqlen, cu_seqlens, device, piece_chunks)
    if key is not None and not capturing:
        _cache[key] = (None if cu_seqlens is None else weakref.ref(cu_seqlens), tables)
        while len(_cache) > _CACHE_SIZE:
            _cache.popitem(last=False)
    return tables


def _find(
    batch: int, seqlen: int, device: torch.device, piece_chunks: int, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    tables = chunk_tables(batch, seqlen, cu_seqlens, device, piece_chunks)
    return tables.chunks, tables.pieces


def _build(batch: int, seqlen: int, cu_seqlens: Tensor | None, device: torch.device, piece_chunks: int) -> ChunkTables:
    if cu_seqlens is None:
        n_seq = batch
        n_chunks = batch * -(-seqlen // CHUNK)
    else:
        n_seq = cu_seqlens.numel() - 1
        n_chunks = (seqlen + (CHUNK - 1) * n_seq) // CHUNK
    n_pieces = n_seq + (n_chunks // piece_chunks if piece_chunks else 0)
    chunks = torch.empty(n_chunks, 4, dtype=torch.int32, device=device)
    pieces = torch.empty(n_pieces, 8, dtype=torch.int32, device=device)
    if n_seq:
        with on_device(device):
            run_kernel(_tables_kernel, n_seq,
                dense(cu_seqlens), chunks, pieces, seqlen, n_seq, n_chunks, n_pieces, piece_chunks or 2**30,
                **options(4, 1, VARLEN=cu_seqlens is not None, CHUNK=CHUNK, BLOCK=1024),
            )  # fmt: skip
    return ChunkTables(chunks, pieces, n_seq)


def compile_cases() -> list[CompileCase]:
    """The table kernel for packed and for equal sequences."""
    from gdn_cp.kernels.compile_report import CompileCase

    numbers = dict.fromkeys(("seqlen", "n_seq", "nt", "n_pieces", "piece_chunks"), "i32")
    return [
        CompileCase(
            name=f"tables/{'varlen' if varlen else 'equal'}",
            kernel=_tables_kernel,
            signature={"chunks_ptr": "*i32", "pieces_ptr": "*i32"} | numbers | ({"cu_ptr": "*i32"} if varlen else {}),
            constexprs={"VARLEN": varlen, "CHUNK": CHUNK, "BLOCK": 1024} | ({} if varlen else {"cu_ptr": None}),
        )
        for varlen in (True, False)
    ]
