"""Training jobs as a user starts them: they learn, survive SIGKILL, and end when one rank fails."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from gdn_cp.training.metrics import METRICS_FILE, read_steps
from tests.functional.jobs import ROOT, SMALL, finish, kill, start, write_text

pytestmark = pytest.mark.functional


def losses(run: Path) -> list[tuple[int, float, float]]:
    return [(step["step"], step["loss"], step["grad_norm"]) for step in read_steps(run / METRICS_FILE)]


def wait_for_step(run: Path, step: int, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if (run / METRICS_FILE).exists() and any(seen >= step for seen, _, _ in losses(run)):
            return
        time.sleep(0.01)
    raise AssertionError(f"step {step} was not reached in {seconds} s")


def test_killed_training_resumes_bit_for_bit(tmp_path):
    text = write_text(tmp_path / "text")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    choices = ["tiny", *SMALL, "--data", str(text), "--cp", "2", "--steps", "30", "--checkpoint-every", "4"]
    code, output = finish(start(2, *choices, "--out", str(whole)))
    assert code == 0, output

    job = start(2, *choices, "--out", str(killed))
    try:
        wait_for_step(killed, 6)
    finally:
        kill(job)
    assert losses(killed)[-1][0] < 30
    (killed / "checkpoints" / "step_00000029").mkdir()  # a checkpoint whose writing was cut: it must not be taken
    code, output = finish(start(2, *choices, "--out", str(killed), "--resume", "auto"))
    assert code == 0, output
    assert "resumed from" in output
    assert "step_00000029" not in output
    assert losses(killed) == losses(whole)
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
    script = tmp_path / "fail.py"
    script.write_text(
        "import os, runpy\n"
        "from gdn_cp.training import loop\n"
        "run_step, count = loop.run_step, [0]\n"
        "def failing(*arguments):\n"
        "    count[0] += 1\n"
        "    if os.environ['RANK'] == '1' and count[0] == 3:\n"
        "        raise RuntimeError('rank 1 is lost')\n"
        "    return run_step(*arguments)\n"
        "loop.run_step = failing\n"
        f"runpy.run_path({str(ROOT / 'scripts' / 'train_proxy.py')!r}, run_name='__main__')\n"
    )
    text = write_text(tmp_path / "text")
    began = time.monotonic()
    choices = ["tiny", *SMALL, "--data", str(text), "--cp", "2", "--steps", "50", "--out", str(tmp_path / "run")]
    code, output = finish(start(2, *choices, script=script))
    assert code != 0
    assert "rank 1 is lost" in output
    assert time.monotonic() - began < 120
    assert [step for step, _, _ in losses(tmp_path / "run")] == [1, 2]


def test_a_choice_that_cannot_work_ends_every_rank_with_a_reason(tmp_path):
    code, output = finish(start(2, "tiny", "--cp", "2", "--data", "/does/not/exist", "--out", str(tmp_path / "run")))
    assert code != 0
    for rank in (0, 1):
        assert f"error (rank {rank}): data='/does/not/exist' is neither a file nor a folder" in output
