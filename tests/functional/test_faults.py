"""Training jobs that meet a fault: what torchrun's user reads, and what is left to continue from."""

from __future__ import annotations

import os

import pytest

from gdn_cp.training.metrics import METRICS_FILE, read_steps
from tests.functional.jobs import SMALL, finish, start, write_text
from tests.functional.kill_points import EVERY, Campaign
from tests.functional.test_train_proxy import losses, sabotage

pytestmark = pytest.mark.functional
KILLS = int(os.environ.get("GDN_CP_TEST_KILLS", "3"))


def test_a_rank_that_stands_still_is_named_and_the_job_ends(tmp_path):
    text = write_text(tmp_path / "text")
    script = sabotage(tmp_path, "n == 3 and rank == 1", "import time; time.sleep(600)")
    choices = ["tiny", *SMALL, "--data", str(text), "--cp", "2", "--steps", "50", "--watchdog-seconds", "4"]
    code, output = finish(start(2, *choices, "--out", str(tmp_path / "run"), script=script), timeout=120)
    assert code != 0
    # Rank 1 stands still, in no collective; rank 0, where it still has time to say so, waits for it in one.
    assert "watchdog (rank 1, step 3, phase data): no progress for" in output
    assert "in sabotaged" in output
    assert "exitcode  : 3" in output, output
    assert len(read_steps(tmp_path / "run" / METRICS_FILE)) == 2


def test_torchrun_restarts_a_killed_rank_with_the_same_losses(tmp_path):
    text = write_text(tmp_path / "text")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    choices = ["tiny", *SMALL, "--data", str(text), "--cp", "2", "--steps", "8", "--checkpoint-every", "3"]
    code, output = finish(start(2, *choices, "--out", str(whole)))
    assert code == 0, output
    first = "os.environ['TORCHELASTIC_RESTART_COUNT'] == '0'"
    script = sabotage(tmp_path, f"n == 5 and rank == 1 and {first}", "os.kill(os.getpid(), signal.SIGKILL)")
    choices = [*choices, "--out", str(killed), "--resume", "auto"]
    code, output = finish(start(2, *choices, script=script, launcher=["--max-restarts", "2"]))
    assert code == 0, output
    assert "resume: no complete checkpoint" in output
    assert "step_00000003 after step 3" in output
    assert losses(killed) == losses(whole)


def test_random_kill_points_lose_nothing_but_time(tmp_path):
    """GDN_CP_TEST_KILLS sets how many; `python -m tests.functional.kill_points` is the same without pytest."""
    pytest.importorskip("megatron.core")
    tally = Campaign(tmp_path, seed=7).run(KILLS)
    assert tally.kills == KILLS
    assert tally.runs_finished >= 1
    assert tally.most_steps_lost <= EVERY
