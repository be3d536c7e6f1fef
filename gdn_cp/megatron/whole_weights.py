"""Loading a hybrid GPTModel, however it is cut over tensor- and pipeline-parallel ranks, from whole tensors.

Megatron cuts a parameter along one dimension; where several projections are joined in one matrix, each section is cut
by itself, so that rank r of 2 holds, of rows [q; k; v], the r-th half of q, of k and of v, one after the other:

    whole   q0 q1 q2 q3 | k0 k1        rank 0   q0 q1 | k0        rank 1   q2 q3 | k1
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gdn_cp.megatron.huggingface_config import HybridModel

_BY_COLUMNS = ("out_proj.weight", "linear_proj.weight", "linear_fc2.weight")
_REPLICATED = ("norm.weight", "layer_norm_weight", "router.weight", "gate_weight")
# Transformer Engine's fused norms, and the norms of plain modules.
_FUSED_NORMS = {
    ".self_attention.in_proj.layer_norm_": ".input_layernorm.",
    ".self_attention.linear_qkv.layer_norm_": ".input_layernorm.",
    ".mlp.linear_fc1.layer_norm_": ".pre_mlp_layernorm.",
}
_EXPERT = re.compile(r"(.*\.mlp\.experts\.)local_experts\.(\d+)\.(.*)")
_GROUPED_EXPERT = re.compile(r"(.*\.mlp\.experts\.)(linear_fc[12]\.weight)(\d+)")
# Transformer Engine's fused norms, and the norms of plain modules.
_FUSED_NORMS = {
    ".self_attention.in_proj.layer_norm_": ".input_layernorm.",
    ".self_attention.linear_qkv.layer_norm_": ".input_layernorm.",
    ".mlp.linear_fc1.layer_norm_": ".pre_mlp_layernorm.",
}


def share_of(name: str, whole: Tensor, model: HybridModel, size: int, rank: int) -> Tensor:
    """What tensor-parallel rank `rank` of `size` holds of the parameter `name`, of which `whole` is all.

    Raises ValueError where `size` does not divide a section.
    """
    if size == 1 or name.endswith(_REPLICATED):
        return whole
    dim = 1 if name.endswith(_BY_COLUMNS) else 0
    sections: tuple[int, ...] = (whole.shape[dim],)
    if name.endswith("in_proj.weight"):
        sections = model.gdn.sections
    elif ".conv1d." in name:
        sections = model.gdn.sections[:3]
    elif name.endswith("linear_fc1.weight"):
        sections = (whole.shape[0] // 2,) * 2
    for width in sections:
        if width % size:
            raise ValueError(f"{name}: the tensor-parallel size {size} does not divide its {width} rows or columns")
    return torch.cat([part.chunk(size, dim)[rank] for part in whole.split(list(sections), dim)], dim)


@torch.no_grad()
def load_whole(
    module: nn.Module,
    source: Mapping[str, Tensor],
    model: HybridModel,
    tp_group: dist.ProcessGroup | None = None,
    *,
    expert_tp_group: dist.ProcessGroup | None = None,
    expert_group: dist.ProcessGroup | None = None,
) -> None:
    """Copy into a GPTModel its share of `source`, the whole model's tensors by name (a lazy mapping is fine).

    Args:
        module: Megatron's GPTModel (or a wrapper with `.module`) of `get_hybrid_block_spec`, any pipeline stage.
        source: as `gdn_cp.megatron.huggingface.to_megatron` names them: layers are counted over all stages.
        model: its sizes.
        tp_group: tensor-parallel ranks; None: one.
        expert_tp_group: those that share an expert; None: as tp_group. (Megatron's expert_tensor_parallel_size is the
            tensor-parallel size unless it is set.)
        expert_group: expert-parallel ranks; None: one.

    Raises:
        ValueError: for a tensor that is missing or has another shape; parameters before it are loaded already.
    """
    while isinstance(inner := getattr(module, "module", None), nn.Module):
        module = inner
    first = 0
    if model.experts is not None and expert_group is not None:
        first = model.experts.num_experts // expert_group.size() * expert_group.rank()
    for name, parameter in _parameters_by_whole_name(module, first):
        group = (expert_tp_group or tp_group) if ".mlp.experts." in name else tp_group
        size, rank = (1, 0) if group is None else (group.size(), group.rank())
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


def _parameters_by_whole_name(module: nn.Module, first_expert: int) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters by their name in the whole model: a rank counts its own layers, and its own experts, from 0."""
    for name, parameter in module.named_parameters():
        if name.startswith("decoder.layers."):
            local, rest = name.removeprefix("decoder.layers.").split(".", 1)
            layer = module.get_submodule(f"decoder.layers.{local}")
            name = f"decoder.layers.{int(layer.layer_number) - 1}.{rest}"  # type: ignore[arg-type]
        for fused, plain in _FUSED_NORMS.items():
            name = name.replace(fused, plain)
        if found := _EXPERT.match(name):
            name = f"{found[1]}local_experts.{int(found[2]) + first_expert}.{found[3]}"
        elif found := _GROUPED_EXPERT.match(name):
            name = f"{found[1]}local_experts.{int(found[3]) + first_expert}.{found[2]}"
        yield name, parameter
