"""Loading a hybrid GPTModel, however it is cut over tensor- and pipeline-parallel ranks, from whole tensors.

Megatron cuts a parameter along one dimension; where several projections are joined in one matrix, each section is cut
by itself, so that rank r of 2 holds, of rows [q; k; v], the r-th half of q, of k and of v, one after the other:

    whole   q0 q1 q2 q3 | k0 k1        rank 0   q0 q1 | k0        rank 1   q2 q3 | k1
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gdn_cp.megatron.huggingface_config import HybridModel

_BY_COLUMNS = ("out_proj.weight", "linear_proj.weight", "linear_fc2.weight")


def share_of(name: str, whole: Tensor, model: HybridModel, size: int, rank: int) -> Tensor:
    """What tensor-parallel rank `rank` of `size` holds of the parameter `name`, of which `whole` is all.

    Raises ValueError where `size` does not divide a section.
    """
    if size == 1 or name.endswith(("norm.weight", "layer_norm_weight")):
        return whole
    dim = 1 if name.endswith(_BY_COLUMNS) else 0
    sections: tuple[int, ...] = (whole.shape[dim],)
    if name.endswith("in_proj.weight"):
        sections = model.gdn.sections
    elif ".conv1d." in name:
        sections = model.gdn.sections[:3]
    elif name.endswith("linear_fc1.weight"):
        sections = (model.ffn_hidden_size, model.ffn_hidden_size)
    for width in sections:
        if width % size:
            raise ValueError(f"{name}: the tensor-parallel size {size} does not divide its {width} rows or columns")
    return torch.cat([part.chunk(size, dim)[rank] for part in whole.split(list(sections), dim)], dim)


@torch.no_grad()
def load_whole(
    module: nn.Module, source: Mapping[str, Tensor], model: HybridModel, tp_group: dist.ProcessGroup | None = None
) -> None:
    """Copy into a GPTModel its share of `source`, the whole model's tensors by name (a lazy mapping is fine).

    Args:
        module: Megatron's GPTModel (or a wrapper with `.module`) of `get_hybrid_block_spec`, any pipeline stage.
        source: as `gdn_cp.megatron.huggingface.to_megatron` names them: layers are counted over all stages.
        model: its sizes.
        tp_group: tensor-parallel ranks; None: one.

    Raises:
        ValueError: for a tensor that is missing or has another shape; parameters before it are loaded already.
    """
    while isinstance(inner := getattr(module, "module", None), nn.Module):
        module = inner
    size, rank = (1, 0) if tp_group is None else (tp_group.size(), tp_group.rank())
    for name, parameter in _parameters_by_whole_name(module):
        if name not in source and name == "output_layer.weight" and model.tie_embeddings:
            name = "embedding.word_embeddings.weight"  # the last pipeline stage's copy
        if name not in source:
            raise ValueError(f"source has no {name}: is it the whole model's, in Megatron's names?")
        share = share_of(name, source[name], model, size, rank)
        if share.shape != parameter.shape:
            raise ValueError(
                f"{name}: the share of rank {rank} of {size} has shape {tuple(share.shape)}, the model's parameter "
                f"{tuple(parameter.shape)}"
            )
        parameter.copy_(share)


def _parameters_by_whole_name(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters by their name in the whole model: a pipeline stage counts its own layers from 0."""
    for name, parameter in module.named_parameters():
        if name.startswith("decoder.layers."):
            local, rest = name.removeprefix("decoder.layers.").split(".", 1)
            layer = module.get_submodule(f"decoder.layers.{local}")
            name = f"decoder.layers.{int(layer.layer_number) - 1}.{rest}"  # type: ignore[arg-type]
        yield name, parameter
