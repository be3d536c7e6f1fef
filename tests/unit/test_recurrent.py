"""fused_recurrent_gated_delta_rule against the float64 recurrence: state banks, circular banks, refusals.

Without a GPU the Triton kernel runs in the interpreter, in float32. Tolerances: float32 sums of at most 32 terms over a
handful of tokens stay below 1e-5; a bfloat16 bank rounds the state once a token, 2^-9 relative each.
"""

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gdn_cp import fused_recurrent_gated_delta_rule
from gdn_cp.kernels.recurrent import recurrent_op
from gdn_cp.kernels.reference import recurrent_gated_delta_rule_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ("reference", "triton")
H, HV, K, V = 2, 4, 16, 8


def relative_error(x: Tensor, expected: Tensor) -> float:
    return ((x.double() - expected.double()).norm() / expected.double().norm()).item()


def make_inputs(B: int, T: int, *, seed: int = 0, k_dim: int = K, v_dim: int = V) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE)

    return {
        "q": normal(B, T, H, k_dim),
        "k": normal(B, T, H, k_dim),
        "v": normal(B, T, HV, v_dim),
        "g": normal(B, T, HV),
        "beta": normal(B, T, HV),
        "A_log": normal(HV).mul(0.3),
        "dt_bias": normal(HV),
    }


FLAGS = {"use_qk_l2norm_in_kernel": True, "use_gate_in_kernel": True, "use_beta_sigmoid_in_kernel": True}


def in_float64(inputs: dict[str, Tensor], state: Tensor | None, **kwargs) -> tuple[Tensor, Tensor]:
    return recurrent_gated_delta_rule_reference(
        **{name: x.double() for name, x in inputs.items()},
        initial_state=None if state is None else state.double(),
        output_final_state=True,
        **kwargs,
    )


def make_bank(*outer: int, dtype: torch.dtype, v_first: bool, seed: int = 7) -> Tensor:
    inner = (HV, V, K) if v_first else (HV, K, V)
    bank = torch.randn(*outer, *inner, generator=torch.Generator().manual_seed(seed))
    return bank.to(DEVICE, dtype)


def indices(*values: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=DEVICE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("v_first", [False, True])
def test_prefill_from_initial_state_matches_float64(backend: str, v_first: bool):
    inputs = make_inputs(2, 5)
    state = make_bank(2, dtype=torch.float32, v_first=v_first)
    before = state.clone()
    call = {**inputs, **FLAGS, "state_v_first": v_first}
    o, final = fused_recurrent_gated_delta_rule(**call, initial_state=state, output_final_state=True, backend=backend)
    o_64, final_64 = in_float64(inputs, state, **FLAGS, state_v_first=v_first)
    assert relative_error(o, o_64) < 1e-5
    assert final is not None
    assert final.dtype == torch.float32
    assert relative_error(final, final_64) < 1e-5
    assert torch.equal(state, before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_plain_log_decay_without_state_gate_or_norm(backend: str):
    inputs = make_inputs(1, 6)
    inputs = {"q": inputs["q"] / 4, "k": inputs["k"] / 4, "v": inputs["v"], "g": -inputs["g"].abs()}
    o, final = fused_recurrent_gated_delta_rule(**inputs, scale=0.5, backend=backend)
    o_64, _ = in_float64(inputs, None, scale=0.5)
    assert final is None
    assert relative_error(o, o_64) < 1e-5
    no_decay = {name: x for name, x in inputs.items() if name != "g"}
    o, _ = fused_recurrent_gated_delta_rule(**no_decay, backend=backend)
    assert relative_error(o, in_float64(no_decay, None)[0]) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_sequences_with_an_empty_one(backend: str):
    inputs = make_inputs(1, 7)
    cu_seqlens = indices(0, 3, 3, 7, dtype=torch.int64)
    state = make_bank(3, dtype=torch.float32, v_first=False)
    o, final = fused_recurrent_gated_delta_rule(
        **inputs, **FLAGS, initial_state=state, output_final_state=True, cu_seqlens=cu_seqlens, backend=backend
    )
    o_64, final_64 = in_float64(inputs, state, **FLAGS, cu_seqlens=cu_seqlens)
    assert final is not None
    assert relative_error(o, o_64) < 1e-5
    assert relative_error(final, final_64) < 1e-5
    assert torch.equal(final[1], state[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("k_dim", "v_dim"), [(24, 20), (64, 40)])
def test_head_dims_that_are_no_power_of_two(backend: str, k_dim: int, v_dim: int):
    inputs = make_inputs(1, 2, k_dim=k_dim, v_dim=v_dim)
    o, final = fused_recurrent_gated_delta_rule(**inputs, **FLAGS, output_final_state=True, backend=backend)
    o_64, final_64 = in_float64(inputs, None, **FLAGS)
    assert final is not None
    assert relative_error(o, o_64) < 1e-5
    assert relative_error(final, final_64) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("v_first", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bank_is_updated_in_place_and_bad_indices_touch_nothing(backend: str, v_first: bool, dtype: torch.dtype):
    inputs = make_inputs(4, 1)
    bank = make_bank(5, dtype=dtype, v_first=v_first)
    before = bank.clone()
    slots = indices(3, -1, 0, 5)  # the second and the last sequence are padding
    o, final = fused_recurrent_gated_delta_rule(
        **inputs, **FLAGS, initial_state=bank, output_final_state=True, state_v_first=v_first, state_indices=slots,
        backend=backend,
    )  # fmt: skip
    assert final is bank
    real = {name: x if x.dim() == 1 else x[[0, 2]] for name, x in inputs.items()}
    o_64, final_64 = in_float64(real, before[[3, 0]], **FLAGS, state_v_first=v_first)
    assert relative_error(o[[0, 2]], o_64) < 1e-5
    assert relative_error(bank[[3, 0]], final_64) < (1e-5 if dtype == torch.float32 else 2**-8)
    assert torch.equal(o[[1, 3]], torch.zeros_like(o[[1, 3]]))
    assert torch.equal(bank[[1, 2, 4]], before[[1, 2, 4]])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("v_first", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packet_equals_token_by_token_bitwise(backend: str, v_first: bool, dtype: torch.dtype):
    inputs, T, S = make_inputs(2, 3), 3, 4
    slots, position = indices(2, 0), indices(6, 1, dtype=torch.int64)
    packet, single = (make_bank(3, S, dtype=dtype, v_first=v_first) for _ in range(2))
    call = {**FLAGS, "state_v_first": v_first, "state_indices": slots, "backend": backend}
    o, _ = fused_recurrent_gated_delta_rule(**inputs, **call, initial_state=packet, cache_seqlens=position)
    one = []
    for t in range(T):
        token = {name: x if x.dim() == 1 else x[:, t : t + 1] for name, x in inputs.items()}
        one.append(fused_recurrent_gated_delta_rule(**token, **call, initial_state=single, cache_seqlens=position + t))
    assert torch.equal(o, torch.cat([o_t for o_t, _ in one], 1))
    assert torch.equal(packet, single)


@pytest.mark.parametrize("backend", BACKENDS)
def test_circular_bank_reads_and_writes_the_documented_entries(backend: str):
    inputs, S = make_inputs(2, 3), 4
    bank = make_bank(2, S, dtype=torch.float32, v_first=False)
    before = bank.clone()
    # As in the docstring: at position 6 entry 2 is read and entries 3, 0, 1 are written. The second request is padding.
    o, _ = fused_recurrent_gated_delta_rule(
        **inputs, **FLAGS, initial_state=bank, cache_seqlens=indices(6, -3), backend=backend
    )
    for t, entry in enumerate((3, 0, 1)):
        some = {name: x if x.dim() == 1 else x[:1, : t + 1] for name, x in inputs.items()}
        o_64, final_64 = in_float64(some, before[:1, 2], **FLAGS)
        assert relative_error(bank[0, entry], final_64[0]) < 1e-5
        assert relative_error(o[0, t], o_64[0, t]) < 1e-5
    assert torch.equal(bank[0, 2], before[0, 2])
    assert torch.equal(bank[1], before[1])
    assert not o[1].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_roll_back_after_rejected_tokens(backend: str):
    inputs = make_inputs(1, 3)
    bank, S = make_bank(1, 4, dtype=torch.float32, v_first=True), 4
    start = bank[:, 5 % S].clone()
    call = {**FLAGS, "state_v_first": True, "backend": backend}
    fused_recurrent_gated_delta_rule(**inputs, **call, initial_state=bank, cache_seqlens=indices(5))
    other = make_inputs(1, 1, seed=3)
    o, _ = fused_recurrent_gated_delta_rule(**other, **call, initial_state=bank, cache_seqlens=indices(6))
    accepted = {name: x if x.dim() == 1 else x[:, :1] for name, x in inputs.items()}
    _, after_accepted = in_float64(accepted, start, **FLAGS, state_v_first=True)
    expected, _ = in_float64(other, after_accepted, **FLAGS, state_v_first=True)
    assert relative_error(o, expected) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_packets_of_different_lengths_in_a_bank(backend: str):
    inputs = make_inputs(1, 6)
    cu_seqlens, slots = indices(0, 1, 4, 4, 6), indices(1, 3, 0, 9)
    bank = make_bank(4, dtype=torch.float32, v_first=False)
    before = bank.clone()
    o, _ = fused_recurrent_gated_delta_rule(
        **inputs, **FLAGS, initial_state=bank, cu_seqlens=cu_seqlens, state_indices=slots, backend=backend
    )
    for n, (start, end) in enumerate(pairwise(cu_seqlens.tolist()[:3])):
        some = {name: x if x.dim() == 1 else x[:, start:end] for name, x in inputs.items()}
        slot = slots[n].item()
        o_64, final_64 = in_float64(some, before[slot : slot + 1], **FLAGS)
        assert relative_error(o[:, start:end], o_64) < 1e-5
        assert relative_error(bank[slot], final_64[0]) < 1e-5
    assert torch.equal(bank[[0, 2]], before[[0, 2]])  # the empty sequence and the padding
    assert not o[:, 4:].any()


def test_sections_of_one_projection_need_no_copy():
    T = 2
    projected = torch.randn(1, T, 2 * H * K + HV * V, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    q, k, v = projected.split([H * K, H * K, HV * V], -1)
    views = {"q": q.unflatten(2, (H, K)), "k": k.unflatten(2, (H, K)), "v": v.unflatten(2, (HV, V))}
    o, _ = fused_recurrent_gated_delta_rule(**views, use_qk_l2norm_in_kernel=True, backend="triton")
    assert relative_error(o, in_float64(views, None, use_qk_l2norm_in_kernel=True)[0]) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens_or_no_requests(backend: str):
    inputs = make_inputs(2, 0)
    state = make_bank(2, dtype=torch.float32, v_first=False)
    o, final = fused_recurrent_gated_delta_rule(
        **inputs, **FLAGS, initial_state=state, output_final_state=True, backend=backend
    )
    assert o.shape == (2, 0, HV, V)
    assert final is not None
    assert torch.equal(final, state)
    o, _ = fused_recurrent_gated_delta_rule(**make_inputs(0, 3), **FLAGS, backend=backend)
    assert o.shape == (0, 3, HV, V)


def test_registered_operator_obeys_its_schema():
    inputs = make_inputs(2, 1)
    bank = make_bank(3, dtype=torch.float32, v_first=False)
    arguments = (
        *inputs.values(), None, bank, None, indices(2, 0), None, 0.25, True, True, False, True, False,
    )  # fmt: skip
    torch.library.opcheck(recurrent_op, arguments, test_utils=("test_schema", "test_faketensor"))
    before = bank.clone()
    expected, _ = fused_recurrent_gated_delta_rule(
        **inputs, **FLAGS, scale=0.25, initial_state=before, state_indices=indices(2, 0), backend="reference"
    )
    assert torch.equal(recurrent_op(*arguments), expected)
    assert torch.equal(bank, before)


REFUSALS = {
    "gradient": ({"q": "grad"}, "q requires a gradient.*chunk_gated_delta_rule"),
    "no bank": ({"initial_state": None}, "state_indices is given but initial_state is None"),
    "bank of four dims for a ring": ({"cache_seqlens": (1, 2)}, r"must be \[num_requests, S, 4, 16, 8\]"),
    "index dtype": ({"state_indices": (0.0, 1.0)}, "state_indices must be a contiguous int32 or int64 vector of 2"),
    "index count": ({"state_indices": (0, 1, 2)}, "state_indices must be a contiguous int32 or int64 vector of 2"),
    "bank dtype": ({"initial_state": torch.float16}, "must be torch.float32 or torch.bfloat16.*got torch.float16"),
    "backend": ({"backend": "cuda"}, "unknown backend 'cuda'"),
    "head dim": ({"wide": True}, "head dims above 256"),
    "scale": ({"scale": float("inf")}, "scale must be finite"),
    "missing A_log": ({"A_log": None}, "A_log is None"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name: str):
    change, message = REFUSALS[name]
    call: dict = {**make_inputs(2, 1), **FLAGS, "state_indices": indices(0, 1)}
    call["initial_state"] = make_bank(3, dtype=torch.float32, v_first=False)
    for key, value in change.items():
        if key == "q":
            call["q"] = call["q"].requires_grad_()
        elif key == "wide":
            call.update(make_inputs(2, 1, k_dim=512), backend="triton")
            call["initial_state"] = torch.zeros(3, HV, 512, V, device=DEVICE)
        elif isinstance(value, tuple):
            call[key] = torch.tensor(value, device=DEVICE)
        elif isinstance(value, torch.dtype):
            call[key] = call[key].to(value)
        else:
            call[key] = value
    with pytest.raises(ValueError, match=message):
        fused_recurrent_gated_delta_rule(**call)


def test_refuses_a_bank_whose_matrices_are_strided_or_whose_requests_do_not_match():
    inputs = {**make_inputs(2, 1), **FLAGS}
    strided = torch.zeros(3, HV, V, K, device=DEVICE).transpose(-1, -2)
    with pytest.raises(ValueError, match="must be contiguous"):
        fused_recurrent_gated_delta_rule(**inputs, initial_state=strided, state_indices=indices(0, 1))
    ring = make_bank(3, 2, dtype=torch.float32, v_first=False)
    with pytest.raises(ValueError, match="holds 3 requests and there are 2 sequences: pass state_indices"):
        fused_recurrent_gated_delta_rule(**inputs, initial_state=ring, cache_seqlens=indices(0, 1))
    with pytest.raises(TypeError, match=r"state_indices must be a torch\.Tensor, got list"):
        fused_recurrent_gated_delta_rule(**inputs, initial_state=ring[:, 0], state_indices=[0, 1])
    with pytest.raises(TypeError, match=r"initial_state must be a torch\.Tensor, got float"):
        fused_recurrent_gated_delta_rule(**inputs, initial_state=1.0, state_indices=indices(0, 1))


def test_gradient_is_refused_only_where_one_would_be_recorded():
    inputs = make_inputs(1, 1)
    inputs["q"].requires_grad_()
    with torch.no_grad():
        o, _ = fused_recurrent_gated_delta_rule(**inputs, **FLAGS)
    assert not o.requires_grad


COMPILED = """
import torch
from gdn_cp import fused_recurrent_gated_delta_rule

def step(q, k, v, g, beta, bank, slots):
    o, _ = fused_recurrent_gated_delta_rule(q, k, v, -g.exp(), beta, initial_state=bank, state_indices=slots)
    return 2 * o

tokens = [torch.randn(2, 1, 2, 16), torch.randn(2, 1, 2, 16), torch.randn(2, 1, 4, 8), torch.randn(2, 1, 4)]
tokens.append(torch.rand(2, 1, 4))
bank, slots = torch.randn(3, 4, 16, 8), torch.tensor([2, 0])
other = bank.clone()
compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
with torch.no_grad():
    print(torch.equal(compiled(*tokens, bank, slots), step(*tokens, other, slots)), torch.equal(bank, other))
"""


def test_torch_compile_sees_one_graph_and_the_bank_is_updated():
    environment = {key: x for key, x in os.environ.items() if key not in ("TORCHDYNAMO_DISABLE", "TRITON_INTERPRET")}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, env=environment)
    assert done.stdout.split() == ["True", "True"], done.stderr
