"""`python -m gdn_cp.doctor`: report, self-test and exit codes."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gdn_cp import doctor
from gdn_cp.kernels.backends import Choice

EXPECTED_NAMES = {
    "o", "final_state", "dq", "dk", "dv", "dg", "dbeta", "dA_log", "ddt_bias", "dinitial_state", "decode o",
    "decode state",
}  # fmt: skip


def test_command_reports_and_passes_on_this_machine():
    done = subprocess.run(
        [sys.executable, "-m", "gdn_cp.doctor", "--device", "cpu"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == doctor.OK, done.stdout + done.stderr
    assert f"torch  {torch.__version__.split('+')[0]}" in done.stdout
    assert "delta rule runs on  reference: the tensors are on cpu" in done.stdout
    assert "All is well." in done.stdout


def test_self_test_covers_every_result_and_gradient():
    checks = doctor.self_test(torch.device("cpu"), torch.float32)
    assert {check.name for check in checks} == EXPECTED_NAMES
    assert all(check.passed for check in checks), checks


def test_self_test_draws_other_data_for_another_seed():
    first, second = (doctor.self_test(torch.device("cpu"), torch.float32, "recurrent", seed) for seed in (0, 1))
    assert [check.error for check in first] != [check.error for check in second]
    assert all(check.passed for check in second)


def test_nan_never_passes():
    assert not doctor.Check("o", float("nan"), 1.0).passed


def test_wrong_result_gives_exit_code_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    right = doctor.chunk_gated_delta_rule

    def wrong(**kwargs):
        o, final = right(**kwargs)
        return o * 1.1, final

    monkeypatch.setattr(doctor, "chunk_gated_delta_rule", wrong)
    assert doctor.main(["--device", "cpu"]) == doctor.WRONG
    assert "o  1.0e-01  WRONG, above 1e-04" in capsys.readouterr().out


def test_gpu_without_fast_kernels_gives_exit_code_2(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor.torch, "device", lambda name: FakeCuda())
    monkeypatch.setattr(doctor, "device_facts", lambda device: {"device": "pretended"})
    monkeypatch.setattr(doctor, "usual_choice", lambda device, backend: Choice("reference", "pretended"))
    monkeypatch.setattr(doctor, "self_test", lambda *_: [doctor.Check("o", 0.0, 1.0)])
    assert doctor.main(["--device", "cuda"]) == doctor.SLOW


class FakeCuda:
    type = "cuda"


@pytest.mark.gpu
def test_gpu_is_well():
    assert doctor.main(["--device", "cuda"]) == doctor.OK
