"""Starting training jobs under torchrun, small enough for two slow cores."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
_SMALL = "layers=2 attention-every=2 hidden=32 ffn=48 attention-groups=2 attention-head-dim=16 gdn-head-dim=8"
SMALL = [f"--{choice}" for choice in f"{_SMALL} token-budget=256 packs-per-step=1 warmup-steps=2 check-ranks".split()]


def write_text(folder: Path) -> Path:
    """A few real files as training text."""
    folder.mkdir()
    for name in ("bisect.py", "heapq.py", "keyword.py", "types.py", "shlex.py"):
        (folder / name).write_bytes((Path(sysconfig.get_path("stdlib")) / name).read_bytes())
    return folder


def start(
    ranks: int, *arguments: str, script: Path = ROOT / "scripts" / "train_proxy.py", launcher: Sequence[str] = ()
) -> subprocess.Popen[str]:
    """A torchrun job of `ranks` ranks, output captured; `launcher`: further flags of torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *launcher]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, str(script), *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(job: subprocess.Popen[str], timeout: float = 240.0) -> tuple[int, str]:
    """(exit code, output) of a job that ends by itself; one that does not is killed, and fails the test."""
    try:
        output, _ = job.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        kill(job)
        raise
    return job.returncode, output


def kill(job: subprocess.Popen[str]) -> None:
    """End the launcher and all ranks at once."""
    family = [*psutil.Process(job.pid).children(recursive=True), psutil.Process(job.pid)]
    for process in family:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    job.communicate()
