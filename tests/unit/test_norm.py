"""The gated RMS norm against its formula in float64, Qwen3-Next's order of roundings, gradients, zeros and refusals."""

import pytest
import torch

from gdn_cp.kernels.norm import gated_rms_norm


def formula(x, z, weight, eps=1e-6):
    normed = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    return normed * weight * z * torch.sigmoid(z)


def leaves(*shape, dtype=torch.float64, weight_dtype=None):
    torch.manual_seed(0)
    shapes_and_dtypes = ((shape, dtype), (shape, dtype), (shape[-1:], weight_dtype or dtype))
    return [torch.randn(s, dtype=torch.float64).to(d).requires_grad_() for s, d in shapes_and_dtypes]


@pytest.mark.parametrize("shape", [(1,), (7, 5), (3, 2, 16), (2, 3, 4, 8), (0, 4)])
@pytest.mark.parametrize("eps", [1e-6, 0.1])
def test_equals_formula_with_gradients(shape, eps):
    arguments = leaves(*shape)
    y, expected = gated_rms_norm(*arguments, eps), formula(*arguments, eps)
    assert torch.allclose(y, expected, rtol=1e-13, atol=1e-14)
    d = torch.randn_like(y)
    for actual, wanted in zip(
        torch.autograd.grad(y, arguments, d), torch.autograd.grad(expected, arguments, d), strict=True
    ):
        assert torch.allclose(actual, wanted, rtol=1e-12, atol=1e-12)


def test_gradcheck():
    assert torch.autograd.gradcheck(gated_rms_norm, leaves(4, 3))


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
def test_roundings_are_those_of_qwen3_next(weight_dtype):
    """Round after the norm, then multiply by the weight, then by the float32 gate, then round: the same bits."""
    x, z, weight = (t.detach() for t in leaves(64, 32, dtype=torch.bfloat16, weight_dtype=weight_dtype))
    normed = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
    gate = z.float() * (1 / (1 + (-z.float()).exp()))
    expected = ((weight * normed.to(torch.bfloat16)) * gate).to(torch.bfloat16)
    assert torch.equal(gated_rms_norm(x, z, weight), expected)


def test_bfloat16_gradients_are_float32_ones_rounded():
    low = leaves(50, 16, dtype=torch.bfloat16, weight_dtype=torch.float32)
    high = [x.detach().double().requires_grad_() for x in low]
    d = torch.randn(50, 16).bfloat16()
    actual = torch.autograd.grad(gated_rms_norm(*low), low, d)
    wanted = torch.autograd.grad(formula(*high), high, d.double())
    assert [g.dtype for g in actual] == [torch.bfloat16, torch.bfloat16, torch.float32]
    for got, expected, tolerance in zip(actual, wanted, (2**-8, 2**-8, 1e-6), strict=True):
        assert (got.double() - expected).norm() <= tolerance * expected.norm()


def test_zero_rows_give_zero_and_finite_gradients():
    x, z, weight = leaves(4, 8, dtype=torch.float32)
    x = torch.zeros_like(x).requires_grad_()
    y = gated_rms_norm(x, z, weight)
    assert torch.equal(y, torch.zeros_like(y))
    assert all(g.isfinite().all() for g in torch.autograd.grad(y.sum(), [x, z, weight]))


def test_head_has_the_bits_that_it_has_alone():
    x, z, weight = leaves(77, 8, 5, dtype=torch.float32)
    d = torch.randn(77, 8, 5)
    whole = gated_rms_norm(x, z, weight)
    dx, dz = torch.autograd.grad(whole, [x, z], d)
    for part in (slice(0, 1), slice(1, 8), slice(4, 8)):
        mine = [t[:, part].detach().contiguous().requires_grad_() for t in (x, z)]
        y = gated_rms_norm(*mine, weight)
        gradients = torch.autograd.grad(y, mine, d[:, part].contiguous())
        assert torch.equal(y, whole[:, part])
        assert torch.equal(gradients[0], dx[:, part])
        assert torch.equal(gradients[1], dz[:, part])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.ones(4, 8, dtype=torch.int32)}, r"x must be a floating-point tensor"),
        ({"z": torch.ones(4, 7)}, r"z must have x's shape \[4, 8\], got \[4, 7\]"),
        ({"weight": torch.ones(7)}, r"weight must be \[8\]"),
        ({"z": torch.ones(4, 8, device="meta")}, r"z is on meta but x is on cpu: move z"),
        ({"eps": 0.0}, r"eps must be positive"),
        ({"eps": float("nan")}, r"eps must be positive.*nan"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(ValueError, match=message):
        gated_rms_norm(**({"x": torch.ones(4, 8), "z": torch.ones(4, 8), "weight": torch.ones(8)} | changes))


@pytest.mark.gpu
def test_gpu_agrees():
    arguments = leaves(77, 8, 16, dtype=torch.float32)
    exact, d = formula(*(x.double() for x in arguments)), torch.randn(77, 8, 16)
    on_gpu = [x.detach().cuda().requires_grad_() for x in arguments]
    y = gated_rms_norm(*on_gpu)
    assert (y.cpu() - exact).norm() <= 1e-6 * exact.norm()
    gradients = torch.autograd.grad(y, on_gpu, d.cuda())
    for actual, wanted in zip(gradients, torch.autograd.grad(exact, arguments, d.double()), strict=True):
        assert (actual.cpu() - wanted).norm() <= 1e-6 * wanted.norm()
