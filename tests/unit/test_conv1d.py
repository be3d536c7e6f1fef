"""The packed causal convolution against torch's own on each sequence alone, in float64; gradients and refusals."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gdn_cp.kernels.conv1d import causal_conv1d

FLOAT64 = 1e-13  # W products and sums, W <= 6


def one_by_one(x, weight, bias, bounds, activation):
    """torch's convolution of each sequence padded with W - 1 zero rows, [T, D]."""
    D, W = weight.shape
    pieces = []
    for start, end in pairwise(bounds):
        padded = torch.nn.functional.pad(x[start:end].T[None], (W - 1, 0))
        if end > start:
            pieces.append(torch.nn.functional.conv1d(padded, weight[:, None], bias, groups=D)[0].T)
    y = torch.cat(pieces) if pieces else x
    return torch.nn.functional.silu(y) if activation else y


def leaves(T, D, W, dtype=torch.float64, bias=True):
    torch.manual_seed(T + 10 * W)
    shapes = [(T, D), (D, W), *([(D,)] if bias else [])]
    return [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    D=st.integers(1, 5),
    W=st.integers(1, 6),
    bias=st.booleans(),
    activation=st.sampled_from(["silu", "swish", None]),
    index_dtype=st.sampled_from([torch.int32, torch.int64]),
)
def test_equals_torch_on_each_sequence(lengths, D, W, bias, activation, index_dtype):
    bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    arguments = leaves(bounds[-1], D, W, bias=bias)
    cu_seqlens = torch.tensor(bounds, dtype=index_dtype)
    y = causal_conv1d(*arguments, cu_seqlens=cu_seqlens, activation=activation)
    padded = [*arguments, *([] if bias else [None])]
    expected = one_by_one(*padded, bounds, activation)
    assert torch.allclose(y, expected, rtol=FLOAT64, atol=FLOAT64)
    if bounds[-1] == 0:
        return
    d = torch.randn_like(y)
    for actual, wanted in zip(
        torch.autograd.grad(y, arguments, d), torch.autograd.grad(expected, arguments, d), strict=True
    ):
        assert torch.allclose(actual, wanted, rtol=100 * FLOAT64, atol=100 * FLOAT64)


@pytest.mark.parametrize("T", [1, 2, 3, 20])
def test_without_boundaries_it_is_one_sequence(T):
    x, weight, bias = leaves(T, 3, 4)
    expected = one_by_one(x, weight, bias, [0, T], True)
    assert torch.allclose(causal_conv1d(x, weight, bias), expected, rtol=FLOAT64, atol=FLOAT64)
    assert torch.equal(causal_conv1d(x, weight[:, None], bias), causal_conv1d(x, weight, bias))


@pytest.mark.parametrize("cu_seqlens", [None, torch.tensor([0, 2, 2, 3, 7])])
@pytest.mark.parametrize("activation", ["silu", None])
def test_gradcheck(cu_seqlens, activation):
    arguments = leaves(7, 2, 4)
    assert torch.autograd.gradcheck(
        lambda x, w, b: causal_conv1d(x, w, b, cu_seqlens=cu_seqlens, activation=activation), arguments
    )


def test_nan_of_one_sequence_stays_in_it_forward_and_backward():
    x, weight, bias = leaves(10, 2, 4)
    with torch.no_grad():
        x[4:6] = torch.nan
    y = causal_conv1d(x, weight, bias, cu_seqlens=torch.tensor([0, 4, 6, 10]))
    clean = [0, 1, 2, 3, 6, 7, 8, 9]
    assert y[clean].isfinite().all()
    (dx,) = torch.autograd.grad(y.nan_to_num().sum(), [x])
    assert dx[clean].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_sums_in_float32(dtype):
    x, weight, bias = leaves(50, 4, 4, dtype)
    y = causal_conv1d(x, weight, bias)
    exact = one_by_one(x.double(), weight.double(), bias.double(), [0, 50], True)
    assert y.dtype == dtype
    # One rounding, half an ulp of the result; the float32 sum before it errs far less but for cancelled values.
    half_ulp = torch.finfo(dtype).eps / 2
    assert torch.allclose(y.double(), exact, rtol=half_ulp * 1.01, atol=1e-6)
    gradients = torch.autograd.grad(y.sum(), [x, weight, bias])
    assert [g.dtype for g in gradients] == [dtype] * 3
    for actual, leaf in zip(gradients, (x, weight, bias), strict=True):
        (wanted,) = torch.autograd.grad(exact.sum(), [leaf], retain_graph=True)
        assert torch.allclose(actual.double(), wanted.double(), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_float32_parameters_with_bfloat16_rows():
    x = torch.randn(9, 3, dtype=torch.bfloat16)
    weight = torch.randn(3, 4, requires_grad=True)
    y = causal_conv1d(x, weight)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


def test_channel_has_the_bits_that_it_has_alone():
    x, weight, bias = leaves(301, 24, 4, torch.float32)
    cu_seqlens, d = torch.tensor([0, 5, 301]), torch.randn(301, 24)
    whole = causal_conv1d(x, weight, bias, cu_seqlens=cu_seqlens)
    (dx,) = torch.autograd.grad(whole, [x], d)
    for part in (slice(0, 3), slice(3, 24), slice(12, 24)):
        mine = x[:, part].detach().contiguous().requires_grad_()
        y = causal_conv1d(mine, weight[part], bias[part], cu_seqlens=cu_seqlens)
        assert torch.equal(y, whole[:, part])
        assert torch.equal(torch.autograd.grad(y, [mine], d[:, part].contiguous())[0], dx[:, part])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.ones(1, 5, 3)}, r"x must be floating-point rows \[T, D\], got .*\[1, 5, 3\]"),
        ({"x": torch.ones(5, 3, dtype=torch.int64)}, r"x must be floating-point rows"),
        ({"weight": torch.ones(4, 4)}, r"weight must be \[3, W\] or \[3, 1, W\]"),
        ({"weight": torch.ones(3, 2, 4)}, r"weight must be \[3, W\] or \[3, 1, W\]"),
        ({"weight": torch.ones(3, 0)}, r"at least one tap"),
        ({"bias": torch.ones(4)}, r"bias must be \[3\]"),
        ({"bias": torch.ones(3, device="meta")}, r"bias is on meta but x is on cpu: move"),
        ({"cu_seqlens": torch.tensor([0.0, 5.0])}, r"cu_seqlens must be an int32 or int64 vector"),
        ({"cu_seqlens": torch.tensor([0, 4])}, r"cu_seqlens must end at the token count 5, got 4"),
        ({"cu_seqlens": torch.tensor([1, 5])}, r"cu_seqlens must start at 0, got 1"),
        ({"cu_seqlens": torch.tensor([0])}, r"cu_seqlens must be an int32 or int64 vector of N \+ 1 >= 2"),
        ({"cu_seqlens": torch.empty(2, dtype=torch.int32, device="meta")}, r"cu_seqlens is on meta"),
        ({"activation": "gelu"}, r"activation must be 'silu', 'swish' or None, got 'gelu'"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(ValueError, match=message):
        causal_conv1d(**({"x": torch.ones(5, 3), "weight": torch.ones(3, 4)} | changes))


@pytest.mark.gpu
def test_gpu_agrees_and_never_waits_for_the_device():
    arguments = leaves(301, 24, 4, torch.float32)
    bounds, d = [0, 5, 5, 301], torch.randn(301, 24)
    exact = one_by_one(*(x.double() for x in arguments), bounds, True)
    on_gpu = [x.detach().cuda().requires_grad_() for x in arguments]
    cu_seqlens, d_gpu = torch.tensor(bounds, dtype=torch.int32, device="cuda"), d.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        y = causal_conv1d(*on_gpu, cu_seqlens=cu_seqlens)
        gradients = torch.autograd.grad(y, on_gpu, d_gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.allclose(y.cpu().double(), exact, rtol=1e-5, atol=1e-6)
    for actual, wanted in zip(gradients, torch.autograd.grad(exact, arguments, d.double()), strict=True):
        assert (actual.cpu() - wanted).norm() <= 1e-6 * wanted.norm()
