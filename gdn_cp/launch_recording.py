"""Launching a sequence of kernels again without the Python that prepared it.

What a function launches follows from the shapes of its tensors and its settings: which kernels, with which constants,
on which of its tensors and of the memory that it allocates. So that is recorded once for each shape, and later calls
only put addresses in: a fifth of the host's time, which at 16,384 tokens on four GPUs is longer than the GPU's.

It is what a CUDA graph does, but for addresses: they may be others each time, so nothing is copied to where a graph
wants it, memory comes from PyTorch's allocator as ever, and the launches may themselves be captured in a graph.
What `replayable` takes: a function of tensors and hashable settings that returns tensors, launches kernels by
`run_kernel` and allocates by `torch.empty` and the like, and does nothing else that matters, neither with tensors nor
to what outlives the call. What it does with tensors besides is found out while it is recorded, and then it is always
called itself.

The memory that no result lies in comes in one piece, laid out by the times between which each block was in use. So a
function that lets go of what it no longer needs has the peak that it has without a recording, but for its results:
all are there from its beginning.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton import knobs

from gdn_cp.kernels.piece_plan import PIECES_VARIABLE
from gdn_cp.kernels.tuned import LAUNCHES_VARIABLE
from gdn_cp.launch import DESCRIPTORS, thread, watched
from gdn_cp.launch_bare import BareLauncher, MapsOf
from gdn_cp.memory_plan import Lifetime, place_blocks

Tensors = tuple[Tensor | None, ...]

MAX_RECORDINGS = 256  # more would be a leak, so all are forgotten then

_aten = torch.ops.aten
_ALLOCATIONS = {
    _aten.empty.memory_format,
    _aten.empty_like.default,
    _aten.empty_strided.default,
    _aten.new_empty.default,
    _aten.new_empty_strided.default,
}


class _Launch(NamedTuple):
    """One kernel: its values with descriptors unfolded, and those that are addresses, or maps of what is there."""

    bare: BareLauncher
    programs: int
    values: list[Any]
    addresses: list[tuple[int, int, int]]  # (which value, source, offset in bytes)
    maps: list[tuple[int, int, int, MapsOf]]


class _Lookup(NamedTuple):
    """Tables that follow from a tensor's content: what finds them, given the source-th tensor (-1: none)."""

    find: Callable[[Tensor | None], tuple[Tensor, ...]]
    source: int


class _Result(NamedTuple):
    """A result: all of a source if `shape` is None, else a view of it."""

    source: int
    shape: torch.Size | None
    strides: tuple[int, ...]
    offset: int


class Recording(NamedTuple):
    """Launches to be done again, the memory they need, and what is returned.

    Sources of addresses are, in this order: the inputs, tables that were looked up, results' memory, and temporary
    memory.
    """

    device: torch.device
    lookups: list[_Lookup]
    allocations: list[tuple[torch.Size, torch.dtype]]
    temporary_bytes: int
    launches: list[_Launch]
    results: list[_Result | None]

    def replay(self, tensors: Tensors) -> Tensors:
        """Launch for other tensors of the same shapes, on the current stream."""
        device, sources = self.device, [*tensors]
        for find, source in self.lookups:
            sources += find(tensors[source] if source >= 0 else None)
        sources += [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in self.allocations]
        if self.temporary_bytes:
            sources.append(torch.empty(self.temporary_bytes, dtype=torch.uint8, device=device))
        starts = [0 if x is None else x.data_ptr() for x in sources]
        driver: Any = triton.runtime.driver.active
        stream = driver.get_current_stream(device.index or 0)
        for bare, programs, recorded, addresses, maps in self.launches:
            values = recorded.copy()
            for index, source, offset in addresses:
                values[index] = starts[source] + offset
            for index, source, offset, maps_of in maps:
                values[index] = maps_of.unfold(starts[source] + offset)[0]
            bare.launch(programs, stream, values)
        return tuple([None if result is None else _take(sources, result) for result in self.results])


def _take(sources: list[Tensor | None], result: _Result) -> Tensor | None:
    x = sources[result.source]
    if result.shape is None or x is None:
        return x
    return x.as_strided(result.shape, result.strides, result.offset)


class _Block(NamedTuple):
    """What was allocated: bytes from an address on, and as what."""

    address: int
    num_bytes: int
    storage: StorageWeakRef
    shape: torch.Size
    dtype: torch.dtype


class Recorder(TorchDispatchMode):
    """Follows a function's launches and allocations; `reason` says why they cannot be done again, "" if they can.

    While it runs, sources are the inputs, then tables, from FIRST_TABLE on, and all blocks, from FIRST_BLOCK on.
    """

    FIRST_TABLE, FIRST_BLOCK = 1_000, 1_000_000

    def __init__(self, tensors: Tensors) -> None:
        super().__init__()
        self.reason = ""
        assert tensors[0] is not None
        self._device, self._inputs = tensors[0].device, tensors
        self._lookups: list[_Lookup] = []
        self._tables: list[Tensor] = []
        self._blocks: list[_Block] = []
        self._live: list[int] = []  # which blocks somebody holds
        self._died: dict[int, int] = {}
        self._launches: list[_Launch] = []
        given = [x.data_ptr() for x in tensors if x is not None and x.numel()]
        if len(set(given)) < len(given):
            self.refuse("two tensors begin at the same address")

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Else torch's compiler would be imported, for seconds. What it compiles is never recorded."""
        return False

    def refuse(self, reason: str) -> None:
        """See `gdn_cp.launch.Recorder`."""
        self.reason = self.reason or reason

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in _ALLOCATIONS:
            self._allocated(out)
        elif not func.is_view or _is_copy(out, args[0]):  # contiguous() may be either, in inference mode
            self.refuse(f"{func} is called")
        return out

    def look_up(self, find: Callable[[Tensor | None], tuple[Tensor, ...]], of: Tensor | None) -> tuple[Tensor, ...]:
        """See `gdn_cp.launch.Recorder`."""
        thread.recorder = None
        try:
            with _disable_current_modes():
                found = find(of)
        finally:
            thread.recorder = self
        source = -1 if of is None else next((i for i, x in enumerate(self._inputs) if x is of), None)
        if source is None:
            self.refuse("tables are looked up for a tensor that is no input")
        elif not any(found[0] is x for x in self._tables):
            self._lookups.append(_Lookup(find, source))
            self._tables += found
        return found

    def launched(self, bare: BareLauncher, programs: int, args: tuple[Any, ...], values: list[Any]) -> None:
        """See `gdn_cp.launch.Recorder`."""
        flat, begins, maps = bare.unfold(values)
        addresses, described = [], []
        for index, x in enumerate(args):
            of = x.base if isinstance(x, DESCRIPTORS) else x
            if not isinstance(of, Tensor) or not of.numel():
                continue
            place = self._find(of.data_ptr())
            if place is None:
                self.refuse("a kernel is given memory that is neither an input's nor allocated here")
                return
            if of is x:
                addresses.append((begins[index], *place))
            else:
                described.append((begins[index], *place, maps[index]))
        self._launches.append(_Launch(bare, programs, flat, addresses, described))

    def _allocated(self, x: Tensor) -> None:
        self._bury()
        storage = x.untyped_storage()
        if x.storage_offset() or not x.is_contiguous():
            self.refuse("memory is allocated in another order")
        self._live.append(len(self._blocks))
        self._blocks.append(_Block(storage.data_ptr(), storage.nbytes(), StorageWeakRef(storage), x.shape, x.dtype))

    def _bury(self) -> None:
        """Note which blocks nobody holds any more."""
        for index in [index for index in self._live if self._blocks[index].storage.expired()]:
            self._live.remove(index)
            self._died[index] = len(self._blocks)

    def _find(self, address: int) -> tuple[int, int] | None:
        """(source, offset) of an address."""
        given = {i: x for i, x in enumerate(self._inputs) if x is not None and x.numel()}
        given |= dict(enumerate(self._tables, self.FIRST_TABLE))
        for source, x in given.items():
            if x.data_ptr() == address:
                return source, 0
        for index in reversed(self._live):
            offset = address - self._blocks[index].address
            if 0 <= offset < self._blocks[index].num_bytes:
                return self.FIRST_BLOCK + index, offset
        inside = [
            (source, address - x.data_ptr()) for source, x in given.items() if 0 < address - x.data_ptr() < _span(x)
        ]
        return inside[0] if len(inside) == 1 else None  # in views of one memory it might move relative to another

    def finish(self, results: Tensors) -> Recording | None:
        """What to do again for such results, once the function has returned."""
        self._bury()
        owners: dict[int, int] = {}  # of blocks that results lie in: the place among those
        first_result = len(self._inputs) + len(self._tables)
        found = [self._describe(x, owners, first_result) for x in results]
        if set(self._live) != set(owners):
            self.refuse("somebody keeps memory that is not returned")
        if self.reason or not self._launches:
            return None
        rest = [index for index in range(len(self._blocks)) if index not in owners]
        offsets, temporary_bytes = place_blocks(
            [Lifetime(self._blocks[index].num_bytes, index, self._died[index]) for index in rest]
        )
        moved = {self.FIRST_TABLE + i: (len(self._inputs) + i, 0) for i in range(len(self._tables))}
        moved |= {self.FIRST_BLOCK + index: (first_result + place, 0) for index, place in owners.items()}
        behind = first_result + len(owners)
        moved |= {self.FIRST_BLOCK + index: (behind, at) for index, at in zip(rest, offsets, strict=True)}
        for launch in self._launches:
            launch.addresses[:] = [_moved(moved, *entry) for entry in launch.addresses]
            launch.maps[:] = [_moved(moved, *entry) for entry in launch.maps]
        return Recording(
            device=self._device,
            lookups=self._lookups,
            allocations=[(self._blocks[index].shape, self._blocks[index].dtype) for index in owners],
            temporary_bytes=temporary_bytes,
            launches=self._launches,
            results=found,
        )

    def _describe(self, x: Tensor | None, owners: dict[int, int], first_result: int) -> _Result | None:
        if x is None:
            return None
        for index, given in enumerate(self._inputs):
            if given is x:
                return _Result(index, None, (), 0)
        address = x.untyped_storage().data_ptr()
        for index in self._live:
            block = self._blocks[index]
            if block.address == address and block.dtype == x.dtype and x.numel():
                source = first_result + owners.setdefault(index, len(owners))
                whole = x.shape == block.shape and x.is_contiguous()
                return _Result(source, None if whole else x.shape, x.stride(), int(x.storage_offset()))
        self.refuse("a result is neither an input nor allocated here")
        return None


def _is_copy(out: Any, x: Tensor) -> bool:
    """Whether what a view of x is asked for gave lies elsewhere."""
    views = (out,) if isinstance(out, Tensor) else out
    return any(view.untyped_storage()._cdata != x.untyped_storage()._cdata for view in views)


def _span(x: Tensor) -> int:
    """Bytes from the first element to behind the last."""
    return (1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))) * x.element_size()


def _moved(moved: dict[int, tuple[int, int]], index: int, source: int, offset: int, *rest: Any) -> Any:
    source, begin = moved.get(source, (source, 0))
    return index, source, begin + offset, *rest


_recordings: dict[Hashable, Recording | str | None] = {}
"""For each function, its settings and its tensors' shapes: the recording, why there can be none, or None before it is
known whether there will be another call."""

_UNSEEN = object()


def replayable(function: Callable[..., Tensors], tensors: Tensors, settings: tuple[Hashable, ...]) -> Tensors:
    """function(*tensors, *settings), whose launches are recorded at the second call and done again at later ones.

    Args:
        function: see the module; what it returns is all that it allocates and that lives on.
        tensors: all on the current device; some may be None, but not the first. The function may write to them. Where
            one begins inside another, what the function launches on that address is taken to be on the former.
        settings: all else that it depends on, but for the environment variables GDN_CP_LAUNCHES and
            GDN_CP_PIECE_CHUNKS. Those that are equal (1, 1.0 and True) must mean the same.
    """
    if torch._C._len_torch_dispatch_stack() or watched():
        return function(*tensors, *settings)
    shapes = [None if x is None else (x.dtype, x.shape, x.stride(), x.data_ptr() & 15) for x in tensors]
    device = tensors[0].device if tensors[0] is not None else None
    variables = os.environ.get(LAUNCHES_VARIABLE), os.environ.get(PIECES_VARIABLE)
    key = (function, settings, device, knobs.runtime.debug, variables, *shapes)
    found: Any = _recordings.get(key, _UNSEEN)  # at once: another thread may forget all
    if found is _UNSEEN:
        if len(_recordings) >= MAX_RECORDINGS:
            _recordings.clear()
        _recordings[key] = None
        return function(*tensors, *settings)
    if isinstance(found, Recording):
        return found.replay(tensors)
    if found is not None:
        return function(*tensors, *settings)
    return _record(key, function, tensors, settings)


def _record(
    key: Hashable, function: Callable[..., Tensors], tensors: Tensors, settings: tuple[Hashable, ...]
) -> Tensors:
    recorder = Recorder(tensors)
    thread.recorder = recorder
    try:
        with recorder:
            results = function(*tensors, *settings)
    finally:
        thread.recorder = None
    _recordings[key] = recorder.finish(results) or recorder.reason or "it launches nothing"
    return results
