"""A hybrid GPTModel gives the same loss and gradients however it is cut over tensor- and context-parallel ranks.

One run of four ranks does every cut: each rank computes the uncut model as reference, then its part of each cut.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("megatron.core")

VOCAB, HIDDEN, FFN = 64, 32, 48
SECTIONS = (32, 32, 64, 64, 8, 8)  # q, k, v, z, beta, alpha of 4 key and 8 value heads of dim 8
# In float32 sums in another order differ by their rounding, amplified where terms cancel (A_log, dt_bias). In float64
# what is left is Megatron's loss, which it computes in float32 from logits that may round the other way.
TOLERANCE = {"float32": 1e-5, "float64": 1e-6}

CUTS: dict[str, dict[str, Any]] = {
    "cp2": {"cp": 2},
    "cp4": {"cp": 4},
    "cp4_a2a1": {"cp": 4, "a2a_size": 1},
    "cp4_a2a2": {"cp": 4, "a2a_size": 2},
    "cp4_auto": {"cp": 4, "a2a_size": "auto"},
    "tp2_cp2_sp_recompute_a2a1": {"tp": 2, "cp": 2, "sp": True, "recompute": True, "a2a_size": 1},
    "cp4_a2a2_contiguous_by_layer": {"cp": 4, "kind": "contiguous", "layer_a2a_size": 2},
    "tp2": {"tp": 2},
    "tp2_sp": {"tp": 2, "sp": True},
    "tp2_cp2": {"tp": 2, "cp": 2},
    "tp2_cp2_sp": {"tp": 2, "cp": 2, "sp": True},
    "tp2_cp2_sp_recompute": {"tp": 2, "cp": 2, "sp": True, "recompute": True},
    "cp4_contiguous": {"cp": 4, "kind": "contiguous"},
    "cp4_plain_params": {"cp": 4, "plain_params": True},
    "tp2_cp2_sp_unpacked": {"tp": 2, "cp": 2, "sp": True, "packed": False},
    "cp4_unpacked": {"cp": 4, "packed": False},
    "cp4_float64": {"cp": 4, "dtype": "float64"},
    "tp2_cp2_sp_float64": {"tp": 2, "cp": 2, "sp": True, "dtype": "float64"},
}


def build_model(
    *,
    tp: int = 1,
    cp: int = 1,
    sp: bool = False,
    recompute: bool = False,
    dtype: str = "float32",
    head_dim: int = 8,
    cpu_initialization: bool = True,
    layer_a2a_size: int | str = "auto",
):
    """A GPTModel of three GDN layers and one attention layer with the features of Qwen3-Next, over fresh groups."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from megatron.core.transformer.transformer_config import TransformerConfig

    from gdn_cp.megatron import get_hybrid_block_spec, install_cpu_shim

    install_cpu_shim()
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp, context_parallel_size=cp)
    model_parallel_cuda_manual_seed(1)
    torch.manual_seed(0)
    config = TransformerConfig(
        num_layers=4,
        hidden_size=HIDDEN,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=8,
        ffn_hidden_size=FFN,
        tensor_model_parallel_size=tp,
        context_parallel_size=cp,
        sequence_parallel=sp,
        use_cpu_initialization=cpu_initialization,
        normalization="RMSNorm",
        layernorm_zero_centered_gamma=True,
        activation_func=torch.nn.functional.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        qk_layernorm=True,
        attention_output_gate=True,
        linear_attention_freq=4,
        linear_num_key_heads=4,
        linear_num_value_heads=8,
        linear_key_head_dim=head_dim,
        linear_value_head_dim=head_dim,
        recompute_granularity="full" if recompute else None,
        recompute_method="uniform" if recompute else None,
        recompute_num_layers=1 if recompute else None,
    )
    model = GPTModel(
        config,
        get_hybrid_block_spec(config, a2a_size=layer_a2a_size),
        vocab_size=VOCAB,
        max_sequence_length=256,
        position_embedding_type="rope",
        rotary_percent=0.5,
    )
    return model.to(getattr(torch, dtype))


def step(
    model,
    tokens: Tensor,
    *,
    tp: int = 1,
    cp: int = 1,
    kind: str = "zigzag",
    plain_params=False,
    packed=True,
    a2a_size: int | str | None = None,
):
    """One forward and backward of this rank's part; returns its part of the loss. Gradients end up summed."""
    from megatron.core import parallel_state
    from megatron.core.packed_seq_params import PackedSeqParams

    from gdn_cp import ThdLayout
    from gdn_cp.comm.layout import pad_cu_seqlens
    from gdn_cp.megatron import packed_seq_params_from_layout, reduce_gradients

    group = parallel_state.get_context_parallel_group()
    rank = group.rank()
    labels = tokens.roll(-1)
    if packed:
        padded = pad_cu_seqlens([0, 13, 13, 45, 46, 64], cp, kind, local_multiple=tp)
        make = ThdLayout.zigzag if kind == "zigzag" else ThdLayout.contiguous
        layout = make(padded.cu_seqlens, cp, seqlens=padded.seqlens, device=tokens.device)
        params = packed_seq_params_from_layout(layout, group, a2a_size)
        if plain_params:
            names = ("qkv_format", "cu_seqlens_q", "cu_seqlens_kv", "cu_seqlens_q_padded", "cu_seqlens_kv_padded")
            params = PackedSeqParams(
                **{name: getattr(params, name) for name in (*names, "max_seqlen_q", "max_seqlen_kv")}
            )
        ids, labels, weights = (
            layout.shard(padded.pad(x), rank)[None] for x in (tokens, labels, torch.ones_like(tokens))
        )
    else:
        params = None
        layout = ThdLayout.batched(2, 32, cp, device=tokens.device)
        ids, labels = (layout.shard(x, rank).view(2, -1) for x in (tokens, labels))
        weights = torch.ones_like(ids)
    per_token = model(ids, torch.zeros_like(ids), None, labels=labels, packed_seq_params=params)
    loss = (per_token * weights).sum() / tokens.numel()
    loss.backward()
    reduce_gradients(model, dp_cp_group=group, tp_group=parallel_state.get_tensor_model_parallel_group())
    return loss.detach()


def share_of_tp_rank(name: str, whole: Tensor, rank: int, size: int) -> Tensor:
    """What of an uncut parameter a tensor-parallel rank holds."""

    def rows(sections) -> Tensor:
        return torch.cat([part.chunk(size)[rank] for part in whole.split(list(sections))])

    if name.endswith("in_proj.weight"):
        return rows(SECTIONS)
    if name.endswith("conv1d.weight"):
        return rows(SECTIONS[:3])
    if name.endswith("linear_fc1.weight"):
        return rows((FFN, FFN))
    if name.endswith(("out_proj.weight", "linear_proj.weight", "linear_fc2.weight")):
        return whole.chunk(size, dim=1)[rank]
    if "norm" in name:
        return whole
    return whole.chunk(size)[rank]  # A_log, dt_bias, linear_qkv, embedding, output_layer


def relative_error(value: Tensor, expected: Tensor) -> float:
    return float((value - expected).norm() / expected.norm())


def _every_cut(rank: int, world_size: int) -> dict[str, dict[str, Any]]:
    import torch.distributed as dist
    from megatron.core import parallel_state

    tokens = torch.randint(0, VOCAB, (64,), generator=torch.Generator().manual_seed(5))
    results: dict[str, dict[str, Any]] = {}
    references: dict[tuple[bool, str], Any] = {}
    for packed, dtype in ((True, "float32"), (False, "float32"), (True, "float64")):
        model = build_model(dtype=dtype)
        loss = step(model, tokens, packed=packed)
        values = {name: p.detach().clone() for name, p in model.named_parameters()}
        references[packed, dtype] = (loss, values, {name: p.grad.clone() for name, p in model.named_parameters()})
    for name, cut in CUTS.items():
        shape = {key: cut[key] for key in ("tp", "cp", "sp", "recompute", "dtype", "layer_a2a_size") if key in cut}
        call = {key: cut[key] for key in ("tp", "cp", "kind", "plain_params", "packed", "a2a_size") if key in cut}
        model = build_model(**shape)
        loss = step(model, tokens, **call)
        dist.all_reduce(loss, group=parallel_state.get_context_parallel_group())
        tp_rank = parallel_state.get_tensor_model_parallel_rank()
        reference_loss, values, gradients = references[cut.get("packed", True), cut.get("dtype", "float32")]
        result: dict[str, Any] = {"loss": relative_error(loss, reference_loss), "values": {}, "gradients": {}}
        for key, p in model.named_parameters():
            value, gradient = (
                share_of_tp_rank(key, whole[key], tp_rank, cut.get("tp", 1)) for whole in (values, gradients)
            )
            result["values"][key] = torch.equal(p, value)
            result["gradients"][key] = relative_error(p.grad, gradient)
        results[name] = result
    return results


@pytest.fixture(scope="module")
def every_cut() -> list[dict[str, dict[str, Any]]]:
    from tests.ranks import run_ranks

    return run_ranks(_every_cut, 4, timeout=240)


@pytest.mark.parametrize("cut", CUTS)
def test_cut_model_equals_whole_model(every_cut, cut):
    for rank, results in enumerate(every_cut):
        result = results[cut]
        tolerance = TOLERANCE[CUTS[cut].get("dtype", "float32")]
        assert result["loss"] < tolerance, f"rank {rank}"
        assert len(result["gradients"]) == 41
        too_far = {name: error for name, error in result["gradients"].items() if not error < tolerance}
        assert not too_far, f"rank {rank}"


def test_cpu_initialisation_does_not_depend_on_the_cut(every_cut):
    for results in every_cut:
        for cut, result in results.items():
            assert all(result["values"].values()), cut
