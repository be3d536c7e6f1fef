"""Timing on a GPU: eager calls and CUDA-graph replays with events, memory of a call, parallel compilation.

Times are medians in milliseconds. Between repetitions a buffer larger than the L2 cache is overwritten, so that no
implementation finds its inputs there. Without a GPU eager calls are timed with the host's clock and nothing else is.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

FLUSH_BYTES = 256 * 2**20
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@cache
def _flush_buffer() -> Tensor:
    return torch.empty(FLUSH_BYTES, dtype=torch.int8, device=DEVICE)


def _seconds_on_host(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _median(run: Callable[[], object], repeats: int) -> float:
    if DEVICE.type != "cuda":
        return 1e3 * statistics.median(_seconds_on_host(run) for _ in range(repeats))
    times = []
    for _ in range(repeats):
        _flush_buffer().zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def time_eager(function: Callable[[], object], repeats: int = 10, warm_up: int = 2) -> float:
    """Median time from the first to the last of the call's kernels, with the host's launches in between."""
    for _ in range(warm_up):
        function()
    return _median(function, repeats)


def time_graph(function: Callable[[], object], repeats: int = 10) -> float | None:
    """Median time of a replay, which has no launches in it; None without a GPU. `function` must have run before.

    Raises:
        RuntimeError: if the call synchronises with the host, so that no graph can hold it.
    """
    if DEVICE.type != "cuda":
        return None
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    graph.replay()
    found = _median(graph.replay, repeats)
    graph.reset()
    return found


def time_best(function: Callable[[], object], repeats: int = 10) -> float:
    """`time_graph`, or `time_eager` without a GPU."""
    eager = time_eager(function, repeats)
    graph = time_graph(function, repeats)
    return eager if graph is None else graph


def measure_memory(forward: Callable[[], Tensor], backward: Callable[[Tensor], object]) -> tuple[int, int] | None:
    """(bytes kept for the backward, peak bytes of forward and backward), both above what was allocated before.

    What forward returns is not counted as kept. None without a GPU.
    """
    if DEVICE.type != "cuda":
        return None
    gc.collect()  # leftovers of earlier calls in reference cycles would be freed in between, and count as negative
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    o = forward()
    kept = torch.cuda.memory_allocated() - before - o.untyped_storage().nbytes()
    gradients = backward(o)
    peak = torch.cuda.max_memory_allocated() - before
    del o, gradients
    return kept, peak


def copy_time(num_bytes: int, repeats: int = 10) -> float:
    """Time of a copy on the device that reads and writes `num_bytes` in all."""
    source = torch.randn(num_bytes // 8, device=DEVICE)
    target = torch.empty_like(source)
    return time_best(lambda: target.copy_(source), repeats)


def quicken_autotuner() -> None:
    """Triton's autotuners measure each configuration for some 10 milliseconds and not for 125."""
    import triton.testing

    triton.testing.do_bench = partial(triton.testing.do_bench, warmup=2, rep=10)


def compile_share_only(share: int, shares: int) -> None:
    """Make this process's autotuners run each `shares`-th configuration once, untimed, which fills compiler caches."""
    import triton.testing
    from triton.runtime.autotuner import Autotuner

    def run_once(kernel_call: Callable[[], object], **_: Any) -> list[float]:
        kernel_call()
        return [0.0, 0.0, 0.0]

    original = Autotuner._bench

    def bench(self: Autotuner, *args: Any, config: Any, **meta: Any) -> Any:
        if self.configs.index(config) % shares != share:
            return [float("inf")] * 3
        return original(self, *args, config=config, **meta)

    triton.testing.do_bench = run_once
    Autotuner._bench = bench
