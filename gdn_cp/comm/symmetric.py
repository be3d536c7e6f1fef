"""Memory that every rank of a group can write and read, and the fused mixer's moves through it: one kernel each.

`PeerMemory` holds two equal slots on every rank. A move takes the slot that the move before did not, moves the rows to
their final places at the peers (`gdn_cp.comm.symmetric_triton`), and settles: a barrier on the stream, after which this
rank's kernels see what all peers wrote. Nothing waits on the host.

The rule of reuse. What a move hands out (`transient` buffers) is good for kernels that are enqueued on the same stream
before the next move. Why two slots are enough: while move n+1 fills the other slot, slow ranks may still read what move
n gave; the barrier of n+1 is behind those reads on every rank's stream; so when move n+2 writes the first slot again,
all have finished with it. Whatever the backward needs is therefore copied out by the kernel that reads it, and any
number of micro-batches may be in flight. A replayed CUDA graph starts where the host does not know which slot was last
in use, so the first move of a capture, and all moves after one, begin with a barrier of their own. All of a group's
moves belong on one stream at a time; a change of stream waits for the last move.

Dimensions: P ranks, T rows of the batch (padded rows included), t = T/P local rows, V value width.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, Protocol
from weakref import WeakKeyDictionary, ref

import torch
import torch.distributed as dist
from torch import Tensor

from gdn_cp.comm.layout import ThdLayout
from gdn_cp.comm.symmetric_triton import Route, Section, TileShape, exchange
from gdn_cp.comm.transport import HeadBuffer, MixerColumns, RowBuffer
from gdn_cp.launch import raw_stream

SLOTS = 2
BARRIER_TIMEOUT_MS = 10 * 60 * 1000  # a rank that is gone ends the others with a CUDA error; NCCL waits as long
LINE = 128  # bytes: a tile's rows that begin on a line travel as whole lines
GRANULE = 2 * 2**20  # bytes of a page of device memory, which a slot is a multiple of


@dataclass(frozen=True, eq=False)
class Slot:
    """A piece of every rank's memory: this rank's as bytes, and all ranks' addresses, int64 [P] on the device."""

    local: Tensor
    addresses: Tensor
    _typed: dict[torch.dtype, Tensor] = field(default_factory=dict)

    def view(self, rows: int, columns: int, dtype: torch.dtype, offset: int = 0) -> Tensor:
        """[rows, columns] at the slot's start, or `offset` elements behind it."""
        if dtype not in self._typed:
            with torch.inference_mode(False):  # or training could not use it later
                self._typed[dtype] = self.local.view(dtype)
        typed = self._typed[dtype]
        return typed.as_strided((rows, columns), (columns, 1), typed.storage_offset() + offset)


class Arena(Protocol):
    """Memory of a group's ranks, as the transport needs it."""

    rank: int
    size: int

    def acquire(self, num_bytes: int) -> Slot:
        """The slot of the next move, free on every rank for work enqueued from now on. Equal on all ranks."""
        ...

    def slot_of(self, x: Tensor) -> Slot:
        """The slot at whose start x is."""
        ...

    def settle(self) -> None:
        """What any rank enqueued before is seen by what this rank enqueues after."""
        ...


class PeerMemory:
    """The group's memory on GPUs that reach each other over NVLink, by torch's symmetric memory.

    The first move, and every move larger than all before, allocates and is a meeting of all ranks on the host; sizes
    come from the layout and are equal on all ranks, so they meet by construction. Call once before capturing a graph.

    Args:
        group: the ranks, each with its own GPU (`gdn_cp.comm.peer_vote.peer_memory` asks whether they can).
        device: this rank's.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self.rank, self.size, self.device = group.rank(), group.size(), device
        self._group = ref(group)  # kept with the group, and so must not keep it
        self._handle: Any = None
        self._slots: list[Slot] = []
        self._capacity = 0
        self._last = 0
        self._captured = False
        self._capture: int | None = None
        self._stream: torch.cuda.Stream | None = None
        self._kept: list[Any] = []

    @property
    def num_bytes(self) -> int:
        """What the slots take of this rank's memory, which torch's allocator does not count."""
        return SLOTS * self._capacity

    def open(self) -> None:
        """Allocate a first, small piece. All ranks call it; RuntimeError where the system forbids it."""
        self._grow(GRANULE)

    def acquire(self, num_bytes: int) -> Slot:
        """See `Arena`.

        Raises:
            RuntimeError: where memory would have to be allocated inside the capture of a CUDA graph.
        """
        capturing = torch.cuda.is_current_stream_capturing()
        if num_bytes > self._capacity:
            if capturing:
                raise RuntimeError(
                    f"peer memory: a move of {num_bytes} bytes does not fit in {self._capacity}, and nothing can be "
                    "allocated while a CUDA graph is captured; run the layer once on a batch of this size before"
                )
            self._grow(num_bytes)
        if self._stream is None or raw_stream(self.device) != self._stream.cuda_stream:
            stream = torch.cuda.current_stream(self.device)
            if self._stream is not None and not capturing:
                stream.wait_stream(self._stream)
            self._stream = stream
        before, self._capture = self._capture, capture_number(raw_stream(self.device)) if capturing else None
        self._captured = self._captured or capturing
        # Behind the first move of a capture all is as it was when captured.
        if self._captured and (self._capture is None or self._capture != before):
            self.settle()
        self._last = (self._last + 1) % SLOTS
        return self._slots[self._last]

    def slot_of(self, x: Tensor) -> Slot:
        """See `Arena`."""
        return next(slot for slot in self._slots if slot.local.data_ptr() == x.data_ptr())

    def settle(self) -> None:
        """See `Arena`: a kernel that signals every peer and waits for each one's signal."""
        self._handle.barrier(0, BARRIER_TIMEOUT_MS)

    def bytes_of(self, rank: int, num_bytes: int) -> Tensor:
        """The first bytes of another rank's memory, as this one reads and writes them; allocated by the first move."""
        return self._handle.get_buffer(rank, (num_bytes,), torch.uint8)

    def _grow(self, num_bytes: int) -> None:
        """Allocate slots of at least `num_bytes` on all ranks, which come here together."""
        import torch.distributed._symmetric_memory as symm_mem

        group = self._group()
        assert group is not None
        torch.cuda.synchronize(self.device)  # peers may be busy with the old slots until their last barrier
        if self._captured:
            self._kept.append((self._handle, self._slots))  # graphs hold their addresses
        self._capacity = -(-num_bytes // GRANULE) * GRANULE
        memory = symm_mem.empty(SLOTS * self._capacity, dtype=torch.uint8, device=self.device)
        handle: Any = symm_mem.rendezvous(memory, group)  # behind it all ranks are idle: the old slots may go
        # A tensor need not be at the start of what peers have mapped.
        offset = memory.data_ptr() - handle.buffer_ptrs[self.rank]
        offsets = torch.tensor([offset], device=self.device)
        everyone = offsets.new_empty(self.size)
        dist.all_gather_into_tensor(everyone, offsets, group=group)
        starts = [base + start for base, start in zip(handle.buffer_ptrs, everyone.tolist(), strict=True)]
        self._handle = handle
        self._slots = []
        for index in range(SLOTS):
            addresses = torch.tensor([start + index * self._capacity for start in starts], device=self.device)
            self._slots.append(Slot(memory.narrow(0, index * self._capacity, self._capacity), addresses))
        torch.cuda.synchronize(self.device)


def capture_number(stream: int) -> int | None:
    """Which of this process's captures a stream is in, by the driver; None where it does not say."""
    active, status, number = 1, ctypes.c_int(), ctypes.c_uint64()
    try:
        ask = ctypes.CDLL("libcuda.so.1").cuStreamGetCaptureInfo_v2
    except (OSError, AttributeError):
        return None
    failed = ask(ctypes.c_void_p(stream), ctypes.byref(status), ctypes.byref(number), None, None, None)
    return number.value if not failed and status.value == active else None


_rows: WeakKeyDictionary[ThdLayout, dict[tuple[int, int], Tensor]] = WeakKeyDictionary()


def natural_rows(layout: ThdLayout, a2a_size: int, group_index: int) -> Tensor:
    """int32 [Tg] on the layout's device: for each row of the group, rank by rank, its place in the order of the
    group's segments (the natural order with one group); -1 - place where it is padding. Kept with the layout.

    >>> natural_rows(ThdLayout.zigzag([0, 8], 2, seqlens=[7]), 2, 0).tolist()
    [0, 1, 6, -8, 2, 3, 4, 5]
    """
    made = _rows.setdefault(layout, {})
    key = (a2a_size, group_index)
    if key not in made:
        with torch.inference_mode(False):
            table, t = layout.segments(a2a_size, group_index), layout.t_local
            rows = table.to_rank_major
            if rows is None:
                rows = torch.arange(a2a_size * t, device=layout.device)
            ranks = range(group_index * a2a_size, (group_index + 1) * a2a_size)
            padding = [mask for rank in ranks if (mask := layout.local_padding(rank)) is not None]
            made[key] = (torch.where(torch.cat(padding), -1 - rows, rows) if padding else rows).to(torch.int32)
    return made[key]


@dataclass(frozen=True, eq=False)
class PeerTransport:
    """The moves of `gdn_cp.comm.transport` through peers' memory. Rows arrive in natural order, padded ones as zeros.

    Attributes:
        columns: with `ranks` the arena's size.
        arena: the memory.
        rows: int32 [T] of `natural_rows`.
        shape: tiles of the kernel; None: the usual ones.
    """

    columns: MixerColumns
    arena: Arena
    rows: Tensor
    shape: TileShape | None = None

    @cached_property
    def _own_rows(self) -> Tensor:
        t = self.rows.shape[0] // self.columns.ranks
        return self.rows.narrow(0, self.arena.rank * t, t)

    def _acquire(self, dtype: torch.dtype) -> Slot:
        """A slot for the largest of the moves, so that the first of them allocates for all."""
        return self.arena.acquire(self.rows.shape[0] * _row(self.columns, dtype) * dtype.itemsize)

    def _rows_in(self, slot: Slot, dtype: torch.dtype, *, transient: bool) -> RowBuffer:
        data = slot.view(self.rows.shape[0], _row(self.columns, dtype), dtype)
        return RowBuffer(data, None, self.columns.share_conv, transient=transient)

    def send_in(self, projected: Tensor, keep_z: bool) -> tuple[RowBuffer, Tensor]:
        """See `Transport`: a push, which copies z too."""
        c = self.columns
        z = projected.narrow(1, c.conv, c.v)
        kept = torch.empty(z.shape, dtype=z.dtype, device=z.device) if keep_z else None
        route, slot = _way_in(c, self.arena.rank, projected.dtype), self._acquire(projected.dtype)
        exchange(projected, slot.addresses, route, self._own_rows, kept=kept, kept_column=c.conv, shape=self.shape)
        self.arena.settle()
        return self._rows_in(slot, projected.dtype, transient=True), z if kept is None else kept

    def return_out(self, o: Tensor) -> HeadBuffer:
        """See `Transport`: a push of each peer's rows out of o."""
        route, slot = _way_out(self.columns, self.arena.rank), self._acquire(o.dtype)
        exchange(o, slot.addresses, route, self.rows, shape=self.shape)
        self.arena.settle()
        data = slot.view(o.shape[0] // self.columns.ranks, self.columns.v, o.dtype)
        return HeadBuffer(data.unsqueeze(0), transient=True)

    def out_grad_buffer(self, like: Tensor) -> Tensor:
        """See `Transport`: ordinary memory, all heads in one block."""
        return torch.empty(1, like.shape[0], self.columns.v, dtype=like.dtype, device=like.device)

    def send_out_grad(self, buffer: Tensor) -> Tensor:
        """See `Transport`: a push."""
        route, slot = _out_grad_way(self.columns, self.arena.rank), self._acquire(buffer.dtype)
        exchange(buffer[0], slot.addresses, route, self._own_rows, shape=self.shape)
        self.arena.settle()
        return slot.view(self.rows.shape[0], route.far_row, buffer.dtype)

    def in_grad_buffer(self, like: Tensor) -> RowBuffer:
        """See `Transport`: a slot, out of which the peers will read. No move may come before `return_in_grad`."""
        return self._rows_in(self._acquire(like.dtype), like.dtype, transient=False)

    def return_in_grad(self, buffer: RowBuffer, d_projected: Tensor, dz: Tensor | None = None) -> None:
        """See `Transport`: a pull, which needs no memory beside `d_projected`, and copies dz too."""
        slot = self.arena.slot_of(buffer.data)
        route = _way_in(self.columns, self.arena.rank, d_projected.dtype)
        self.arena.settle()
        options = {"pull": True, "kept": dz, "kept_column": self.columns.conv, "shape": self.shape}
        exchange(d_projected, slot.addresses, route, self._own_rows, **options)


def _row(c: MixerColumns, dtype: torch.dtype) -> int:
    """Columns from row to row of a share: whole lines."""
    line = LINE // dtype.itemsize
    return -(-c.share_width // line) * line


@lru_cache(maxsize=64)
def _way_in(c: MixerColumns, rank: int, dtype: torch.dtype) -> Route:
    """Between the projection (near) and shares in natural order (far)."""
    qk, v, heads = c.qk // c.ranks, c.v // c.ranks, c.heads // c.ranks
    sections = (
        Section(0, qk, 0, qk),
        Section(c.qk, qk, qk, qk),
        Section(2 * c.qk, v, 2 * qk, v),
        Section(c.gates, heads, c.share_conv, heads, parts=2, apart=c.heads),
    )
    return Route(sections, _row(c, dtype), c.ranks, rank)


@lru_cache(maxsize=64)
def _way_out(c: MixerColumns, rank: int) -> Route:
    """Between o of this rank's heads in natural order (near) and each rank's rows of all heads (far)."""
    share = c.v // c.ranks
    return Route((Section(0, 0, rank * share, share),), c.v, c.ranks, rank, natural_near=True)


@lru_cache(maxsize=64)
def _out_grad_way(c: MixerColumns, rank: int) -> Route:
    """Between this rank's rows of all heads (near) and a share of heads in natural order (far)."""
    share = c.v // c.ranks
    return Route((Section(0, share, 0, share),), share, c.ranks, rank)
