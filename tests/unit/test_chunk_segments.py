"""Triton's rule over segments that are continued elsewhere, against the float64 recurrence of whole sequences."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gdn_cp.kernels import chunk_segments
from gdn_cp.kernels.reference import recurrent_gated_delta_rule_reference
from gdn_cp.kernels.segments import (
    TRUNCATION_THRESHOLD,
    LawRoom,
    RuleOptions,
    SegmentRule,
    TokenInputs,
    begin_segment_backward,
)
from tests.segment_chains import bounds, roles, run_in_segments

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# As for the whole rule: some 500 roundings of float32 in a row, if they never cancel.
TOLERANCE = 500 * 2.0**-24
OPTIONS = RuleOptions(
    use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True, use_beta_sigmoid_in_kernel=True, backend="triton"
)
CHAINS = {
    "one sequence in four": ((70, 130, 65, 3),),
    "a whole sequence, an empty one and two in segments": ((40,), (66, 64), (0,), (1, 150, 20)),
}


def make_inputs(tokens: int, H: int = 1, HV: int = 2, K: int = 16, V: int = 32, decay: float = 0.0) -> TokenInputs:
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw).to(DEVICE)

    q, k, v = normal(1, tokens, H, K), normal(1, tokens, H, K), normal(1, tokens, HV, V)
    return TokenInputs(q, k, v, normal(1, tokens, HV), normal(1, tokens, HV), normal(HV) + decay, normal(HV) - 2)


def expected_results(inputs: TokenInputs, chains, d_output: Tensor) -> tuple[Tensor, list[Tensor]]:
    leaves = [x.cpu().double().requires_grad_() for x in inputs.tensors() if x is not None]
    q, k, v, g, beta, A_log, dt_bias = leaves
    cu_seqlens = bounds(tuple((sum(chain),) for chain in chains), "cpu")
    flags = {name: getattr(OPTIONS, name) for name in vars(OPTIONS) if name.startswith("use_")}
    o, _ = recurrent_gated_delta_rule_reference(
        q, k, v, g, beta, A_log=A_log, dt_bias=dt_bias, cu_seqlens=cu_seqlens, **flags
    )
    return o.detach(), list(torch.autograd.grad(o, leaves, d_output.cpu().double()))


def assert_equal_to_recurrence(inputs: TokenInputs, chains, options: RuleOptions) -> None:
    d_output = torch.randn(inputs.v.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    o, gradients = run_in_segments(inputs, options, chains, d_output)
    wanted_o, wanted = expected_results(inputs, chains, d_output)
    # A_log's and dt_bias' are sums over tokens that may cancel: against what is summed, as in `tests.delta_rule`.
    least = {name: float(wanted[3].norm()) for name in ("A_log", "dt_bias")}
    for name, x, y in zip(("o", *vars(inputs)), (o, *gradients), (wanted_o, *wanted), strict=True):
        assert x is not None
        error = float((x.cpu().double() - y).norm()) / max(float(y.norm()), least.get(name, 0.0))
        assert error < TOLERANCE, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("chains", CHAINS.values(), ids=CHAINS)
@pytest.mark.parametrize("pieces", [0, 1])
def test_output_and_gradients_are_those_of_whole_sequences(chains, pieces):
    """Whole segments, and segments cut into pieces of one chunk, whose laws make the segment's."""
    inputs = make_inputs(sum(map(sum, chains)))
    assert_equal_to_recurrence(inputs, chains, replace(OPTIONS, intra_card=pieces))


def test_slices_of_the_backward_cut_through_segments(monkeypatch):
    monkeypatch.setattr(chunk_segments, "slice_chunks", lambda *_: 2)
    chains, inputs = ((30,), (65, 130)), make_inputs(225, HV=1)
    assert_equal_to_recurrence(inputs, chains, replace(OPTIONS, intra_card=1))
    assert_equal_to_recurrence(inputs, chains, OPTIONS)


@pytest.mark.parametrize(("pieces", "slices"), [(0, False), (4, False), (0, True)])
def test_truncated_maps_are_zero_and_walks_begin_where_nothing_before_counts(pieces, slices, monkeypatch):
    """Heads that forget nothing keep their bits; others miss at most 4.5e-5 of the state there, which is at most the
    sum of all |v| (of all scale |dO| for gradients), since keys and queries have length one and beta is below one."""
    if slices:  # whose products are made for the summary alone, and only where it goes
        monkeypatch.setattr(chunk_segments, "slice_chunks", lambda *_: 4)
    chains, options = ((320, 320, 320),), replace(OPTIONS, intra_card=pieces)
    inputs = make_inputs(960, H=2, HV=4)
    inputs = replace(inputs, A_log=torch.tensor([-12.0, -2.5, -1.0, 3.0], device=DEVICE))
    cu_seqlens, parts = bounds(chains, DEVICE), roles(chains, DEVICE)
    d_output = torch.randn(inputs.v.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    found, needed = [], (True,) * 7
    for truncate in (False, True):
        rule = SegmentRule(inputs, options, cu_seqlens, parts, (0, 3), truncate=truncate)
        # Memory of the caller's, with room for one segment more.
        room = LawRoom(torch.full((4, 4, 16, 48), torch.nan), torch.full((4, 4), -1, dtype=torch.int32))
        room = LawRoom(*(x.to(DEVICE) for x in room))
        assert rule.summarise(room=room) is room.laws
        ext, maps = room.laws[:3].split((32, 16), -1)
        # Without truncation M may become zero by itself.
        assert torch.equal(
            room.lost[1], (~maps[1].flatten(1).any(1)).int() if truncate else torch.zeros_like(room.lost[1])
        )
        rule.run(torch.zeros_like(ext))
        rest = (rule.kept(), torch.zeros_like(ext), d_output, needed)
        back = begin_segment_backward(inputs, options, cu_seqlens, parts, *rest, truncate=truncate)
        out = torch.full((4, 4, 16, 32), torch.nan, device=DEVICE)
        gradient = back.state_gradient(out=out)
        assert gradient is out
        found.append((ext[:2], maps[1], gradient[1:3]))
    for whole, cut, size in zip(*found, (inputs.v, None, d_output / 4), strict=True):
        kept = whole[..., 0, :, :]
        assert torch.equal(kept, cut[..., 0, :, :])
        difference = (whole - cut)[..., 1:, :, :].norm(dim=(-2, -1)).amax()
        assert difference > 0  # something was cut
        if size is not None:
            assert difference < TRUNCATION_THRESHOLD * size.norm(dim=-1).sum(1).amax()
    (_, whole_maps, _), (_, cut_maps, _) = found
    assert whole_maps[1:3].flatten(1).any(1).all()
    assert not cut_maps[2:].any()


def test_equal_bits_on_repetition():
    chains, inputs = ((10, 66, 5),), make_inputs(81, HV=1)
    d_output = torch.ones_like(inputs.v)
    (o, first), (o_again, second) = (run_in_segments(inputs, OPTIONS, chains, d_output) for _ in range(2))
    assert torch.equal(o, o_again)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True) if x is not None and y is not None)
