"""The planner's scripts run end to end on CPU ranks, on tiny shapes: coefficients that it reads, and its choices."""

import json
import sys
from itertools import accumulate
from pathlib import Path

import pytest

from gdn_cp import GdnDims
from gdn_cp.comm.planner import Machine, plan

SCRIPTS = str(Path(__file__).parents[2] / "scripts")
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"

pytest.importorskip("tyro")


def in_scripts() -> None:
    """Let a rank import the scripts as they import each other."""
    if SCRIPTS not in sys.path:
        sys.path.insert(0, SCRIPTS)


def planner_benchmark(rank: int, world_size: int, output: str, coefficients: str) -> int:
    in_scripts()
    import bench_planner

    bench_planner.WORST = float("inf")  # nothing is said about this machine's speed
    grid = ((256, 1, False), (128, 3, True))
    return bench_planner.main(
        bench_planner.Options(
            output=Path(output),
            machine=coefficients,
            grid=grid,
            heads=(2, 4),
            head_dim=8,
            hidden=16,
            repeats=1,
            calls=1,
        )
    )


def measured_machine(rank: int, world_size: int, folder: str) -> int:
    in_scripts()
    import measure_machine

    options = measure_machine.Options(
        "tiny", Path(folder), tokens=128, full_heads=(2, 4), few_heads=(1, 1), dim=8, exchange_bytes=2**16, repeats=1
    )
    return measure_machine.main(options)


def test_measured_coefficients_are_what_the_planner_and_its_benchmark_take(run_ranks, tmp_path: Path):
    assert run_ranks(measured_machine, 2, str(tmp_path)) == [0, 0]
    written = str(tmp_path / "tiny.json")
    found = Machine.named(written)
    assert (
        min(found.chunk_head_us, found.chain_chunk_us, found.link_gb_per_s, found.link_latency_us, found.matmul_tflops)
        > 0
    )
    assert found.ranks_per_node == Machine.named("default").ranks_per_node
    assert plan([0, 4096], 2, GdnDims(2, 4, 8, 8), machine=written).a2a_size in (1, 2)

    output = tmp_path / "planner.json"
    assert run_ranks(planner_benchmark, 2, str(output), written) == [0, 0]
    content = json.loads(output.read_text())
    assert len(content["rows"]) == 2
    for row in content["rows"]:
        assert set(row["measured_ms"]) == {"1", "2"}
        assert row["ratio"] == row["measured_ms"][str(row["chosen"])] / min(row["measured_ms"].values())
        assert max(row["errors"].values()) < 1e-5


def test_choices_are_good_on_the_measured_batches():
    """The table that scripts/bench_planner.py measured on four H200s: every choice within a tenth of the best one."""
    in_scripts()
    from bench_ranks import batch_lengths

    table = json.loads((RESULTS / "planner-cp4-h200.json").read_text())
    dims = GdnDims(16, 32, 128, 128)
    assert len(table["rows"]) == 20
    for row in table["rows"]:
        lengths = batch_lengths(row["tokens"], row["sequences"], 4, row["mixed"])
        times = {int(a2a_size): ms for a2a_size, ms in row["measured_ms"].items()}
        made = plan([0, *accumulate(lengths)], 4, dims, hidden_size=2048, machine="h200", peers=True)
        assert times[made.a2a_size] <= 1.1 * min(times.values()), row
