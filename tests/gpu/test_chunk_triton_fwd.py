"""Forward of the Triton delta rule on a GPU: bfloat16 and float16 against float64, and what only the GPU path has.

Tolerance: operands of the products are rounded to 8 (bfloat16) or 11 bits, a relative error of at most 2^-9 or 2^-12
each; products of three such factors and the rounding of the result make four roundings.
"""

import pytest
import torch
from torch import Tensor

from gdn_cp.kernels.chunk_triton import chunk_gated_delta_rule_triton
from gdn_cp.kernels.piece_plan import PIECES_VARIABLE
from gdn_cp.kernels.reference import chunk_gated_delta_rule_reference

pytestmark = pytest.mark.gpu
ROUNDINGS = 4
BITS = {torch.bfloat16: 9, torch.float16: 12}
FLAGS = {"use_qk_l2norm_in_kernel": True, "use_gate_in_kernel": True, "use_beta_sigmoid_in_kernel": True}


def make_inputs(T, H, HV, K, V, N=1, B=1, dtype=torch.bfloat16):
    def random(*shape, dtype=dtype):
        return torch.randn(*shape, device="cuda", dtype=dtype)

    inputs = {"q": random(B, T, H, K), "k": random(B, T, H, K), "v": random(B, T, HV, V), "g": random(B, T, HV)}
    inputs |= {"beta": random(B, T, HV), "scale": K**-0.5, "output_final_state": True}
    inputs["initial_state"] = random(N * B, HV, K, V, dtype=torch.float32)
    inputs["A_log"] = torch.empty(HV, device="cuda").uniform_(0.01, 16).log()
    inputs["dt_bias"] = random(HV, dtype=torch.float32) - 4
    return inputs | FLAGS


def relative_error(x: Tensor, reference: Tensor) -> float:
    return ((x.double() - reference).norm() / reference.norm()).item()


@pytest.mark.parametrize(
    ("shape", "cu", "dtype"),
    [
        ((1000, 2, 4, 128, 128), None, torch.bfloat16),
        ((1000, 2, 4, 128, 128), None, torch.float16),
        ((1111, 2, 6, 64, 128), [0, 0, 1, 64, 129, 300, 300, 1111], torch.bfloat16),
        ((700, 1, 2, 128, 64), None, torch.bfloat16),
        ((300, 1, 2, 96, 192), None, torch.bfloat16),
        ((300, 1, 2, 256, 256), None, torch.bfloat16),
        ((300, 2, 2, 16, 32), None, torch.bfloat16),
        ((2048, 1, 8, 128, 128), [*range(0, 1025), 2048], torch.bfloat16),
    ],
)
@pytest.mark.parametrize("pieces", ["0", "3"])
def test_forward_against_float64(shape, cu, dtype, pieces, monkeypatch):
    monkeypatch.setenv(PIECES_VARIABLE, pieces)
    cu = None if cu is None else torch.tensor(cu, device="cuda", dtype=torch.int32)
    inputs = make_inputs(*shape, N=1 if cu is None else len(cu) - 1, dtype=dtype)
    o, final = chunk_gated_delta_rule_triton(**inputs, cu_seqlens=cu)
    again, _ = chunk_gated_delta_rule_triton(**inputs, cu_seqlens=cu)
    exact = {name: x.double() if isinstance(x, Tensor) else x for name, x in inputs.items()}
    expected, expected_final = chunk_gated_delta_rule_reference(**exact, cu_seqlens=cu)
    assert relative_error(o, expected) < ROUNDINGS * 2.0 ** -BITS[dtype]
    assert relative_error(final, expected_final) < ROUNDINGS * 2.0 ** -BITS[dtype]
    assert torch.equal(o, again)


def test_heads_do_not_change_bits(monkeypatch):
    """The head-parallel promise: half of the heads give the bits they have among all heads, under the same cut."""
    monkeypatch.setenv(PIECES_VARIABLE, "4")
    inputs = make_inputs(2000, 16, 32, 128, 128)
    o, final = chunk_gated_delta_rule_triton(**inputs)
    half = {}
    for name, x in inputs.items():
        half[name] = x
        if isinstance(x, Tensor):
            axis = {"initial_state": 1, "A_log": 0, "dt_bias": 0}.get(name, 2)
            half[name] = x.narrow(axis, 0, x.shape[axis] // 2).contiguous()
    o_half, final_half = chunk_gated_delta_rule_triton(**half)
    assert torch.equal(o[:, :, :16], o_half)
    assert torch.equal(final[:, :16], final_half)


def test_nan_in_one_sequence_stays_there():
    cu = torch.tensor([0, 100, 250], device="cuda", dtype=torch.int32)
    inputs = make_inputs(250, 2, 4, 128, 128, N=2)
    clean, clean_final = chunk_gated_delta_rule_triton(**inputs, cu_seqlens=cu)
    for name in ("q", "k", "v", "g", "beta"):
        inputs[name][:, 100:] = float("nan")
    o, final = chunk_gated_delta_rule_triton(**inputs, cu_seqlens=cu)
    assert torch.equal(o[:, :100], clean[:, :100])
    assert torch.equal(final[0], clean_final[0])


def test_offsets_beyond_31_bits():
    """A million tokens of 32 heads, 2^32 elements of v: a second sequence near the end, which is checked by itself."""
    T, start = 2**20, 2**20 - 500
    cu = torch.tensor([0, start, T], device="cuda", dtype=torch.int32)
    inputs = make_inputs(T, 16, 32, 128, 128, N=2)
    o, final = chunk_gated_delta_rule_triton(**inputs, cu_seqlens=cu)
    tail = {n: x[:, start:] if n in ("q", "k", "v", "g", "beta") else x for n, x in inputs.items()}
    tail["initial_state"] = inputs["initial_state"][1:]
    o_tail, final_tail = chunk_gated_delta_rule_triton(**tail)
    assert torch.equal(o[:, start:], o_tail)
    assert torch.equal(final[1:], final_tail)


def test_cuda_graph_replays_with_new_lengths():
    inputs = make_inputs(1024, 2, 4, 128, 128, N=2)
    cu = torch.tensor([0, 300, 1024], device="cuda", dtype=torch.int32)
    chunk_gated_delta_rule_triton(**inputs, cu_seqlens=cu)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, _ = chunk_gated_delta_rule_triton(**inputs, cu_seqlens=cu)
    cu.copy_(torch.tensor([0, 700, 1024], device="cuda", dtype=torch.int32))
    graph.replay()
    expected, _ = chunk_gated_delta_rule_triton(**inputs, cu_seqlens=cu)
    assert torch.equal(o, expected)
