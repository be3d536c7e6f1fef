"""Peers' memory without several GPUs: ranks are threads of one process, their slots lie in host or one GPU's memory.

On a GPU all threads use its default stream, where work runs in the order in which the threads enqueue it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gdn_cp.comm.symmetric import SLOTS, Slot


class HostMemory:
    """Every rank's slots in one memory, full of 0xFF: NaN in any floating dtype."""

    def __init__(self, ranks: int, num_bytes: int, device: str = "cpu") -> None:
        self.local = torch.full((ranks, SLOTS, num_bytes), 0xFF, dtype=torch.uint8, device=device)

    def slots(self, rank: int) -> list[Slot]:
        """One rank's view."""
        found = []
        for i in range(SLOTS):
            addresses = [self.local[p, i].data_ptr() for p in range(len(self.local))]
            found.append(Slot(self.local[rank, i], torch.tensor(addresses, device=self.local.device)))
        return found


class HostArena:
    """One rank's arena in `HostMemory`, slots by turns; `meet` is what settling is."""

    def __init__(self, memory: HostMemory, rank: int, meet: Callable[[], None] = lambda: None) -> None:
        self.rank, self.size, self.last = rank, len(memory.local), 0
        self.slots, self.meet = memory.slots(rank), meet

    def acquire(self, num_bytes: int) -> Slot:
        assert num_bytes <= len(self.slots[0].local)
        self.last = (self.last + 1) % SLOTS
        return self.slots[self.last]

    def slot_of(self, x: Tensor) -> Slot:
        return next(slot for slot in self.slots if slot.local.data_ptr() == x.data_ptr())

    def settle(self) -> None:
        self.meet()


def run_threads(
    function: Callable[..., Any], ranks: int, num_bytes: int, device: str = "cpu",
    partitions: tuple[list[list[int]], ...] = (),
) -> list[Any]:  # fmt: skip
    """`function(arena)` of every rank, each in a thread; one runs at a time, and they change where they settle.

    Triton's interpreter patches the language for the time of a launch, so launches must not overlap. With `partitions`
    of the ranks into groups, a function gets an arena for each, of the group in which its rank is.
    """
    turn, results = threading.Lock(), [None] * ranks
    arenas: list[list[HostArena]] = [[] for _ in range(ranks)]
    barriers: list[threading.Barrier] = []
    failures: list[BaseException] = []

    def meeting(barrier: threading.Barrier) -> Callable[[], None]:
        def meet() -> None:
            turn.release()
            try:
                barrier.wait()
            finally:
                turn.acquire()

        return meet

    for partition in partitions or ([list(range(ranks))],):
        for group in partition:
            memory, barrier = HostMemory(len(group), num_bytes, device), threading.Barrier(len(group), timeout=60)
            barriers.append(barrier)
            for index, rank in enumerate(group):
                arenas[rank].append(HostArena(memory, index, meeting(barrier)))

    def run(rank: int) -> None:
        with turn:
            try:
                results[rank] = function(*arenas[rank])
            except BaseException as error:  # told by the caller's thread
                failures.append(error)
                for barrier in barriers:
                    barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for failure in failures:
        if not isinstance(failure, threading.BrokenBarrierError):
            raise failure
    assert not failures
    return results
