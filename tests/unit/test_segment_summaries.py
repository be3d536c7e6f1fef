"""Segment summaries and their merge against the token recurrence: the affine law, forward and backward, truncation."""

from __future__ import annotations

from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gdn_cp.kernels.merge import merge_chains
from gdn_cp.kernels.reference import l2norm, recurrent_gated_delta_rule_reference
from gdn_cp.kernels.segments import (
    TRUNCATION_THRESHOLD,
    RuleOptions,
    TokenInputs,
    begin_backward,
    run_rule,
    summarise_segments,
)
from tests.segment_chains import links

H, HV, K, V = 2, 4, 8, 6


def random_inputs(tokens: int, seed: int, dtype: torch.dtype = torch.float64, decay: float = 0.1) -> TokenInputs:
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)

    q, k = normal(1, tokens, H, K), l2norm(normal(1, tokens, H, K))
    g, beta = -decay * normal(1, tokens, HV).abs(), normal(1, tokens, HV).sigmoid()
    return TokenInputs(q, k, normal(1, tokens, HV, V), g, beta)


def bounds(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def final_states(inputs: TokenInputs, cu_seqlens: Tensor, state: Tensor) -> Tensor:
    """The states after each segment by the token recurrence."""
    _, final = recurrent_gated_delta_rule_reference(
        inputs.q, inputs.k, inputs.v, inputs.g, inputs.beta, None, state, True, cu_seqlens=cu_seqlens
    )
    assert final is not None
    return final


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30))


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(0, 90), min_size=1, max_size=5), st.integers(0, 2**20))
def test_summary_is_the_affine_law_of_the_recurrence(lengths, seed):
    cu, inputs = bounds(lengths), random_inputs(sum(lengths), seed)
    state = torch.randn(len(lengths), HV, K, V, dtype=torch.float64)
    ext, transfer = summarise_segments(inputs, RuleOptions(), cu)
    # Roundings of about 100 products in float64.
    assert relative_error(ext + transfer @ state, final_states(inputs, cu, state)) < 1e-13


def test_summary_in_float32_and_bfloat16_inputs_is_float32():
    lengths = [130, 7, 64]
    cu, inputs = bounds(lengths), random_inputs(201, seed=1)
    for dtype in (torch.float32, torch.bfloat16):
        rounded = TokenInputs(*(x if x is None else x.to(dtype) for x in inputs.tensors()))
        again = TokenInputs(*(x if x is None else x.double() for x in rounded.tensors()))
        exact = summarise_segments(again, RuleOptions(), cu)
        summary = summarise_segments(rounded, RuleOptions(), cu)
        for actual, expected in zip(summary, exact, strict=True):
            assert actual.dtype == torch.float32
            assert relative_error(actual, expected) < 2e-6  # ten or so roundings of 6e-8, added up at random


def test_summary_applies_norm_gate_and_sigmoid_as_the_rule_does():
    lengths = [70, 20]
    cu, inputs = bounds(lengths), random_inputs(90, seed=2)
    A_log, dt_bias = torch.randn(HV, dtype=torch.float64), torch.randn(HV, dtype=torch.float64)
    raw = TokenInputs(inputs.q, 3 * inputs.k, inputs.v, inputs.g, inputs.beta, A_log, dt_bias)
    options = RuleOptions(use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True, use_beta_sigmoid_in_kernel=True)
    state = torch.randn(2, HV, K, V, dtype=torch.float64)
    ext, transfer = summarise_segments(raw, options, cu)
    _, expected = run_rule(raw, options, cu, state, True)
    assert relative_error(ext + transfer @ state, expected) < 1e-13


@pytest.mark.parametrize("with_gate", [True, False])
def test_merge_composes_the_states_of_a_whole_sequence(with_gate):
    lengths = [40, 1, 75, 30]
    cu, inputs = bounds(lengths), random_inputs(sum(lengths), seed=3)
    if not with_gate:  # no decay: nothing is forgotten on the way
        inputs = TokenInputs(inputs.q, inputs.k, inputs.v, None, inputs.beta)
    ext, transfer = summarise_segments(inputs, RuleOptions(), cu)
    merged = torch.empty_like(ext)
    units, table, steps = links((tuple(lengths),), HV, False, "cpu")
    flat = ext.flatten(0, 1), transfer.flatten(0, 1)
    merge_chains(*flat, units, table, merged.flatten(0, 1), steps=steps)
    assert not merged[0].any()
    for index, (start, _) in enumerate(pairwise(cu.tolist())):
        if index:
            whole = torch.tensor([0, start])
            expected = final_states(inputs.narrow(0, start), whole, torch.zeros(1, HV, K, V, dtype=torch.float64))
            assert relative_error(merged[index], expected[0]) < 1e-13


def test_backward_of_the_state_is_the_same_law_transposed():
    lengths = [33, 64, 100]
    cu, inputs = bounds(lengths), random_inputs(sum(lengths), seed=4)
    state = torch.randn(3, HV, K, V, dtype=torch.float64, requires_grad=True)
    d_output, d_final = torch.randn(1, sum(lengths), HV, V).double(), torch.randn(3, HV, K, V).double()
    leaves = TokenInputs(*(x if x is None else x.clone().requires_grad_() for x in inputs.tensors()))
    o, final = run_rule(leaves, RuleOptions(), cu, state, True)
    wanted = [x for x in leaves.tensors() if x is not None]
    *expected, d_state = torch.autograd.grad((o, final), [*wanted, state], (d_output, d_final))

    needs_grad = tuple(x is not None for x in inputs.tensors())
    pending = begin_backward(inputs, RuleOptions(), cu, state, d_output, needs_grad)
    _, transfer = summarise_segments(inputs, RuleOptions(), cu)
    assert relative_error(pending.state_gradient() + transfer.mT @ d_final, d_state) < 1e-13
    found = [grad for grad in pending.finish(d_final) if grad is not None]
    for actual, grad in zip(found, expected, strict=True):
        assert torch.equal(actual, grad)


@pytest.mark.parametrize("decay", [0.05, 0.5, 3.0])
def test_truncation_errs_by_no_more_than_its_bound(decay):
    lengths = [20, 64, 200]
    cu, inputs = bounds(lengths), random_inputs(sum(lengths), seed=5, decay=decay)
    assert inputs.g is not None
    ext, transfer = summarise_segments(inputs, RuleOptions(), cu)
    cut_ext, cut = summarise_segments(inputs, RuleOptions(), cu, truncate=True)
    kept = torch.stack([part.sum(1)[0] for part in inputs.g.split(lengths, 1)]).exp()  # [n, HV]
    truncated = kept < TRUNCATION_THRESHOLD
    assert torch.equal(cut_ext, ext)
    assert torch.equal(cut[~truncated], transfer[~truncated])
    assert not cut[truncated].any()
    # |M| <= e^(sum of g) in the 2-norm, since |I - beta k k^T| <= 1 for unit k and 0 <= beta <= 2.
    assert (torch.linalg.matrix_norm(transfer, 2) <= kept * (1 + 1e-12)).all()
    assert bool(truncated.any()) == (decay > 0.05)


def test_truncation_of_everything_computes_no_transfer(monkeypatch):
    widths = []
    from gdn_cp.kernels import segments

    run = segments.run_rule
    monkeypatch.setattr(
        segments, "run_rule", lambda inputs, *rest: widths.append(inputs.v.shape[-1]) or run(inputs, *rest)
    )
    cu, inputs = bounds([64, 64]), random_inputs(128, seed=6, decay=5.0)
    _, transfer = summarise_segments(inputs, RuleOptions(), cu, truncate=True)
    assert not transfer.any()
    summarise_segments(inputs, RuleOptions(), cu)
    assert widths == [V, V + K]


def test_more_columns_than_triton_takes_run_apart(monkeypatch):
    from gdn_cp.kernels import chunk_triton, segments

    assert segments.MOST_COLUMNS == chunk_triton.MAX_HEAD_DIM
    cu, inputs = bounds([64, 0, 10]), random_inputs(74, seed=8)
    together, widths, run = summarise_segments(inputs, RuleOptions(), cu), [], segments.run_rule
    monkeypatch.setattr(segments, "MOST_COLUMNS", V + K - 1)
    monkeypatch.setattr(
        segments, "run_rule", lambda inputs, *rest: widths.append(inputs.v.shape[-1]) or run(inputs, *rest)
    )
    apart = summarise_segments(inputs, RuleOptions(), cu)
    assert widths == [V, K]
    for x, expected in zip(apart, together, strict=True):
        assert relative_error(x, expected) < 1e-14  # a few roundings of float64: products of another shape


def test_without_decay_nothing_is_truncated():
    cu, inputs = bounds([64, 10]), random_inputs(74, seed=7)
    inputs = TokenInputs(inputs.q, inputs.k, inputs.v, None, inputs.beta)
    plain, truncated = (summarise_segments(inputs, RuleOptions(), cu, truncate=flag) for flag in (False, True))
    assert torch.equal(plain.transfer, truncated.transfer)
