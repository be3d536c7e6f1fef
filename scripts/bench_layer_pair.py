"""The two layers that bench_layer.py compares: this package's and megatron-core's own, with the same weights.

Dimensions: t local rows, T rows of the batch, h hidden size, H query/key heads, HV value heads, P ranks.
"""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from kernel_cases import load_fla
from torch import Tensor, nn

from gdn_cp.comm.layout import ThdLayout
from gdn_cp.comm.peer_vote import peer_memory
from gdn_cp.comm.symmetric import PeerMemory

OURS, THEIRS = "gdn_cp", "megatron"


@dataclass(frozen=True)
class Widths:
    """Sizes of a layer; the defaults are Qwen3-Next's."""

    hidden: int = 2048
    """Hidden size."""
    key_heads: int = 16
    """Query/key heads."""
    value_heads: int = 32
    """Value heads."""
    head_dim: int = 128
    """Width of every head."""
    conv: int = 4
    """Width of the convolution."""


@dataclass(frozen=True)
class Runner:
    """A layer and the description of the batch that it takes: `run(x)` gives the layer's output."""

    layer: nn.Module
    packed_seq_params: Any

    def run(self, x: Tensor) -> Tensor:
        """[t, 1, h] to [t, 1, h]."""
        return self.layer(x, None, packed_seq_params=self.packed_seq_params)[0]

    def leaves(self, x: Tensor) -> list[Tensor]:
        """What gradients are taken of: the input and every parameter."""
        return [x, *self.layer.parameters()]


def layer_config(widths: Widths, cp_size: int, device: torch.device) -> Any:
    """Megatron's TransformerConfig, the same for both layers."""
    from megatron.core.transformer import TransformerConfig

    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    return TransformerConfig(
        num_layers=1,
        hidden_size=widths.hidden,
        num_attention_heads=widths.key_heads,
        linear_conv_kernel_dim=widths.conv,
        linear_key_head_dim=widths.head_dim,
        linear_value_head_dim=widths.head_dim,
        linear_num_key_heads=widths.key_heads,
        linear_num_value_heads=widths.value_heads,
        linear_attention_freq=4,
        normalization="RMSNorm",
        layernorm_epsilon=1e-6,
        activation_func=nn.functional.silu,
        add_bias_linear=False,
        context_parallel_size=cp_size,
        params_dtype=dtype,
        bf16=on_gpu,
        use_cpu_initialization=not on_gpu,
    )


def start_megatron(cp_size: int, device: torch.device) -> None:
    """One context-parallel group of all ranks, and Megatron's random states."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from gdn_cp.megatron import install_cpu_shim

    if device.type != "cuda":
        install_cpu_shim()
    parallel_state.initialize_model_parallel(context_parallel_size=cp_size)
    model_parallel_cuda_manual_seed(1)


def build_ours(config: Any, device: torch.device) -> nn.Module:
    """This package's layer."""
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

    from gdn_cp.megatron import GatedDeltaNet, GatedDeltaNetSubmodules, RMSNorm

    parts = GatedDeltaNetSubmodules(in_proj=ColumnParallelLinear, out_norm=RMSNorm, out_proj=RowParallelLinear)
    return GatedDeltaNet(config, parts, layer_number=1).to(device)


@dataclass(frozen=True)
class TheirClasses:
    """Megatron's own layer, the class of its parts, and a note on how it runs."""

    layer: type[Any]
    parts: type[Any]
    note: str


def find_theirs() -> TheirClasses | str:
    """Megatron's own layer on flash-linear-attention, or why the installed packages have no such layer."""
    fla = load_fla()
    if isinstance(fla, str):
        return fla
    try:
        from megatron.core.ssm.gated_delta_net import common, gdn  # type: ignore[import-not-found]
    except ImportError:
        version = importlib.metadata.version("megatron-core")
        return f"megatron-core {version} has no GatedDeltaNet with context parallelism; 0.19.2 has"
    note = "; ".join(filter(None, (f"on flash-linear-attention {fla.version}", fla.note)))
    return TheirClasses(gdn.GatedDeltaNet, common.GatedDeltaNetSubmodules, note)


def build_theirs(config: Any, device: torch.device) -> tuple[nn.Module | None, str]:
    """Megatron's own layer on plain Megatron modules and flash-linear-attention, with a note on how it runs.

    None, and the reason, where the installed packages have no such layer.
    """
    theirs = find_theirs()
    if isinstance(theirs, str):
        return None, theirs
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    parts = theirs.parts(in_proj=ColumnParallelLinear, out_norm=WrappedTorchNorm, out_proj=RowParallelLinear)
    groups = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
    layer = theirs.layer(config, parts, layer_number=1, pg_collection=groups)
    return layer.to(device, config.params_dtype), theirs.note


@torch.no_grad()
def share_weights(source: nn.Module, target: nn.Module) -> None:
    """Copy every parameter by name; A_log and dt_bias keep the target's dtype."""
    values = dict(source.named_parameters())
    for name, parameter in target.named_parameters():
        parameter.copy_(values[name])


def describe_to_ours(layout: ThdLayout, a2a_size: int, group: dist.ProcessGroup | None = None) -> Any:
    """The batch as this package's layer takes it; `group` in place of the layer's own."""
    from gdn_cp.megatron import packed_seq_params_from_layout

    return packed_seq_params_from_layout(layout, group, a2a_size=a2a_size)


def describe_to_theirs(layout: ThdLayout) -> Any:
    """The batch as Megatron's layer takes it."""
    from megatron.core.packed_seq_params import PackedSeqParams

    bounds = layout.cu_seqlens_tensor()
    longest = max(layout.seqlens)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        cu_seqlens_q_padded=bounds,
        cu_seqlens_kv_padded=bounds,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


@dataclass(frozen=True)
class OtherPath:
    """A second group of all ranks, which exchanges rows otherwise than Megatron's own: over "nccl" or "peer" memory."""

    name: str
    group: dist.ProcessGroup
    memory: PeerMemory | None  # of whichever of the two groups has it

    @property
    def peer_bytes(self) -> int:
        """What peers' memory takes on this rank."""
        return 0 if self.memory is None else self.memory.num_bytes


def other_path(world_size: int, device: torch.device) -> OtherPath | None:
    """The other path's group; None where the ranks do not share their memory, and so there is no other."""
    from megatron.core import parallel_state

    first: Any = parallel_state.get_context_parallel_group()
    memory = peer_memory(first, device)
    group = dist.new_group(list(range(world_size)))
    assert isinstance(group, dist.ProcessGroup)
    if memory is not None:
        peer_memory(group, device, "nccl")
        return OtherPath("nccl", group, memory)
    memory = peer_memory(group, device, "auto")
    return None if memory is None else OtherPath("peer", group, memory)
