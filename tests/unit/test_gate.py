"""The gate in plain torch: its formula in float64, its dtypes, gradients and refusals."""

import pytest
import torch

from gdn_cp import fused_gdn_gate, fused_gdn_gate_chunk_cumsum
from gdn_cp.kernels.gate import gdn_gate_reference


def leaves(*shape, dtype=torch.float64, parameters=None):
    torch.manual_seed(0)
    shapes_and_dtypes = ((shape, dtype), (shape[-1:], parameters or dtype), (shape[-1:], parameters or dtype))
    return [(3 * torch.randn(s, dtype=torch.float64)).to(d).requires_grad_() for s, d in shapes_and_dtypes]


@pytest.mark.parametrize("shape", [(3,), (2, 5, 3), (0, 4)])
def test_formula(shape):
    g, A_log, dt_bias = leaves(*shape)
    raw = g + dt_bias
    expected = -A_log.exp() * torch.logaddexp(raw, torch.zeros_like(raw))
    assert torch.allclose(fused_gdn_gate(g, A_log, dt_bias), expected, rtol=1e-13)
    assert torch.equal(fused_gdn_gate(g, A_log), fused_gdn_gate(g, A_log, torch.zeros_like(dt_bias)))


def test_gradcheck():
    assert torch.autograd.gradcheck(fused_gdn_gate, leaves(2, 5, 3))
    assert torch.autograd.gradcheck(fused_gdn_gate, leaves(2, 5, 3)[:2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_computes_in_float32(dtype):
    """Only the given roundings of the inputs and some of float32: the same as float64 of the rounded inputs."""
    arguments = leaves(4, 50, 3, dtype=dtype, parameters=torch.float32)
    exact = [x.detach().double().requires_grad_() for x in arguments]
    y, expected = fused_gdn_gate(*arguments), gdn_gate_reference(*exact)
    assert y.dtype == torch.float32
    assert torch.allclose(y.double(), expected, rtol=16 * 2**-24)
    gradients = torch.autograd.grad(y.sum(), arguments)
    assert [x.dtype for x in gradients] == [dtype, torch.float32, torch.float32]
    for actual, wanted in zip(gradients, torch.autograd.grad(expected.sum(), exact), strict=True):
        # A sum of 200 terms of one sign, at most 200 roundings; g's gradient is rounded once to its dtype, where it may
        # be denormal.
        limits = torch.finfo(actual.dtype)
        denormal = limits.smallest_normal * limits.eps
        assert torch.allclose(actual.double(), wanted, rtol=200 * 2**-24 + limits.eps, atol=denormal)


def test_large_arguments_are_linear_and_small_ones_vanish():
    g = torch.tensor([500.0, -500.0], requires_grad=True)
    y = fused_gdn_gate(g, torch.zeros(2))
    (gradient,) = torch.autograd.grad(y.sum(), [g])
    assert y.tolist() == [-500.0, 0.0]
    assert gradient.tolist() == [-1.0, 0.0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"g": torch.ones(2, 3, dtype=torch.int64)}, r"g must be a floating-point tensor \[..., HV\], got torch.int64"),
        ({"g": torch.tensor(1.0)}, r"g must be a floating-point tensor"),
        ({"A_log": torch.ones(2)}, r"A_log must be a floating-point vector of 3 elements.*\[2\]"),
        ({"A_log": torch.ones(3, dtype=torch.int32)}, r"A_log must be a floating-point vector.*int32"),
        ({"dt_bias": torch.ones(3, 1)}, r"dt_bias must be a floating-point vector of 3"),
        ({"dt_bias": torch.ones(3, device="meta")}, r"dt_bias is on meta but g is on cpu: move dt_bias"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(ValueError, match=message):
        fused_gdn_gate(**({"g": torch.ones(2, 3), "A_log": torch.ones(3), "dt_bias": torch.ones(3)} | changes))


def test_running_sum_of_no_tokens_is_float32():
    y = fused_gdn_gate_chunk_cumsum(torch.ones(1, 0, 3, dtype=torch.bfloat16), torch.ones(3))
    assert (y.dtype, y.shape) == (torch.float32, (1, 0, 3))


@pytest.mark.parametrize(
    ("cu_seqlens", "message"),
    [
        ([0, 4], "must end at the token count 5, got 4"),
        ([0, 6, 5], "must not decrease"),
        ([0.0, 5.0], "int32 or int64"),
    ],
)
def test_running_sum_refuses_boundaries_that_do_not_cut_the_rows(cu_seqlens, message):
    with pytest.raises(ValueError, match=message):
        fused_gdn_gate_chunk_cumsum(torch.ones(1, 5, 3), torch.ones(3), cu_seqlens=torch.tensor(cu_seqlens))


@pytest.mark.parametrize(("backend", "kernel"), [(None, True), ("triton", True), ("reference", False)])
def test_backend_variable_decides_which_gate_runs(backend, kernel, monkeypatch):
    asked = []
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr("gdn_cp.kernels.gate.gdn_gate_reference", lambda *arguments: asked.append("torch"))
    monkeypatch.setattr("gdn_cp.kernels.gate_triton.gdn_gate_op", lambda *arguments: asked.append("kernel"))
    monkeypatch.delenv("GDN_CP_BACKEND", raising=False)
    if backend is not None:
        monkeypatch.setenv("GDN_CP_BACKEND", backend)
    fused_gdn_gate(torch.ones(2, 3), torch.ones(3))
    assert asked == ["kernel" if kernel else "torch"]
