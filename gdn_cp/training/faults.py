"""Faults that would be silence or a bare message, as errors that say where: which rank, step, phase and batch.

- ranks of a model that were given different batches, which would hang in the first exchange, or train on nonsense;
- a rank that stands still, alone or in a collective that another rank never joins;
- a batch that does not fit into memory.

Nothing here acts on the numbers of a run.
"""

from __future__ import annotations

import faulthandler
import hashlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist

from gdn_cp.comm.checks import assert_same_on_all_ranks
from gdn_cp.comm.layout import ThdLayout
from gdn_cp.training.metrics import peak_memory_gib
from gdn_cp.training.packing import PackedBatch

Phase = Literal["start", "data", "forward", "backward", "reduce", "optimizer", "checkpoint", "finish"]
STALLED = 3  # exit code of a rank that its watchdog ended; 2 is a choice that cannot work
_LAST_WORDS_SECONDS = 1.0  # between report and end: neighbours stuck in the same collective report in this time
_GIL_NET = 1.5  # times the limit: when the interpreter itself stands still, faulthandler's C thread ends the process


@dataclass(frozen=True)
class BatchSizes:
    """The sizes of a pack: real tokens, sequences, the longest of them, and rows of one rank, padding included."""

    tokens: int
    sequences: int
    longest: int
    rows_per_rank: int

    @classmethod
    def of(cls, batch: PackedBatch, cp_size: int) -> BatchSizes:
        """Sizes of a pack that `cp_size` ranks share."""
        return cls(sum(batch.seqlens), len(batch.seqlens), max(batch.seqlens), batch.cu_seqlens[-1] // cp_size)

    def __str__(self) -> str:
        return (
            f"{self.tokens:,} tokens in {self.sequences} sequences, the longest of {self.longest:,}; "
            f"{self.rows_per_rank:,} rows on each rank"
        )


@dataclass
class Progress:
    """Where this rank stands; written by the training loop, read by whoever must report a fault."""

    rank: int = 0
    step: int = 0
    phase: Phase = "start"
    batch: BatchSizes | None = None
    beats: int = 0
    on_beat: Callable[[], None] = field(default=lambda: None, repr=False)

    def enter(self, phase: Phase, step: int | None = None) -> None:
        """A phase begins (and with `step`, a step): a sign of life."""
        self.phase = phase
        if step is not None:
            self.step = step
        self.beats += 1
        self.on_beat()

    def __str__(self) -> str:
        return f"rank {self.rank}, step {self.step}, phase {self.phase}"


def batch_digest(batch: PackedBatch) -> int:
    """A signed 64-bit number that depends on all values of a pack's arrays (lengths are the layout's to compare)."""
    content = hashlib.blake2b(digest_size=8)
    for array in (batch.tokens, batch.labels, batch.position_ids, batch.loss_mask):
        content.update(np.ascontiguousarray(array).tobytes())
    return int.from_bytes(content.digest(), "little", signed=True)


def check_same_batch(batch: PackedBatch, layout: ThdLayout, group: dist.ProcessGroup, where: str) -> None:
    """Raise ValueError on every rank of `group`, naming those that differ, unless all hold the same pack and layout.

    `group` holds all ranks that work on one pack: tensor and context parallel. Two all-gathers of 8 bytes a rank, and
    on GPUs two synchronisations. Ranks are named by their global numbers; which count as right is said in
    `gdn_cp.comm.checks`.
    """
    if group.size() == 1:
        return
    members = dist.get_process_group_ranks(group)
    try:
        assert_same_on_all_ranks(layout, group)
    except ValueError as error:
        raise ValueError(f"{where}: among global ranks {members}, in this order: {error}") from None
    device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
    mine = torch.tensor([batch_digest(batch)], dtype=torch.int64, device=device)
    gathered = [torch.empty_like(mine) for _ in members]
    dist.all_gather(gathered, mine, group=group)
    digests = [int(digest) for digest in torch.cat(gathered).tolist()]
    common = max(digests, key=digests.count)  # equal counts: the first
    differing = [rank for rank, digest in zip(members, digests, strict=True) if digest != common]
    if differing:
        raise ValueError(
            f"{where}: ranks {differing} hold other tokens, labels, positions or loss mask than the rest of global "
            f"ranks {members}; every rank that shares a pack must build it from the same text and the same plan"
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a GPU's or the host's memory is used up."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)
    )


def describe_memory(device: torch.device) -> str:
    """What this process holds of the device's memory."""
    if device.type != "cuda":
        return f"{peak_memory_gib(device):.2f} GiB resident at the peak"
    allocated, reserved, peak = (
        amount(device) / 2**30
        for amount in (torch.cuda.memory_allocated, torch.cuda.memory_reserved, torch.cuda.max_memory_allocated)
    )
    return f"{allocated:.2f} GiB allocated ({peak:.2f} at the peak), {reserved:.2f} GiB reserved by this process"


@contextmanager
def located(progress: Progress, device: torch.device) -> Iterator[None]:
    """Say where the rank stood when an error passes.

    Out of memory becomes a torch.OutOfMemoryError with the batch's sizes. A ValueError passes as it is: its text is the
    explanation. Before any other error one line goes to stderr, and the error passes unchanged.
    """
    try:
        yield
    except ValueError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise torch.OutOfMemoryError(
                f"{progress}: out of memory. Pack: {progress.batch or 'none yet'}. {describe_memory(device)}. "
                f"Lower --token-budget, or raise --cp. The allocator said: {error}"
            ) from error
        print(f"error ({progress}): {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        raise


class Watchdog:
    """Ends this process, with a report, when `progress` shows no sign of life for `seconds`; 0 never does.

    A context manager around the training loop. A daemon thread looks at the heartbeats; its report names rank, step,
    phase and the call in which the main thread stands, with that thread's stack, and the process ends with `STALLED`.
    Should the interpreter itself stand still (an extension that keeps its lock), faulthandler's C thread, rearmed at
    each heartbeat, prints all stacks and ends the process after 1.5 times as long.
    """

    def __init__(self, progress: Progress, seconds: float) -> None:
        self._progress = progress
        self._seconds = seconds
        self._stop = threading.Event()
        self._watched = threading.get_ident()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        if self._seconds > 0:
            self._progress.on_beat = self._arm_net
            self._arm_net()
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._seconds > 0:
            self._stop.set()
            self._thread.join()
            self._progress.on_beat = lambda: None
            faulthandler.cancel_dump_traceback_later()

    def _arm_net(self) -> None:
        after = _GIL_NET * self._seconds + 2 * _LAST_WORDS_SECONDS
        faulthandler.dump_traceback_later(after, exit=True, file=2)  # 2: pytest and others replace sys.stderr

    def _watch(self) -> None:
        seen, since = -1, time.monotonic()
        while not self._stop.wait(min(1.0, self._seconds / 10)):
            now, beats = time.monotonic(), self._progress.beats
            if beats != seen:
                seen, since = beats, now
            elif now - since >= self._seconds:
                self._end(now - since)

    def _end(self, waited: float) -> None:
        """Report past Python's buffers, whose locks the main thread may hold, and end without clean-up."""
        _write_stderr(self._report(waited))
        time.sleep(_LAST_WORDS_SECONDS)
        os._exit(STALLED)

    def _report(self, waited: float) -> str:
        frame = sys._current_frames().get(self._watched)
        stack = "" if frame is None else "".join(traceback.format_stack(frame))
        return (
            f"watchdog ({self._progress}): no progress for {waited:.1f} s, in {describe_call(frame)}. "
            "If other ranks report a collective at the same time, the one that reports none, or another, keeps them "
            f"waiting. This rank ends with code {STALLED}; stack of its training thread:\n{stack}"
        )


def describe_call(frame: FrameType | None) -> str:
    """`all_reduce, called at step.py:90 (accumulate_gradients)`: the innermost function, and who of us called it.

    For a collective the innermost Python function is a wait in torch.distributed; its own name is that of the outermost
    function there. Elsewhere the innermost function is named.
    """
    if frame is None:
        return "a thread that has ended"
    stack = [(entry, line) for entry, line in traceback.walk_stack(frame)]  # innermost first
    ours = next((i for i, (entry, _) in enumerate(stack) if "gdn_cp" in Path(entry.f_code.co_filename).parts), None)
    name = stack[0][0].f_code.co_name
    if ours is None:
        return name
    caller, line = stack[ours]
    place = f"{Path(caller.f_code.co_filename).name}:{line} ({caller.f_code.co_name})"
    collectives = [
        entry.f_code.co_name
        for entry, _ in stack[:ours]
        if "distributed_c10d" in entry.f_code.co_filename or "functional_collectives" in entry.f_code.co_filename
    ]
    if ours == 0:
        return place
    return f"{collectives[-1] if collectives else name}, called at {place}"


def _write_stderr(text: str) -> None:
    content = text.encode()
    while content:
        content = content[os.write(2, content) :]
