"""Which of racecheck's reports are of Triton's dispatch of warps and which are races."""

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "sanitize_report.py"
KERNEL = Path(__file__).parents[2] / "gdn_cp" / "kernels" / "chunk_bwd_fused_kernel.py"


@pytest.fixture(scope="module")
def report():
    spec = importlib.util.spec_from_file_location("sanitize_report", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def line_of(text: str) -> int:
    lines = KERNEL.read_text(encoding="utf-8").splitlines()
    return next(number for number, line in enumerate(lines, 1) if line.strip().startswith(text))


def race(read: int, write: int, file: str = KERNEL.name) -> str:
    return (
        f"========= Error: Race reported between Read access at fused_kernel+0x140 in {file}:{read}\n"
        f"=========     and Write access at fused_kernel+0x1220 in {file}:{write} [12 hazards]\n=========\n"
    )


def test_dispatch_is_no_race_and_everything_else_is(report, tmp_path, capsys):
    begin, call, product = line_of("def fused_kernel("), line_of("gl.warp_specialize("), line_of("KS = warpgroup_mma(")
    races, dispatched = report.split_reports(race(begin, begin) + race(begin, call))
    assert (races, dispatched) == ([], 2)
    for at in (race(begin, product), race(product, call), race(begin, begin, "elsewhere.py")):
        races, dispatched = report.split_reports(race(begin, call) + at)
        assert len(races) == dispatched == 1
    log = tmp_path / "racecheck.log"
    log.write_text(race(begin, product) + "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)\n")
    assert report.main(str(log)) == 1
    assert f"{KERNEL.name}:{product}" in capsys.readouterr().out
    log.write_text(race(begin, call) + "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)\n")
    assert report.main(str(log)) == 0


def test_a_log_that_was_cut_off_passes_for_nothing(report, tmp_path):
    log = tmp_path / "racecheck.log"
    log.write_text("========= COMPUTE-SANITIZER\n")
    assert report.main(str(log)) == 1


def test_a_failure_under_the_tool_is_none_of_its_reports(report, tmp_path):
    log = tmp_path / "racecheck.log"
    dispatched = race(line_of("def fused_kernel("), line_of("gl.warp_specialize("))
    summary = "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)\n"
    log.write_text(dispatched + "========= Target application returned an error\n" + summary)
    assert report.main(str(log)) == 1


def test_an_access_without_a_line_is_a_race(report):
    races, dispatched = report.split_reports("Race reported between Read access at fused_kernel+0x1 [2 hazards]\n")
    assert len(races) == 1
    assert dispatched == 0
