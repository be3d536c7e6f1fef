"""The kernel scripts run end to end without a GPU, on tiny shapes: options, checks, files, pictures."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# The plain-torch path is what runs here; the interpreter would only slow Triton's import down.
ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}

pytest.importorskip("tyro")


def run(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        env={**ENVIRONMENT, "GDN_CP_COMMIT": "abc"},
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_check_compares_with_float64_and_writes_what_it_found(tmp_path: Path):
    output = tmp_path / "check.json"
    text = run(
        "scripts/check_kernels.py",
        "--device",
        "cpu",
        "--jobs",
        "1",
        "--draws",
        "2",
        "--no-fla",
        "--only",
        "K=16",
        "--output",
        str(output),
    )
    content = json.loads(output.read_text())
    assert "1 cases, 0 wrong" in text
    assert content["machine"]["commit"] == "abc"
    (case,) = content["cases"]
    assert case["repeats"]
    assert case["draws"] == 2
    # A root mean square of two is between the larger one and that over the root of two.
    assert all(case["largest"][name] / 1.5 < error <= case["largest"][name] for name, error in case["ours"].items())
    assert set(case["ours"]) >= {"o", "final_state", "dq", "dk", "dv", "dg", "dbeta", "dA_log", "ddt_bias"}
    assert max(case["ours"].values()) < content["limit"]


def test_rounding_errors_add_up_by_squares(tmp_path: Path):
    output = tmp_path / "roundings.json"
    run("scripts/rounding_errors.py", "--tokens", "100", "--dims", "32", "48", "--group", "4", "--output", str(output))
    content = json.loads(output.read_text())
    table, sums = content["errors"], content["sums"]
    assert 0 < sums["walks"]["dA_log"]["rms"] < sums["all"]["dA_log"]["rms"] <= sums["all"]["dA_log"]["largest"]
    everything, nothing = table.pop("all"), table.pop("none")
    assert max(nothing.values()) < 1e-9
    # Of sums over few tokens, dA_log and ddt_bias, the errors are few numbers: their squares add up on average only.
    for name in ("o", "final_state", "dq", "dk", "dv", "dg", "dbeta", "dinitial_state"):
        together = sum(row[name] ** 2 for row in table.values()) ** 0.5
        assert 0.7 * together < everything[name] < 1.4 * together, name


def test_bench_writes_rows_and_plot_draws_them(tmp_path: Path):
    chunk, decode, gate = (tmp_path / f"{name}.json" for name in ("chunk", "decode", "gate"))
    small = ("--repeats", "1", "--output")
    run(
        "scripts/bench_kernels.py", "chunk", "--jobs", "0", "--heads", "1", "2", "--tokens", "64", "--others", *small,
        str(chunk),
    )  # fmt: skip
    run(
        "scripts/bench_kernels.py", "decode", "--requests", "2", "--heads", "1", "2", "--dim", "16", *small, str(decode)
    )
    run("scripts/bench_kernels.py", "gate", "--tokens", "64", *small, str(gate))
    rows = json.loads(chunk.read_text())["rows"]
    assert [row["sequences"] for row in rows] == [1, 16]
    assert all(row["both_eager"] > 0 and not row["error"] for row in rows)
    banks = [row["bank"] for row in json.loads(decode.read_text())["rows"]]
    assert banks == ["float32 [K, V]", "float32 [V, K]", "bfloat16 [K, V]", "bfloat16 [V, K]"]
    pytest.importorskip("matplotlib")
    pictures = run("scripts/plot_bench.py", str(chunk), str(decode), str(gate)).split()
    assert [Path(picture).stat().st_size > 1000 for picture in pictures] == [True] * 3


def test_sanitizer_cases_are_right():
    assert "wrong: none" in run("scripts/sanitize_cases.py")


@pytest.mark.parametrize("script", ["gpu_check.sh", "sanitize_kernels.sh"])
def test_shell_scripts_parse_and_ask_for_a_folder(script: str):
    subprocess.run(["bash", "-n", f"scripts/{script}"], check=True, cwd=ROOT)
    done = subprocess.run(["bash", f"scripts/{script}"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode != 0
    assert f"usage: scripts/{script} FOLDER" in done.stderr


@pytest.mark.parametrize(("mode", "gpus"), [("all", 4), ("all", 1), ("ranks", 2), ("quick", 2)])
def test_gpu_check_runs_every_step_and_names_those_that_fail(mode: str, gpus: int, tmp_path: Path):
    """With a program for Python that says how many GPUs there are, and fails in the planner's benchmark."""
    python = tmp_path / "python"
    python.write_text(f"""#!/usr/bin/env bash
        if [ "$1" = -c ]; then echo {gpus}; exit 0; fi
        echo "$*" >> {tmp_path}/calls
        [[ "$*" != *bench_planner* ]]""")
    python.chmod(0o755)
    done = subprocess.run(
        ["bash", "scripts/gpu_check.sh", str(tmp_path / "out"), mode],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHON": str(python)},
    )
    calls = (tmp_path / "calls").read_text()
    of_kernels = ["gdn_cp.doctor", "check_kernels", "bench_kernels.py chunk", "bench_kernels.py decode", "tests/gpu"]
    of_ranks = ["-m multi_gpu", "bench_exchange", "bench_layer", "bench_planner"]
    assert all((words in calls) == (mode != "ranks") for words in of_kernels)
    assert all((words in calls) == (gpus > 1) for words in of_ranks)
    assert ("bench_proxy" in calls) == (gpus > 1 and mode != "quick")
    failed = done.stdout.splitlines()[-1].split()[1:]
    assert [name for name in failed if name != "sanitize"] == (["planner"] if gpus > 1 else [])
    assert done.returncode == bool(failed)
