"""One optimizer step: from the packs of a step plan to a loss, gradients, and, where those are finite, new weights.

Every rank of a context-parallel group builds the same pack, from the same host-side lengths, and takes its own rows by
the pack's layout. The loss is a sum over this rank's targets divided by the targets of the whole step, so that losses
and gradients add up over data- and context-parallel ranks, whatever their number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from gdn_cp.comm.layout import ThdLayout
from gdn_cp.training.data import PackStream, StepPlan
from gdn_cp.training.engine import Engine
from gdn_cp.training.faults import BatchSizes, Progress, check_same_batch
from gdn_cp.training.packing import PackedBatch
from gdn_cp.training.parallel import Ranks


@dataclass(frozen=True)
class StepResult:
    """Loss in nats per target of the whole step, norm of its gradient before clipping, whether it was applied.

    `a2a_sizes`: what the GDN layers took for each pack of this data-parallel rank; empty without such layers.
    """

    loss: float
    grad_norm: float
    applied: bool
    a2a_sizes: tuple[int, ...] = ()

    @property
    def finite(self) -> bool:
        """Whether loss and gradient norm are finite numbers."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def model_inputs(batch: PackedBatch, ranks: Ranks, check_where: str | None = None) -> dict[str, Any]:
    """This rank's rows of a pack, as arguments of a Megatron GPTModel (all [1, t_local]) and `loss_mask` [t_local].

    `check_where` compares the pack among the ranks that share it; the text begins the ValueError where they differ.
    """
    from gdn_cp.megatron import packed_seq_params_from_layout

    layout = ThdLayout.zigzag(batch.cu_seqlens, ranks.cp_size, seqlens=batch.seqlens, device=ranks.device)
    if check_where is not None:
        check_same_batch(batch, layout, ranks.tp_cp_group, check_where)

    def rows(array: np.ndarray) -> Tensor:
        return layout.shard(torch.from_numpy(array).to(ranks.device, non_blocking=True), ranks.cp_rank)

    return {
        "input_ids": rows(batch.tokens)[None],
        "position_ids": rows(batch.position_ids)[None],
        "labels": rows(batch.labels)[None],
        "loss_mask": rows(batch.loss_mask),
        "packed_seq_params": packed_seq_params_from_layout(layout, ranks.cp_group),
    }


def accumulate_gradients(
    engine: Engine,
    stream: PackStream,
    plan: StepPlan,
    ranks: Ranks,
    progress: Progress | None = None,
    check_ranks: bool = False,
) -> tuple[Tensor, tuple[int, ...]]:
    """Forward and backward over this data-parallel rank's packs: (loss of the step over all ranks, float64; a2a_sizes).

    The latter as in `StepResult`. `progress` is told of each phase; `check_ranks` as in the run's choices.
    """
    progress = progress or Progress(ranks.rank)
    engine.begin_step()
    engine.module.train()
    total = torch.zeros((), dtype=torch.float64, device=ranks.device)
    a2a_sizes = []
    packs = plan.packs[ranks.dp_rank :: ranks.dp_size]
    for index, pack in enumerate(packs):
        progress.enter("data")
        batch = stream.build(pack)
        progress.batch = BatchSizes.of(batch, ranks.cp_size)
        where = f"step {progress.step}, pack {index + 1} of {len(packs)}" if check_ranks else None
        inputs = model_inputs(batch, ranks, where)
        mask = inputs.pop("loss_mask")
        progress.enter("forward")
        with engine.accumulating(last=index == len(packs) - 1):
            losses = engine.module(attention_mask=None, **inputs)
            loss = losses[0].float().masked_fill(~mask, 0.0).sum() / plan.num_targets
            progress.enter("backward")
            # A process has one GPU. Autograd's own thread for it would launch the same from a core with cold caches.
            with torch.autograd.set_multithreading_enabled(False):
                loss.backward()
        total += loss.detach()
        taken = inputs["packed_seq_params"].a2a_size_taken
        a2a_sizes += [] if taken is None else [taken]
    progress.enter("reduce")
    dist.all_reduce(total, group=ranks.dp_cp_group)
    return total, tuple(a2a_sizes)


def run_step(
    engine: Engine,
    stream: PackStream,
    plan: StepPlan,
    ranks: Ranks,
    lr: float,
    progress: Progress | None = None,
    check_ranks: bool = False,
) -> StepResult:
    """A whole optimizer step; weights stay as they are where the loss or the gradient norm is not finite.

    `progress` and `check_ranks` as in `accumulate_gradients`.
    """
    progress = progress or Progress(ranks.rank)
    total, a2a_sizes = accumulate_gradients(engine, stream, plan, ranks, progress, check_ranks)
    grad_norm = engine.reduce_gradients()
    result = StepResult(float(total), grad_norm, applied=False, a2a_sizes=a2a_sizes)
    if not result.finite:
        return result
    progress.enter("optimizer")
    engine.apply(lr, grad_norm)
    return replace(result, applied=True)
