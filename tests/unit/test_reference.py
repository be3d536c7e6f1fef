"""The recurrence against its definition written out, and the chunked form against the recurrence."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gdn_cp.kernels import reference
from gdn_cp.kernels.reference import (
    chunk_gated_delta_rule_reference,
    l2norm,
    recurrent_gated_delta_rule_reference,
)
from tests.delta_rule import errors, flags, in_float64, naive, random_inputs, run

# A float64 result errs by a small multiple of 2^-53 for each of some hundreds of roundings along a path.
FLOAT64 = 1e-12


def float32_tolerance(T: int) -> float:
    """T rank-one updates and their products round independently: a random walk of T steps of 8 roundings of 2^-24."""
    return 8 * 2**-24 * (T + 1) ** 0.5


def assert_close(actual: dict, oracle: dict, tolerance: float) -> None:
    too_large = {name: error for name, error in errors(actual, oracle).items() if not error <= tolerance}
    assert not too_large, f"relative errors above {tolerance:.1e}: {too_large}"


def bounds_to_tensor(bounds: list[int] | None) -> torch.Tensor | None:
    return None if bounds is None else torch.tensor(bounds, dtype=torch.int32)


def test_recurrence_is_the_definition():
    bounds = [0, 3, 3, 10]
    x = {name: t.detach() for name, t in random_inputs(1, 10, 2, 6, 4, 3, N=3, raw=False).items()}
    expected = naive(*(x[n][0] for n in ("q", "k", "v", "g", "beta")), x["initial_state"], 0.3, bounds)
    o, state = recurrent_gated_delta_rule_reference(
        **x, scale=0.3, output_final_state=True, cu_seqlens=bounds_to_tensor(bounds)
    )
    assert_close({"o": o[0], "state": state}, {"o": expected[0], "state": expected[1]}, FLOAT64)


def test_flags_are_their_formulas():
    x = random_inputs(2, 9, 2, 4, 5, 3)
    A_log, dt_bias = x.pop("A_log"), x.pop("dt_bias")
    unit = {n: x[n] * torch.rsqrt((x[n] ** 2).sum(-1, keepdim=True) + 1e-6) for n in ("q", "k")}
    ready = x | unit | {"g": -A_log.exp() * torch.log1p((x["g"] + dt_bias).exp()), "beta": 1 / (1 + (-x["beta"]).exp())}
    for op in (recurrent_gated_delta_rule_reference, chunk_gated_delta_rule_reference):
        fused = op(**x, A_log=A_log, dt_bias=dt_bias, output_final_state=True, **flags(True))
        plain = op(**ready, scale=5**-0.5, output_final_state=True)
        assert_close(dict(zip("os", fused, strict=True)), dict(zip("os", plain, strict=True)), FLOAT64)


@pytest.mark.parametrize("raw", [True, False], ids=["raw_gate", "ready_gate"])
@pytest.mark.parametrize(
    ("B", "T", "H", "HV", "K", "V", "bounds"),
    [
        (1, 1, 1, 1, 1, 1, None),
        (2, 63, 2, 2, 8, 8, None),
        (1, 64, 1, 2, 16, 8, None),
        (2, 65, 2, 6, 8, 20, None),
        (1, 300, 2, 4, 12, 12, None),
        (1, 300, 1, 3, 8, 16, [0, 0, 70, 71, 135, 135, 300, 300]),
        (1, 128, 2, 2, 8, 8, [0, 64, 128]),
        (1, 40, 1, 8, 4, 4, [*range(0, 40, 2), 40]),
        (2, 0, 1, 2, 4, 4, None),
        (1, 0, 1, 2, 4, 4, [0, 0, 0]),
    ],
)
def test_chunked_equals_recurrence(B, T, H, HV, K, V, bounds, raw):
    N = None if bounds is None else len(bounds) - 1
    # Normalised to one dimension, q and k are signs, whose gradients are 0 up to rounding.
    kwargs = flags(raw, l2norm=K > 1) | {"cu_seqlens": bounds_to_tensor(bounds)}
    inputs = random_inputs(B, T, H, HV, K, V, N=N, raw=raw)
    if T == 0:
        o, state = chunk_gated_delta_rule_reference(**inputs, output_final_state=True, **kwargs)
        assert o.shape == (B, 0, HV, V)
        assert torch.equal(state, inputs["initial_state"])
        return
    oracle = run(recurrent_gated_delta_rule_reference, inputs, **kwargs)
    assert_close(run(chunk_gated_delta_rule_reference, inputs, **kwargs), oracle, FLOAT64)
    inputs = {name: x.detach().float().requires_grad_() for name, x in inputs.items()}
    oracle = run(recurrent_gated_delta_rule_reference, in_float64(inputs), **kwargs)
    for op in (chunk_gated_delta_rule_reference, recurrent_gated_delta_rule_reference):
        assert_close(run(op, inputs, **kwargs), oracle, float32_tolerance(T))


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    H=st.integers(1, 3),
    r=st.integers(1, 3),
    K=st.integers(2, 9),
    V=st.integers(1, 9),
    chunk_size=st.sampled_from([1, 4, 16, 64]),
    raw=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_chunked_equals_recurrence_for_any_packing(lengths, H, r, K, V, chunk_size, raw, seed):
    bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    inputs = random_inputs(1, bounds[-1], H, H * r, K, V, N=len(lengths), raw=raw, seed=seed)
    kwargs = flags(raw) | {"cu_seqlens": bounds_to_tensor(bounds)}
    if bounds[-1] == 0:
        return
    oracle = run(recurrent_gated_delta_rule_reference, inputs, **kwargs)
    assert_close(run(chunk_gated_delta_rule_reference, inputs, chunk_size=chunk_size, **kwargs), oracle, FLOAT64)


@pytest.mark.parametrize("op", [chunk_gated_delta_rule_reference, recurrent_gated_delta_rule_reference])
@pytest.mark.parametrize("raw", [True, False], ids=["raw_gate", "ready_gate"])
def test_gradcheck(op, raw):
    inputs = random_inputs(1, 5, 1, 2, 2, 3, N=3, raw=raw)
    kwargs = flags(raw) | {"cu_seqlens": torch.tensor([0, 3, 3, 5]), "output_final_state": True}
    if op is chunk_gated_delta_rule_reference:
        kwargs["chunk_size"] = 2
    names = list(inputs)
    assert torch.autograd.gradcheck(
        lambda *xs: op(**dict(zip(names, xs, strict=True)), **kwargs), tuple(inputs.values())
    )


@pytest.mark.parametrize("decay", [0.0, -30 / 64, -30.0, -1e4])
def test_strong_and_absent_gates(decay):
    """e^-30 in a chunk, and far stronger ones; the float32 chunked form keeps the digits of weak gates between them."""
    T = 200
    inputs = random_inputs(1, T, 1, 2, 8, 8, raw=False, dtype=torch.float32)
    g = torch.full((1, T, 2), decay)
    g[:, 1::3, 1] = -0.1
    inputs["g"] = g.requires_grad_()
    oracle = run(recurrent_gated_delta_rule_reference, in_float64(inputs), **flags(False))
    actual = run(chunk_gated_delta_rule_reference, inputs, **flags(False))
    assert all(x.isfinite().all() for x in actual.values())
    assert_close(actual, oracle, float32_tolerance(T))


@pytest.mark.parametrize("op", [chunk_gated_delta_rule_reference, recurrent_gated_delta_rule_reference])
def test_no_gate_is_zero_gate_and_no_beta_is_ones(op):
    inputs = random_inputs(1, 70, 2, 4, 8, 8, raw=False)
    explicit = inputs | {"g": torch.zeros(1, 70, 4).double(), "beta": torch.ones(1, 70, 4).double()}
    o, state = op(**explicit, output_final_state=True, use_qk_l2norm_in_kernel=True)
    absent = {name: x for name, x in inputs.items() if name not in ("g", "beta")}
    o_absent, state_absent = op(**absent, output_final_state=True, use_qk_l2norm_in_kernel=True)
    assert torch.equal(o, o_absent)
    assert torch.equal(state, state_absent)


@pytest.mark.parametrize("op", [chunk_gated_delta_rule_reference, recurrent_gated_delta_rule_reference])
def test_state_v_first_transposes_states_and_their_gradient(op):
    inputs = random_inputs(2, 70, 1, 2, 4, 6)
    k_first = run(op, inputs, **flags(True))
    turned = inputs | {"initial_state": inputs["initial_state"].detach().mT.contiguous().requires_grad_()}
    o, state = op(**turned, output_final_state=True, state_v_first=True, **flags(True))
    (gradient,) = torch.autograd.grad(o.sum(), [turned["initial_state"]])
    o_k_first, _ = op(**inputs, **flags(True))
    (expected,) = torch.autograd.grad(o_k_first.sum(), [inputs["initial_state"]])
    assert torch.equal(o, k_first["o"])
    assert torch.equal(state, k_first["state"].mT)
    assert state.is_contiguous()
    assert torch.equal(gradient, expected.mT)


def test_two_halves_through_the_state_equal_the_whole():
    inputs = {name: x.detach() for name, x in random_inputs(1, 150, 2, 4, 8, 8).items()}
    state = inputs.pop("initial_state")
    whole, final = chunk_gated_delta_rule_reference(
        **inputs, **flags(True), initial_state=state, output_final_state=True
    )
    parts = []
    for rows in (slice(0, 37), slice(37, 150)):
        half = {name: x[:, rows] if x.dim() > 1 else x for name, x in inputs.items()}
        o, state = chunk_gated_delta_rule_reference(**half, **flags(True), initial_state=state, output_final_state=True)
        parts.append(o)
    assert_close({"o": torch.cat(parts, 1), "s": state}, {"o": whole, "s": final}, FLOAT64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_are_computed_in_float32(dtype):
    """Only the rounding of o and of the gradients to `dtype` is left: half an ulp of each element, relative to it."""
    inputs = random_inputs(1, 100, 2, 4, 8, 8, dtype=dtype)
    oracle = run(recurrent_gated_delta_rule_reference, in_float64(inputs), **flags(True))
    actual = run(chunk_gated_delta_rule_reference, inputs, **flags(True))
    assert actual["o"].dtype == actual["dk"].dtype == dtype
    assert actual["state"].dtype == actual["dA_log"].dtype == torch.float32
    rounded = ("o", "dq", "dk", "dv", "dg", "dbeta")
    upstream = torch.finfo(dtype).eps  # `run` rounds the gradient that it passes for o to dtype
    assert_close({n: actual[n] for n in rounded}, {n: oracle[n] for n in rounded}, torch.finfo(dtype).eps + upstream)
    assert_close({"state": actual["state"]}, {"state": oracle["state"]}, float32_tolerance(100))


def test_autocast_does_not_lower_the_precision():
    inputs = random_inputs(1, 80, 1, 2, 8, 8, dtype=torch.float32)
    plain, state = chunk_gated_delta_rule_reference(**inputs, **flags(True), output_final_state=True)
    with torch.autocast("cpu", torch.bfloat16):
        o, state_under_autocast = chunk_gated_delta_rule_reference(**inputs, **flags(True), output_final_state=True)
    assert torch.equal(o, plain)
    assert torch.equal(state_under_autocast, state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("H", "HV", "K", "V", "bounds"), [(4, 4, 16, 16, [0, 300]), (4, 12, 8, 24, [0, 3, 90, 90, 300])]
)
def test_head_parallel_is_bitwise_equal_to_all_heads(H, HV, K, V, bounds, dtype):
    """Each rank's heads alone, contiguous as after an exchange, against all heads read in place from a wider tensor."""
    inputs = random_inputs(1, 300, H, HV, K, V, N=len(bounds) - 1, dtype=dtype)
    wide = torch.cat([inputs[name].detach().flatten(2) for name in ("q", "k", "v")], -1).split(
        (H * K, H * K, HV * V), -1
    )
    in_place = {n: x.unflatten(2, (heads, -1)) for n, x, heads in zip("qkv", wide, (H, H, HV), strict=True)}
    in_place = inputs | {name: x.requires_grad_() for name, x in in_place.items()}
    assert not in_place["q"].is_contiguous()
    kwargs = flags(True) | {"cu_seqlens": bounds_to_tensor(bounds), "output_final_state": True}
    head_dim = {"A_log": 0, "dt_bias": 0, "initial_state": 1}

    def outputs_and_gradients(arguments: dict, part: int, parts: int) -> dict:
        o, state = chunk_gated_delta_rule_reference(**arguments, **kwargs)
        weights = (torch.cos(torch.arange(300 * HV * V)).view(1, 300, HV, V), torch.ones_like(state))
        gradients = torch.autograd.grad(
            (o, state), list(arguments.values()), (weights[0].to(o.dtype).chunk(parts, 2)[part], weights[1])
        )
        return {"o": o, "state": state} | dict(zip(arguments, gradients, strict=True))

    whole = outputs_and_gradients(in_place, 0, 1)
    for parts in (2, 4):
        for part in range(parts):
            mine = {
                n: x.detach().chunk(parts, head_dim.get(n, 2))[part].contiguous().requires_grad_()
                for n, x in inputs.items()
            }
            # The parameters' gradients are sums over tokens, whose order torch chooses by the shape: not bitwise.
            for name, x in outputs_and_gradients(mine, part, parts).items():
                if name not in ("A_log", "dt_bias"):
                    dim = 1 if name in ("state", "initial_state") else 2
                    assert torch.equal(x, whole[name].chunk(parts, dim)[part]), (parts, part, name)


def test_repeated_run_gives_the_same_bits():
    inputs = random_inputs(1, 200, 2, 4, 8, 8, N=2, dtype=torch.float32)
    kwargs = flags(True) | {"cu_seqlens": torch.tensor([0, 90, 200])}
    first, second = (run(chunk_gated_delta_rule_reference, inputs, **kwargs) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_sequence_has_the_bits_that_it_has_alone():
    inputs = {n: x.detach() for n, x in random_inputs(1, 300, 2, 4, 8, 8, N=3, dtype=torch.float32).items()}
    state, bounds = inputs.pop("initial_state"), [0, 90, 130, 300]
    packed, _ = chunk_gated_delta_rule_reference(
        **inputs, **flags(True), initial_state=state, cu_seqlens=bounds_to_tensor(bounds)
    )
    for n in range(3):
        rows = slice(bounds[n], bounds[n + 1])
        alone = {name: x[:, rows] if x.dim() > 1 else x for name, x in inputs.items()}
        o, _ = chunk_gated_delta_rule_reference(**alone, **flags(True), initial_state=state[n : n + 1])
        assert torch.equal(o, packed[:, rows])


def test_many_tiny_sequences_take_a_smaller_chunk():
    bounds = tuple(range(4001))
    table = reference._chunk_table(bounds, 64, torch.device("cpu"))
    assert table.chunk_size == 16
    assert table.active == (4000,)
    inputs = {n: x.detach() for n, x in random_inputs(1, 4000, 1, 1, 2, 2, N=4000, raw=False).items()}
    o, _ = chunk_gated_delta_rule_reference(**inputs, cu_seqlens=torch.tensor(bounds))
    S = inputs["initial_state"][:, 0] * inputs["g"][0, :, 0, None, None].exp()
    k, q, v = (inputs[name][0, :, 0] for name in "kqv")
    S = S + inputs["beta"][0, :, 0, None, None] * k[..., None] * (v - torch.einsum("nk,nkv->nv", k, S))[:, None]
    assert_close({"o": o[0, :, 0]}, {"o": torch.einsum("nk,nkv->nv", q, S) * 2**-0.5}, FLOAT64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_l2norm_is_safe_at_zero(dtype):
    x = torch.zeros(3, 4, dtype=dtype, requires_grad=True)
    y = l2norm(x)
    (gradient,) = torch.autograd.grad(y.sum(), [x])
    assert torch.equal(y, torch.zeros_like(x))
    # At zero the norm is the constant eps**0.5, so the slope is 1/eps**0.5, rounded to dtype.
    assert torch.allclose(gradient.double(), torch.full((3, 4), 1e3).double(), rtol=torch.finfo(dtype).eps)


def test_l2norm_has_unit_length_and_a_right_gradient():
    x = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    expected = x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()
    assert_close({"y": l2norm(x)}, {"y": expected}, FLOAT64)
    assert torch.autograd.gradcheck(l2norm, (x,))


@pytest.mark.parametrize("op", [chunk_gated_delta_rule_reference, recurrent_gated_delta_rule_reference])
def test_zero_rows_of_q_and_k_have_finite_gradients(op):
    inputs = random_inputs(1, 20, 1, 2, 4, 4)
    for name in ("q", "k"):
        inputs[name] = inputs[name].detach().index_fill(1, torch.tensor([0, 7]), 0).requires_grad_()
    assert all(x.isfinite().all() for x in run(op, inputs, **flags(True)).values())


@pytest.mark.gpu
def test_gpu_agrees_and_repeats_its_bits():
    bounds = [0, 0, 70, 71, 300]
    inputs = random_inputs(1, 300, 2, 4, 32, 16, N=4, dtype=torch.float32)
    kwargs = flags(True)
    oracle = run(
        recurrent_gated_delta_rule_reference, in_float64(inputs), **kwargs, cu_seqlens=bounds_to_tensor(bounds)
    )
    inputs = {name: x.detach().cuda().requires_grad_() for name, x in inputs.items()}
    kwargs["cu_seqlens"] = torch.tensor(bounds, device="cuda")
    first, second = (run(chunk_gated_delta_rule_reference, inputs, **kwargs) for _ in range(2))
    assert_close({name: x.cpu() for name, x in first.items()}, oracle, float32_tolerance(300))
    assert all(torch.equal(first[name], second[name]) for name in first)
