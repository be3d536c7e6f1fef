"""The public op: equality with the float64 recurrence through it, what it hands to backends, and every refusal."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gdn_cp
from gdn_cp import chunk_gated_delta_rule
from gdn_cp.kernels.chunk import _IMPLEMENTATIONS
from gdn_cp.kernels.reference import recurrent_gated_delta_rule_reference
from tests.delta_rule import errors, flags, random_inputs, run

FLOAT64 = 1e-12


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 150), min_size=1, max_size=2),
    H=st.integers(1, 2),
    r=st.sampled_from([1, 2, 3, 4]),
    K=st.integers(2, 12),
    V=st.integers(1, 12),
    raw=st.booleans(),
    packed=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_op_equals_float64_recurrence(lengths, H, r, K, V, raw, packed, seed):
    T, N, kwargs = sum(lengths), 1, flags(raw)
    if packed:
        bounds = [0, 0, *torch.tensor(lengths).cumsum(0).tolist()]
        N, kwargs["cu_seqlens"] = len(bounds) - 1, torch.tensor(bounds)
    inputs = random_inputs(1, T, H, H * r, K, V, N=N, raw=raw, seed=seed)
    oracle = run(recurrent_gated_delta_rule_reference, inputs, **kwargs)
    measured = errors(run(chunk_gated_delta_rule, inputs, **kwargs), oracle)
    assert max(measured.values()) <= FLOAT64, measured


def test_positional_arguments_follow_the_field():
    x = random_inputs(1, 10, 1, 2, 4, 4, raw=False)
    o, state = chunk_gated_delta_rule(x["q"], x["k"], x["v"], x["g"], x["beta"], 0.5, x["initial_state"], True)
    expected = recurrent_gated_delta_rule_reference(**x, scale=0.5, output_final_state=True)
    assert torch.allclose(o, expected[0], rtol=0, atol=FLOAT64)
    assert torch.allclose(state, expected[1], rtol=0, atol=FLOAT64)


def test_no_final_state_unless_asked_and_integer_scale_is_a_number():
    x = random_inputs(1, 10, 1, 2, 4, 4, raw=False)
    o, state = chunk_gated_delta_rule(**x, scale=1)
    assert state is None
    assert torch.equal(o, chunk_gated_delta_rule(**x, scale=1.0)[0])


@pytest.mark.parametrize("name", ["reference", "recurrent"])
def test_backend_argument_chooses_the_implementation(monkeypatch, name):
    monkeypatch.setitem(_IMPLEMENTATIONS, name, lambda *args, **kwargs: (name, None))
    x = random_inputs(1, 4, 1, 1, 2, 2, raw=False)
    assert chunk_gated_delta_rule(**x, backend=name)[0] == name
    monkeypatch.setenv("GDN_CP_BACKEND", name)
    assert chunk_gated_delta_rule(**x)[0] == name


def test_backends_get_the_default_scale_as_a_number(monkeypatch):
    seen = {}
    monkeypatch.setitem(_IMPLEMENTATIONS, "reference", lambda *args, **kwargs: (args[5], seen.update(kwargs)))
    scale, _ = chunk_gated_delta_rule(**random_inputs(1, 4, 1, 1, 16, 2, raw=False))
    assert scale == 0.25
    assert "backend" not in seen


def test_import_needs_neither_triton_nor_megatron():
    code = (
        "import sys, gdn_cp, torch; x = torch.ones(1, 3, 1, 2);"
        "gdn_cp.chunk_gated_delta_rule(x, x, x); gdn_cp.fused_gdn_gate(x, torch.ones(2));"
        "print([m for m in sys.modules if m.split('.')[0] in ('triton', 'megatron')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"


def test_unknown_public_name_is_an_attribute_error():
    assert set(gdn_cp.__all__) <= set(dir(gdn_cp))
    with pytest.raises(AttributeError, match="no_such_name"):
        gdn_cp.no_such_name  # noqa: B018


def ones(*shape, dtype=torch.float32):
    return torch.ones(shape, dtype=dtype)


def a_call(**changes):
    """Arguments of a good call with B=1, T=6, H=2, HV=4, K=3, V=5, with some replaced."""
    call = {
        "q": ones(1, 6, 2, 3),
        "k": ones(1, 6, 2, 3),
        "v": ones(1, 6, 4, 5),
        "g": -ones(1, 6, 4),
        "beta": ones(1, 6, 4),
    }
    return call | changes


RAW = {"use_gate_in_kernel": True}
REFUSALS = {
    "q_dim": ({"q": ones(6, 2, 3)}, r"q must be \[B, T, H, K\], got \[6, 2, 3\]"),
    "k_shape": ({"k": ones(1, 6, 2, 4)}, r"k must have q's shape .* got \[1, 6, 2, 4\]"),
    "k_heads_like_v": ({"k": ones(1, 6, 4, 3)}, r"k must have q's shape"),
    "v_tokens": ({"v": ones(1, 7, 4, 5)}, r"v must be \[1, 6, HV, V\].* got \[1, 7, 4, 5\]"),
    "v_dim": ({"v": ones(1, 6, 20)}, r"v must be \[1, 6, HV, V\]"),
    "fewer_value_heads": ({"v": ones(1, 6, 1, 5), "g": None, "beta": None}, r"v has 1 heads .*q has 2 .*multiple of H"),
    "no_multiple": ({"v": ones(1, 6, 3, 5), "g": None, "beta": None}, r"v has 3 heads .*q has 2 .*multiple of H"),
    "no_heads": ({"q": ones(1, 6, 0, 3), "k": ones(1, 6, 0, 3)}, r"at least 1"),
    "g_shape": ({"g": ones(1, 6, 2)}, r"g must be \[1, 6, 4\].* got \[1, 6, 2\]"),
    "beta_shape": ({"beta": ones(1, 6, 4, 1)}, r"beta must be \[1, 6, 4\]"),
    "q_integer": ({"q": ones(1, 6, 2, 3, dtype=torch.int32)}, r"q has dtype torch.int32: use bfloat16"),
    "beta_bool": ({"beta": ones(1, 6, 4, dtype=torch.bool)}, r"beta has dtype torch.bool: use bfloat16"),
    "k_dtype": (
        {"k": ones(1, 6, 2, 3, dtype=torch.float64)},
        r"k has dtype torch.float64 but q has torch.float32: cast",
    ),
    "v_dtype": (
        {"v": ones(1, 6, 4, 5, dtype=torch.float16)},
        r"v has dtype torch.float16 but q has torch.float32: cast",
    ),
    "v_device": ({"v": torch.ones(1, 6, 4, 5, device="meta")}, r"v is on meta but q is on cpu: move v"),
    "g_device": ({"g": torch.ones(1, 6, 4, device="meta")}, r"g is on meta but q is on cpu: move g"),
    "no_A_log": (RAW, r"A_log is None: pass the parameter A_log \[4\]"),
    "no_raw_gate": (RAW | {"g": None, "A_log": ones(4)}, r"g is None: pass the raw gate"),
    "A_log_shape": (RAW | {"A_log": ones(2)}, r"A_log must be .*4 elements.* got .*\[2\]"),
    "A_log_dtype": (RAW | {"A_log": ones(4, dtype=torch.int64)}, r"A_log must be a floating-point.*int64"),
    "A_log_device": (RAW | {"A_log": torch.ones(4, device="meta")}, r"A_log is on meta .*move A_log"),
    "dt_bias_shape": (RAW | {"A_log": ones(4), "dt_bias": ones(4, 1)}, r"dt_bias must be .*4 elements"),
    "A_log_unused": ({"A_log": ones(4)}, r"A_log is given but use_gate_in_kernel=False"),
    "dt_bias_unused": ({"dt_bias": ones(4)}, r"dt_bias is given but use_gate_in_kernel=False"),
    "no_raw_beta": ({"beta": None, "use_beta_sigmoid_in_kernel": True}, r"beta is None: pass the raw beta"),
    "cu_dtype": ({"cu_seqlens": torch.tensor([0.0, 6.0])}, r"cu_seqlens must be an int32 or int64 vector.*float32"),
    "cu_dim": ({"cu_seqlens": torch.tensor([[0, 6]])}, r"cu_seqlens must be an int32 or int64 vector.*\[1, 2\]"),
    "cu_empty": ({"cu_seqlens": torch.tensor([0])}, r"cu_seqlens must be .*N \+ 1 >= 2"),
    "cu_start": ({"cu_seqlens": torch.tensor([1, 6])}, r"cu_seqlens must start at 0, got 1"),
    "cu_decreasing": ({"cu_seqlens": torch.tensor([0, 4, 2, 6])}, r"must not decrease, got 4 then 2 at sequence 1"),
    "cu_short": ({"cu_seqlens": torch.tensor([0, 5])}, r"cu_seqlens must end at the token count 6, got 5"),
    "cu_long": ({"cu_seqlens": torch.tensor([0, 7])}, r"cu_seqlens must end at the token count 6, got 7"),
    "cu_device": ({"cu_seqlens": torch.empty(2, dtype=torch.int32, device="meta")}, r"cu_seqlens is on meta .*move"),
    "state_shape": ({"initial_state": ones(1, 4, 5, 3)}, r"initial_state must be \[1, 4, 3, 5\] .*got \[1, 4, 5, 3\]"),
    "state_v_first": (
        {"initial_state": ones(1, 4, 3, 5), "state_v_first": True},
        r"initial_state must be \[1, 4, 5, 3\] .*state_v_first",
    ),
    "state_per_sequence": (
        {"initial_state": ones(1, 4, 3, 5), "cu_seqlens": torch.tensor([0, 2, 6])},
        r"initial_state must be \[2, 4, 3, 5\]",
    ),
    "state_dtype": (
        {"initial_state": ones(1, 4, 3, 5, dtype=torch.bfloat16)},
        r"initial_state must be torch.float32 .*got torch.bfloat16: cast",
    ),
    "state_device": ({"initial_state": torch.ones(1, 4, 3, 5, device="meta")}, r"initial_state is on meta .*move"),
    "scale": ({"scale": float("nan")}, r"scale must be finite, got nan"),
    "backend": ({"backend": "cuda"}, r"unknown backend 'cuda' .*triton, reference, recurrent or auto"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSALS.values(), ids=REFUSALS)
def test_refusal_names_argument_value_and_remedy(changes, message):
    chunk_gated_delta_rule(**a_call())
    with pytest.raises(ValueError, match=message):
        chunk_gated_delta_rule(**a_call(**changes))


def test_packed_call_needs_batch_one():
    call = {name: x.repeat(2, *[1] * (x.dim() - 1)) for name, x in a_call().items()}
    with pytest.raises(ValueError, match=r"q has batch size 2 but cu_seqlens.*reshape every input to \[1, 12, ...\]"):
        chunk_gated_delta_rule(**call, cu_seqlens=torch.tensor([0, 12]))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("q", [1.0]),
        ("k", None),
        ("g", 0.5),
        ("cu_seqlens", [0, 6]),
        ("initial_state", 0),
        ("scale", "1"),
        ("scale", True),
    ],
)
def test_wrong_types_are_type_errors(name, value):
    with pytest.raises(TypeError, match=name):
        chunk_gated_delta_rule(**a_call(**{name: value}))


def test_float64_wants_float64_states():
    inputs = random_inputs(1, 6, 1, 1, 2, 2, raw=False)
    with pytest.raises(ValueError, match=r"initial_state must be torch.float64"):
        chunk_gated_delta_rule(**(inputs | {"initial_state": inputs["initial_state"].float()}))


@pytest.mark.gpu
def test_gpu_falls_back_for_a_head_dim_that_triton_refuses():
    x = random_inputs(1, 100, 1, 2, 9, 7, raw=False, dtype=torch.bfloat16)
    on_gpu = {name: t.detach().cuda() for name, t in x.items()}
    with pytest.warns(RuntimeWarning, match="head dim"):
        o, _ = chunk_gated_delta_rule(**on_gpu, use_qk_l2norm_in_kernel=True)
    expected, _ = chunk_gated_delta_rule(**x, use_qk_l2norm_in_kernel=True)
    assert (o.cpu().float() - expected.float()).norm() <= 2**-7 * expected.float().norm()
    with pytest.raises(ValueError, match="head dim"):
        chunk_gated_delta_rule(**on_gpu, backend="triton")


@pytest.mark.gpu
def test_gpu_reference_refuses_wrong_boundaries_when_it_reads_them():
    x = {name: t.cuda() for name, t in a_call().items()}
    with pytest.raises(ValueError, match="cu_seqlens must end at the token count 6, got 5"):
        chunk_gated_delta_rule(**x, cu_seqlens=torch.tensor([0, 5], device="cuda"), backend="reference")


@pytest.mark.gpu
def test_gpu_validation_never_waits_for_the_device(monkeypatch):
    monkeypatch.setitem(_IMPLEMENTATIONS, "reference", lambda *args, **kwargs: (None, None))
    x = {name: t.detach().cuda() for name, t in random_inputs(1, 64, 1, 2, 16, 16, N=2).items()}
    cu_seqlens = torch.tensor([0, 30, 64], device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = chunk_gated_delta_rule(**x, **flags(True), cu_seqlens=cu_seqlens, backend="reference")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert result == (None, None)
