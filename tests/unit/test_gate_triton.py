"""The Triton gate against the float64 formula: values, sums inside chunks, gradients, repetition.

float32 keeps about 1e-7 of each element; a sum of up to 200 of them, in any order, stays below 200 * 6e-8 ~ 1e-5.
"""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from gdn_cp.kernels.gate import fused_gdn_gate_chunk_cumsum, gdn_gate_reference
from gdn_cp.kernels.gate_triton import gate_backward, gdn_gate_backward_op, gdn_gate_op

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = 1e-5


def relative_error(x: Tensor, expected: Tensor) -> float:
    return ((x.double() - expected).norm() / expected.norm()).item()


def make_inputs(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    g = torch.randn(*shape, generator=generator) * 4
    A_log, dt_bias = (torch.randn(shape[-1], generator=generator) for _ in range(2))
    return [g.to(DEVICE, dtype), A_log.to(DEVICE), dt_bias.to(DEVICE)]


def expected_gate(inputs: list[Tensor], bounds: list[int] | None) -> tuple[Tensor, list[Tensor]]:
    leaves = [x.double().requires_grad_() for x in inputs]
    y = gdn_gate_reference(*leaves)
    if bounds is not None:
        pieces = [y[:, c : min(c + 64, end)].cumsum(1) for s, end in pairwise(bounds) for c in range(s, end, 64)]
        y = torch.cat(pieces, 1)
    return y, leaves


@pytest.mark.parametrize("cumsum", [False, True])
@pytest.mark.parametrize(("T", "HV"), [(1, 1), (150, 6), (64, 40)])
def test_gate_and_gradients_match_float64(cumsum: bool, T: int, HV: int):
    inputs = make_inputs(1, T, HV)
    leaves = [x.clone().requires_grad_() for x in inputs]
    y = gdn_gate_op(*leaves, None, cumsum)
    y_64, leaves_64 = expected_gate(inputs, [0, T] if cumsum else None)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    y.backward(weight)
    y_64.backward(weight.double())
    assert y.dtype == torch.float32
    assert relative_error(y, y_64) < TOLERANCE
    for leaf, leaf_64 in zip(leaves, leaves_64, strict=True):
        assert leaf.grad is not None
        assert leaf_64.grad is not None
        assert relative_error(leaf.grad, leaf_64.grad) < TOLERANCE


def test_sums_restart_at_every_chunk_of_every_sequence():
    inputs = make_inputs(1, 200, 3)
    bounds = [0, 70, 70, 71, 200]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=DEVICE)
    y = gdn_gate_op(*inputs, cu_seqlens, True)
    assert relative_error(y, expected_gate(inputs, bounds)[0]) < TOLERANCE
    torch_path = fused_gdn_gate_chunk_cumsum(*(x.double() for x in inputs), cu_seqlens=cu_seqlens)
    assert relative_error(torch_path, expected_gate(inputs, bounds)[0]) < 1e-14


def test_batch_rows_are_sequences():
    inputs = make_inputs(3, 70, 2)
    rows = [gdn_gate_op(inputs[0][b : b + 1], *inputs[1:], None, True) for b in range(3)]
    assert torch.equal(gdn_gate_op(*inputs, None, True), torch.cat(rows))


def test_extreme_gates_keep_their_digits():
    x = torch.tensor([-100.0, -80.0, -30.0, -17.0, -1e-3, 0.0, 1e-3, 17.0, 40.0, 1e4], device=DEVICE).view(1, 10, 1)
    A_log = torch.zeros(1, device=DEVICE)
    y, y_64 = gdn_gate_op(x, A_log, None, None, False), gdn_gate_reference(x.double(), A_log.double())
    normal = y_64.abs() > 1e-37  # below float32's smallest normal number digits are lost
    # A GPU takes e^x as 2^(x log2 e): half a unit in the last place of that exponent is |x| * 2^-23 at most.
    limit = 2**-21 + x.double().abs() * 2**-23
    assert (((y.double() - y_64) / y_64).abs() <= limit)[normal].all()
    assert torch.isfinite(y).all()


@pytest.mark.parametrize("cumsum", [False, True])
def test_section_of_a_projection_and_missing_bias(cumsum: bool):
    whole = make_inputs(1, 70, 12)[0]
    g, A_log = whole[..., 5:9], torch.zeros(4, device=DEVICE)
    y, (dg, dA_log, _) = gdn_gate_op(g, A_log, None, None, cumsum), gate_backward(g, g, A_log, None, None, cumsum)
    assert torch.equal(y, gdn_gate_op(g.contiguous(), A_log, None, None, cumsum))
    dense = gate_backward(g.contiguous(), g.contiguous(), A_log, None, None, cumsum)
    assert torch.equal(dg, dense[0])
    assert torch.equal(dA_log, dense[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameter_gradients_are_summed_in_float32_for_half_precision_gates(dtype: torch.dtype):
    g, A_log, dt_bias = make_inputs(1, 130, 3, dtype=dtype)
    leaves = [x.clone().requires_grad_() for x in (g, A_log, dt_bias)]
    y = gdn_gate_op(*leaves, None, False)
    y_64, leaves_64 = expected_gate([g, A_log, dt_bias], None)
    y.sum().backward()
    y_64.sum().backward()
    assert leaves[0].grad.dtype == dtype
    for leaf, leaf_64 in zip(leaves[1:], leaves_64[1:], strict=True):
        assert leaf.grad.dtype == torch.float32
        assert relative_error(leaf.grad, leaf_64.grad) < TOLERANCE
    # the gradient of g is rounded once: 2^-8 for bfloat16's 8 bits
    assert relative_error(leaves[0].grad, leaves_64[0].grad) < 2**-8


def test_repetition_gives_the_same_bits():
    inputs = make_inputs(1, 150, 5)
    first, second = (gdn_gate_backward_op(inputs[0], *inputs, None, True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_no_tokens():
    g, A_log, dt_bias = make_inputs(1, 0, 4)
    leaves = [x.clone().requires_grad_() for x in (g, A_log, dt_bias)]
    gdn_gate_op(*leaves, None, True).sum().backward()
    assert not leaves[1].grad.any()
    assert not leaves[2].grad.any()


def test_registered_operators_obey_their_schema():
    inputs = make_inputs(1, 70, 4)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(gdn_gate_op, (*inputs, None, False), test_utils=checks)
    torch.library.opcheck(gdn_gate_backward_op, (inputs[0], *inputs, None, False), test_utils=checks[:2])


def test_cumsum_refuses_batches_of_packed_rows_and_wrong_ranks():
    g, A_log, dt_bias = make_inputs(2, 4, 3)
    cu_seqlens = torch.tensor([0, 4], device=DEVICE)
    with pytest.raises(ValueError, match="with B = 1 if cu_seqlens is given"):
        fused_gdn_gate_chunk_cumsum(g, A_log, dt_bias, cu_seqlens=cu_seqlens)
    with pytest.raises(ValueError, match=r"g must be \[B, T, HV\]"):
        fused_gdn_gate_chunk_cumsum(g[0], A_log, dt_bias)
