"""Training on four GPUs against one: tensor, sequence and context parallelism at once, and every way to share CP 4.

Each division runs in a world of four ranks, the undivided job in a world of one, all of them side by side, for most of
the time goes into compiling: a small hybrid model, of which every parameter's gradient is compared, and the first steps
of the proxy, of which losses are.
"""

from __future__ import annotations

import gc
import math
import re
import sysconfig
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
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
# bfloat16 has 8 bits, and how far its roundings carry a gradient is measured: on one GPU, against float32. A division
# rounds partial sums in other places, about as many of them, so its errors are other draws of the same size. One draw
# says little where terms cancel: errors of dt_bias, sums over all tokens of either sign, spread from 0.2 to 4.5 % over
# seeds on a CPU, on one rank as on two. So errors are taken together, over seeds and layers: the root of their mean
# square is good to a fifth from a dozen draws, and twice the other is no chance.
SEEDS, NOISE = (1234, 1, 2, 3), 2.0
ROUNDING = 2.0**-8  # of the loss itself, where nothing but the last rounding may be left


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


def whole_gradients(config: TrainConfig, ranks: Any) -> dict[str, Tensor]:
    """The gradients, put together from all ranks, of one step over real text, and the loss, on the CPU.

    "spread": how far another rank's are from rank 0's, relative to the norm; rank 0 alone gives the tensors.
    """
    from megatron.core.distributed import finalize_model_grads

    from gdn_cp.training.data import Corpus, PackStream
    from gdn_cp.training.model import build_model
    from gdn_cp.training.step import accumulate_gradients
    from gdn_cp.training.tokenizer import ByteTokenizer
    from gdn_cp.training.weights import gather_whole

    corpus = Corpus.build(real_text(), ByteTokenizer())
    stream = PackStream(corpus, config.data.token_budget, config.data.pad_multiple, seed=config.run.seed)
    module, transformer = build_model(config, ranks)
    engine: Any = _Gradients(module, transformer)
    loss, _ = accumulate_gradients(engine, stream, stream.next_step(config.data.packs_per_step), ranks)
    finalize_model_grads([engine.module])
    gradients = {name: p.main_grad for name, p in module.named_parameters()}
    whole = {"loss": loss, **gather_whole(gradients, module, config.model, ranks.tp_group)}
    spread = 0.0
    for tensor in whole.values():
        first = tensor.clone()
        dist.broadcast(first, src=0)
        spread = max(spread, relative_error(tensor, first))
    kept = {name: tensor.float().cpu() for name, tensor in whole.items()} if ranks.rank == 0 else {}
    return {**kept, "spread": torch.tensor(spread)}


def relative_error(value: Tensor, expected: Tensor) -> float:
    return float((value - expected).norm() / expected.norm())


def small_gradients(small: TrainConfig, world_size: int) -> dict[str, Any]:
    """The small model's gradients: by seed in bfloat16; in float32 of the first seed, alone of all that is compared."""
    from gdn_cp.training.parallel import choose_device, model_parallel

    wanted = [("bf16", seed) for seed in SEEDS] + [("fp32", seed) for seed in SEEDS[: None if world_size == 1 else 1]]
    results = {}
    with model_parallel(small.parallel, choose_device(small.run.device), timeout_minutes=2) as ranks:
        for precision, seed in wanted:
            run: Any = replace(small.run, precision=precision, seed=seed)
            results[precision, seed] = whole_gradients(replace(small, run=run), ranks)
    return results


def train_division(
    rank: int, world_size: int, small: TrainConfig, proxy: TrainConfig, parallel: ParallelConfig, out: str
) -> dict[Any, Any]:
    """The small model's gradients in both precisions and the proxy's losses by step."""
    from gdn_cp.training import loop
    from gdn_cp.training.metrics import METRICS_FILE, read_steps

    no_file: Any = lambda *_, **__: None  # noqa: E731  (weights of 0.8 GB and a plot for each run)
    loop.export_weights = loop.plot_run = no_file
    result: dict[Any, Any] = small_gradients(replace(small, parallel=parallel), world_size)
    gc.collect()  # the wrappers of the model refer to each other
    loop.train(replace(proxy, parallel=parallel, run=replace(proxy.run, out=Path(out))))
    steps = list(read_steps(Path(out) / METRICS_FILE))
    result["losses"] = {step["step"]: step["loss"] for step in steps}
    result["a2a_sizes"] = {size for step in steps for size in step["a2a_sizes"]}
    return result


def train_everywhere(
    small: TrainConfig, proxy: TrainConfig, out: Path, backend: str
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(results of one rank alone, results of each of four ranks, both by division), all run side by side."""
    with ThreadPoolExecutor(1 + len(DIVISIONS)) as pool:
        jobs = {
            name: pool.submit(
                run_ranks, train_division, ranks, small, proxy, parallel, str(out / name), backend=backend, timeout=240
            )
            for ranks, divisions in ((1, ONE), (4, DIVISIONS))
            for name, parallel in divisions.items()
        }
        results = {name: job.result() for name, job in jobs.items()}
    return results["one"][0], [{name: results[name][rank] for name in DIVISIONS} for rank in range(4)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    pytest.importorskip("megatron.core")
    return train_everywhere(SMALL, PROXY, tmp_path_factory.mktemp("runs"), "nccl")


def kinds(names: Iterable[str]) -> dict[str, list[str]]:
    """Parameters that differ in their layer alone, together."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(re.sub(r"layers\.\d+", "layers.*", name), []).append(name)
    return found


@pytest.mark.multi_gpu(4)
@pytest.mark.parametrize("division", DIVISIONS)
def test_float32_gradients_are_those_of_one_gpu(trained, division):
    one, four = trained
    for rank, results in enumerate(four):
        for key in (("fp32", SEEDS[0]), *(("bf16", seed) for seed in SEEDS)):
            assert results[division][key]["spread"] < EXACT, f"rank {rank}, {key}"
    expected, found = one["fp32", SEEDS[0]], four[0][division]["fp32", SEEDS[0]]
    assert found.keys() == expected.keys()
    errors = {name: relative_error(x, expected[name]) for name, x in found.items() if name != "spread"}
    print(f"at most {max(errors.values()):.1e} ({max(errors, key=errors.__getitem__)})")
    assert all(error < EXACT for error in errors.values()), errors


@pytest.mark.multi_gpu(4)
@pytest.mark.parametrize("division", DIVISIONS)
def test_bfloat16_gradients_err_as_on_one_gpu(trained, division):
    one, four = trained
    cut = four[0][division]

    def error(found: dict[Any, Any], names: list[str]) -> float:
        """Root of the mean square of the relative errors over seeds and layers."""
        errors = [
            relative_error(found["bf16", seed][name], one["fp32", seed][name]) for seed in SEEDS for name in names
        ]
        return math.sqrt(sum(error**2 for error in errors) / len(errors))

    names = [name for name in one["fp32", SEEDS[0]] if name not in ("loss", "spread")]
    lines = {kind: (error(cut, same), error(one, same)) for kind, same in kinds(names).items()}
    for kind, (divided, alone) in sorted(lines.items(), key=lambda item: item[1], reverse=True)[:6]:
        print(f"{kind}: {divided:.4f}, on one GPU {alone:.4f}")
    for kind, (divided, alone) in lines.items():
        assert alone < 0.25, f"{kind}: {alone} on one GPU is no yardstick"
        assert divided <= NOISE * alone, f"{kind}: {divided}, on one GPU {alone}"
    assert error(cut, ["loss"]) < ROUNDING


@pytest.mark.multi_gpu(4)
@pytest.mark.parametrize("division", DIVISIONS)
def test_proxy_has_the_losses_of_one_gpu(trained, division):
    one, four = trained
    parallel = DIVISIONS[division]
    taken = four[0][division]["a2a_sizes"]
    if isinstance(parallel.a2a_size, str):  # the planner's choice
        assert all(parallel.cp % size == 0 for size in taken)
    else:
        assert taken == {parallel.a2a_size}
    assert len(one["losses"]) == PROXY.run.steps
    assert_close(four[0][division]["losses"], one["losses"], FIRST)
