"""Sums of gradients over ranks, for training a Megatron model without Megatron's own DistributedDataParallel.

Megatron's DDP with `finalize_model_grads` does the same and needs nothing from here (on a CPU: with the shim).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from megatron.core.utils import get_model_config
from torch import Tensor, nn


@torch.no_grad()
def reduce_gradients(
    model: nn.Module, *, dp_cp_group: dist.ProcessGroup | None = None, tp_group: dist.ProcessGroup | None = None
) -> None:
    """Make every parameter's `.grad` the gradient of the whole batch; call it once after the last backward of a step.

    The loss of each rank must be its own sum divided by the number of target tokens of the whole batch, over data- and
    context-parallel ranks. Then the sum over those ranks is the gradient, also of the parameters of which each rank
    uses its own heads only. Over the tensor-parallel ranks the gradients of those parameters are summed of which each
    rank saw a part: the norms under sequence parallelism, and the norms of q and k.

    Args:
        model: a Megatron model (a wrapper with `.module` is fine), same on every rank.
        dp_cp_group: data- and context-parallel ranks; None where something else has summed over them. (torch's DDP
            averages: multiply the loss by the group's size.)
        tp_group: tensor-parallel ranks; None: no tensor parallelism.

    Parameters without a gradient on this rank take part with zeros, so that ranks never wait for each other.
    """
    config = get_model_config(model)
    parameters = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    for _name, parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    if dp_cp_group is not None and dp_cp_group.size() > 1:
        _sum_in_place((p.grad for _, p in parameters), dp_cp_group)
    if tp_group is not None and tp_group.size() > 1:
        partial = [
            p.grad
            for name, p in parameters
            if (config.sequence_parallel and getattr(p, "sequence_parallel", False))
            or (config.qk_layernorm and (".q_layernorm." in name or ".k_layernorm." in name))
        ]
        _sum_in_place(partial, tp_group)


def _sum_in_place(gradients: Iterable[Tensor | None], group: dist.ProcessGroup) -> None:
    """One all-reduce per dtype."""
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for gradient in gradients:
        assert gradient is not None
        by_dtype.setdefault(gradient.dtype, []).append(gradient)
    for tensors in by_dtype.values():
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat, group=group)
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))
