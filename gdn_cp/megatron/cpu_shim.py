"""What megatron-core 0.16 to 0.19 needs patched to train where there is no CUDA: tests, demos, laptops.

Megatron allocates some buffers with `device=torch.cuda.current_device()` and keeps the random state of tensor-parallel
regions on the GPU. `install_cpu_shim()` replaces the few functions concerned. It is called explicitly, never by an
import, and does nothing where CUDA is present. Keep `use_cpu_initialization=True` in the config.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class CpuRngStatesTracker:
    """Named random states of the CPU generator, with the interface of Megatron's tracker of CUDA states."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget all states."""
        self.states_: dict[str, Tensor] = {}
        self.seeds_: set[int] = set()

    def is_initialized(self) -> bool:
        """Tell whether any state was added."""
        return bool(self.states_)

    def get_states(self) -> dict[str, Tensor]:
        """Return the states by name."""
        return dict(self.states_)

    def set_states(self, states: dict[str, Tensor]) -> None:
        """Replace the states."""
        self.states_ = dict(states)

    def add(self, name: str, seed: int) -> None:
        """Add the state that `seed` gives under `name`."""
        if name in self.states_ or seed in self.seeds_:
            raise ValueError(f"name={name!r}, seed={seed}: each name and each seed can be added once")
        self.seeds_.add(seed)
        self.states_[name] = torch.Generator().manual_seed(seed).get_state()

    @contextlib.contextmanager
    def fork(self, name: str = "model-parallel-rng") -> Iterator[None]:
        """Draw from the state `name` inside the block; outside, the default state goes on as if nothing had been."""
        outside = torch.get_rng_state()
        torch.set_rng_state(self.states_[name])
        try:
            yield
        finally:
            self.states_[name] = torch.get_rng_state()
            torch.set_rng_state(outside)


def _zigzag_position_embedding(pos_emb: Tensor, seq_dim: int, cp_group: dist.ProcessGroup) -> Tensor:
    """Chunks r and 2P-1-r of the positional embedding: Megatron's own function without its pinned copy to a GPU."""
    chunks = pos_emb.chunk(2 * cp_group.size(), dim=seq_dim)
    return torch.cat((chunks[cp_group.rank()], chunks[-1 - cp_group.rank()]), dim=seq_dim)


class _TorchOfSchedules:
    """torch as Megatron's pipeline schedules see it: their counter of tokens, asked for on "cuda", is on the CPU."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def zeros(self, *size: Any, device: Any = None, **settings: Any) -> Tensor:
        """torch.zeros on the CPU."""
        return torch.zeros(*size, device="cpu", **settings)


def install_cpu_shim() -> bool:
    """Patch torch.cuda and megatron-core for a machine without CUDA; return whether it was done.

    Patched: `torch.cuda.current_device` (the CPU), `torch.cuda.synchronize` and `torch.cuda.current_stream` (nothing to
    wait for), `torch.Tensor.cuda` (the tensor itself); Megatron's tracker of random states and the state that
    activation recomputation saves; the router's product without Transformer Engine (mixtures of experts run with
    `moe_token_dispatcher_type="allgather"`); the slice of rotary embeddings of unpacked sequences; the counter of
    tokens of the pipeline schedules. Where CUDA is present nothing is touched and the result is False. A second call is
    harmless.
    """
    if torch.cuda.is_available():
        return False
    from megatron.core.models.common.embeddings import rope_utils, rotary_pos_embedding
    from megatron.core.pipeline_parallel import schedules
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import moe_utils

    cpu = torch.device("cpu")
    patches: list[tuple[Any, str, Any]] = [
        (torch.cuda, "current_device", lambda: cpu),
        (torch.cuda, "synchronize", lambda device=None: None),
        (moe_utils, "te_general_gemm", getattr(moe_utils, "te_general_gemm", None)),  # 0.16.1 forgets it without TE
        (torch.Tensor, "cuda", lambda tensor, *_, **__: tensor),  # of tied embeddings on the last pipeline stage
        (torch.cuda, "current_stream", lambda device=None: None),  # 0.19.2's gradient buffers ask for it
        (random, "_get_cuda_rng_state", lambda device="cpu", clone=False, graph_safe=False: torch.get_rng_state()),
        (random, "_set_cuda_rng_state", lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)),
        (rope_utils, "get_pos_emb_on_this_cp_rank", _zigzag_position_embedding),
        (rotary_pos_embedding, "get_pos_emb_on_this_cp_rank", _zigzag_position_embedding),
        (schedules, "torch", _TorchOfSchedules()),
    ]
    for module, name, replacement in patches:
        setattr(module, name, replacement)
    if not isinstance(random._CUDA_RNG_STATE_TRACKER, CpuRngStatesTracker):
        random._CUDA_RNG_STATE_TRACKER = CpuRngStatesTracker()
        random._CUDA_RNG_STATE_TRACKER_INITIALIZED = True
    return True
