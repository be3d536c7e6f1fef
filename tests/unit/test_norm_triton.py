"""The Triton gated RMS norm against the float64 one in plain torch: values, roundings, gradients, strides, repetition.

float32 keeps about 1e-7 of each element; a sum of up to 300 of them, in any order, stays below 300 * 6e-8 ~ 2e-5.
"""

import pytest
import torch
from torch import Tensor

from gdn_cp.kernels import norm_triton
from gdn_cp.kernels.norm import gated_rms_norm, gated_rms_norm_reference
from gdn_cp.kernels.norm_triton import (
    gate_heads,
    gate_heads_backward,
    gated_rms_norm_backward_op,
    gated_rms_norm_op,
    norm_backward,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = 2e-5


def make_inputs(*shape: int, dtype: torch.dtype = torch.float32, weight_dtype: torch.dtype | None = None):
    generator = torch.Generator().manual_seed(sum(shape))
    x, z = (torch.randn(shape, generator=generator).to(DEVICE, dtype) for _ in range(2))
    return [x, z, torch.randn(shape[-1], generator=generator).to(DEVICE, weight_dtype or dtype)]


def relative_error(x: Tensor, expected: Tensor) -> float:
    return ((x.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def rounding(dtype: torch.dtype) -> float:
    """Relative error of one rounding to dtype: half an ulp; Triton's interpreter cuts bfloat16's digits off instead."""
    return torch.finfo(dtype).eps * (1 if dtype == torch.bfloat16 and DEVICE == "cpu" else 0.5)


def check(inputs: list[Tensor], eps: float = 1e-6, tolerance: float = TOLERANCE, roundings: float = 0.0) -> None:
    """Values (with an allowance for their inner roundings) and every gradient against the float64 reference."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    y, expected = gated_rms_norm_op(*leaves, eps), gated_rms_norm_reference(*exact, eps)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    y.backward(dy)
    expected.backward(dy.double())
    assert y.dtype == leaves[0].dtype
    assert y.is_contiguous()
    assert relative_error(y, expected) < tolerance + roundings
    for leaf, wanted in zip(leaves, exact, strict=True):
        assert leaf.grad.dtype == leaf.dtype
        assert relative_error(leaf.grad, wanted.grad) < tolerance


@pytest.mark.parametrize("shape", [(16,), (5, 128), (70, 3, 24), (2, 7, 2, 64), (9, 2, 256), (300, 1, 16)])
def test_values_and_gradients_match_float64(shape: tuple[int, ...]):
    check(make_inputs(*shape))


def test_large_eps():
    check(make_inputs(9, 2, 32), eps=0.1)


def test_programs_of_several_tiles(monkeypatch: pytest.MonkeyPatch):
    """17 tiles of 16 heads over 5 programs: 4 tiles each, 1 for the last, which is not full."""
    monkeypatch.setattr(norm_triton, "BACKWARD_TILE", 16 * 16)
    check(make_inputs(131, 2, 16))


def test_heads_in_blocks_and_padded_tokens():
    """Heads in blocks forward and backward, gradients into other blocks and a section, NaN where nobody may look."""
    x, z, weight = make_inputs(11, 6, 16)
    dy = make_inputs(12, 6, 16)[0][1:]
    padding = torch.zeros(11, dtype=torch.bool, device=DEVICE)
    padding[[0, 7]] = True
    clean = [t.masked_fill(padding[:, None, None], 0) for t in (dy, x, z)]
    dy, x, z = (t.masked_fill(padding[:, None, None], torch.nan) for t in (dy, x, z))
    blocks = x.unflatten(1, (3, 2)).transpose(0, 1).contiguous()
    y, kept = gate_heads(blocks, z, weight, 1e-6, padding=padding, keep=True)
    assert torch.equal(y, gated_rms_norm_op(*clean[1:], weight, 1e-6).flatten(1))
    assert torch.equal(kept, clean[1].flatten(1))
    dx, dz = torch.full((2, 11, 3, 16), torch.nan, device=DEVICE), torch.full((11, 8, 16), torch.nan, device=DEVICE)
    dweight = gate_heads_backward(dy, blocks, z, weight, 1e-6, dx, dz[:, 1:7], padding=padding)
    expected = norm_backward(*clean, weight, 1e-6)
    assert torch.equal(dx.transpose(0, 1).flatten(1, 2), expected[0])
    assert torch.equal(dz[:, 1:7], expected[1])
    assert dz[:, [0, 7]].isnan().all()
    assert torch.equal(dweight, expected[2])


def test_sections_of_wider_tensors_are_read_in_place():
    whole = make_inputs(20, 4, 48)[0]
    x, z, dy = whole[:, :3, 16:32], whole[:, 1:, :16], whole[:, :3, 32:]
    assert norm_triton._by_heads(z).data_ptr() == z.data_ptr()
    weight = make_inputs(16)[2]
    dense = [t.contiguous() for t in (dy, x, z)]
    strided_results = [gated_rms_norm_op(x, z, weight, 1e-6), *norm_backward(dy, x, z, weight, 1e-6)]
    dense_results = [gated_rms_norm_op(*dense[1:], weight, 1e-6), *norm_backward(*dense, weight, 1e-6)]
    assert all(torch.equal(a, b) for a, b in zip(strided_results, dense_results, strict=True))
    transposed = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(gated_rms_norm_op(transposed, z, weight, 1e-6), dense_results[0])


def test_head_has_the_bits_that_it_has_alone():
    x, z, weight = make_inputs(40, 8, 16)
    y, gradients = gated_rms_norm_op(x, z, weight, 1e-6), norm_backward(z, x, z, weight, 1e-6)
    part = slice(3, 5)
    alone = (x[:, part], z[:, part], weight, 1e-6)
    assert torch.equal(gated_rms_norm_op(*alone), y[:, part])
    for mine, of_all in zip(norm_backward(z[:, part], *alone)[:2], gradients[:2], strict=True):
        assert torch.equal(mine, of_all[:, part])


def test_zero_rows_give_zero_and_finite_gradients():
    x, z, weight = make_inputs(4, 16)
    x = torch.zeros_like(x)
    assert not gated_rms_norm_op(x, z, weight, 1e-6).any()
    assert all(g.isfinite().all() for g in norm_backward(torch.ones_like(x), x, z, weight, 1e-6))


def test_nan_stays_in_its_row():
    x, z, weight = make_inputs(40, 16)
    x[7] = torch.nan
    clean = [*range(7), *range(8, 40)]
    assert gated_rms_norm_op(x, z, weight, 1e-6)[clean].isfinite().all()
    dx, dz, _ = norm_backward(torch.ones_like(x), x, z, weight, 1e-6)
    assert dx[clean].isfinite().all()
    assert dz[clean].isfinite().all()


def test_repetition_gives_the_same_bits():
    x, z, weight = make_inputs(60, 2, 16)
    first, second = (gated_rms_norm_backward_op(x, x, z, weight, 1e-6) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_no_rows():
    leaves = [t.requires_grad_() for t in make_inputs(0, 3, 16)]
    gated_rms_norm_op(*leaves, 1e-6).sum().backward()
    assert leaves[0].grad.shape == (0, 3, 16)
    assert not leaves[2].grad.any()


def test_registered_operators_obey_their_schema():
    inputs = make_inputs(5, 2, 16)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(gated_rms_norm_op, (*inputs, 1e-6), test_utils=checks)
    torch.library.opcheck(gated_rms_norm_backward_op, (inputs[0], *inputs, 1e-6), test_utils=checks[:2])


@pytest.mark.parametrize(
    ("V", "dtype", "reason"),
    [
        (16, torch.bfloat16, None),
        (256, torch.float32, None),
        (8, torch.float32, "heads 8 wide, not 16 to 256"),
        (257, torch.float32, "heads 257 wide, not 16 to 256"),
        (64, torch.float64, "x is torch.float64"),
    ],
)
def test_what_the_kernels_serve(V: int, dtype: torch.dtype, reason: str | None):
    assert norm_triton.unsupported(*make_inputs(2, V, dtype=dtype)) == reason


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gradients_round_once_and_values_three_times(dtype: torch.dtype):
    tolerance = rounding(dtype) + TOLERANCE
    check(make_inputs(30, 2, 32, dtype=dtype), tolerance=tolerance, roundings=2 * rounding(dtype))


def test_float32_weight_of_bfloat16_heads_is_not_rounded():
    inputs = make_inputs(30, 2, 32, dtype=torch.bfloat16, weight_dtype=torch.float32)
    leaves = [t.requires_grad_() for t in inputs]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    (dweight,) = torch.autograd.grad(gated_rms_norm_op(*leaves, 1e-6).float().sum(), leaves[2:])
    (wanted,) = torch.autograd.grad(gated_rms_norm_reference(*exact, 1e-6).sum(), exact[2:])
    assert dweight.dtype == torch.float32
    assert relative_error(dweight, wanted) < TOLERANCE


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(3000, 32, 128), (5000, 3, 96)])
def test_gpu_many_heads(dtype: torch.dtype, shape: tuple[int, ...]):
    half_ulp = rounding(dtype) if dtype == torch.bfloat16 else 0.0
    check(make_inputs(*shape, dtype=dtype), tolerance=half_ulp + TOLERANCE, roundings=2 * half_ulp)


@pytest.mark.gpu
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
def test_gpu_roundings_are_those_of_the_reference(weight_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    """Equal but where the inverse root or the exponential differ in a last bit of float32 beside a rounding edge."""
    inputs = make_inputs(2000, 8, 128, dtype=torch.bfloat16, weight_dtype=weight_dtype)
    y = gated_rms_norm(*inputs)
    assert torch.equal(y, gated_rms_norm_op(*inputs, 1e-6))
    monkeypatch.setenv("GDN_CP_BACKEND", "reference")
    reference = gated_rms_norm(*inputs)
    assert torch.equal(reference, gated_rms_norm_reference(*inputs, 1e-6))
    # An edge of bfloat16 is met by some 2^-16 of float32's neighbours, a few of them apart, in each of three roundings.
    assert (y != reference).double().mean() < 3 * 16 * 2**-16
    assert relative_error(y, reference.double()) < 2**-8


@pytest.mark.gpu
def test_gpu_waits_for_nothing_and_is_captured_in_a_graph():
    leaves = [t.requires_grad_() for t in make_inputs(300, 8, 128, dtype=torch.bfloat16)]
    dy = torch.randn_like(leaves[0])

    def step() -> list[Tensor]:
        y = gated_rms_norm(*leaves)
        return [y, *torch.autograd.grad(y, leaves, dy)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        expected = [t.clone() for t in step()]
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))
