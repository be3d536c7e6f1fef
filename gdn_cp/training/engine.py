"""Two ways to turn gradients into a step: plain torch for CPUs, Megatron's DDP and distributed optimizer for GPUs.

Both add gradients over data- and context-parallel ranks (the loss is already divided by the targets of the whole step),
clip by the global norm and run AdamW without decay of vectors. Both hand out their state in two parts: `shared` is the
same on all data- and context-parallel ranks, `own` differs from rank to rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gdn_cp.training.config import OptimConfig
from gdn_cp.training.parallel import Ranks


class Engine(Protocol):
    """What the training loop needs of an optimizer."""

    @property
    def module(self) -> nn.Module:
        """The model as it is called, wrapped or not."""
        ...

    def begin_step(self) -> None:
        """Forget the gradients of the step before."""

    def accumulating(self, *, last: bool) -> AbstractContextManager[Any]:
        """Around forward and backward of one pack; `last` is the step's last, which may start the exchange."""
        ...

    def reduce_gradients(self) -> float:
        """Add gradients over the ranks; returns the global norm before clipping."""
        ...

    def apply(self, lr: float, grad_norm: float) -> None:
        """Clip and step."""

    def state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """(shared, own)."""
        ...

    def load_state(self, shared: Mapping[str, Any], own: Mapping[str, Any]) -> None:
        """Take back what `state` gave."""


def decay_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups of torch optimizers: matrices decay, vectors do not (norms, A_log, dt_bias, biases)."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]


class TorchEngine:
    """torch's AdamW; gradients added in one flat all-reduce. For CPUs, and for anything that fits without sharding."""

    def __init__(self, module: nn.Module, optim: OptimConfig, ranks: Ranks) -> None:
        self.module = module
        self._ranks = ranks
        self._clip = optim.clip_grad
        self._parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(
            decay_groups(module, optim.weight_decay),
            lr=optim.lr,
            betas=(optim.beta1, optim.beta2),
            eps=optim.adam_eps,
            foreach=True,
        )

    def begin_step(self) -> None:
        """Forget the gradients of the step before."""
        self._optimizer.zero_grad(set_to_none=True)

    def accumulating(self, *, last: bool) -> AbstractContextManager[Any]:
        """Gradients gather in `.grad` by themselves."""
        return nullcontext()

    def reduce_gradients(self) -> float:
        """Add gradients over the ranks; returns the global norm before clipping."""
        from gdn_cp.megatron import reduce_gradients

        reduce_gradients(self.module, dp_cp_group=self._ranks.dp_cp_group, tp_group=self._ranks.tp_group)
        return _global_norm(self._parameters, self._ranks)

    def apply(self, lr: float, grad_norm: float) -> None:
        """Clip and step."""
        if 0.0 < self._clip < grad_norm:
            for parameter in self._parameters:
                if parameter.grad is not None:
                    parameter.grad.mul_(self._clip / grad_norm)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()

    def state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """(shared, own): everything is shared."""
        return {"model": _parameter_state(self.module), "optimizer": self._optimizer.state_dict()}, {}

    def load_state(self, shared: Mapping[str, Any], own: Mapping[str, Any]) -> None:
        """Take back what `state` gave."""
        _load_parameters(self.module, shared["model"])
        self._optimizer.load_state_dict(shared["optimizer"])


class MegatronEngine:
    """Megatron's DistributedDataParallel and distributed optimizer: bf16 weights, float32 gradients and master weights.

    Each data- and context-parallel rank keeps its shard of the master weights and of AdamW's moments.
    """

    def __init__(self, module: nn.Module, optim: OptimConfig, ranks: Ranks, config: Any) -> None:
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

        self.module: Any = DistributedDataParallel(
            config,
            DistributedDataParallelConfig(
                grad_reduce_in_fp32=True, overlap_grad_reduce=True, use_distributed_optimizer=True
            ),
            module,
        )
        self._plain = module
        self._ranks = ranks
        self._clip = optim.clip_grad
        self._optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=optim.lr,
                min_lr=optim.min_lr,
                weight_decay=optim.weight_decay,
                adam_beta1=optim.beta1,
                adam_beta2=optim.beta2,
                adam_eps=optim.adam_eps,
                clip_grad=optim.clip_grad,
                bf16=config.bf16,
                params_dtype=config.params_dtype,
                use_distributed_optimizer=True,
            ),
            [self.module],
            use_gloo_process_groups=False,
        )
        self._parts = getattr(self._optimizer, "chained_optimizers", [self._optimizer])
        for group in self._groups():  # Megatron's own scheduler does this at each step
            group["weight_decay"] = optim.weight_decay * group.get("wd_mult", 1.0)

    def _groups(self) -> list[dict[str, Any]]:
        return [group for part in self._parts for group in part.optimizer.param_groups]

    def begin_step(self) -> None:
        """Forget the gradients of the step before."""
        self.module.zero_grad_buffer()
        self._optimizer.zero_grad()

    def accumulating(self, *, last: bool) -> AbstractContextManager[Any]:
        """Hold back the exchange of gradients until the last pack of the step."""
        return nullcontext() if last else self.module.no_sync()

    def reduce_gradients(self) -> float:
        """Add gradients over the ranks; returns the global norm before clipping."""
        from megatron.core.distributed import finalize_model_grads

        finalize_model_grads([self.module])
        self._optimizer.prepare_grads()
        return float(self._optimizer.get_grad_norm())

    def apply(self, lr: float, grad_norm: float) -> None:
        """Clip and step."""
        from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

        for group in self._groups():
            group["lr"] = lr
        if self._clip > 0.0:
            for part in self._parts:
                clip_grad_by_total_norm_fp32(part.get_parameters(), self._clip, grad_norm)
        self._optimizer.step_with_ready_grads()

    def state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """(shared, own): the model is shared, the optimizer's shard is the rank's own."""
        shards = [
            {"adam": part.optimizer.state_dict(), "masters": [p.detach() for p in _parameters_of(part.optimizer)]}
            for part in self._parts
        ]
        return {"model": _parameter_state(self._plain)}, {"optimizer": shards}

    @torch.no_grad()
    def load_state(self, shared: Mapping[str, Any], own: Mapping[str, Any]) -> None:
        """Take back what `state` gave."""
        _load_parameters(self._plain, shared["model"])
        for part, shard in zip(self._parts, own["optimizer"], strict=True):
            part.optimizer.load_state_dict(shard["adam"])
            for parameter, master in zip(_parameters_of(part.optimizer), shard["masters"], strict=True):
                parameter.copy_(master)


def build_engine(module: nn.Module, optim: OptimConfig, ranks: Ranks, transformer: Any) -> Engine:
    """The way that fits the device; `transformer` is the model's TransformerConfig."""
    if ranks.device.type == "cpu":
        return TorchEngine(module, optim, ranks)
    return MegatronEngine(module, optim, ranks, transformer)


def _parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


@torch.no_grad()
def _global_norm(parameters: list[nn.Parameter], ranks: Ranks) -> float:
    """L2 norm of all gradients; one that every tensor-parallel rank holds alike counts once."""
    counted = [
        parameter.grad
        for parameter in parameters
        if parameter.grad is not None and (getattr(parameter, "tensor_model_parallel", False) or ranks.tp_rank == 0)
    ]
    total = torch.zeros((), dtype=torch.float64, device=ranks.device)
    for grad in counted:
        total += grad.double().square().sum()
    if ranks.tp_size > 1:
        dist.all_reduce(total, group=ranks.tp_group)
    return float(total.sqrt())


def _parameter_state(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in module.named_parameters()}


@torch.no_grad()
def _load_parameters(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    parameters = dict(module.named_parameters())
    if parameters.keys() != state.keys():
        raise ValueError(f"checkpoint and model differ in parameters: {sorted(parameters.keys() ^ state.keys())}")
    for name, parameter in parameters.items():
        parameter.copy_(state[name])
