"""Time launch settings of the chunked kernels on the GPU at hand and write the best to a file for GDN_CP_LAUNCHES.

    python scripts/tune_kernels.py --output h200.json
    GDN_CP_LAUNCHES=h200.json torchrun ...

Opt-in: the package ships fixed settings and never tunes by itself. Each candidate's results are compared with those of
the shipped settings before it is timed, so that one that a compiler gets wrong is not chosen; a candidate replaces the
shipped setting only if its kernel takes at least 2 % less time.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from kernel_cases import Case, machine, make_inputs, ours, relative_error, run_with_gradients, write_json
from torch import Tensor

from gdn_cp.kernels.chunk_bwd_config import backward_config
from gdn_cp.kernels.configs import capability, prepare_config
from gdn_cp.kernels.tuned import LAUNCHES_VARIABLE

GAIN = 0.98  # of the shipped setting's time, below which a candidate replaces it
AGREEMENT = (
    2.0**-7
)  # relative difference from the shipped setting's results: sums in another order, rounded to bfloat16

_WIDE = [(32, 4, 2), (32, 4, 3), (64, 4, 2), (64, 4, 3), (32, 8, 2), (32, 8, 3), (64, 8, 2), (64, 8, 3)]
CANDIDATES: dict[str, list[tuple[int, ...]]] = {
    # Products of 64 rows on 8 warps are laid out for 128 and written past their end: 4 warps there.
    "scores": [(16, 4, 3), (32, 4, 2), (32, 4, 3), (64, 4, 2), (64, 4, 3)],
    "dq": [*_WIDE, (32, 4, 3, 168), (64, 4, 2, 168), (32, 8, 3, 128), (64, 8, 3, 128)],
    "dk": [*_WIDE, (32, 4, 3, 168), (32, 8, 3, 128), (64, 8, 2, 128)],
    "products": [(4, 1), (4, 2), (8, 1)],
    "solve": [(64, 1), (32, 1), (16, 1), (64, 2)],
}
KERNEL_NAMES = {name: f"{name}_kernel" for name in ("scores", "dq", "dk")} | {
    "products": "products_kernel",
    "solve": "solve_kernel",
}


@dataclass
class Options:
    """Tune for one head dim."""

    output: Path = Path("launches.json")
    """File to write; its entries for other GPUs, dtypes and head dims are kept."""
    dim: int = 128
    """K and V."""
    heads: tuple[int, int] = (16, 32)
    """Query/key heads and value heads on a GPU."""
    tokens: int = 16384
    """Tokens of the batch that is timed."""
    kernels: tuple[str, ...] = tuple(CANDIDATES)
    """Kernels to tune."""
    repeats: int = 5
    """Repetitions of each timing."""
    jobs: int = 8
    """Processes that compile ahead."""


def entry(kernel: str, launch: tuple[int, ...], dim: int) -> dict[str, Any]:
    """An entry of the file for the current GPU."""
    arch = capability(torch.device("cuda", torch.cuda.current_device()))
    return {"capability": arch, "dtype": "bfloat16", "dim": dim, "kernel": kernel, "launch": list(launch)}


def with_launch(kernel: str, launch: tuple[int, ...] | None, dim: int, folder: Path) -> None:
    """Make this process launch `kernel` with the settings, or with the shipped ones."""
    os.environ.pop(LAUNCHES_VARIABLE, None)
    if launch is not None:
        path = folder / f"{kernel}_{'_'.join(map(str, launch))}.json"
        path.write_text(json.dumps({"entries": [entry(kernel, launch, dim)]}), encoding="utf-8")
        os.environ[LAUNCHES_VARIABLE] = str(path)


def results_of(case: Case) -> dict[str, Tensor]:
    """Output and gradients on the case's inputs."""
    device = torch.device("cuda", torch.cuda.current_device())
    inputs = make_inputs(case, device)
    return {
        n: x for n, x in run_with_gradients(ours().call, inputs, case, case.cu_seqlens(device)).items() if x is not None
    }


def disagreement(case: Case, expected: dict[str, Tensor]) -> float:
    """Largest relative difference of the results from those expected."""
    return max(relative_error(x, expected[name].double()) for name, x in results_of(case).items())


def microseconds(case: Case, kernel: str, repeats: int) -> float:
    """Device time of a kernel in one forward and backward."""
    results_of(case)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(repeats):
            results_of(case)
        torch.cuda.synchronize()
    times = [e.device_time_total for e in profile.key_averages() if e.key == KERNEL_NAMES[kernel]]
    return sum(times) / repeats


def compile_ahead(kernel: str, launch: tuple[int, ...], case: Case, folder: Path) -> str:
    """Work item: compile one candidate into Triton's cache; what went wrong, or nothing."""
    with_launch(kernel, launch, case.dims[0], folder)
    try:
        results_of(case)
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:100]}"
    return ""


def tune(options: Options, folder: Path) -> list[dict[str, Any]]:
    """Entries of the candidates that beat the shipped settings."""
    dims = (options.dim, options.dim)
    small = Case("tuning, checked", 1000, options.heads, dims)
    large = Case("tuning, timed", options.tokens, options.heads, dims)
    work = [(kernel, launch) for kernel in options.kernels for launch in CANDIDATES[kernel]]
    with ProcessPoolExecutor(options.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        jobs = [pool.submit(compile_ahead, kernel, launch, small, folder) for kernel, launch in work]
        problems = {item: job.result() for item, job in zip(work, jobs, strict=True)}
    with_launch("", None, options.dim, folder)
    expected = results_of(small)
    entries = []
    for kernel in options.kernels:
        with_launch(kernel, None, options.dim, folder)
        shipped = best = microseconds(large, kernel, options.repeats)
        if not shipped:  # as on Hopper at 128, where one kernel stands for three
            print(f"{kernel:9} is not launched for these heads")
            continue
        print(f"{kernel:9} shipped: {shipped:.0f} us")
        chosen: tuple[int, ...] | None = None
        for launch in CANDIDATES[kernel]:
            remark = problems[kernel, launch]
            if not remark:
                with_launch(kernel, launch, options.dim, folder)
                off = disagreement(small, expected)
                if off > AGREEMENT:
                    remark = f"refused: differs by {off:.1e}"
                else:
                    found = microseconds(large, kernel, options.repeats)
                    remark = f"{found:.0f} us"
                    if found < min(best, GAIN * shipped):
                        best, chosen = found, launch
            print(f"{kernel:9} {launch!s:18} {remark}")
        if chosen is not None:
            entries.append(
                entry(kernel, chosen, options.dim) | {"microseconds": round(best), "shipped": round(shipped)}
            )
    with_launch("", None, options.dim, folder)
    return entries


def merged(path: Path, entries: list[dict[str, Any]], kernels: tuple[str, ...], dim: int) -> list[dict[str, Any]]:
    """`entries` and those of the file that are about something else."""
    if not path.exists():
        return entries
    arch = capability(torch.device("cuda", torch.cuda.current_device()))
    old = json.loads(path.read_text(encoding="utf-8"))["entries"]
    return entries + [e for e in old if (e["capability"], e["dim"]) != (arch, dim) or e["kernel"] not in kernels]


def main(options: Options) -> int:
    """Tune, and write the file."""
    if not torch.cuda.is_available():
        print("tuning needs an NVIDIA GPU")
        return 2
    started = time.monotonic()
    device = torch.device("cuda", torch.cuda.current_device())
    shipped = backward_config(device, torch.bfloat16, options.dim, options.dim, options.heads[1])
    print(f"shipped: {shipped}, {prepare_config(device, torch.bfloat16, options.dim)}")
    with tempfile.TemporaryDirectory() as folder:
        entries = tune(options, Path(folder))
    content = {"kind": "launches", "machine": machine(), "heads": options.heads, "tokens": options.tokens}
    write_json(options.output, content | {"entries": merged(options.output, entries, options.kernels, options.dim)})
    print(
        f"{len(entries)} settings beat the shipped ones; {options.output} written in {time.monotonic() - started:.0f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
