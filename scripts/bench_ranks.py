"""What the benchmarks on several ranks share: the world, times that count the slowest rank, graphs, kernels by name.

Run under torchrun. Without a GPU the ranks meet over gloo and times are the host's: that tries a script, nothing else.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from check_kernels import mixed_lengths
from kernel_timing import DEVICE

START_MINUTES = 20  # ranks wait for the one that compiles ahead

Step = Callable[[], Any]


@dataclass(frozen=True)
class World:
    """This rank's place among all ranks of the job, which are one context-parallel group."""

    rank: int
    size: int
    device: torch.device
    group: dist.ProcessGroup

    def say(self, *words: object) -> None:
        """Print once for all ranks."""
        if self.rank == 0:
            print(*words, flush=True)

    def greatest(self, values: Iterable[float]) -> list[float]:
        """Each value's maximum over the ranks."""
        table = torch.tensor(list(values), dtype=torch.float64, device=self.device)
        dist.all_reduce(table, dist.ReduceOp.MAX, group=self.group)
        return table.tolist()

    def all_agree(self, good: bool) -> bool:
        """Tell whether it is so on every rank."""
        return self.greatest([0.0 if good else 1.0]) == [0.0]

    def settle(self) -> None:
        """Wait until every rank's device is idle."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        dist.barrier(group=self.group)


def local_rank() -> int:
    """This process's number on its machine, which is its GPU's."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def join_world() -> World:
    """Meet the other ranks of torchrun, each on its own GPU.

    Raises:
        SystemExit: outside torchrun.
    """
    if "RANK" not in os.environ:
        raise SystemExit("run this under torchrun, for example: torchrun --standalone --nproc-per-node 4 SCRIPT")
    device = DEVICE
    if DEVICE.type == "cuda":
        device = torch.device("cuda", local_rank())
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend, timeout = ("nccl" if device.type == "cuda" else "gloo"), timedelta(minutes=START_MINUTES)
        dist.init_process_group(backend, timeout=timeout, device_id=device if device.type == "cuda" else None)
    group = dist.group.WORLD
    assert group is not None
    return World(dist.get_rank(), dist.get_world_size(), device, group)


def leave(status: int) -> NoReturn:
    """End this rank once all are done, without taking the process groups down.

    With NCCL calls captured in CUDA graphs, `destroy_process_group` was seen to wait for ever.
    """
    sys.stdout.flush()
    if dist.is_initialized():
        dist.barrier()
    os._exit(status)


def batch_lengths(tokens: int, sequences: int, cp_size: int, mixed: bool) -> tuple[int, ...]:
    """Lengths that sum to `tokens`, each a multiple of 2*cp_size: equal ones, or of very different sizes.

    Raises:
        ValueError: where the tokens cannot be shared out so.
    """
    unit = 2 * cp_size
    if tokens % (unit if mixed else unit * sequences):
        raise ValueError(f"tokens={tokens}: cannot be cut into {sequences} sequences of multiples of {unit}")
    if not mixed:
        return (tokens // sequences,) * sequences
    spare = tokens // unit - sequences  # every sequence has at least one unit
    return tuple(unit * (1 + extra) for extra in mixed_lengths(spare, sequences))


def _milliseconds(step: Step, calls: int, device: torch.device) -> float:
    """Time of one of `calls` calls in a row, from the first kernel to the last."""
    if device.type != "cuda":
        started = time.perf_counter()
        for _ in range(calls):
            step()
        return 1e3 * (time.perf_counter() - started) / calls
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(calls):
        step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / calls


def time_by_turns(
    steps: dict[str, Step], world: World, repeats: int = 7, calls: int = 4, warm_up: int = 2
) -> dict[str, float]:
    """Median over `repeats` rounds of each step's milliseconds on the slowest rank.

    A round runs every step once, `calls` calls in a row, and every other round runs them in reverse order, so that
    what changes slowly (clocks, neighbours) meets all alike. All ranks start each turn together.
    """
    for step in steps.values():
        for _ in range(warm_up):
            step()
    found: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(repeats):
        for name in list(steps)[:: -1 if turn % 2 else 1]:
            world.settle()
            found[name].append(_milliseconds(steps[name], calls, world.device))
    slowest = {name: world.greatest(times) for name, times in found.items()}
    return {name: statistics.median(times) for name, times in slowest.items()}


def capture(step: Step, world: World) -> Step | str:
    """A replay of the step as a CUDA graph, or why there is none (on any rank). The step must have run before."""
    if world.device.type != "cuda":
        return "no GPU"
    failure = ""
    graph = torch.cuda.CUDAGraph()
    try:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        world.settle()
        # NCCL's watchdog asks about events from a thread of its own, which a global capture would forbid.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            step()
    except RuntimeError as error:
        failure = str(error).strip().splitlines()[0][:200]
    return graph.replay if world.all_agree(not failure) else failure or "capture failed on another rank"


@dataclass(frozen=True)
class KernelTime:
    """One kernel's share of a step on this rank: launches and milliseconds of the device for one call."""

    name: str
    launches: float
    milliseconds: float


def kernel_times(step: Step, world: World, calls: int = 3) -> list[KernelTime]:
    """Device time of one call by kernel, the longest first; copies and fills of memory count as kernels."""
    step()
    world.settle()
    on_gpu = world.device.type == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profile:
        for _ in range(calls):
            step()
        if on_gpu:
            torch.cuda.synchronize()
    found = []
    for event in profile.key_averages():
        time_us = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        runs_there = event.device_type.name == "CUDA" or not on_gpu
        if time_us > 0 and runs_there:
            found.append(KernelTime(event.key, event.count / calls, time_us / 1e3 / calls))
    return sorted(found, key=lambda kernel: -kernel.milliseconds)


def print_kernels(world: World, title: str, kernels: list[KernelTime], most: int = 45) -> None:
    """A line for each kernel, and the sum of all."""
    total, launches = sum(k.milliseconds for k in kernels), sum(k.launches for k in kernels)
    world.say(f"\n{title}: {total:.3f} ms in {launches:.0f} launches")
    for kernel in kernels[:most]:
        world.say(f"{kernel.milliseconds:9.3f} {kernel.launches:6.1f}  {kernel.name[:100]}")
