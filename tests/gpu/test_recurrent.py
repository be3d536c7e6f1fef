"""Decode on a GPU at the head sizes of Qwen3-Next: the compiled kernel against float64, its promises about bits.

Inputs are rounded to bfloat16 before the oracle sees them, so the error left is float32 rounding, plus one rounding of
the output (2^-9 relative) and, in a bfloat16 bank, of the state. 4e-3 is twice 2^-9.
"""

import pytest
import torch
from torch import Tensor

from gdn_cp import fused_recurrent_gated_delta_rule
from gdn_cp.kernels.reference import recurrent_gated_delta_rule_reference

pytestmark = pytest.mark.gpu
H, HV, K, V = 4, 8, 128, 128
FLAGS = {"use_qk_l2norm_in_kernel": True, "use_gate_in_kernel": True, "use_beta_sigmoid_in_kernel": True}
BANKS = [(dtype, v_first) for dtype in (torch.float32, torch.bfloat16) for v_first in (False, True)]
LIMIT = 4e-3


def relative_error(x: Tensor, expected: Tensor) -> float:
    return ((x.double() - expected.double()).norm() / expected.double().norm()).item()


def make_inputs(B: int, T: int, dtype: torch.dtype = torch.bfloat16, k_dim: int = K, v_dim: int = V) -> dict:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda").to(dtype)

    heads = {"q": normal(B, T, H, k_dim), "k": normal(B, T, H, k_dim), "v": normal(B, T, HV, v_dim)}
    gates = {"g": normal(B, T, HV), "beta": normal(B, T, HV)}
    return {**heads, **gates, "A_log": torch.rand(HV, device="cuda"), "dt_bias": torch.rand(HV, device="cuda")}


def make_bank(*outer: int, dtype: torch.dtype, v_first: bool, k_dim: int = K, v_dim: int = V) -> Tensor:
    inner = (HV, v_dim, k_dim) if v_first else (HV, k_dim, v_dim)
    return torch.randn(*outer, *inner, device="cuda").to(dtype)


def expected(inputs: dict, state: Tensor, v_first: bool) -> tuple[Tensor, Tensor]:
    exact = {name: x.double() for name, x in inputs.items()}
    o, final = recurrent_gated_delta_rule_reference(
        **exact, **FLAGS, initial_state=state.double(), output_final_state=True, state_v_first=v_first
    )
    assert final is not None
    return o, final


@pytest.mark.parametrize(("dtype", "v_first"), BANKS)
@pytest.mark.parametrize("inputs_dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_decode_matches_float64(dtype: torch.dtype, v_first: bool, inputs_dtype: torch.dtype):
    inputs = make_inputs(5, 1, inputs_dtype)
    bank = make_bank(7, dtype=dtype, v_first=v_first)
    before = bank.clone()
    slots = torch.tensor([6, 0, 3, -1, 7], device="cuda", dtype=torch.int32)
    o, _ = fused_recurrent_gated_delta_rule(
        **inputs, **FLAGS, initial_state=bank, state_indices=slots, state_v_first=v_first, backend="triton"
    )
    real = {name: x if x.dim() == 1 else x[:3] for name, x in inputs.items()}
    o_64, final_64 = expected(real, before[[6, 0, 3]], v_first)
    assert relative_error(o[:3], o_64) < LIMIT
    assert relative_error(bank[[6, 0, 3]], final_64) < LIMIT
    assert not o[3:].any()
    assert torch.equal(bank[[1, 2, 4, 5]], before[[1, 2, 4, 5]])


@pytest.mark.parametrize("dims", [(16, 16), (64, 32), (96, 192), (128, 256), (256, 128), (32, 24)])
@pytest.mark.parametrize(("dtype", "v_first"), BANKS)
def test_other_head_dims(dims: tuple[int, int], dtype: torch.dtype, v_first: bool):
    k_dim, v_dim = dims
    inputs = make_inputs(2, 3, k_dim=k_dim, v_dim=v_dim)
    bank = make_bank(2, 4, dtype=dtype, v_first=v_first, k_dim=k_dim, v_dim=v_dim)
    before = bank.clone()
    position = torch.tensor([2, 7], device="cuda")
    o, _ = fused_recurrent_gated_delta_rule(
        **inputs, **FLAGS, initial_state=bank, cache_seqlens=position, state_v_first=v_first, backend="triton"
    )
    o_64, final_64 = expected(inputs, torch.stack([before[0, 2], before[1, 3]]), v_first)
    # three roundings of a bfloat16 state, of independent sign
    assert relative_error(o, o_64) < 2 * LIMIT
    assert relative_error(torch.stack([bank[0, 1], bank[1, 2]]), final_64) < 2 * LIMIT


@pytest.mark.parametrize(("dtype", "v_first"), BANKS)
@pytest.mark.parametrize("circular", [False, True])
def test_packet_equals_token_by_token_bitwise(dtype: torch.dtype, v_first: bool, circular: bool):
    B, T, S = 6, 5, 4
    inputs = make_inputs(B, T)
    packet = make_bank(B, S, dtype=dtype, v_first=v_first) if circular else make_bank(B, dtype=dtype, v_first=v_first)
    single = packet.clone()
    slots = torch.randperm(B, device="cuda").int()
    position = torch.arange(B, device="cuda")

    def run(tokens: dict, bank: Tensor, start: Tensor) -> Tensor:
        places = {"cache_seqlens": start} if circular else {}
        return fused_recurrent_gated_delta_rule(
            **tokens,
            **FLAGS,
            **places,
            initial_state=bank,
            state_indices=slots,
            state_v_first=v_first,
            backend="triton",
        )[0]

    o = run(inputs, packet, position)
    one = [{n: x if x.dim() == 1 else x[:, t : t + 1] for n, x in inputs.items()} for t in range(T)]
    outputs = [run(token, single, position + t) for t, token in enumerate(one)]
    assert torch.equal(o, torch.cat(outputs, 1))
    assert torch.equal(packet, single)


@pytest.mark.parametrize(("dtype", "v_first"), BANKS)
def test_captured_in_a_graph_reads_new_indices(dtype: torch.dtype, v_first: bool):
    inputs, bank = make_inputs(3, 1), make_bank(6, dtype=dtype, v_first=v_first)
    before = bank.clone()
    slots = torch.tensor([0, 1, 2], device="cuda", dtype=torch.int32)
    call = {**inputs, **FLAGS, "state_v_first": v_first, "backend": "triton"}
    fused_recurrent_gated_delta_rule(**call, initial_state=before.clone(), state_indices=slots)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, _ = fused_recurrent_gated_delta_rule(**call, initial_state=bank, state_indices=slots)
    slots.copy_(torch.tensor([5, -1, 3]))
    graph.replay()
    other = before.clone()
    o_eager, _ = fused_recurrent_gated_delta_rule(**call, initial_state=other, state_indices=slots)
    assert torch.equal(o, o_eager)
    assert torch.equal(bank, other)
    assert torch.equal(bank[:3], before[:3])


def test_slots_beyond_two_to_the_31_elements():
    slots_total = 2**31 // (HV * K * V) + 2
    bank = torch.zeros(slots_total, HV, K, V, device="cuda", dtype=torch.bfloat16)
    bank[-1] = torch.randn(HV, K, V, device="cuda")
    inputs, last = make_inputs(1, 1), bank[-1:].clone()
    slots = torch.tensor([slots_total - 1], device="cuda", dtype=torch.int64)
    o, _ = fused_recurrent_gated_delta_rule(**inputs, **FLAGS, initial_state=bank, state_indices=slots)
    o_64, final_64 = expected(inputs, last, False)
    assert relative_error(o, o_64) < LIMIT
    assert relative_error(bank[-1:], final_64) < LIMIT
    assert not bank[:2].any()


def test_repetition_gives_the_same_bits():
    inputs = make_inputs(4, 33)
    runs = [fused_recurrent_gated_delta_rule(**inputs, **FLAGS, output_final_state=True) for _ in range(2)]
    assert torch.equal(runs[0][0], runs[1][0])
    assert runs[0][1] is not None
    assert torch.equal(runs[0][1], runs[1][1])
