"""The same data and seed give the same losses and gradients under every division of the work over ranks."""

from __future__ import annotations

import dataclasses
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gdn_cp.training.config import DataConfig, ModelConfig, OptimConfig, ParallelConfig, TrainConfig, check_config
from gdn_cp.training.data import Corpus, PackStream
from gdn_cp.training.engine import TorchEngine
from gdn_cp.training.model import build_model
from gdn_cp.training.parallel import model_parallel
from gdn_cp.training.presets import TINY
from gdn_cp.training.step import accumulate_gradients, run_step
from gdn_cp.training.tokenizer import ByteTokenizer
from gdn_cp.training.weights import gather_whole

STEPS = 10
RELATIVE = 1e-5  # float32 sums in another order: each is good to about 1e-7, a few hundred of them are added
MODEL = ModelConfig(
    layers=2,
    hidden=32,
    ffn=48,
    attention_every=2,
    attention_heads=4,
    attention_groups=2,
    attention_head_dim=16,
    gdn_key_heads=4,
    gdn_value_heads=8,
    gdn_head_dim=8,
)
DATA = DataConfig(token_budget=160, pad_multiple=8, packs_per_step=2)
OPTIM = OptimConfig(lr=1e-2, min_lr=1e-3, warmup_steps=2)


def real_text() -> list[bytes]:
    """Functions of the standard library, from a few bytes to several packs long."""
    functions = [json.JSONDecoder.decode, json.dumps, Path.exists, Path.read_text, Path.match, json.load, Path.mkdir]
    return [inspect.getsource(function).encode() for function in functions]


def watch_backward(parameter: torch.Tensor, own_thread: list[bool]) -> None:
    """Note at each backward whether autograd may run it elsewhere than on the forward's thread."""
    parameter.register_hook(lambda _: own_thread.append(torch._C._is_multithreading_enabled()))


def train_and_collect(
    rank: int,
    world_size: int,
    divisions: list[ParallelConfig],
    model: ModelConfig = MODEL,
    data: DataConfig = DATA,
    last_step: int = STEPS,
) -> list[dict[str, Any]]:
    """Losses, and the whole gradients of the first step, of each way to divide the work."""
    results = []
    for parallel in divisions:
        config = TrainConfig(model=model, data=data, parallel=parallel, optim=OPTIM)
        with model_parallel(parallel, torch.device("cpu"), timeout_minutes=1) as ranks:
            corpus = Corpus.build(real_text(), ByteTokenizer())
            stream = PackStream(corpus, data.token_budget, data.pad_multiple, seed=5)
            module, _ = build_model(config, ranks)
            engine = TorchEngine(module, OPTIM, ranks)
            start = stream.state_dict()
            own_thread: list[bool] = []
            watch_backward(next(p for p in module.parameters() if p.requires_grad), own_thread)
            accumulate_gradients(engine, stream, stream.next_step(data.packs_per_step), ranks)
            norm = engine.reduce_gradients()
            grads = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
            whole = {name: grad.clone() for name, grad in gather_whole(grads, module, model, ranks.tp_group).items()}
            stream.load_state_dict(start)
            steps = [
                run_step(engine, stream, stream.next_step(data.packs_per_step), ranks, OPTIM.lr_at(step, STEPS))
                for step in range(1, last_step + 1)
            ]
            sizes = [step.a2a_sizes for step in steps]
            losses = [step.loss for step in steps]
            results.append(
                {"losses": losses, "norm": norm, "grads": whole, "a2a_sizes": sizes, "own_thread": own_thread}
            )
    return results


@pytest.fixture(scope="module")
def one_rank() -> dict[str, Any]:
    from tests.ranks import run_ranks

    return run_ranks(train_and_collect, 1, [ParallelConfig()])[0][0]


def assert_same(one: dict[str, Any], other: dict[str, Any], name: str) -> None:
    for step, (expected, got) in enumerate(zip(one["losses"], other["losses"], strict=True), start=1):
        assert abs(got - expected) <= RELATIVE * expected, f"{name}, step {step}: {got} against {expected}"
    assert abs(other["norm"] - one["norm"]) <= RELATIVE * one["norm"], name
    assert other["grads"].keys() == one["grads"].keys()
    for parameter, expected in one["grads"].items():
        error = (other["grads"][parameter] - expected).norm() / expected.norm()
        assert error <= RELATIVE, f"{name}, gradient of {parameter}: {error}"


def test_one_rank_learns(one_rank):
    assert one_rank["losses"][-1] < 0.8 * one_rank["losses"][0]
    assert all(grad.norm() > 0 for grad in one_rank["grads"].values())


def test_the_backward_runs_on_the_thread_of_the_forward(one_rank):
    assert len(one_rank["own_thread"]) >= STEPS
    assert not any(one_rank["own_thread"])


def test_losses_and_gradients_on_two_ranks(run_ranks, one_rank):
    divisions = [ParallelConfig(cp=2), ParallelConfig(tp=2), ParallelConfig(tp=2, sequence_parallel=True)]
    for per_rank in run_ranks(train_and_collect, 2, divisions):
        for division, result in zip(divisions, per_rank, strict=True):
            assert_same(one_rank, result, str(division))


def test_losses_and_gradients_on_four_ranks(run_ranks, one_rank):
    divisions = [
        ParallelConfig(cp=4),
        ParallelConfig(tp=2, cp=2, a2a_size=1),
        ParallelConfig(tp=2, cp=2, sequence_parallel=True),
        ParallelConfig(cp=2),  # with two data-parallel replicas
    ]
    for per_rank in run_ranks(train_and_collect, 4, divisions):
        for division, result in zip(divisions, per_rank, strict=True):
            assert_same(one_rank, result, str(division))


def test_tiny_proxy_has_the_same_losses_under_every_a2a_size(run_ranks):
    data = DataConfig(token_budget=256, pad_multiple=8, packs_per_step=1)
    sizes = (4, 1, 2, None)
    divisions = [ParallelConfig(cp=4, a2a_size=size) for size in sizes]
    for results in run_ranks(train_and_collect, 4, divisions, TINY.model, data, 4):
        for size, result in zip(sizes, results, strict=True):
            assert result["a2a_sizes"] == [(size or 4,)] * 4
            assert_same(results[0], result, f"a2a_size={size}")


def test_heads_that_no_rank_count_divides_train_under_auto(run_ranks):
    odd = dataclasses.replace(MODEL, gdn_key_heads=3, gdn_value_heads=6)
    with pytest.raises(ValueError, match="gdn_key_heads=3 must be a multiple of tp \\* a2a_size = 4"):
        check_config(TrainConfig(model=odd, data=DATA, parallel=ParallelConfig(cp=4, a2a_size=None)), 4)
    assert check_config(TrainConfig(model=odd, data=DATA, parallel=ParallelConfig(cp=4)), 4) == 1
    (one,) = run_ranks(train_and_collect, 1, [ParallelConfig()], odd)[0]
    for (result,) in run_ranks(train_and_collect, 4, [ParallelConfig(cp=4)], odd):
        assert result["a2a_sizes"] == [(1, 1)] * STEPS
        assert_same(one, result, "3/6 heads on 4 ranks")
        assert result["losses"][-1] < 0.8 * result["losses"][0]
