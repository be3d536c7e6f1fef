"""The record of a run survives kills and resumes, and becomes a line, a plot and a summary."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from gdn_cp.training.metrics import METRICS_FILE, RunLog, StepMetrics, read_last, read_steps
from gdn_cp.training.plot import plot_run


def metrics(step: int, loss: float = 2.0, mfu: float | None = None, skipped: bool = False) -> StepMetrics:
    return StepMetrics(
        step=step,
        loss=loss,
        grad_norm=1.25,
        lr=1e-3,
        tokens=2048,
        epoch=0,
        seconds=0.5,
        tokens_per_second=4096.0,
        tokens_per_second_per_rank=2048.0,
        tflops_per_rank=0.5,
        mfu=mfu,
        memory_gib=1.5,
        skipped=skipped,
    )


def run_log(out: Path, first_step: int = 0, is_writer: bool = True) -> RunLog:
    return RunLog(out, is_writer=is_writer, first_step=first_step, last_step=10, unit="GPU", progress=False)


def test_line_says_what_is_known():
    assert metrics(3).line(10, "rank") == (
        "step  3/10 | loss 2.0000 | grad norm 1.250 | lr 1.00e-03 | 4,096 tokens/s | 2,048 tokens/s/rank | "
        "0.5 TFLOP/s/rank | 1.50 GiB"
    )
    assert "MFU 45.6%" in metrics(3, mfu=0.456).line(10, "GPU")
    assert dataclasses.replace(metrics(3), a2a_sizes=(4, 1, 4)).line(10, "GPU").endswith("1.50 GiB | a2a 1/4")
    assert metrics(3, skipped=True).line(10, "GPU").endswith("SKIPPED (not finite)")


def test_a_resumed_record_is_one_history(tmp_path, capsys):
    with run_log(tmp_path) as log:
        log.event("start", unigram_entropy=3.0, unit="GPU", layout="CP=2")
        for step in (1, 2, 3):
            log.step(metrics(step, loss=5.0))
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"event": "step", "step": 4, "lo')  # a kill in the middle of a line
    with run_log(tmp_path, first_step=2) as log:
        for step in (3, 4):
            log.step(metrics(step, loss=4.0))
    steps = read_steps(tmp_path / METRICS_FILE)
    assert [(record["step"], record["loss"]) for record in steps] == [(1, 5.0), (2, 5.0), (3, 4.0), (4, 4.0)]
    start = read_last(tmp_path / METRICS_FILE, "start")
    assert start is not None
    assert start["unigram_entropy"] == 3.0
    assert "step  4/10 | loss 4.0000" in capsys.readouterr().out
    plot = plot_run(tmp_path)
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_other_ranks_write_nothing(tmp_path):
    with run_log(tmp_path / "run", is_writer=False) as log:
        log.event("start")
        log.step(metrics(1))
        log.say("nothing")
    assert not (tmp_path / "run").exists()


def test_plot_of_no_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no training steps"):
        plot_run(tmp_path)
    (tmp_path / METRICS_FILE).write_text(json.dumps({"event": "start"}) + "\n")
    with pytest.raises(ValueError, match="no training steps"):
        plot_run(tmp_path)
