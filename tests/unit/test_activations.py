"""Sigmoid, silu and softplus: values against float64 formulas, gradients, and bits that do not depend on the place."""

import pytest
import torch

from gdn_cp.kernels.activations import sigmoid, silu_backward, silu_forward, softplus

X = torch.cat([torch.linspace(-100, 100, 201), torch.tensor([0.0, -1e-20, 1e-20])])


def silu(x):
    return silu_forward(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("function", "formula"),
    [
        (sigmoid, torch.sigmoid),
        (silu, torch.nn.functional.silu),
        (softplus, lambda x: torch.logaddexp(x, torch.zeros_like(x))),
    ],
    ids=["sigmoid", "silu", "softplus"],
)
def test_value_is_the_formula(function, formula, dtype):
    x = X.to(dtype)
    # An exponential, a sum and a quotient: some ulp. Below e^-87 float32 results are denormal and may be flushed to 0.
    tiny = torch.finfo(dtype).tiny * 100
    assert torch.allclose(function(x).double(), formula(x.double()), rtol=8 * torch.finfo(dtype).eps, atol=tiny)


def test_gradients():
    x = torch.randn(30, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(sigmoid, (x,))
    assert torch.autograd.gradcheck(softplus, (x,))
    d = torch.randn(30, dtype=torch.float64)
    (expected,) = torch.autograd.grad(torch.nn.functional.silu(x), [x], d)
    assert torch.allclose(silu_backward(d, x.detach()), expected, rtol=1e-13)


@pytest.mark.parametrize(("function", "slope"), [(sigmoid, 0.25), (softplus, 0.5)])
def test_slope_at_zero_and_far_out(function, slope):
    x = torch.tensor([0.0, -200.0, 200.0], requires_grad=True)
    (gradient,) = torch.autograd.grad(function(x).sum(), [x])
    assert gradient[0] == slope
    assert gradient.isfinite().all()
    assert silu_backward(torch.ones(3), x.detach()).tolist() == [0.5, 0.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("function", [sigmoid, silu, softplus, lambda x: silu_backward(x, x)])
def test_an_element_has_the_bits_that_it_has_alone(function, dtype):
    x = torch.randn(1003, dtype=dtype)
    whole = function(x)
    for size in (1, 7, 33, 500):
        assert torch.equal(function(x[5 : 5 + size].clone()), whole[5 : 5 + size])


def test_inputs_are_left_alone():
    x = torch.randn(9)
    before = x.clone()
    for function in (sigmoid, silu, softplus):
        function(x)
    assert torch.equal(x, before)
