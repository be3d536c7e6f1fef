"""What a run says about itself: a line per step on the terminal, JSON lines always, TensorBoard where it is installed.

Only rank 0 writes. The JSONL file is the record; the plot and the final summary are made from it, so that a resumed
run shows its whole history.
"""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

METRICS_FILE = "metrics.jsonl"


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step. Loss in nats per real target; tokens are real targets; memory is rank 0's peak.

    `a2a_sizes`: what the GDN layers took for each pack of rank 0's context-parallel group; empty without a cut.
    """

    step: int
    loss: float
    grad_norm: float
    lr: float
    tokens: int
    epoch: int
    seconds: float
    tokens_per_second: float
    tokens_per_second_per_rank: float
    tflops_per_rank: float
    mfu: float | None
    memory_gib: float
    skipped: bool = False
    a2a_sizes: tuple[int, ...] = ()

    def line(self, last_step: int, unit: str) -> str:
        """The terminal's line; `unit` names a rank: GPU or rank."""
        parts = [
            f"step {self.step:>{len(str(last_step))}}/{last_step}",
            f"loss {self.loss:.4f}",
            f"grad norm {self.grad_norm:.3f}",
            f"lr {self.lr:.2e}",
            f"{self.tokens_per_second:,.0f} tokens/s",
            f"{self.tokens_per_second_per_rank:,.0f} tokens/s/{unit}",
            f"{self.tflops_per_rank:.3g} TFLOP/s/{unit}",
        ]
        if self.mfu is not None:
            parts.append(f"MFU {self.mfu:.1%}")
        parts.append(f"{self.memory_gib:.2f} GiB")
        if self.a2a_sizes:
            parts.append("a2a " + "/".join(str(size) for size in sorted(set(self.a2a_sizes))))
        if self.skipped:
            parts.append("SKIPPED (not finite)")
        return " | ".join(parts)


def peak_memory_gib(device: torch.device) -> float:
    """Most memory that this process has held: allocated on the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def read_steps(path: Path) -> list[dict[str, Any]]:
    """Step records of a metrics file in order of step; of a step run twice (after a resume) the later one.

    A last line that a kill cut short is passed over.
    """
    steps: dict[int, dict[str, Any]] = {}
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if record.get("event") == "step":
                steps[record["step"]] = record
    return [steps[step] for step in sorted(steps)]


def read_last(path: Path, event: str) -> dict[str, Any] | None:
    """The last record of this kind ("start", "end") in a metrics file."""
    found = None
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if record.get("event") == event:
                found = record
    return found


class RunLog:
    """Rank 0's log of a run, used as a context manager; on other ranks every method does nothing."""

    def __init__(self, out: Path, *, is_writer: bool, first_step: int, last_step: int, unit: str, progress: bool):
        self._is_writer = is_writer
        self._last_step = last_step
        self._unit = unit
        if not is_writer:
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        out.mkdir(parents=True, exist_ok=True)
        path = out / METRICS_FILE
        _end_line(path)
        self._jsonl = path.open("a", encoding="utf-8")
        self._board = _tensorboard(out / "tensorboard", first_step)
        self._console = Console(soft_wrap=True, highlight=False, markup=False)
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self._console,
            disable=not progress or not self._console.is_terminal,
        )
        self._task = self._bar.add_task("training", total=last_step, completed=first_step)

    def __enter__(self) -> RunLog:
        if self._is_writer:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_writer:
            self._bar.stop()
            self._jsonl.close()
            if self._board is not None:
                self._board.close()

    def say(self, text: str) -> None:
        """A line for the reader at the terminal."""
        if self._is_writer:
            self._console.print(text)

    def event(self, kind: str, **values: Any) -> None:
        """A record of its own kind in the JSONL file."""
        if self._is_writer:
            plain = {name: _finite_or_none(value) for name, value in values.items()}
            self._jsonl.write(json.dumps({"event": kind, "time": time.time(), **plain}) + "\n")
            self._jsonl.flush()

    def step(self, metrics: StepMetrics) -> None:
        """One step, to every sink."""
        if not self._is_writer:
            return
        self.event("step", **asdict(metrics))
        self.say(metrics.line(self._last_step, self._unit))
        self._bar.update(self._task, completed=metrics.step)
        if self._board is not None:
            for name in ("loss", "grad_norm", "lr", "tokens_per_second", "tflops_per_rank", "memory_gib"):
                self._board.add_scalar(name, getattr(metrics, name), metrics.step)
            if metrics.mfu is not None:
                self._board.add_scalar("mfu", metrics.mfu, metrics.step)


def _finite_or_none(value: Any) -> Any:
    """JSON has no word for numbers that are not finite."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _end_line(path: Path) -> None:
    """Close a line that a kill cut short, so that the next record begins on its own line."""
    if path.exists() and path.stat().st_size:
        with path.open("rb+") as file:
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                file.write(b"\n")


def _tensorboard(folder: Path, first_step: int) -> Any | None:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=first_step + 1 if first_step else None)
