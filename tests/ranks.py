"""Run one function on several ranks of a gloo (or NCCL) world and hear from every one of them."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

# The server imports torch once; each rank is then a fork of it, which takes milliseconds and not seconds.
_server = multiprocessing.get_context("forkserver")
_PRELOAD = ["torch", "torch.distributed", "gdn_cp", "tests.conftest"]
_server.set_forkserver_preload(_PRELOAD)
# The server has asked for GPUs (tests.conftest does), and CUDA cannot be used in a fork of a process that has.
_fresh = multiprocessing.get_context("spawn")


def preload_megatron() -> None:
    """Let the server import Megatron once, which takes seconds, instead of each rank; before the first `run_ranks`.

    Where it is not installed nothing happens.
    """
    _server.set_forkserver_preload([*_PRELOAD, "gdn_cp.megatron", "megatron.core.models.gpt", "gdn_cp.training.loop"])


class RankError(AssertionError):
    """One or more ranks failed; the message holds each one's traceback."""


def _worker(
    rank: int, world_size: int, store: str, backend: str, timeout: float, pipe: Connection, payload: bytes
) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    try:
        if backend == "nccl":
            torch.cuda.set_device(rank)
        dist.init_process_group(
            backend,
            init_method=f"file://{store}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout),
        )
        function, args = pickle.loads(payload)
        answer, good = pickle.dumps(("ok", function(rank, world_size, *args))), True  # may fail on the result too
    except BaseException:
        answer, good = pickle.dumps(("error", traceback.format_exc())), False
    pipe.send_bytes(answer)
    pipe.close()
    if dist.is_initialized() and good:
        dist.barrier()  # nobody tears its connections down while a neighbour still uses them
        dist.destroy_process_group()
    os._exit(0)


def run_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, backend: str = "gloo", timeout: float = 120.0
) -> list[Any]:
    """Call `function(rank, world_size, *args)` on every rank of a fresh world and return the results in rank order.

    `function` is a module-level function; it and its arguments and results are pickled. The ranks meet through a file,
    so no port is raced for. The first rank that fails ends the others, and every failure is in the RankError raised;
    so is the silence of ranks that did not end within `timeout` seconds.
    """
    payload = pickle.dumps((function, args))
    context = _fresh if backend == "nccl" else _server
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        processes, pipes = [], []
        for rank in range(world_size):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(
                target=_worker, args=(rank, world_size, store, backend, timeout, theirs, payload), daemon=True
            )
            process.start()
            theirs.close()
            processes.append(process)
            pipes.append(ours)
        patience = 0.0  # after a failure the others may wait for ever
        try:
            results = _collect(pipes, timeout)
            patience = 5.0
            return results
        finally:
            for process in processes:
                process.join(patience)
                if process.is_alive():
                    process.kill()
                    process.join()


def _collect(pipes: list[Connection], timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    errors: dict[int, str] = {}
    waiting = {pipe: rank for rank, pipe in enumerate(pipes)}
    deadline = time.monotonic() + timeout
    while waiting:
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for pipe in ready:
            rank = waiting.pop(pipe)  # type: ignore[index]
            try:
                kind, value = pickle.loads(pipe.recv_bytes())  # type: ignore[union-attr]
            except EOFError:
                kind, value = "error", "the process died without a word"
            if kind == "ok":
                results[rank] = value
            else:
                errors[rank] = value
                deadline = min(deadline, time.monotonic() + 5)  # the others hear of it soon or never
    for rank in waiting.values():
        errors[rank] = f"still running after {timeout:.0f} s (or 5 s after another rank's failure)"
    if errors:
        raise RankError("\n".join(f"rank {rank}: {text}" for rank, text in sorted(errors.items())))
    return [results[rank] for rank in range(len(pipes))]
