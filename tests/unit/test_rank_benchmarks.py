"""The benchmarks on several ranks run end to end on two CPU ranks, on tiny shapes: checks, rows, files, tables."""

import json
import sys
from pathlib import Path

import pytest

SCRIPTS = str(Path(__file__).parents[2] / "scripts")

pytest.importorskip("tyro")


def in_scripts() -> None:
    """Let a rank import the scripts as they import each other."""
    if SCRIPTS not in sys.path:
        sys.path.insert(0, SCRIPTS)


def drawn(output: Path) -> bool:
    """Whether plot_bench.py makes a picture of the file (or there is nothing to draw with)."""
    pytest.importorskip("matplotlib")
    in_scripts()
    import plot_bench

    plot_bench.main(plot_bench.Options((output,)))
    return output.with_suffix(".png").stat().st_size > 1000


def layer_benchmark(rank: int, world_size: int, output: str) -> int:
    in_scripts()
    import bench_layer
    from bench_layer_pair import Widths

    return bench_layer.main(
        bench_layer.Options(
            output=Path(output),
            cases=("tiny-3mixed",),
            widths=Widths(hidden=32, key_heads=2, value_heads=4, head_dim=8),
            graphs=("tiny-3mixed",),
            breakdown=("tiny-3mixed",),
            check_tokens=128,
            repeats=1,
            calls=1,
        )
    )


def test_layer_benchmark_checks_against_float64_and_writes_a_row_for_each_a2a_size(run_ranks, tmp_path: Path):
    pytest.importorskip("megatron.core")
    output = tmp_path / "layer.json"
    assert run_ranks(layer_benchmark, 2, str(output)) == [0, 0]
    content = json.loads(output.read_text())
    assert content["ranks"] == 2
    rows = {row["contender"]: row for row in content["rows"]}
    assert {"gdn_cp a2a=2", "gdn_cp a2a=1"} <= set(rows)
    for name, row in rows.items():
        assert max(content["errors"][name].values()) < 1e-4
        assert row["eager_ms"] > 0
        assert row["kernels"]
        assert row["note"] == "no graph: no GPU"
    assert "megatron" in content["notes"] or "megatron" in rows
    assert drawn(output)


def turns(rank: int, world_size: int) -> tuple[list[str], dict[str, float], list[float]]:
    in_scripts()
    from bench_ranks import join_world, time_by_turns

    world, order = join_world(), []
    steps = {name: (lambda name=name: order.append(name)) for name in "ab"}
    times = time_by_turns(steps, world, repeats=2, calls=2, warm_up=1)
    return order, times, world.greatest([rank, -rank])


def test_turns_alternate_and_count_the_slowest_rank(run_ranks):
    (order, times, greatest), (_, others, _) = run_ranks(turns, 2)
    assert "".join(order) == "ab" + "aabb" + "bbaa"  # warm-up, a round, a round in reverse order
    assert times == others
    assert min(times.values()) > 0
    assert greatest == [1, 0]


def test_batch_lengths_are_multiples_of_two_cp_size():
    in_scripts()
    from bench_ranks import batch_lengths

    mixed = batch_lengths(65536, 17, 4, mixed=True)
    assert (len(mixed), sum(mixed), {n % 8 for n in mixed}) == (17, 65536, {0})
    assert 0 < min(mixed) < max(mixed) / 20
    assert batch_lengths(64, 4, 2, mixed=False) == (16,) * 4
    with pytest.raises(ValueError, match="tokens=60"):
        batch_lengths(60, 4, 4, mixed=False)


def test_errors_above_the_limit_and_nan_are_named():
    in_scripts()
    from bench_layer import too_large

    assert too_large({"out": 1e-3, "dx": float("nan")}, 1e-2) == ["dx errs by nan, allowed 1.0e-02"]


def exchange_benchmark(rank: int, world_size: int, output: str) -> int:
    in_scripts()
    import bench_exchange

    return bench_exchange.main(
        bench_exchange.Options(
            output=Path(output), tokens=(64,), sequences=3, heads=(2, 4), head_dim=16, repeats=1, calls=1
        )
    )


def test_exchange_benchmark_compares_bits_and_times_every_path(run_ranks, tmp_path: Path):
    output = tmp_path / "exchange.json"
    assert run_ranks(exchange_benchmark, 2, str(output)) == [0, 0]
    content = json.loads(output.read_text())
    rows = {row["path"]: row for row in content["rows"]}
    assert {"gdn_cp plain", "gdn_cp nccl", "wire: nccl alone"} <= set(rows)
    assert "gdn_cp peer" in content["notes"]
    for name, row in rows.items():
        assert row["in_ms"] > 0
        assert row["out_gb_per_s"] > 0
        assert (row["both_ms"] is None) == name.startswith("wire")
        assert not row["note"]
    assert drawn(output)


def wrong_results(rank: int, world_size: int) -> list[str]:
    in_scripts()
    import torch
    from bench_exchange import different
    from bench_ranks import join_world

    x = torch.zeros(3)
    return different({"in": x, "out": x + rank}, {"in": x, "out": x}, join_world())


def test_a_bit_that_is_wrong_on_one_rank_is_named_on_all(run_ranks):
    assert run_ranks(wrong_results, 2) == [["out"], ["out"]]
