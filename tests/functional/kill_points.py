"""Kill a training run at random moments, again and again, and see that nothing but time is lost.

    python -m tests.functional.kill_points --kills 100 --seed 1

Two ranks train a tiny model with a checkpoint every few steps. Each attempt is ended by SIGKILL: of one rank, which the
other survives by up to 0.1 s as under a launcher, or of both. One in eight moments is in the start, three are some time
after a step of chance, four are within the first milliseconds of a checkpoint's writing. The next attempt resumes by
itself. After each one it must hold that

- the newest complete checkpoint is the last one due: no more is lost than the steps since;
- the attempt began at that checkpoint;
- every step of every attempt has the loss and gradient norm of an uninterrupted run, bit for bit;

and whenever a run comes to its end, that its weights are those of the uninterrupted run.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import multiprocessing
import os
import random
import tempfile
import time
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch.distributed as dist
from safetensors.torch import load_file

from gdn_cp.training.checkpoint import find_checkpoint, read_manifest
from gdn_cp.training.config import DataConfig, ModelConfig, OptimConfig, ParallelConfig, RunConfig, TrainConfig
from gdn_cp.training.metrics import METRICS_FILE
from tests.functional.jobs import write_text

RANKS, STEPS, EVERY = 2, 24, 3
_PRELOAD = ["tests.conftest", "gdn_cp.megatron", "megatron.core.models.gpt", "gdn_cp.training.loop"]
_EXTRA = ["torch.utils.tensorboard", "rich.progress", "matplotlib.pyplot", "safetensors.torch"]
_WRITING_SECONDS = 0.012  # a checkpoint of this model takes about 0.01 s
_START_SECONDS = 0.2  # until the first step, in a fork of a process that has imported everything
_LAUNCHER_SECONDS = 0.1  # how long a launcher takes to see a dead rank
_server = multiprocessing.get_context("forkserver")


def config(out: Path, text: Path) -> TrainConfig:
    """The smallest hybrid model on two context-parallel ranks."""
    return TrainConfig(
        model=ModelConfig(2, 16, 16, 2, 2, 2, 8, gdn_key_heads=2, gdn_value_heads=2, gdn_head_dim=8),
        data=DataConfig(data=text, token_budget=64),
        parallel=ParallelConfig(cp=RANKS),
        optim=OptimConfig(warmup_steps=2),
        run=RunConfig(
            steps=STEPS, checkpoint_every=EVERY, out=out, resume="auto", device="cpu", progress=False, check_ranks=True
        ),
    )


def train_rank(rank: int, store: str, choices: TrainConfig, log: Path) -> None:
    """One rank, as a launcher would have started it."""
    from gdn_cp.training.loop import train

    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    train(choices)
    os._exit(0)


@dataclass
class Records:
    """What metrics.jsonl says: the step at which each attempt began, and every step that any attempt took."""

    starts: list[int] = field(default_factory=list)
    steps: list[tuple[int, float, float]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)

    @classmethod
    def read(cls, run: Path) -> Records:
        """All whole lines, repeated steps included."""
        found = cls()
        path = run / METRICS_FILE
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            found.times.append(record["time"])
            if record["event"] == "start":
                found.starts.append(record["first_step"])
            elif record["event"] == "step":
                found.steps.append((record["step"], record["loss"], record["grad_norm"]))
        return found


@dataclass
class Tally:
    """What a campaign did."""

    kills: int = 0
    while_writing: int = 0
    before_training: int = 0
    resumes: int = 0
    resumes_from_nothing: int = 0
    runs_finished: int = 0
    most_steps_lost: int = 0
    seconds: float = 0.0


class Campaign:
    """Kills and checks, in one folder."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.text = write_text(folder / "text")
        self.rng = random.Random(seed)
        self.tally = Tally()
        self._attempts = 0
        _server.set_forkserver_preload([*_PRELOAD, *_EXTRA])
        self.whole = folder / "whole"
        for process in self._start(self.whole):
            process.join()
            assert process.exitcode == 0, self._log().read_text()
        records = Records.read(self.whole)
        self.step_seconds = (records.times[-2] - records.times[0]) / STEPS  # the last record is the end's
        self.expected = {step: numbers for step, *numbers in records.steps}
        assert sorted(self.expected) == list(range(1, STEPS + 1))

    def _log(self) -> Path:
        return self.folder / f"attempt_{self._attempts}.log"

    def _start(self, run: Path) -> list[BaseProcess]:
        self._attempts += 1
        store = str(self.folder / f"store_{self._attempts}")
        processes: list[BaseProcess] = [
            _server.Process(target=train_rank, args=(rank, store, config(run, self.text), self._log()), daemon=True)
            for rank in range(RANKS)
        ]
        for process in processes:
            process.start()
        return processes

    def run(self, kills: int, seconds: float = float("inf")) -> Tally:
        """Kill until `kills` are done or time is up; then the last run is finished undisturbed."""
        began = time.monotonic()
        runs = 0
        while self.tally.kills < kills and time.monotonic() - began < seconds:
            runs += 1
            run = self.folder / f"run_{runs}"
            while self.tally.kills < kills and time.monotonic() - began < seconds:
                if self._attempt(run, kill=_newest(run) < STEPS):
                    break
            else:
                assert self._attempt(run, kill=False)
        self.tally.seconds = round(time.monotonic() - began, 1)
        return self.tally

    def _attempt(self, run: Path, *, kill: bool) -> bool:
        """One start of the ranks; whether they came to the end. Everything that must hold is asserted."""
        before, due, debris = Records.read(run), _newest(run), _debris(run)
        processes = self._start(run)
        finished = not (kill and self._kill(processes, run, STEPS - due))
        for process in processes:
            process.join()
            assert not finished or process.exitcode == 0, self._log().read_text()
        after = Records.read(run)
        began = after.starts[len(before.starts) :]
        assert began in ([], [due]), f"attempt {self._attempts} began at {began}, the newest checkpoint was {due}"
        taken = after.steps[len(before.steps) :]
        assert [step for step, *_ in taken] == list(range(due + 1, due + 1 + len(taken)))
        for step, *numbers in taken:
            assert numbers == self.expected[step], f"attempt {self._attempts}, step {step}"
        if not finished:
            self._check_loss(run, due, due + len(taken))
            self.tally.while_writing += bool(_debris(run) - debris)
        self._count(bool(began), bool(before.starts), due, finished)
        if finished:
            ours, theirs = load_file(run / "weights.safetensors"), load_file(self.whole / "weights.safetensors")
            assert ours.keys() == theirs.keys()
            assert all((ours[name] == theirs[name]).all() for name in ours)
        return finished

    def _check_loss(self, run: Path, due: int, reached: int) -> None:
        """Step `reached` is logged, so all checkpoints of earlier steps are published: rank 0 waits for them."""
        newest = _newest(run)
        last_due = max(due, EVERY * ((reached - 1) // EVERY))
        assert newest >= last_due, f"attempt {self._attempts} reached step {reached}, checkpoint {newest} is newest"
        self.tally.most_steps_lost = max(self.tally.most_steps_lost, reached - newest)

    def _count(self, trained: bool, again: bool, due: int, finished: bool) -> None:
        tally = self.tally
        tally.kills += not finished
        tally.before_training += not trained
        tally.resumes += trained and again
        tally.resumes_from_nothing += trained and again and due == 0
        tally.runs_finished += finished

    def _kill(self, processes: list[BaseProcess], run: Path, steps_left: int) -> bool:
        """SIGKILL at a moment of chance; False where the ranks ended before it came."""
        rng, debris = self.rng, _debris(run)
        kind = rng.choices(["start", "step", "writing"], [1, 3, 4])[0]
        moment = time.monotonic() + rng.uniform(0.0, _START_SECONDS) if kind == "start" else float("inf")
        taken = len(Records.read(run).steps)
        wanted = rng.randint(1, steps_left) if kind == "step" else rng.randint(1, max(1, steps_left // EVERY))
        seen: set[str] = set()
        while time.monotonic() < moment:
            if all(process.exitcode is not None for process in processes):
                return False
            if any(process.exitcode for process in processes):
                raise AssertionError(f"a rank ended by itself:\n{self._log().read_text()}")
            if kind == "step" and moment == float("inf"):
                if len(Records.read(run).steps) - taken >= wanted:
                    moment = time.monotonic() + rng.uniform(0.0, 3 * self.step_seconds)
            elif kind == "writing" and moment == float("inf"):
                seen |= _debris(run) - debris
                if len({name for name, _ in seen}) >= wanted:
                    moment = time.monotonic() + rng.uniform(0.0, _WRITING_SECONDS)
            time.sleep(0.0005)
        first = rng.choice([*processes, None])
        if first is not None:
            first.kill()
            time.sleep(rng.uniform(0.0, _LAUNCHER_SECONDS))
        for process in processes:
            process.kill()
        for process in processes:
            process.join()
        return any(process.exitcode for process in processes)


def _newest(run: Path) -> int:
    """Step of the checkpoint that the next attempt will take; not to be asked while one runs."""
    found = find_checkpoint("auto", run / "checkpoints")
    return int(found.name.removeprefix("step_")) if found else 0


def _debris(run: Path) -> set[tuple[str, int]]:
    """Folders of checkpoints whose writing, or removal, was cut."""
    root = run / "checkpoints"
    cut = [*root.glob(".step_*"), *(path for path in root.glob("step_*") if read_manifest(path) is None)]
    found = set()
    for path in cut:
        with contextlib.suppress(FileNotFoundError):  # the run goes on
            found.add((path.name, path.stat().st_mtime_ns))
    return found


def main() -> None:
    """Run a campaign and print what it did."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no further attempt after this")
    choices = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tally = Campaign(Path(folder), choices.seed).run(choices.kills, choices.seconds)
    print(json.dumps(dataclasses.asdict(tally)))


if __name__ == "__main__":
    main()
