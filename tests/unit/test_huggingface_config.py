"""Configurations of transformers' models: what is read of them, written back, and refused."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

pytest.importorskip("megatron.core")

from gdn_cp.megatron.huggingface_config import HybridModel

EXPERTS = {
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
}
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 16,
    "max_position_embeddings": 256,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25},
}


def config_of(**changed: Any) -> dict[str, Any]:
    return {
        "model_type": "qwen3_next",
        **SIZES,
        "rms_norm_eps": 1e-6,
        "linear_conv_kernel_dim": 4,
        "num_experts": 0,
    } | changed


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({**EXPERTS, "num_experts_per_tok": 7}, "num_experts_per_tok=7 must be between 1 and num_experts=6"),
        ({**EXPERTS, "model_type": "qwen3_5_text"}, "num_experts=6: model_type='qwen3_5_text' has no experts"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type='yarn'"),
        ({"model_type": "llama"}, "model_type='llama'"),
        ({"layer_types": ["sliding_attention"] * 4}, "sliding_attention"),
        ({"layer_types": ["linear_attention"] * 3}, "3 entries for num_hidden_layers=4"),
        ({"linear_num_value_heads": 3}, "num_v_heads=3 must be a multiple"),
        ({"num_key_value_heads": 3}, "num_attention_heads=4 must be a multiple of num_key_value_heads=3"),
    ],
)
def test_configurations_that_are_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        HybridModel.from_huggingface(config_of(**changed))


def test_configurations_with_something_missing_are_refused():
    model = HybridModel.from_huggingface(config_of())
    for name in ("model_type", "vocab_size", "num_hidden_layers", "head_dim", "linear_key_head_dim", "rms_norm_eps"):
        config = config_of()
        del config[name]
        if name == "head_dim":  # has a default
            assert HybridModel.from_huggingface(config).kv_channels == 32 // 4
            continue
        with pytest.raises(ValueError, match=f"config.json lacks {name}|model_type=None"):
            HybridModel.from_huggingface(config)
    content = dataclasses.asdict(model)
    del content["kv_channels"]
    with pytest.raises(ValueError, match=r"model.json: heads, kv_channels: missing or not known"):
        HybridModel.from_json({**content, "heads": 3})


def test_configurations_of_earlier_transformers_and_of_multimodal_models():
    flat = config_of(rope_theta=1e7, partial_rotary_factor=0.5, full_attention_interval=2)
    del flat["rope_parameters"]
    model = HybridModel.from_huggingface(flat)
    assert (model.rotary_base, model.rotary_percent, model.linear_attention) == (1e7, 0.5, (1, 0, 1, 0))
    text = {**config_of(), "model_type": "qwen3_5_text"}
    whole = {"model_type": "qwen3_5", "tie_word_embeddings": True, "text_config": text, "vision_config": {}}
    model = HybridModel.from_huggingface(whole)
    assert (model.family, model.tie_embeddings) == ("qwen3_5_text", True)
    assert HybridModel.from_json(json.loads(json.dumps(dataclasses.asdict(model)))) == model
    assert HybridModel.from_huggingface(model.to_huggingface("float32")) == model
