"""Mixtures of experts of Qwen3-Next and Qwen3.5: sizes, and where Hugging Face and Megatron keep each expert.

    Hugging Face (within a layer)                    Megatron
    mlp.gate.weight                                  mlp.router.weight
    mlp.experts.7.gate_proj, up_proj (.weight)       mlp.experts.local_experts.7.linear_fc1.weight   gate, up
    mlp.experts.7.down_proj                          mlp.experts.local_experts.7.linear_fc2.weight
    mlp.shared_expert.gate_proj, up_proj             mlp.shared_experts.linear_fc1.weight            gate, up
    mlp.shared_expert.down_proj                      mlp.shared_experts.linear_fc2.weight
    mlp.shared_expert_gate.weight                    mlp.shared_experts.gate_weight

Experts are counted over all expert-parallel ranks. Files that hold all experts of a layer in one tensor
(mlp.experts.gate_up_proj and down_proj) are read as if they held one by one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

ROUTER_COPIES = {
    "mlp.gate.weight": "mlp.router.weight",
    "mlp.shared_expert_gate.weight": "mlp.shared_experts.gate_weight",
}
MOE_FAMILIES = ("qwen3_next", "qwen3_5_moe_text")
_NEVER_DENSE = "qwen3_5_moe_text"
_DEFAULT_EXPERTS = {"qwen3_next": 512, "qwen3_5_moe_text": 256}
_TOGETHER = re.compile(r"(.*\.mlp\.experts\.)(gate_up_proj|down_proj)$")


@dataclass(frozen=True)
class Experts:
    """A mixture of experts, the same in every layer that has one.

    `sparse` has 1 for a layer with experts and 0 for one with a dense MLP. `normalize_top_k`: the chosen experts'
    probabilities are divided by their sum. `aux_loss_coeff` weighs the loss that balances the experts' load.

    Raises ValueError for more experts chosen than there are.
    """

    num_experts: int
    top_k: int
    ffn_hidden_size: int
    shared_ffn_hidden_size: int
    normalize_top_k: bool
    aux_loss_coeff: float
    sparse: tuple[int, ...]

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(f"num_experts_per_tok={self.top_k} must be between 1 and num_experts={self.num_experts}")

    @classmethod
    def from_huggingface(cls, config: Mapping[str, Any], layers: int) -> Experts | None:
        """Of a `config.json`; None where no layer has experts."""
        family = config.get("model_type")
        number = config.get("num_experts", _DEFAULT_EXPERTS.get(str(family), 0))
        step, dense = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or ()
        sparse = tuple(int(bool(number) and i not in dense and (i + 1) % step == 0) for i in range(layers))
        if not any(sparse):
            return None
        if family not in MOE_FAMILIES:
            raise ValueError(f"num_experts={number}: model_type={family!r} has no experts, {list(MOE_FAMILIES)} do")
        return cls(
            num_experts=number,
            top_k=config["num_experts_per_tok"],
            ffn_hidden_size=config["moe_intermediate_size"],
            shared_ffn_hidden_size=config["shared_expert_intermediate_size"],
            normalize_top_k=config.get("norm_topk_prob", True),
            aux_loss_coeff=config.get("router_aux_loss_coef", 0.001),
            sparse=sparse,
        )

    @classmethod
    def from_megatron(cls, config: Any) -> Experts | None:
        """Of a TransformerConfig; None for a dense model. ValueError for what the families cannot express."""
        if config.num_moe_experts is None:
            return None
        needed = {
            "moe_router_score_function": "softmax",
            "moe_router_enable_expert_bias": False,
            "moe_router_num_groups": None,
            "moe_router_topk_scaling_factor": None,
            "moe_shared_expert_gate": True,
            "moe_apply_probs_on_input": False,
        }
        for name, value in needed.items():
            if getattr(config, name) != value:
                raise ValueError(f"config.{name}={getattr(config, name)!r}: the experts of Qwen need {value!r}")
        if not config.moe_shared_expert_intermediate_size:
            raise ValueError("config.moe_shared_expert_intermediate_size is not set: Qwen has a shared expert")
        coefficient = config.moe_aux_loss_coeff
        return cls(
            num_experts=config.num_moe_experts,
            top_k=config.moe_router_topk,
            ffn_hidden_size=config.moe_ffn_hidden_size or config.ffn_hidden_size,
            shared_ffn_hidden_size=config.moe_shared_expert_intermediate_size,
            normalize_top_k=not config.moe_router_pre_softmax,
            aux_loss_coeff=coefficient[0] if isinstance(coefficient, list) else coefficient,
            sparse=tuple(moe_pattern(config)),
        )

    @classmethod
    def from_json(cls, content: Mapping[str, Any] | None) -> Experts | None:
        """The inverse of `dataclasses.asdict` after a way through JSON."""
        return None if content is None else cls(**{**content, "sparse": tuple(content["sparse"])})

    def to_huggingface(self, family: str) -> dict[str, Any]:
        """Settings of a `config.json`. ValueError where the family has no dense layers and this model has."""
        dense = [layer for layer, sparse in enumerate(self.sparse) if not sparse]
        settings: dict[str, Any] = {
            "num_experts": self.num_experts,
            "num_experts_per_tok": self.top_k,
            "moe_intermediate_size": self.ffn_hidden_size,
            "shared_expert_intermediate_size": self.shared_ffn_hidden_size,
            "router_aux_loss_coef": self.aux_loss_coeff,
        }
        if family != _NEVER_DENSE:
            return {**settings, "norm_topk_prob": self.normalize_top_k, "mlp_only_layers": dense}
        if dense or not self.normalize_top_k:
            raise ValueError(
                f"{family}: every layer has experts whose probabilities are normalised; got {asdict(self)}"
            )
        return settings

    def transformer_settings(self) -> dict[str, Any]:
        """Arguments of Megatron's TransformerConfig; the dispatcher and expert parallelism are the job's choice."""
        return {
            "num_moe_experts": self.num_experts,
            "moe_router_topk": self.top_k,
            "moe_ffn_hidden_size": self.ffn_hidden_size,
            "moe_shared_expert_intermediate_size": self.shared_ffn_hidden_size,
            "moe_shared_expert_gate": True,
            "moe_router_pre_softmax": not self.normalize_top_k,  # a softmax over the chosen ones is normalised
            "moe_router_score_function": "softmax",
            "moe_router_dtype": "fp32",
            "moe_router_load_balancing_type": "aux_loss",
            "moe_aux_loss_coeff": self.aux_loss_coeff,
            "moe_layer_freq": list(self.sparse),
        }

    def mlps(self) -> Iterator[tuple[str, str, int]]:
        """(Hugging Face's prefix, Megatron's, width) of each MLP of a layer with experts."""
        for i in range(self.num_experts):
            yield f"mlp.experts.{i}.", f"mlp.experts.local_experts.{i}.", self.ffn_hidden_size
        yield "mlp.shared_expert.", "mlp.shared_experts.", self.shared_ffn_hidden_size


def moe_pattern(config: Any) -> list[int]:
    """Per layer 1 for a mixture of experts, 0 for a dense MLP, of a TransformerConfig.

    Raises ValueError for a list of another length than `num_layers`.
    """
    if config.num_moe_experts is None:
        return [0] * config.num_layers
    every = config.moe_layer_freq
    if isinstance(every, int):
        return [int(layer % every == 0) for layer in range(config.num_layers)]
    if len(every) != config.num_layers:
        raise ValueError(f"config.moe_layer_freq has {len(every)} entries for {config.num_layers} layers")
    return list(every)


class OneByOne(Mapping[str, Tensor]):
    """Tensors by name, where tensors that hold all experts of a layer are seen as one tensor for each expert.

    [E, 2*I, h] of gate and up rows and [E, h, I]; the last one read is kept, so that it is read once.
    """

    def __init__(self, source: Mapping[str, Tensor], num_experts: int) -> None:
        self._source = source
        self._place: dict[str, tuple[str, int, int | None]] = {}
        self._last: tuple[str, Tensor] | None = None
        for name in source:
            found = _TOGETHER.match(name)
            for expert in range(num_experts if found else 0):
                assert found is not None
                parts = {"gate_proj": 0, "up_proj": 1} if found[2] == "gate_up_proj" else {"down_proj": None}
                for part, half in parts.items():
                    self._place[f"{found[1]}{expert}.{part}.weight"] = (name, expert, half)
        self._names = [*(name for name in source if not _TOGETHER.match(name)), *self._place]

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._place:
            return self._source[name]
        whole, expert, half = self._place[name]
        if self._last is None or self._last[0] != whole:
            self._last = (whole, self._source[whole])
        tensor = self._last[1][expert]
        return tensor if half is None else tensor.chunk(2)[half]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
