"""The plain layer equals the Gated DeltaNet of Qwen3-Next and Qwen3.5 in transformers, outputs and all gradients."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gdn_cp import GatedDeltaNet, ThdLayout

pytest.importorskip("transformers")

HIDDEN, H, HV, K, V = 32, 2, 4, 16, 8
TOLERANCE = 1e-5  # both in float32, with chunks cut and summed differently


def qwen3_next() -> nn.Module:
    from transformers.models.qwen3_next.configuration_qwen3_next import Qwen3NextConfig
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

    return Qwen3NextGatedDeltaNet(Qwen3NextConfig(**_sizes()), layer_idx=0)


def qwen3_5() -> nn.Module:
    configuration = pytest.importorskip("transformers.models.qwen3_5.configuration_qwen3_5")
    modeling = pytest.importorskip("transformers.models.qwen3_5.modeling_qwen3_5")
    return modeling.Qwen3_5GatedDeltaNet(configuration.Qwen3_5TextConfig(**_sizes()), layer_idx=0)


def _sizes() -> dict[str, Any]:
    return {
        "hidden_size": HIDDEN,
        "num_hidden_layers": 1,
        "layer_types": ["linear_attention"],
        "linear_num_key_heads": H,
        "linear_num_value_heads": HV,
        "linear_key_head_dim": K,
        "linear_value_head_dim": V,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
    }


def in_proj_of(theirs: dict[str, Tensor]) -> Tensor:
    """Our in_proj rows q, k, v, z, beta, alpha from a state dict (or the gradients) of either model."""
    if "in_proj_qkv" in theirs:
        return torch.cat([theirs[name] for name in ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")])
    ratio = HV // H
    per_head = theirs["in_proj_qkvz"].view(H, 2 * K + 2 * ratio * V, HIDDEN)
    parts = per_head.split([K, K, ratio * V, ratio * V], dim=1)
    gates = theirs["in_proj_ba"].view(H, 2 * ratio, HIDDEN).split([ratio, ratio], dim=1)
    return torch.cat([part.reshape(-1, HIDDEN) for part in (*parts, *gates)])


def in_our_names(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    projections = {name.removesuffix(".weight"): x for name, x in theirs.items() if name.startswith("in_proj")}
    ours = {name: theirs[name] for name in ("A_log", "dt_bias", "conv1d.weight", "out_proj.weight")}
    return {**ours, "in_proj.weight": in_proj_of(projections), "out_norm.weight": theirs["norm.weight"]}


def run(module: nn.Module, x: Tensor, upstream: Tensor) -> dict[str, Tensor]:
    """Output, input gradient and parameter gradients, in our names."""
    leaf = x.clone().requires_grad_()
    out = module(leaf)
    module.zero_grad()
    out.backward(upstream)
    assert leaf.grad is not None
    gradients = {name: p.grad.clone() for name, p in module.named_parameters()}
    if not isinstance(module, GatedDeltaNet):
        gradients = in_our_names(gradients)
    return {"out": out.detach(), "input": leaf.grad, **gradients}


@pytest.mark.parametrize("length", [1, 3, 64, 150])
@pytest.mark.parametrize("make", [qwen3_next, qwen3_5])
def test_layer_equals_transformers(make, length, monkeypatch):
    torch.manual_seed(length)
    theirs = make()
    with torch.no_grad():
        for p in theirs.parameters():
            if p.dim() == 1:  # norm weight, A_log and dt_bias away from their initial values
                p.add_(torch.randn_like(p) * 0.3)
    ours = GatedDeltaNet(HIDDEN, H, HV, K, V)
    ours.load_state_dict(in_our_names(theirs.state_dict()))

    x, upstream = torch.randn(2, 2, length, HIDDEN)
    result, as_shipped = run(ours, x, upstream), run(theirs, x, upstream)
    modeling = sys.modules[type(theirs).__module__]
    monkeypatch.setattr(modeling, "torch_chunk_gated_delta_rule", modeling.torch_recurrent_gated_delta_rule)
    by_token = run(theirs, x, upstream)
    assert result.keys() == by_token.keys() == as_shipped.keys()
    errors = {name: relative(result[name], by_token[name]) for name in by_token}
    assert all(error < TOLERANCE for error in errors.values()), errors
    # Their chunked form loses digits in the gate's gradients (3e-5 of their own recurrence), ours does not.
    errors = {name: relative(result[name], x) - relative(by_token[name], x) for name, x in as_shipped.items()}
    assert all(error < TOLERANCE for error in errors.values()), errors


def test_packed_documents_equal_transformers_document_by_document():
    torch.manual_seed(0)
    theirs = qwen3_next()
    ours = GatedDeltaNet(HIDDEN, H, HV, K, V)
    ours.load_state_dict(in_our_names(theirs.state_dict()))
    documents = [torch.randn(n, HIDDEN) for n in (5, 1, 70)]
    packed = ours(torch.cat(documents), layout=ThdLayout.zigzag([0, 5, 6, 76], 1))
    alone = torch.cat([theirs(document[None])[0] for document in documents])
    assert relative(packed, alone) < TOLERANCE


def test_initial_values_are_those_of_qwen3_next():
    torch.manual_seed(0)
    layer = GatedDeltaNet(HIDDEN, 64, 128, 4, 4)
    A = layer.A_log.exp()
    assert 0.01 <= A.min() < 1.0  # log of uniform(0.01, 16); Megatron's own layer starts at 1
    assert 15.0 < A.max() <= 16.0
    assert torch.equal(layer.dt_bias, torch.ones(128))
    assert torch.equal(layer.out_norm.weight, torch.ones(4))


def relative(value: Tensor, expected: Tensor) -> float:
    return float((value - expected).detach().norm() / expected.detach().norm().clamp_min(1e-30))
