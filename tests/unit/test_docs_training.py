"""The commands of docs/training.md, in their order, with a small model on a little text."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import subprocess
import sys
from itertools import groupby
from pathlib import Path

import pytest

from gdn_cp.training.metrics import METRICS_FILE, read_last, read_steps
from tests.functional.jobs import ROOT, SMALL, write_text

pytest.importorskip("megatron.core")

DOCUMENT = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
COMMANDS = [
    line
    for body in re.findall(r"^```bash\n(.*?)^```$", DOCUMENT, re.MULTILINE | re.DOTALL)
    for line in body.strip().splitlines()
]


def ranks_of(command: str) -> int:
    """How many ranks a command of the document starts."""
    found = re.match(r"torchrun --nproc-per-node (\d+) ", command)
    return int(found[1]) if found else 1


def run_commands(rank: int, world: int, folder: str, commands: list[str]) -> list[int]:
    """Exit codes of scripts on a world that exists already, as torchrun would have made it."""
    os.chdir(folder)
    codes = []
    for command in commands:
        words = shlex.split(command)
        start = next(i for i, word in enumerate(words) if word.startswith("scripts/"))
        sys.argv = words[start:]
        if words[start] == "scripts/train_proxy.py" and "--help" not in words:
            # Flags that come last win; a resumed run has a step more to do.
            steps = "3" if "--resume" in words else "2"
            small = [*SMALL, "--vocab", "320", "--data", "text", "--device", "cpu", "--no-progress"]
            sys.argv += [*small, "--steps", steps]
        try:
            script = runpy.run_path(str(ROOT / words[start]), run_name="__main__")
            codes.append(0 if "main" in script else 1)
        except SystemExit as end:
            codes.append(int(end.code or 0))
    return codes


def test_scripts_run_as_the_document_says(run_ranks, tmp_path):
    write_text(tmp_path / "text")
    scripts = [command for command in COMMANDS if not command.startswith("make")]
    assert len(scripts) == 9
    # One world for each number of ranks, the plot of a run on two after it.
    for ranks, commands in groupby(sorted(scripts, key=ranks_of, reverse=True), key=ranks_of):
        wanted = list(commands)
        assert run_ranks(run_commands, ranks, str(tmp_path), wanted, timeout=200) == [[0] * len(wanted)] * ranks
    runs = {path.name: read_steps(path / METRICS_FILE) for path in (tmp_path / "runs").iterdir()}
    assert runs.keys() == {"one", "two", "four", "odd", "states"}
    assert {step["a2a_sizes"][0] for step in runs["odd"]} == {1}
    assert {step["a2a_sizes"][0] for step in runs["states"]} == {2}
    files = {path.name for path in (tmp_path / "runs" / "two").iterdir()}
    assert files >= {METRICS_FILE, "loss.png", "weights.safetensors", "model.json", "checkpoints"}
    assert (tmp_path / "hf" / "config.json").exists()
    resumed = read_last(tmp_path / "runs" / "two" / METRICS_FILE, "start")
    assert resumed is not None
    assert resumed["first_step"] == 2
    assert len(runs["two"]) == 3


def make(folder: Path, *arguments: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["make", "-C", str(ROOT), *arguments], env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_make_trains_with_an_interpreter_as_it_is_and_installs_the_torch_named(tmp_path):
    first, second, third = (shlex.split(command)[1:] for command in COMMANDS if command.startswith("make"))
    assert first == ["train"]
    assert second[0] == "train"
    choices = second[1].removeprefix("ARGS=").split()
    small = [*choices, *SMALL, "--data", str(write_text(tmp_path / "text")), "--steps", "2", "--no-progress"]
    out = tmp_path / "run"
    output = make(tmp_path, "train", f"PYTHON={sys.executable}", "VENV=", f"RUN={out}", f"ARGS={' '.join(small)}")
    assert "summary: 2 steps" in output
    assert (out / "loss.png").exists()
    dry = make(tmp_path, "--dry-run", f"VENV={tmp_path / 'venv'}", *third)
    assert "pip install --quiet 'torch==2.11.0'" in dry
    assert "scripts/train_proxy.py" in dry
