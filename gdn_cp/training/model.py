"""A Megatron GPTModel of Gated DeltaNet and full-attention layers from a ModelConfig."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn

from gdn_cp.comm.choice import prepare_cp_groups
from gdn_cp.gated_delta_net import GdnDims
from gdn_cp.training.config import ModelConfig, TrainConfig
from gdn_cp.training.parallel import Ranks
from gdn_cp.training.weights import initialize


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of weights and activations for "fp32", "bf16" or "auto" (bf16 on GPUs, fp32 on CPUs)."""
    if precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]


def leave(weight: Tensor) -> None:
    """Initialise nothing."""


def megatron_config(config: TrainConfig, ranks: Ranks) -> Any:
    """Megatron's TransformerConfig of this run."""
    from megatron.core.transformer import TransformerConfig

    model = config.model
    dtype = compute_dtype(config.run.precision, ranks.device)
    return TransformerConfig(
        num_layers=model.layers,
        hidden_size=model.hidden,
        ffn_hidden_size=model.ffn,
        num_attention_heads=model.attention_heads,
        num_query_groups=model.attention_groups,
        kv_channels=model.attention_head_dim,
        attention_output_gate=model.attention_gate,
        qk_layernorm=True,
        linear_conv_kernel_dim=model.gdn_conv,
        linear_key_head_dim=model.gdn_head_dim,
        linear_value_head_dim=model.gdn_head_dim,
        linear_num_key_heads=model.gdn_key_heads,
        linear_num_value_heads=model.gdn_value_heads,
        linear_attention_freq=model.attention_every,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_eps,
        gated_linear_unit=True,
        activation_func=nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method=leave,  # `initialize` draws every weight
        output_layer_init_method=leave,
        embedding_init_method=leave,
        tensor_model_parallel_size=ranks.tp_size,
        context_parallel_size=ranks.cp_size,
        sequence_parallel=config.parallel.sequence_parallel,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        pipeline_dtype=dtype,
        calculate_per_token_loss=True,  # gradients are added over ranks, not averaged
        use_cpu_initialization=True,  # works everywhere
    )


def gdn_dims(model: ModelConfig, tp_size: int) -> GdnDims:
    """The GDN heads of one tensor-parallel rank."""
    keys, values = model.gdn_key_heads // tp_size, model.gdn_value_heads // tp_size
    return GdnDims(keys, values, model.gdn_head_dim, model.gdn_head_dim, model.gdn_conv)


def hybrid_decoder(config: TrainConfig, transformer: Any) -> Any:
    """Megatron's specs of the decoder's layers, Gated DeltaNet by this package."""
    from gdn_cp.megatron import get_hybrid_block_spec

    return get_hybrid_block_spec(
        transformer,
        backend=config.run.gdn_backend,
        a2a_size=config.parallel.a2a_size,
        intra_card=config.parallel.intra_card,
        truncate_states=config.parallel.truncate_states,
    )


def build_model(
    config: TrainConfig, ranks: Ranks, decoder: Callable[[TrainConfig, Any], Any] = hybrid_decoder
) -> tuple[nn.Module, Any]:
    """(GPTModel on this rank's device, its TransformerConfig), with weights that depend on the seed alone.

    `decoder` gives the specs of the layers (a TransformerBlockSubmodules) from the run and Megatron's config.
    """
    from megatron.core.models.gpt import GPTModel
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    torch.manual_seed(config.run.seed)
    prepare_cp_groups(
        ranks.cp_group,
        gdn_dims(config.model, ranks.tp_size),
        config.parallel.a2a_size,
        timeout=timedelta(minutes=config.run.timeout_minutes),
    )
    model_parallel_cuda_manual_seed(config.run.seed)
    transformer = megatron_config(config, ranks)
    model = GPTModel(
        config=transformer,
        transformer_layer_spec=decoder(config, transformer),
        vocab_size=config.model.vocab,
        max_sequence_length=config.data.token_budget,
        parallel_output=True,
        share_embeddings_and_output_weights=config.model.tie_embeddings,
        position_embedding_type="rope",
        rotary_percent=config.model.rope_fraction,
        rotary_base=int(config.model.rope_theta),
    )
    initialize(model, config.model, config.run.seed, ranks.tp_group)
    return model.to(ranks.device), transformer
