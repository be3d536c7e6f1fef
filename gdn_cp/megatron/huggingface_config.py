"""One description of a hybrid model from which both configurations follow: Hugging Face's and Megatron's.

Known are the families Qwen3-Next ("qwen3_next", dense or with experts) and Qwen3.5 (the text model: "qwen3_5_text",
and "qwen3_5_moe_text" with experts). What one side cannot say is refused, never dropped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch.nn.functional import silu

from gdn_cp.gated_delta_net import GdnDims
from gdn_cp.megatron.huggingface_experts import Experts

FAMILIES = {
    "qwen3_next": "Qwen3NextForCausalLM",
    "qwen3_5_text": "Qwen3_5ForCausalLM",
    "qwen3_5_moe_text": "Qwen3_5MoeForCausalLM",
}


@dataclass(frozen=True)
class HybridModel:
    """Sizes and settings of a hybrid model, over all ranks.

    `linear_attention` has 1 for a Gated DeltaNet layer and 0 for full attention, layer by layer. `zero_centered`:
    Megatron's norm weights hold the gain minus one (`layernorm_zero_centered_gamma`), as Hugging Face's decoder norms
    do, so that these need no arithmetic. `experts`: None for a dense model; `ffn_hidden_size` is of its dense layers.

    Raises ValueError for an unknown family, a list of another length than `num_layers` or heads that do not divide.
    """

    family: str
    vocab_size: int
    hidden_size: int
    ffn_hidden_size: int
    num_layers: int
    linear_attention: tuple[int, ...]
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    linear_num_key_heads: int
    linear_num_value_heads: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    linear_conv_kernel_dim: int
    norm_eps: float
    rotary_base: float
    rotary_percent: float
    max_sequence_length: int
    tie_embeddings: bool
    zero_centered: bool = True
    experts: Experts | None = None

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"model_type={self.family!r} is not known: one of {sorted(FAMILIES)}")
        if len(self.linear_attention) != self.num_layers:
            raise ValueError(
                f"layer_types: {len(self.linear_attention)} entries for num_hidden_layers={self.num_layers}; give one "
                "for each layer"
            )
        if self.experts is not None and len(self.experts.sparse) != self.num_layers:
            raise ValueError(f"experts.sparse: {len(self.experts.sparse)} entries for {self.num_layers} layers")
        if self.num_query_groups < 1 or self.num_attention_heads % self.num_query_groups:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads={self.num_query_groups}"
            )
        _ = self.gdn  # refuses head counts that do not divide

    @property
    def gdn(self) -> GdnDims:
        """The heads of a Gated DeltaNet layer."""
        return GdnDims(
            self.linear_num_key_heads,
            self.linear_num_value_heads,
            self.linear_key_head_dim,
            self.linear_value_head_dim,
            self.linear_conv_kernel_dim,
        )

    @classmethod
    def from_huggingface(cls, config: Mapping[str, Any], *, zero_centered: bool = True) -> HybridModel:
        """Read the content of a `config.json` (of transformers 4.57 or 5; of a multimodal Qwen3.5 its text part).

        Raises ValueError, naming the setting, for one that is missing and for what the Megatron model has no equivalent
        of: biases, other activations, scaled rotary embeddings.
        """
        if "text_config" in config:
            config = {"tie_word_embeddings": config.get("tie_word_embeddings", False), **config["text_config"]}
        config = _Settings(config)
        rope = _rope(config)
        layers = config["num_hidden_layers"]
        types = config.get("layer_types")
        if types is None:
            every = config.get("full_attention_interval", 4)
            types = ["linear_attention" if (i + 1) % every else "full_attention" for i in range(layers)]
        unknown = set(types) - {"linear_attention", "full_attention"}
        if unknown:
            raise ValueError(f"layer_types: {sorted(unknown)} are not known; only linear_attention and full_attention")
        _refuse_unsupported(config)
        experts = Experts.from_huggingface(config, layers)
        return cls(
            family=config["model_type"],
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            ffn_hidden_size=_dense_width(config, experts),
            num_layers=layers,
            linear_attention=tuple(int(kind == "linear_attention") for kind in types),
            num_attention_heads=config["num_attention_heads"],
            num_query_groups=config["num_key_value_heads"],
            kv_channels=config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
            linear_num_key_heads=config["linear_num_key_heads"],
            linear_num_value_heads=config["linear_num_value_heads"],
            linear_key_head_dim=config["linear_key_head_dim"],
            linear_value_head_dim=config["linear_value_head_dim"],
            linear_conv_kernel_dim=config["linear_conv_kernel_dim"],
            norm_eps=config["rms_norm_eps"],
            rotary_base=rope["rope_theta"],
            rotary_percent=rope["partial_rotary_factor"],
            max_sequence_length=config["max_position_embeddings"],
            tie_embeddings=bool(config.get("tie_word_embeddings", False)),
            zero_centered=zero_centered,
            experts=experts,
        )

    @classmethod
    def from_megatron(cls, config: Any, model: Any, *, family: str = "qwen3_next") -> HybridModel:
        """Describe a Megatron GPTModel built with `get_hybrid_block_spec(config)`.

        Args:
            config: its TransformerConfig.
            model: the GPTModel itself: vocabulary, rotary embedding and sequence length.
            family: the Hugging Face family that it shall become.

        Raises ValueError for settings that this family cannot express.
        """
        from gdn_cp.megatron.specs import linear_attention_pattern

        needed = {
            "activation_func": silu,
            "gated_linear_unit": True,
            "add_bias_linear": False,
            "add_qkv_bias": False,
            "qk_layernorm": True,
            "attention_output_gate": True,
            "normalization": "RMSNorm",
        }
        for name, value in needed.items():
            if getattr(config, name) != value:
                raise ValueError(f"config.{name}={getattr(config, name)!r}: {family} needs {value!r}")
        if model.position_embedding_type != "rope":
            raise ValueError(f"position_embedding_type={model.position_embedding_type!r}: {family} needs 'rope'")
        return cls(
            family=family,
            vocab_size=model.vocab_size,
            ffn_hidden_size=config.ffn_hidden_size,
            linear_attention=tuple(linear_attention_pattern(config)),
            norm_eps=config.layernorm_epsilon,
            rotary_base=float(model.rotary_base),
            rotary_percent=model.rotary_percent,
            max_sequence_length=model.max_sequence_length,
            tie_embeddings=model.share_embeddings_and_output_weights,
            zero_centered=config.layernorm_zero_centered_gamma,
            experts=Experts.from_megatron(config),
            **{name: getattr(config, name) for name in _SAME_NAMES},
        )

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> HybridModel:
        """The inverse of `dataclasses.asdict` after a way through JSON. ValueError for missing and unknown names."""
        known = {field.name for field in dataclasses.fields(cls)}
        wrong = sorted((known - {"zero_centered", "experts"} - content.keys()) | (content.keys() - known))
        if wrong:
            raise ValueError(f"model.json: {', '.join(wrong)}: missing or not known; it has {', '.join(sorted(known))}")
        experts = Experts.from_json(content.get("experts"))
        return cls(**{**content, "linear_attention": tuple(content["linear_attention"]), "experts": experts})

    def to_huggingface(self, dtype: str) -> dict[str, Any]:
        """The content of a `config.json`; `dtype` as Hugging Face spells it, such as "bfloat16"."""
        rope = {
            "rope_type": "default",
            "rope_theta": self.rotary_base,
            "partial_rotary_factor": self.rotary_percent,
        }
        config: dict[str, Any] = {
            "architectures": [FAMILIES[self.family]],
            "model_type": self.family,
            "dtype": dtype,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.ffn_hidden_size,
            "num_hidden_layers": self.num_layers,
            "layer_types": ["linear_attention" if gdn else "full_attention" for gdn in self.linear_attention],
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_query_groups,
            "head_dim": self.kv_channels,
            **{name: getattr(self, name) for name in _SAME_NAMES if name.startswith("linear_")},
            "hidden_act": "silu",
            "attention_bias": False,
            "rms_norm_eps": self.norm_eps,
            "rope_parameters": rope,
            "max_position_embeddings": self.max_sequence_length,
            "tie_word_embeddings": self.tie_embeddings,
        }
        if self.experts is not None:
            config.update(self.experts.to_huggingface(self.family))
        elif self.family == "qwen3_next":  # its layers are mixtures of experts unless this says otherwise
            config.update(num_experts=0, mlp_only_layers=list(range(self.num_layers)))
        return config

    def transformer_settings(self) -> dict[str, Any]:
        """Arguments of Megatron's TransformerConfig; add the parallel sizes, `params_dtype` and the like."""
        return {
            **{name: getattr(self, name) for name in _SAME_NAMES},
            **({} if self.experts is None else self.experts.transformer_settings()),
            "ffn_hidden_size": self.ffn_hidden_size,
            "linear_attention_freq": list(self.linear_attention),
            "layernorm_epsilon": self.norm_eps,
            "layernorm_zero_centered_gamma": self.zero_centered,
            "normalization": "RMSNorm",
            "qk_layernorm": True,
            "attention_output_gate": True,
            "activation_func": silu,
            "gated_linear_unit": True,
            "add_bias_linear": False,
            "add_qkv_bias": False,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
        }

    def model_settings(self) -> dict[str, Any]:
        """Arguments of Megatron's GPTModel besides the config and the layer spec."""
        return {
            "vocab_size": self.vocab_size,
            "max_sequence_length": self.max_sequence_length,
            "share_embeddings_and_output_weights": self.tie_embeddings,
            "position_embedding_type": "rope",
            "rotary_percent": self.rotary_percent,
            "rotary_base": self.rotary_base,
        }


_SAME_NAMES = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "linear_num_key_heads",
    "linear_num_value_heads",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "linear_conv_kernel_dim",
)
assert set(_SAME_NAMES) <= {field.name for field in dataclasses.fields(HybridModel)}


class _Settings(dict[str, Any]):
    """A configuration that says which setting it lacks."""

    def __missing__(self, name: str) -> Any:
        raise ValueError(f"config.json lacks {name}: is it the configuration of {' or '.join(FAMILIES)}?")


def _rope(config: Mapping[str, Any]) -> dict[str, float]:
    """Base and rotated part, from transformers 5's `rope_parameters` or the flat settings before it."""
    flat = {name: config[name] for name in ("rope_theta", "partial_rotary_factor") if name in config}
    scaling = config.get("rope_scaling") or {}
    rope = {
        "rope_theta": 1e4,
        "partial_rotary_factor": 0.25,
        **flat,
        **scaling,
        **(config.get("rope_parameters") or {}),
    }
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ValueError(f'rope_parameters: rope_type={kind!r} is not supported, only "default"')
    return rope


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    if config.get("attention_bias"):
        raise ValueError("attention_bias=True: the Megatron layers have no biases")
    if config.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act={config['hidden_act']!r}: only 'silu' is supported")


def _dense_width(config: Mapping[str, Any], experts: Experts | None) -> int:
    """Width of the dense MLPs; where there are none, and the configuration says nothing, that of an expert."""
    if experts is not None and "intermediate_size" not in config:
        return experts.ffn_hidden_size
    return config["intermediate_size"]
