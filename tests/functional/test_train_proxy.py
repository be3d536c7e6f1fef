"""Training jobs as a user starts them: they learn, survive SIGKILL, and end when one rank fails."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from gdn_cp.training.metrics import METRICS_FILE, read_steps
from tests.functional.jobs import ROOT, SMALL, finish, start, write_text

pytestmark = pytest.mark.functional


def losses(run: Path) -> list[tuple[int, float, float]]:
    return [(step["step"], step["loss"], step["grad_norm"]) for step in read_steps(run / METRICS_FILE)]


def sabotage(folder: Path, condition: str, deed: str) -> Path:
    """The training script, but each rank does `deed` before its n-th step where `condition` (of n and rank) holds."""
    script = folder / "sabotage.py"
    script.write_text(
        "import os, runpy, signal\n"
        "from gdn_cp.training import loop\n"
        "run_step, rank, n = loop.run_step, int(os.environ['RANK']), 0\n"
        "def sabotaged(*arguments):\n"
        "    global n\n"
        "    n += 1\n"
        f"    if {condition}:\n"
        f"        {deed}\n"
        "    return run_step(*arguments)\n"
        "loop.run_step = sabotaged\n"
        f"runpy.run_path({str(ROOT / 'scripts' / 'train_proxy.py')!r}, run_name='__main__')\n"
    )
    return script


def test_killed_training_resumes_bit_for_bit(tmp_path):
    text = write_text(tmp_path / "text")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    choices = ["tiny", *SMALL, "--data", str(text), "--cp", "2", "--steps", "12", "--checkpoint-every", "4"]
    code, output = finish(start(2, *choices, "--out", str(whole)))
    assert code == 0, output

    script = sabotage(tmp_path, "n == 7", "os.kill(os.getpid(), signal.SIGKILL)")
    code, output = finish(start(2, *choices, "--out", str(killed), script=script))
    assert code != 0
    assert "SIGKILL" in output
    survived = losses(killed)  # the launcher may end rank 0 before it has written its last line
    assert len(survived) >= 4
    assert survived == losses(whole)[: len(survived)]
    (killed / "checkpoints" / "step_00000011").mkdir()  # a checkpoint whose writing was cut: it must not be taken
    code, output = finish(start(2, *choices, "--out", str(killed), "--resume", "auto"))
    assert code == 0, output
    assert "step_00000004 after step 4" in output
    assert "step_00000011" not in output
    assert losses(killed) == losses(whole), output
    ours, theirs = load_file(whole / "weights.safetensors"), load_file(killed / "weights.safetensors")
    assert ours.keys() == theirs.keys()
    assert all((ours[name] == theirs[name]).all() for name in ours)

    code, output = finish(start(1, *choices[:-6], "--cp", "1", "--out", str(killed), "--resume", "auto"))
    assert code != 0
    assert "made with cp=2, this run has 1" in output


def test_tiny_learns_more_than_letter_frequencies(tmp_path):
    run = tmp_path / "run"
    code, output = finish(
        start(
            2,
            "tiny",
            "--cp",
            "2",
            "--steps",
            "45",
            "--token-budget",
            "1024",
            "--packs-per-step",
            "1",
            "--out",
            str(run),
        )
    )
    assert code == 0, output
    assert "below entropy: yes" in output
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((run / "tensorboard").iterdir())
    assert "decoder.layers.0.self_attention.A_log" in load_file(run / "weights.safetensors")
    events = [json.loads(line)["event"] for line in (run / METRICS_FILE).read_text().splitlines()]
    assert events == ["start", *["step"] * 45, "end"]


def test_a_failing_rank_ends_the_job(tmp_path):
    # The other rank waits in a collective that the failed one will never join.
    script = sabotage(tmp_path, "n == 3 and rank == 1", "raise RuntimeError('rank 1 is lost')")
    text = write_text(tmp_path / "text")
    began = time.monotonic()
    choices = ["tiny", *SMALL, "--data", str(text), "--cp", "2", "--steps", "50", "--out", str(tmp_path / "run")]
    code, output = finish(start(2, *choices, script=script))
    assert code != 0
    assert "rank 1 is lost" in output
    assert time.monotonic() - began < 120
    assert len(losses(tmp_path / "run")) <= 2


def test_a_choice_that_cannot_work_ends_every_rank_with_a_reason(tmp_path):
    code, output = finish(start(2, "tiny", "--cp", "2", "--data", "/does/not/exist", "--out", str(tmp_path / "run")))
    assert code != 0
    for rank in (0, 1):
        assert f"error (rank {rank}): data='/does/not/exist' is neither a file nor a folder" in output
