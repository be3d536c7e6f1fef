"""Backward of the Triton delta rule on a GPU: gradients in bfloat16 and float16 against float64, bits, memory.

Tolerance: operands of the products are rounded to 8 (bfloat16) or 11 bits, a relative error of at most 2^-9 or 2^-12
each; a gradient has passed through up to five of them in a row (state, its gradient, U, scores, the result).
"""

import pytest
import torch
from torch import Tensor

from gdn_cp.kernels import bwd_slices, chunk_triton
from gdn_cp.kernels.chunk_triton import chunk_gated_delta_rule_triton
from gdn_cp.kernels.piece_plan import PIECES_VARIABLE
from gdn_cp.kernels.reference import chunk_gated_delta_rule_reference

pytestmark = pytest.mark.gpu
ROUNDINGS = 5
BITS = {torch.bfloat16: 9, torch.float16: 12}
FLAGS = {"use_qk_l2norm_in_kernel": True, "use_gate_in_kernel": True, "use_beta_sigmoid_in_kernel": True}


def make_inputs(T, H, HV, K, V, cu=None, dtype=torch.bfloat16, B=1):
    generator = torch.Generator("cuda").manual_seed(0)

    def random(*shape, dtype=dtype):
        return torch.randn(*shape, device="cuda", generator=generator).to(dtype)

    N = B if cu is None else len(cu) - 1
    inputs = {"q": random(B, T, H, K), "k": random(B, T, H, K), "v": random(B, T, HV, V), "g": random(B, T, HV)}
    inputs["beta"] = random(B, T, HV)
    inputs["initial_state"] = random(N, HV, K, V, dtype=torch.float32)
    inputs["A_log"] = (torch.rand(HV, device="cuda", generator=generator) * 16 + 0.01).log()
    inputs["dt_bias"] = random(HV, dtype=torch.float32) - 4
    weights = (random(B, T, HV, V), random(N, HV, K, V, dtype=torch.float32))
    return inputs, weights


def gradients(function, inputs, weights, cu=None, dtype=None):
    leaves = {name: x.to(dtype or x.dtype).clone().requires_grad_() for name, x in inputs.items()}
    bounds = None if cu is None else torch.tensor(cu, device="cuda", dtype=torch.int32)
    scale = inputs["q"].shape[-1] ** -0.5
    outputs = function(**leaves, scale=scale, output_final_state=True, cu_seqlens=bounds, **FLAGS)
    torch.autograd.backward(outputs, [w.to(x.dtype) for w, x in zip(weights, outputs, strict=True)])
    return {name: x.grad for name, x in leaves.items()}


def assert_close(
    inputs: dict[str, Tensor], got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float
) -> None:
    """Relative errors within tolerance; those of A_log and dt_bias relative to the sums of their terms' magnitudes,
    since terms of both signs cancel in them and rounding errors do not."""
    raw = inputs["g"].double() + inputs["dt_bias"].double()
    terms = expected["g"].abs()
    size = {name: x.norm() for name, x in expected.items()}
    size["dt_bias"] = terms.sum((0, 1)).norm()
    size["A_log"] = (terms * torch.nn.functional.softplus(raw) / raw.sigmoid()).sum((0, 1)).norm()
    errors = {name: ((x.double() - expected[name]).norm() / size[name]).item() for name, x in got.items()}
    assert all(error < tolerance for error in errors.values()), errors


@pytest.mark.parametrize(
    ("shape", "cu", "dtype"),
    [
        ((1000, 2, 4, 128, 128), None, torch.bfloat16),
        ((1000, 2, 4, 128, 128), None, torch.float16),
        ((1000, 16, 32, 128, 128), None, torch.bfloat16),
        ((1111, 2, 6, 64, 128), [0, 0, 1, 64, 129, 300, 300, 1111], torch.bfloat16),
        ((700, 1, 2, 128, 64), None, torch.bfloat16),
        ((700, 3, 3, 64, 64), None, torch.bfloat16),
        ((300, 1, 2, 96, 192), None, torch.bfloat16),
        ((300, 1, 2, 256, 256), None, torch.bfloat16),
        ((300, 2, 2, 16, 32), None, torch.bfloat16),
        ((2048, 1, 8, 128, 128), [*range(0, 1025), 2048], torch.bfloat16),
    ],
)
@pytest.mark.parametrize("pieces", ["0", "3"])
def test_gradients_against_float64(shape, cu, dtype, pieces, monkeypatch):
    monkeypatch.setenv(PIECES_VARIABLE, pieces)
    inputs, weights = make_inputs(*shape, cu=cu, dtype=dtype)
    got = gradients(chunk_gated_delta_rule_triton, inputs, weights, cu)
    again = gradients(chunk_gated_delta_rule_triton, inputs, weights, cu)
    assert all(torch.equal(x, again[name]) for name, x in got.items())
    expected = gradients(chunk_gated_delta_rule_reference, inputs, weights, cu, torch.float64)
    assert_close(inputs, got, expected, ROUNDINGS * 2.0 ** -BITS[dtype])


def test_slices_change_nothing(monkeypatch):
    cu = [0, 700, 700, 1900, 2000]
    inputs, weights = make_inputs(2000, 2, 4, 128, 128, cu=cu)
    monkeypatch.setenv(PIECES_VARIABLE, "0")
    whole = gradients(chunk_gated_delta_rule_triton, inputs, weights, cu)
    monkeypatch.setattr(chunk_triton, "slice_chunks", lambda *_: 5)
    sliced = gradients(chunk_gated_delta_rule_triton, inputs, weights, cu)
    assert all(torch.equal(x, sliced[name]) for name, x in whole.items())


def test_heads_do_not_change_bits(monkeypatch):
    """The head-parallel promise: a quarter of the heads gives the bits that it has among all, under the same cut."""
    monkeypatch.setenv(PIECES_VARIABLE, "4")
    inputs, weights = make_inputs(2000, 16, 32, 128, 128)
    every = gradients(chunk_gated_delta_rule_triton, inputs, weights)

    def quarter(name: str, x: Tensor) -> Tensor:
        axis = {"initial_state": 1, "A_log": 0, "dt_bias": 0}.get(name, 2)
        return x.narrow(axis, 0, x.shape[axis] // 4).contiguous()

    part = gradients(
        chunk_gated_delta_rule_triton,
        {name: quarter(name, x) for name, x in inputs.items()},
        (weights[0][:, :, :8].contiguous(), weights[1][:, :8].contiguous()),
    )
    for name, x in every.items():
        assert torch.equal(quarter(name, x), part[name]), name


def test_memory_of_a_long_batch_is_bounded_by_its_slices():
    """Beyond inputs, saved tensors and gradients, the backward takes the buffers of one slice, not of all chunks."""
    inputs, weights = make_inputs(2**15, 16, 32, 128, 128)
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    o, _ = chunk_gated_delta_rule_triton(**leaves, scale=1.0, output_final_state=False, **FLAGS)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    o.backward(weights[0])
    results = sum(x.grad.numel() * x.grad.element_size() for x in leaves.values() if x.grad is not None)
    assert torch.cuda.max_memory_allocated() - before < results + bwd_slices.SLICE_BYTES + 2**26
