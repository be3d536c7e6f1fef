"""The benchmarks on several ranks run end to end on two CPU ranks, on tiny shapes: checks, rows, files, tables."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.functional.jobs import write_text

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


def proxy_options(output: Path, **choices: Any) -> Any:
    from bench_proxy import Options

    small = {"preset": "tiny", "tokens": 256, "data": output.parent / "text", "steps": 2, "warm_up": 1}
    return Options(output=output, **(small | choices))


def proxy_benchmark(rank: int, world_size: int, output: str) -> int:
    in_scripts()
    import bench_proxy

    return bench_proxy.main(proxy_options(Path(output), against="gdn_cp", a2a_size=1))


def wrong_layer(rank: int, world_size: int, output: str) -> tuple[int, list[list[float]], list[dict[str, float]]]:
    """(what `compare` says, each job's weights, first steps apart before and after) where the second job is changed."""
    in_scripts()
    import bench_proxy
    import torch
    from bench_ranks import join_world

    world, options = join_world(), proxy_options(Path(output))
    config = bench_proxy.training_config(options, world_size)
    corpus = bench_proxy.Corpus.build(bench_proxy.read_documents(config.data.data), bench_proxy.ByteTokenizer())
    stream = bench_proxy.PackStream(corpus, config.data.token_budget, config.data.pad_multiple, seed=5)
    plans = (stream.next_step(1),)
    decoders = {"one": bench_proxy.hybrid_decoder, "two": bench_proxy.hybrid_decoder}
    with bench_proxy.model_parallel(config.parallel, world.device, 1.0) as ranks:
        jobs = bench_proxy.build_jobs(config, ranks, decoders)
        race = bench_proxy.Race(config, world, ranks, stream, plans)
        first = [bench_proxy.first_step(job, race) for job in jobs]
        apart = [bench_proxy.difference(*first, race)]
        weights = [[p.double().sum().item() for p in job.engine.module.parameters()] for job in jobs]
        with torch.no_grad():
            for name, parameter in jobs[1].engine.module.named_parameters():
                if name.endswith("0.self_attention.conv1d.weight"):
                    parameter.copy_(parameter.flip(-1))
        apart.append(bench_proxy.difference(first[0], bench_proxy.first_step(jobs[1], race), race))
        return bench_proxy.compare(race, jobs, options, {}), weights, apart


def test_proxy_benchmark_steps_by_turns_and_writes_every_block(run_ranks, tmp_path: Path):
    pytest.importorskip("megatron.core")
    write_text(tmp_path / "text")
    output = tmp_path / "proxy.json"
    assert run_ranks(proxy_benchmark, 2, str(output)) == [0, 0]
    content = json.loads(output.read_text())
    assert content["layout"] == "TP=1 CP=2 DP=1 on 2 cpu rank(s)"
    assert content["machine"]["commit"]
    assert content["config"]["parallel"]["a2a_size"] == 1
    assert max(content["apart"].values()) == 0
    ours, again = "gdn_cp", "gdn_cp again"
    blocks = content["blocks"]
    assert [b["contender"] for b in blocks] == [ours, again, again, ours, ours, again]
    assert [b["block"] for b in blocks] == [1, 1, 2, 2, 3, 3]
    losses = {name: [b["last_loss"] for b in blocks if b["contender"] == name] for name in (ours, again)}
    assert losses[ours] == losses[again]
    assert losses[ours][2] < losses[ours][0] < content["first_step"][ours]["loss"]
    for block in blocks:
        assert len(block["step_ms"]) == len(content["packs"]) == 2
        assert min(block["step_ms"]) <= block["median_ms"] <= max(block["step_ms"])
        assert min(block["step_ms"]) > 0


def test_a_proxy_that_computes_something_else_is_not_timed(run_ranks, tmp_path: Path):
    pytest.importorskip("megatron.core")
    write_text(tmp_path / "text")
    output = tmp_path / "proxy.json"
    for code, weights, (before, after) in run_ranks(wrong_layer, 2, str(output)):
        assert code == 1
        assert weights[0] == weights[1]
        assert max(before.values()) == 0
        assert after["token_losses"] > 1e-2  # 50 times what float32 may differ by
    assert not output.exists()


def test_choices_of_the_proxy_benchmark_that_time_nothing_are_refused():
    in_scripts()
    from bench_proxy import training_config

    for choices, words in (
        ({"steps": 0}, "steps=0"),
        ({"cp": 0}, "cp=0"),
        ({"cp": 3}, "cp=3"),
        ({"warm_up": -1}, "-1"),
    ):
        with pytest.raises(ValueError, match=words):
            training_config(proxy_options(Path("proxy.json"), **choices), 4)
    assert training_config(proxy_options(Path("proxy.json"), cp=2), 4).data.packs_per_step == 2
