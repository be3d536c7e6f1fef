"""Training on four GPUs against one: tensor, sequence and context parallelism at once, and every way to share CP 4.

One world of four ranks runs all divisions, beside it a world of one runs the undivided job: a small hybrid model, of
which every parameter's gradient is compared, and the first steps of the proxy, of which losses are.
"""

from __future__ import annotations

import gc
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gdn_cp.training.config import DataConfig, ModelConfig, ParallelConfig, TrainConfig
from gdn_cp.training.presets import QWEN3_NEXT_PROXY
from tests.functional.test_train_gpu import FIRST, assert_close
from tests.ranks import run_ranks
from tests.unit.test_training_parallel import real_text

pytestmark = pytest.mark.functional

DIVISIONS = {
    "tp2_sp_cp2": ParallelConfig(tp=2, cp=2, sequence_parallel=True),
    "tp2_sp_cp2_states": ParallelConfig(tp=2, cp=2, sequence_parallel=True, a2a_size=1),
    "cp4": ParallelConfig(cp=4),
    "cp4_two_by_two": ParallelConfig(cp=4, a2a_size=2),
    "cp4_states": ParallelConfig(cp=4, a2a_size=1),
}
ONE = {"one": ParallelConfig()}
SMALL = TrainConfig(
    model=ModelConfig(
        hidden=128,
        ffn=192,
        attention_heads=8,
        attention_groups=2,
        attention_head_dim=32,
        gdn_key_heads=4,
        gdn_value_heads=8,
        gdn_head_dim=64,
    ),
    data=DataConfig(token_budget=2048, pad_multiple=8, packs_per_step=2),
)
PROXY = replace(
    QWEN3_NEXT_PROXY,
    data=replace(QWEN3_NEXT_PROXY.data, data=Path(sysconfig.get_path("stdlib")) / "asyncio"),
    run=replace(QWEN3_NEXT_PROXY.run, steps=5, checkpoint_every=-1, progress=False),
)
# float32 through three tensor-core products of 2^-11 each or exactly, and sums in another order.
EXACT = 1e-4
# bfloat16 has 8 bits. How far that many roundings carry a gradient is measured: on one GPU, against float32. A division
# rounds partial sums of its own in other places, about as many; three times their error is far off for noise.
ROUNDING, NOISE = 2.0**-8, 3.0


class _Gradients:
    """What `accumulate_gradients` needs of an optimizer: Megatron's DDP, which adds gradients in float32."""

    def __init__(self, module: nn.Module, transformer: Any) -> None:
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

        settings = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
        self.module: Any = DistributedDataParallel(transformer, settings, module)

    def begin_step(self) -> None:
        self.module.zero_grad_buffer()

    def accumulating(self, *, last: bool) -> AbstractContextManager[Any]:
        return nullcontext() if last else self.module.no_sync()


def whole_gradients(config: TrainConfig, device: torch.device) -> dict[str, Tensor]:
    """The gradients, put together from all ranks, of one step over real text, and the loss, on the CPU."""
    from megatron.core.distributed import finalize_model_grads

    from gdn_cp.training.data import Corpus, PackStream
    from gdn_cp.training.model import build_model
    from gdn_cp.training.parallel import model_parallel
    from gdn_cp.training.step import accumulate_gradients
    from gdn_cp.training.tokenizer import ByteTokenizer
    from gdn_cp.training.weights import gather_whole

    with model_parallel(config.parallel, device, timeout_minutes=2) as ranks:
        corpus = Corpus.build(real_text(), ByteTokenizer())
        stream = PackStream(corpus, config.data.token_budget, config.data.pad_multiple, seed=5)
        module, transformer = build_model(config, ranks)
        engine: Any = _Gradients(module, transformer)
        loss, _ = accumulate_gradients(engine, stream, stream.next_step(config.data.packs_per_step), ranks)
        finalize_model_grads([engine.module])
        gradients = {name: p.main_grad for name, p in module.named_parameters()}
        whole = gather_whole(gradients, module, config.model, ranks.tp_group)
        return {"loss": loss.cpu(), **{name: gradient.float().cpu() for name, gradient in whole.items()}}


def train_all(
    rank: int, world_size: int, small: TrainConfig, proxy: TrainConfig, divisions: dict[str, ParallelConfig], out: str
) -> dict[str, Any]:
    """Of each division the small model's gradients in both precisions and the proxy's losses by step."""
    from gdn_cp.training import loop
    from gdn_cp.training.metrics import METRICS_FILE, read_steps
    from gdn_cp.training.parallel import choose_device

    no_file: Any = lambda *_, **__: None  # noqa: E731  (weights of 0.8 GB and a plot for each run)
    loop.export_weights = loop.plot_run = no_file
    results: dict[str, Any] = {}
    for name, parallel in divisions.items():
        precisions: dict[str, Any] = {"fp32": small.run, "bf16": small.run}
        result = {}
        for precision, run in precisions.items():
            chosen = replace(small, parallel=parallel, run=replace(run, precision=precision))
            result[precision] = whole_gradients(chosen, choose_device(run.device))
        folder = Path(out) / name
        loop.train(replace(proxy, parallel=parallel, run=replace(proxy.run, out=folder)))
        result["losses"] = {step["step"]: step["loss"] for step in read_steps(folder / METRICS_FILE)}
        result["a2a_sizes"] = {size for step in read_steps(folder / METRICS_FILE) for size in step["a2a_sizes"]}
        results[name] = result
        gc.collect()  # the wrappers of the model refer to each other
    return results


def train_everywhere(
    small: TrainConfig, proxy: TrainConfig, out: Path, backend: str
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(results of one rank alone, results of each of four ranks), run side by side."""
    with ThreadPoolExecutor(2) as pool:
        alone, four = (
            pool.submit(run_ranks, train_all, ranks, small, proxy, divisions, str(out), backend=backend, timeout=240)
            for ranks, divisions in ((1, ONE), (4, DIVISIONS))
        )
        return alone.result()[0]["one"], four.result()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    pytest.importorskip("megatron.core")
    return train_everywhere(SMALL, PROXY, tmp_path_factory.mktemp("runs"), "nccl")


def relative_error(value: Tensor, expected: Tensor) -> float:
    return float((value - expected).norm() / expected.norm())


@pytest.mark.multi_gpu(4)
@pytest.mark.parametrize("division", DIVISIONS)
def test_float32_gradients_are_those_of_one_gpu(trained, division):
    one, four = trained
    for rank, results in enumerate(four):
        found = results[division]["fp32"]
        assert found.keys() == one["fp32"].keys()
        errors = {name: relative_error(found[name], expected) for name, expected in one["fp32"].items()}
        print(f"rank {rank}: at most {max(errors.values()):.1e} ({max(errors, key=errors.__getitem__)})")
        assert all(error < EXACT for error in errors.values()), errors


@pytest.mark.multi_gpu(4)
@pytest.mark.parametrize("division", DIVISIONS)
def test_bfloat16_gradients_err_as_on_one_gpu(trained, division):
    one, four = trained
    worst = {}
    for rank, results in enumerate(four):
        for name, exact in one["fp32"].items():
            alone, cut = (relative_error(found["bf16"][name], exact) for found in (one, results[division]))
            worst[name] = f"{name} {cut:.4f}, on one GPU {alone:.4f}"
            assert alone < 0.25, f"{name}: {alone} on one GPU is no yardstick"
            assert cut <= NOISE * alone + ROUNDING, f"rank {rank}, {name}: {cut}, on one GPU {alone}"
    print(*sorted(worst.values(), key=lambda line: line.split()[1], reverse=True)[:5], sep="\n")


@pytest.mark.multi_gpu(4)
@pytest.mark.parametrize("division", DIVISIONS)
def test_proxy_has_the_losses_of_one_gpu(trained, division):
    one, four = trained
    parallel = DIVISIONS[division]
    sizes = {parallel.cp if isinstance(parallel.a2a_size, str) else parallel.a2a_size}
    assert four[0][division]["a2a_sizes"] == sizes
    assert len(one["losses"]) == PROXY.run.steps
    assert_close(four[0][division]["losses"], one["losses"], FIRST)
