"""Weights as whole tensors: drawn whole and cut for tensor-parallel ranks, and put together again for export.

Megatron cuts a parameter along `partition_dim`. Where it joins several projections in one matrix, each section is cut
by itself, so that rank r of 2 holds, of rows [q; k; v], the r-th half of q, of k and of v, one after the other:

    whole   q0 q1 q2 q3 | k0 k1        rank 0   q0 q1 | k0        rank 1   q2 q3 | k1

Drawing the whole tensor from a generator of its own (seed and name) makes the model the same under every
tensor-parallel size and on every device.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gdn_cp.training.config import ModelConfig

_A_RANGE = (1.0, 16.0)  # exp(A_log) at the start, as in Mamba 2 and Megatron's GDN
_OUTPUT_PROJECTIONS = ("linear_proj.weight", "linear_fc2.weight", "out_proj.weight")


def sections_of(name: str, model: ModelConfig) -> tuple[int, ...] | None:
    """Widths of the separately cut sections of a parameter along its first dimension; None where it is one piece."""
    keys, values = model.gdn_key_heads * model.gdn_head_dim, model.gdn_value_heads * model.gdn_head_dim
    if name.endswith(".in_proj.weight"):
        return keys, keys, values, values, model.gdn_value_heads, model.gdn_value_heads
    if ".conv1d." in name:
        return keys, keys, values
    if name.endswith(".linear_fc1.weight"):
        return model.ffn, model.ffn
    return None


def cut(whole: Tensor, dim: int, sections: Sequence[int] | None, size: int, rank: int) -> Tensor:
    """The part of `whole` that tensor-parallel rank `rank` of `size` holds: its share of every section along `dim`."""
    parts = whole.split(list(sections), dim) if sections else (whole,)
    return torch.cat([part.chunk(size, dim)[rank] for part in parts], dim)


def join(shards: Sequence[Tensor], dim: int, sections: Sequence[int] | None) -> Tensor:
    """The inverse of `cut`: the whole tensor from all ranks' parts, in rank order."""
    if not sections:
        return torch.cat(list(shards), dim)
    widths = [section // len(shards) for section in sections]
    by_rank = [shard.split(widths, dim) for shard in shards]
    return torch.cat([part for section in zip(*by_rank, strict=True) for part in section], dim)


def partition_dim(parameter: Tensor) -> int | None:
    """The dimension along which tensor parallelism cuts this parameter; None where every rank holds all of it."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return None
    return max(0, getattr(parameter, "partition_dim", 0))


@torch.no_grad()
def initialize(module: nn.Module, model: ModelConfig, seed: int, tp_group: dist.ProcessGroup | None) -> None:
    """Draw every weight anew, the same whatever the number of ranks and the device.

    Matrices: normal with `init_std`, divided by sqrt(2 * layers) where they write to the residual stream. Convolutions:
    uniform in +-1/sqrt(taps). A_log: log of uniform [1, 16]. dt_bias: 1. Norm weights keep what they have.
    """
    size, rank = (tp_group.size(), tp_group.rank()) if tp_group is not None else (1, 0)
    for name, parameter in module.named_parameters():
        dim = partition_dim(parameter)
        shape = list(parameter.shape)
        if dim is not None:
            shape[dim] *= size
        whole = _draw(name, shape, model, seed)
        if whole is not None:
            if dim is not None:
                whole = cut(whole, dim, sections_of(name, model), size, rank)
            parameter.copy_(whole)


def _draw(name: str, shape: list[int], model: ModelConfig, seed: int) -> Tensor | None:
    key = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little") >> 1
    generator = torch.Generator().manual_seed(key)
    if name.endswith("A_log"):
        return torch.empty(shape).uniform_(*_A_RANGE, generator=generator).log_()
    if name.endswith("dt_bias"):
        return torch.ones(shape)
    if ".conv1d." in name:
        bound = 1.0 / math.sqrt(model.gdn_conv)
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)
    if len(shape) < 2:
        return None
    std = model.init_std
    if name.endswith(_OUTPUT_PROJECTIONS):
        std /= math.sqrt(2.0 * model.layers)
    return torch.empty(shape).normal_(0.0, std, generator=generator)


@torch.no_grad()
def gather_whole(
    tensors: dict[str, Tensor], module: nn.Module, model: ModelConfig, tp_group: dist.ProcessGroup | None
) -> dict[str, Tensor]:
    """Whole tensors, on every rank, of a dictionary by parameter name (the parameters themselves, or gradients)."""
    size = tp_group.size() if tp_group is not None else 1
    whole = {}
    for name, parameter in module.named_parameters():
        if name not in tensors:
            continue
        tensor, dim = tensors[name].detach(), partition_dim(parameter)
        if dim is not None and size > 1:
            shards = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(size)]
            dist.all_gather(shards, tensor.contiguous(), group=tp_group)
            tensor = join(shards, dim, sections_of(name, model))
        whole[name] = tensor
    return whole


def export_weights(
    path: Path, module: nn.Module, model: ModelConfig, tp_group: dist.ProcessGroup | None, *, write: bool
) -> None:
    """Save all parameters, whole and under their plain names, as safetensors; all ranks call it, `write` ones write."""
    whole = gather_whole(dict(module.named_parameters()), module, model, tp_group)
    if write:
        from safetensors.torch import save_file

        partial = path.with_name(f".{path.name}.partial")
        save_file({name: tensor.to("cpu").contiguous() for name, tensor in whole.items()}, str(partial))
        partial.replace(path)


def describe_model(path: Path, module: Any) -> str:
    """Write beside the weights what `scripts/convert_hf.py` needs to know of the model; returns what was done."""
    from gdn_cp.megatron.huggingface_config import HybridModel

    try:
        sizes = HybridModel.from_megatron(module.config, module)
    except ValueError as error:  # Hugging Face's models have, for one, always an output gate
        return f"none, {error}"
    path.write_text(json.dumps(dataclasses.asdict(sizes), indent=2) + "\n", encoding="utf-8")
    return str(path)
