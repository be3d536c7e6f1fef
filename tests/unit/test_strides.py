"""The Triton kernels give the same bits whatever the strides of their arguments are."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gdn_cp import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule
from gdn_cp.kernels.conv1d_triton import conv1d_backward, conv1d_forward
from gdn_cp.kernels.gate_triton import gate_backward, gate_forward

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SWITCHES = {"use_qk_l2norm_in_kernel": True, "use_gate_in_kernel": True, "use_beta_sigmoid_in_kernel": True}
VECTORS: dict[str, Callable[[], Tensor]] = {
    "column": lambda: torch.randn(2, 3, device=DEVICE)[:, 1],
    "expanded": lambda: torch.randn(1, device=DEVICE).expand(2),
}
Results = tuple[Tensor, ...]


def tokens(B: int, T: int) -> list[Any]:
    shapes = ((B, T, 1, 16), (B, T, 1, 16), (B, T, 2, 16), (B, T, 2), (B, T, 2))
    return [torch.randn(shape, device=DEVICE) for shape in shapes]


def assert_strides_do_not_matter(function: Callable[..., Results], *strided: Tensor) -> None:
    dense = [x.clone(memory_format=torch.contiguous_format) for x in strided]
    assert any(x.stride() != y.stride() for x, y in zip(strided, dense, strict=True))
    for result, expected in zip(function(*strided), function(*dense), strict=True):
        assert expected.isfinite().all()
        assert torch.equal(result, expected)


@pytest.mark.parametrize("make", VECTORS.values(), ids=VECTORS)
def test_gate_parameters_of_decode(make: Callable[[], Tensor]):
    inputs = tokens(1, 3)

    def rule(A_log: Tensor, dt_bias: Tensor) -> Results:
        options: dict[str, Any] = {"A_log": A_log, "dt_bias": dt_bias, "backend": "triton", **SWITCHES}
        return (fused_recurrent_gated_delta_rule(*inputs, **options)[0],)

    assert_strides_do_not_matter(rule, make(), make())


@pytest.mark.parametrize("make", VECTORS.values(), ids=VECTORS)
def test_gate_parameters_of_the_rule_and_its_gradients(make: Callable[[], Tensor]):
    inputs, weights = tokens(1, 70), torch.randn(1, 70, 2, 16, device=DEVICE)

    def rule(A_log: Tensor, dt_bias: Tensor) -> Results:
        leaves: list[Any] = [x.detach().requires_grad_() for x in (*inputs, A_log, dt_bias)]
        options: dict[str, Any] = {"A_log": leaves[5], "dt_bias": leaves[6], "backend": "triton", **SWITCHES}
        o, _ = chunk_gated_delta_rule(*leaves[:5], **options)
        return o, *torch.autograd.grad(o, leaves, weights)

    assert_strides_do_not_matter(rule, make(), make())


@pytest.mark.parametrize("rule", [chunk_gated_delta_rule, fused_recurrent_gated_delta_rule])
def test_boundaries_of_the_rule(rule: Callable[..., tuple[Tensor, None]]):
    inputs, cu_seqlens = tokens(1, 70), torch.tensor([0, -1, 20, -1, 70, -1], device=DEVICE)[::2]
    assert_strides_do_not_matter(lambda cu: (rule(*inputs, cu_seqlens=cu, backend="triton")[0],), cu_seqlens)


def test_one_token_of_each_sequence_with_any_stride_between_tokens():
    """As in [B, 1, ...] that was [1, B, ...] and is transposed: torch calls such a tensor contiguous."""

    def rule(*given: Any) -> Results:
        leaves: list[Any] = [x.detach().requires_grad_() for x in given[:3]]
        o, _ = chunk_gated_delta_rule(*leaves, *given[3:5], backend="triton", use_qk_l2norm_in_kernel=True)
        return o, *torch.autograd.grad(o, leaves, given[5])

    given = [*tokens(3, 1), torch.randn(3, 1, 2, 16, device=DEVICE)]
    far_apart = [x.as_strided(x.shape, (x.stride(0), 10**9, *x.stride()[2:])) for x in given]
    assert all(x.is_contiguous() for x in far_apart)
    assert_strides_do_not_matter(rule, *far_apart)


@pytest.mark.parametrize("make", VECTORS.values(), ids=VECTORS)
def test_gate_alone(make: Callable[[], Tensor]):
    g, d = torch.randn(2, 70, 2, device=DEVICE)

    def gate(A_log: Tensor, dt_bias: Tensor) -> Results:
        return gate_forward(g, A_log, dt_bias, None, False), *gate_backward(d, g, A_log, dt_bias, None, False)

    assert_strides_do_not_matter(gate, make(), make())


def test_bias_and_boundaries_of_the_convolution():
    x, d, weight = *torch.randn(2, 70, 2, device=DEVICE), torch.randn(2, 4, device=DEVICE)

    def convolution(bias: Tensor, cu_seqlens: Tensor) -> Results:
        y = conv1d_forward(x, weight, bias, cu_seqlens, True)
        return y, *conv1d_backward(d, x, weight, bias, cu_seqlens, True, True)

    cu_seqlens = torch.tensor([0, -1, 20, -1, 70, -1], dtype=torch.int32, device=DEVICE)[::2]
    assert_strides_do_not_matter(convolution, VECTORS["column"](), cu_seqlens)
