"""Distributed checkpoints of a hybrid model: written under one cut, read under another, by our layer and Megatron's."""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("megatron.core")
pytest.importorskip("psutil")  # without it a save waits for ever

from tests.unit.test_megatron_layer import megatrons_own
from tests.unit.test_megatron_parallel import VOCAB, build_model, relative_error, share_of_tp_rank, step

# Written under (TP, CP), read under each of the others.
PASSAGES = {(2, 2): [(1, 4), (1, 1), (2, 1), (2, 2)], (1, 4): [(2, 2)], (1, 1): [(2, 2), (1, 4)]}
SAME_MATHS = 1e-6  # losses are sums in another order


@contextlib.contextmanager
def saving_allowed() -> Iterator[None]:
    """Let a rank of `run_ranks` save: Megatron's writers are its children, which a daemon may not have.

    Their queue comes from a fork here, not from Megatron's fresh interpreter, which imports torch for ten seconds.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    process: Any = multiprocessing.current_process()
    process._config["daemon"] = False
    with multiprocessing.get_context("fork").Manager() as manager:
        filesystem_async._results_queue = manager.Queue()
        yield


def save(model: Any, folder: Path) -> None:
    import torch.distributed as dist
    from megatron.core import dist_checkpointing

    if dist.get_rank() == 0:
        folder.mkdir()
    dist.barrier()
    dist_checkpointing.save(model.sharded_state_dict(), str(folder))


@torch.no_grad()
def load(model: Any, folder: Path) -> None:
    """Read everything: what the model held before is NaN."""
    from megatron.core import dist_checkpointing

    for p in model.parameters():
        p.fill_(float("nan"))
    model.load_state_dict(dist_checkpointing.load(model.sharded_state_dict(), str(folder)))


@torch.no_grad()
def whole_values(model: Any) -> dict[str, Tensor]:
    """Values for every parameter of an uncut model, none of them an initial value."""
    generator = torch.Generator().manual_seed(9)
    return {name: p + 0.1 * torch.randn(p.shape, generator=generator) for name, p in model.named_parameters()}


@torch.no_grad()
def set_values(model: Any, values: dict[str, Tensor], tp: int) -> None:
    from megatron.core import parallel_state

    rank = parallel_state.get_tensor_model_parallel_rank()
    for name, p in model.named_parameters():
        p.copy_(share_of_tp_rank(name, values[name], rank, tp))


def differing(model: Any, values: dict[str, Tensor], tp: int) -> list[str]:
    from megatron.core import parallel_state

    rank = parallel_state.get_tensor_model_parallel_rank()
    return [n for n, p in model.named_parameters() if not torch.equal(p, share_of_tp_rank(n, values[n], rank, tp))]


def loss_of(model: Any, tp: int, cp: int, packed: bool = True) -> Tensor:
    import torch.distributed as dist
    from megatron.core import parallel_state

    tokens = torch.randint(0, VOCAB, (64,), generator=torch.Generator().manual_seed(5))
    loss = step(model, tokens, tp=tp, cp=cp, packed=packed)
    dist.all_reduce(loss, group=parallel_state.get_context_parallel_group())
    return loss


@saving_allowed()
def _pass_between_cuts(rank: int, world_size: int, root: str) -> dict[Any, Any]:
    reference = build_model()
    values = whole_values(reference)
    set_values(reference, values, 1)
    expected = loss_of(reference, 1, 1)
    results = {}
    for source, targets in PASSAGES.items():
        folder = Path(root, "tp{}_cp{}".format(*source))
        model = build_model(tp=source[0], cp=source[1])
        set_values(model, values, source[0])
        save(model, folder)
        for tp, cp in targets:
            model = build_model(tp=tp, cp=cp)
            load(model, folder)
            error = relative_error(loss_of(model, tp, cp), expected)
            results[source, (tp, cp)] = differing(model, values, tp), error, len(list(model.parameters()))
    return results


def test_a_checkpoint_is_read_exactly_under_another_cut(run_ranks, tmp_path):
    for rank, results in enumerate(run_ranks(_pass_between_cuts, 4, str(tmp_path), timeout=240)):
        assert len(results) == 7
        for passage, (differ, loss_error, parameters) in results.items():
            assert not differ, (rank, passage)
            assert loss_error < SAME_MATHS, (rank, passage)
            assert parameters == 41


def with_megatrons_layer(tp: int, patch: pytest.MonkeyPatch) -> Any:
    """The hybrid model with Megatron's own GatedDeltaNet in place of ours."""
    model = build_model(tp=tp)
    for layer in model.decoder.layers[:3]:
        layer.self_attention = megatrons_own(model.config, patch, conv_bias=False)
    return model


@saving_allowed()
def _pass_between_layers(rank: int, world_size: int, root: str) -> dict[str, Any]:
    values = whole_values(build_model())
    ours, theirs = Path(root, "ours"), Path(root, "theirs")
    with pytest.MonkeyPatch.context() as patch:
        model = with_megatrons_layer(2, patch)
        set_values(model, values, 2)
        expected = loss_of(model, 2, 1, packed=False)
        save(model, theirs)
    model = build_model(cp=2)
    load(model, theirs)
    result = {"ours": differing(model, values, 1)}
    result["error"] = relative_error(loss_of(model, 1, 2, packed=False), expected)
    save(model, ours)
    with pytest.MonkeyPatch.context() as patch:
        model = with_megatrons_layer(2, patch)
        load(model, ours)
        result["theirs"] = differing(model, values, 2)
        result["same"] = torch.equal(loss_of(model, 2, 1, packed=False), expected)
    return result


def test_a_checkpoint_passes_both_ways_between_megatrons_layer_and_ours_under_other_cuts(run_ranks, tmp_path):
    for result in run_ranks(_pass_between_layers, 2, str(tmp_path), timeout=240):
        assert result["ours"] == result["theirs"] == []
        assert result["error"] < 1e-5  # Megatron's torch form of the rule sums its chunks otherwise
        assert result["same"]
