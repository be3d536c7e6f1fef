"""Starting and ending the ranks: torch.distributed, Megatron's groups, and each rank's place in them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from gdn_cp.training.config import ParallelConfig


@dataclass(frozen=True)
class Ranks:
    """This rank's device and its place: tensor (tp), context (cp) and data (dp) parallel."""

    device: torch.device
    rank: int
    world_size: int
    tp_rank: int
    tp_size: int
    cp_rank: int
    cp_size: int
    dp_rank: int
    dp_size: int
    tp_group: dist.ProcessGroup
    cp_group: dist.ProcessGroup
    dp_cp_group: dist.ProcessGroup
    tp_cp_group: dist.ProcessGroup
    """The ranks that share one pack."""

    @property
    def holds_shared_state(self) -> bool:
        """Whether this rank writes what all its data- and context-parallel neighbours hold alike."""
        return self.dp_rank == 0 and self.cp_rank == 0

    def describe(self) -> str:
        """The sizes, for logs and plots."""
        return f"TP={self.tp_size} CP={self.cp_size} DP={self.dp_size} on {self.world_size} {self.device.type} rank(s)"


def choose_device(wanted: str) -> torch.device:
    """This rank's device: "cpu", "cuda", or "auto" for a GPU where there is one.

    Raises ValueError where GPUs are wanted and this machine has fewer than ranks.
    """
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    count = torch.cuda.device_count()
    if local >= count:
        raise ValueError(
            f"device={wanted!r}: local rank {local} has no GPU of its own, this machine has {count}; "
            "start one rank per GPU, or use device='cpu'"
        )
    return torch.device("cuda", local)


@contextmanager
def distributed(device: torch.device, timeout_minutes: float) -> Iterator[None]:
    """A default process group: torchrun's, or one of a single rank where torchrun did not start us.

    Collectives that wait longer than the timeout fail, so that no rank waits for ever for one that died. A group that
    exists already (in tests) is used, and left alone at the end.
    """
    if dist.is_initialized():
        yield
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(minutes=timeout_minutes)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        store, rank, world_size = next(rendezvous("env://", timeout=timeout))
        if os.environ.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE") != "1":
            # torchrun keeps one store over its restarts; without a prefix, ranks would find the dead ones' addresses.
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            store = dist.PrefixStore(f"attempt_{attempt}", store)  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    else:
        alone = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]  (documented, but not in __all__)
        dist.init_process_group(backend, store=alone, rank=0, world_size=1, timeout=timeout)
    yield  # an error passes by the next line: tearing groups down would wait for ranks that are gone
    dist.destroy_process_group()


@contextmanager
def model_parallel(parallel: ParallelConfig, device: torch.device, timeout_minutes: float) -> Iterator[Ranks]:
    """Megatron's process groups for these sizes, on top of the default group."""
    from megatron.core import parallel_state as megatron_groups

    from gdn_cp.megatron import install_cpu_shim

    if device.type == "cpu":
        install_cpu_shim()
    parallel_state: Any = megatron_groups  # its annotations allow for groups that do not exist
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tp,
        context_parallel_size=parallel.cp,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=max(1, round(timeout_minutes)),
    )
    yield Ranks(
        device=device,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=parallel.tp,
        cp_rank=parallel_state.get_context_parallel_rank(),
        cp_size=parallel.cp,
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        cp_group=parallel_state.get_context_parallel_group(),
        dp_cp_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
        tp_cp_group=parallel_state.get_tensor_and_context_parallel_group(),
    )
    parallel_state.destroy_model_parallel()
