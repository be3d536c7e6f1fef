"""The backward's local kernel in Gluon on a GPU: gradients against float64 and against the three kernels it stands for.

Tolerance: operands of the products are rounded to 8 (bfloat16) or 11 bits, a relative error of at most 2^-9 or 2^-12
each; a gradient has passed through up to five of them in a row (state, its gradient, U, scores, the result).
"""

import pytest
import torch
from torch import Tensor

from gdn_cp import launch_recording
from gdn_cp.kernels import bwd_slices
from gdn_cp.kernels.chunk_bwd import Slices
from gdn_cp.kernels.chunk_bwd_config import FUSED_VERSIONS
from gdn_cp.kernels.chunk_triton import chunk_gated_delta_rule_triton
from gdn_cp.kernels.reference import chunk_gated_delta_rule_reference
from gdn_cp.launch_bare import TRITON

pytestmark = pytest.mark.gpu
ROUNDINGS = 5
BITS = {torch.bfloat16: 9, torch.float16: 12}
RAGGED = [0, 0, 1, 64, 129, 300, 300, 1111]


@pytest.fixture(autouse=True)
def hopper():
    if TRITON not in FUSED_VERSIONS or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip(f"the kernel is for Hopper and Triton {FUSED_VERSIONS}, this is {TRITON}")
    launch_recording._recordings.clear()
    yield
    launch_recording._recordings.clear()  # of launches in one of two ways


@pytest.fixture
def fused(monkeypatch) -> list[bool]:
    """What `Slices.can_fuse` has said."""
    said, ask = [], Slices.can_fuse

    def listen(self, *args):
        said.append(ask(self, *args))
        return said[-1]

    monkeypatch.setattr(Slices, "can_fuse", listen)
    return said


def make_inputs(T: int, H: int, HV: int, dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", generator=generator)

    inputs = {"q": random(1, T, H, 128), "k": random(1, T, H, 128), "v": random(1, T, HV, 128)}
    inputs = {name: x.to(dtype) for name, x in inputs.items()}
    # Heads that forget in a few tokens, heads that forget nothing, and betas of almost nothing.
    inputs["g"] = -random(1, T, HV).abs() * torch.linspace(0, 0.5, HV, device="cuda")
    inputs["beta"] = (random(1, T, HV) * 3).sigmoid()
    return inputs, random(1, T, HV, 128).to(dtype)


def gradients(function, inputs, weight, cu, norm=True, dtype=None) -> dict[str, Tensor]:
    # Without the norm keys have to be short, or the rule grows without bounds.
    size = 1.0 if norm else 128**-0.5
    leaves = {name: x.to(dtype or x.dtype) * (size if name in "qk" else 1) for name, x in inputs.items()}
    leaves = {name: x.detach().requires_grad_() for name, x in leaves.items()}
    bounds = None if cu is None else torch.tensor(cu, device="cuda", dtype=torch.int32)
    out, _ = function(
        **leaves, initial_state=None, scale=128**-0.5, output_final_state=False, cu_seqlens=bounds,
        use_qk_l2norm_in_kernel=norm,
    )  # fmt: skip
    grads = torch.autograd.grad(out, list(leaves.values()), weight.to(out.dtype))
    return dict(zip(leaves, grads, strict=True))


def errors(got: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    return {name: ((x.double() - expected[name]).norm() / expected[name].norm()).item() for name, x in got.items()}


@pytest.mark.parametrize(
    ("T", "H", "HV", "cu", "dtype", "norm"),
    [
        (1000, 2, 4, None, torch.bfloat16, True),
        (1000, 2, 4, None, torch.float16, True),
        (1111, 2, 6, RAGGED, torch.bfloat16, True),
        (700, 3, 3, None, torch.bfloat16, False),
    ],
)
def test_gradients_against_float64(T, H, HV, cu, dtype, norm, fused):
    inputs, weight = make_inputs(T, H, HV, dtype)
    got = gradients(chunk_gated_delta_rule_triton, inputs, weight, cu, norm)
    assert fused == [True]
    expected = gradients(chunk_gated_delta_rule_reference, inputs, weight, cu, norm, torch.float64)
    found = errors(got, expected)
    assert all(error < ROUNDINGS * 2.0 ** -BITS[dtype] for error in found.values()), found
    again = gradients(chunk_gated_delta_rule_triton, inputs, weight, cu, norm)
    replayed = gradients(chunk_gated_delta_rule_triton, inputs, weight, cu, norm)
    assert all(torch.equal(x, again[name]) and torch.equal(x, replayed[name]) for name, x in got.items())


@pytest.mark.parametrize(("T", "H", "HV", "cu"), [(5000, 16, 32, None), (1111, 1, 8, RAGGED)])
def test_as_the_three_kernels(T, H, HV, cu, monkeypatch):
    """dg, which is float32, is equal but for the order of sums; dq and dk but for single roundings, and dbeta but for
    those of U, which half of it divides by beta."""
    inputs, weight = make_inputs(T, H, HV, torch.bfloat16)
    got = gradients(chunk_gated_delta_rule_triton, inputs, weight, cu)
    monkeypatch.setattr(Slices, "can_fuse", lambda *_: False)
    launch_recording._recordings.clear()
    found = errors(
        got, {n: x.double() for n, x in gradients(chunk_gated_delta_rule_triton, inputs, weight, cu).items()}
    )
    assert found["v"] == 0
    assert found["g"] < 1e-5, found
    assert max(found[name] for name in ("q", "k", "beta")) < 1e-3, found


def test_slices_against_float64(monkeypatch, fused):
    """Later slices begin at a chunk that is not the first, and take states that the forward has kept."""
    monkeypatch.setattr(bwd_slices, "SLICE_BYTES", 2**24)
    inputs, weight = make_inputs(3000, 4, 8, torch.bfloat16)
    got = gradients(chunk_gated_delta_rule_triton, inputs, weight, [0, 1000, 3000])
    assert fused == [True]
    expected = gradients(chunk_gated_delta_rule_reference, inputs, weight, [0, 1000, 3000], True, torch.float64)
    found = errors(got, expected)
    assert all(error < ROUNDINGS * 2.0**-9 for error in found.values()), found


def test_given_states_go_the_other_way(fused):
    inputs, weight = make_inputs(200, 2, 2, torch.bfloat16)
    state = torch.zeros(1, 2, 128, 128, device="cuda", requires_grad=True)
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    out, _ = chunk_gated_delta_rule_triton(
        **leaves, initial_state=state, scale=1.0, output_final_state=False, use_qk_l2norm_in_kernel=True
    )
    torch.autograd.grad(out, list(leaves.values()), weight)
    assert fused == [False]
