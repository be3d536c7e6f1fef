"""Random malformed calls: a valid call with one argument made wrong is refused by a message that names the argument.

Each example draws an entry point, a valid call of it and one wrong value; the call must raise ValueError or TypeError,
and nothing else. `GDN_CP_FUZZ=10000` draws that many examples (300 without).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

import gdn_cp  # noqa: E402
from gdn_cp import GatedDeltaNet, GdnDims, ThdLayout  # noqa: E402
from gdn_cp.comm.all_to_all import cp_to_hp, hp_to_cp  # noqa: E402
from gdn_cp.comm.layout import pad_cu_seqlens  # noqa: E402

EXAMPLES = int(os.environ.get("GDN_CP_FUZZ", "300"))

Draw = Callable[[Any], Any]
BAD_OBJECTS: tuple[Any, ...] = ("x", b"x", 3, 1.5, [1.0], (), {}, object(), float("nan"), np.zeros(3), Tensor)


@dataclass
class Call:
    """A valid call, and for each argument what may be drawn in its place."""

    function: Callable[..., Any]
    arguments: dict[str, Any]
    wrong: dict[str, list[Any]] = field(default_factory=dict)


def of_type(*right: type) -> list[Any]:
    return [bad for bad in BAD_OBJECTS if not isinstance(bad, right)]


def tensors(good: Tensor, *, dims: tuple[int, ...] | None = None, dtypes: tuple[torch.dtype, ...] = ()) -> list[Any]:
    """What no [..] tensor of this shape may be: other types, dimensions, sizes (of `dims`), dtypes, devices."""
    wrong: list[Any] = of_type(Tensor)
    wrong += [good[None], good.flatten()[:1].sum(), *([good.flatten()] if good.dim() > 1 else [])]
    for dim in range(good.dim()) if dims is None else dims:
        for size in (good.shape[dim] + 1, 2 * good.shape[dim] + 3, 0):
            if size != good.shape[dim]:
                shape = list(good.shape)
                shape[dim] = size
                wrong.append(good.new_zeros(shape))
    wrong += [good.to(dtype) for dtype in (torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn, *dtypes)]
    return [*wrong, good.to("meta")]


SIZES: list[Any] = [0, -1, -(2**70), None, "2", 2.0, float("nan"), [2], (), object(), np.float32(2), torch.tensor(2.5)]
INDICES: list[Any] = [-1, 10**30, 2**31, *SIZES[2:]]
NOT_LENGTHS: list[Any] = [
    None, 8, "ab", 1.5, [0.0, 8.0], [0, float("nan")], [[0, 8]], [0, [1, 2]], [0, "8"], [True, False], object(), {},
    {0: 8}, np.array([0.0, 8.0]), torch.tensor([0.0, 8.0]), torch.tensor([[0, 8]]), torch.tensor(8), torch.tensor(
    [False, True]), torch.tensor([0, 8], device="meta"), torch.tensor([0j, 1j]), [0, 2**70], [0, None], np.array(["0"]),
]  # fmt: skip
NOT_BOUNDARIES: list[Any] = [*NOT_LENGTHS, [], [0], [1, 8], [-8, 8], [0, 8, 4], [0, -8], [0, 2**31], [0, 2**63 - 1]]
NOT_DEVICES: list[Any] = ["nope", "cpu:x", "", 1.5, [], object(), *([] if torch.cuda.is_available() else ["cuda", 0])]
NOT_KINDS: list[Any] = ["", "ZIGZAG", "zig zag", None, 1, [], b"zigzag", ("zigzag",)]
NOT_BACKENDS: list[Any] = ["", "Triton", "cuda", 1, [], b"reference", object()]
NOT_FLAGS: list[Any] = ["no", None, 2, [], torch.tensor(True)]
NOT_SCALES: list[Any] = ["1", True, float("nan"), float("inf"), -float("inf"), [1.0], (), torch.tensor(1.0), object()]


def delta_rule(draw: Draw, *, chunk: bool) -> Call:
    B, T, H, ratio, K, V = (draw(st.integers(1, n)) for n in (2, 5, 3, 3, 4, 4))
    HV = H * ratio
    dtype = draw(st.sampled_from((torch.float32, torch.bfloat16, torch.float64)))
    other = torch.float32 if dtype != torch.float32 else torch.float16
    gate, packed, v_first = draw(st.booleans()), draw(st.booleans()), draw(st.booleans())
    cut = draw(st.integers(0, T))
    B = 1 if packed else B
    N = 2 if packed else B
    state = torch.zeros((N, HV, V, K) if v_first else (N, HV, K, V))
    state = state.double() if dtype == torch.float64 else state
    q, k = torch.randn(2, B, T, H, K).to(dtype)
    v, g, beta = torch.randn(B, T, HV, V).to(dtype), -torch.rand(B, T, HV), torch.rand(B, T, HV)
    good: dict[str, Any] = {
        "q": q,
        "k": k,
        "v": v,
        "g": g,
        "beta": beta,
        "initial_state": state,
        "state_v_first": v_first,
    }
    wrong: dict[str, list[Any]] = {
        "q": [None, *tensors(q, dtypes=(other,))],
        "k": [None, *tensors(k, dtypes=(other,))],
        "v": [None, *tensors(v, dims=(0, 1), dtypes=(other,)), v[:, :, :0], v[..., :0]],
        "g": tensors(g),
        "beta": tensors(beta),
        "initial_state": tensors(state, dtypes=(torch.bfloat16, torch.float16)),
        "scale": NOT_SCALES,
        "backend": NOT_BACKENDS,
    }
    flags = ("output_final_state", "use_qk_l2norm_in_kernel", "use_gate_in_kernel", "use_beta_sigmoid_in_kernel")
    wrong |= dict.fromkeys((*flags, "state_v_first"), NOT_FLAGS)
    A_log, dt_bias = torch.zeros(HV), torch.ones(HV)
    if gate:
        good |= {"use_gate_in_kernel": True, "A_log": A_log, "dt_bias": dt_bias}
        wrong |= {"A_log": [None, *tensors(A_log)], "dt_bias": tensors(dt_bias)}
    else:  # they would be ignored
        wrong |= {"A_log": [A_log, *of_type()], "dt_bias": [dt_bias, *of_type()]}
    if packed:
        cu = torch.tensor([0, cut, T])
        good["cu_seqlens"] = cu
        bounds = [cu + 1, cu - 1, torch.tensor([0, cut, T + 1]), torch.tensor([0, T + 1, T]), cu[:1], cu[None], cu[:0]]
        wrong["cu_seqlens"] = [*of_type(Tensor), *bounds, cu.float(), cu.short(), cu.to("meta")]
    if chunk:
        return Call(gdn_cp.chunk_gated_delta_rule, good, wrong)
    for name in ("q", "k", "v", "g", "beta", "initial_state"):
        wrong[name].append(good[name].clone().requires_grad_())
    if draw(st.booleans()):
        slots = torch.arange(N)
        good["state_indices"] = slots
        not_slots = [x for x in tensors(slots) if not isinstance(x, Tensor) or x.dtype != torch.int32]
        wrong["state_indices"] = [*not_slots, slots.float(), slots.short()]
        wrong["initial_state"] = [None, *tensors(state, dims=(1, 2, 3))]
    return Call(gdn_cp.fused_recurrent_gated_delta_rule, good, wrong)


def gate_call(draw: Draw) -> Call:
    HV, rows = draw(st.integers(2, 4)), draw(st.integers(1, 4))
    g, A_log, dt_bias = torch.randn(rows, HV), torch.zeros(HV), torch.ones(HV)
    bad_g = [None, *of_type(Tensor), torch.zeros(()), g.int(), g.bool(), g.to(torch.complex64), g.to("meta")]
    wrong = {"g": [*bad_g, g[:, 1:]], "A_log": [None, *tensors(A_log)], "dt_bias": tensors(dt_bias)}
    return Call(gdn_cp.fused_gdn_gate, {"g": g, "A_log": A_log, "dt_bias": dt_bias}, wrong)


def layout_call(draw: Draw) -> Call:
    ranks = draw(st.integers(1, 4))
    kind = draw(st.sampled_from(("zigzag", "contiguous")))
    lengths = draw(st.lists(st.integers(0, 3), min_size=1, max_size=4))
    if not any(lengths):
        lengths[0] = 1
    cu = [0, *np.cumsum(lengths).tolist()]
    cu = [2 * ranks * bound for bound in cu]
    seqlens = [max(0, length - draw(st.integers(0, 2))) for length in np.diff(cu).tolist()]
    longer = [length + 1 for length in np.diff(cu).tolist()]
    odd = [[0, 2 * ranks + 1]] if ranks > 1 else []
    wrong = {
        "cu_seqlens": [*NOT_BOUNDARIES[:-1], *odd, [0, 2**63 - 1]],
        "cp_size": [*SIZES, 10**30, 2**63 - 1, 2**31, cu[-1] + 1],
        "seqlens": [*NOT_LENGTHS[1:], [-1] * len(seqlens), longer, [*seqlens, 0], seqlens[1:]],
        "device": NOT_DEVICES,
    }
    return Call(getattr(ThdLayout, kind), {"cu_seqlens": cu, "cp_size": ranks, "seqlens": seqlens}, wrong)


def batched_call(draw: Draw) -> Call:
    batch, chunk, ranks = (draw(st.integers(1, 4)) for _ in range(3))
    wrong = {
        "batch": [*SIZES, 2**31, 2**62, 10**30],
        "seqlen": [*SIZES, 2**31, 2**62, 10**30, *([2 * ranks + 1] if ranks > 1 else [])],
        "cp_size": [*SIZES, 2**31, 2**62, 10**30],
        "kind": NOT_KINDS,
        "device": NOT_DEVICES,
    }
    return Call(ThdLayout.batched, {"batch": batch, "seqlen": 2 * ranks * chunk, "cp_size": ranks}, wrong)


def padding_call(draw: Draw) -> Call:
    cu = [0, *np.cumsum(draw(st.lists(st.integers(0, 9), min_size=1, max_size=4))).tolist()]
    wrong = {
        "cu_seqlens": NOT_BOUNDARIES,
        "cp_size": [*SIZES, 2**62, 10**30],
        "kind": NOT_KINDS,
        "local_multiple": [*SIZES, 2**62, 10**30],
        "total": [*(size for size in SIZES if size is not None), 2**31, 2**62, 10**30],
    }
    return Call(pad_cu_seqlens, {"cu_seqlens": cu, "cp_size": draw(st.integers(1, 4))}, wrong)


def some_layout(draw: Draw, ranks: int) -> ThdLayout:
    make = draw(st.sampled_from((ThdLayout.zigzag, ThdLayout.contiguous)))
    lengths = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    return make([2 * ranks * bound for bound in [0, *np.cumsum(lengths).tolist()]], ranks)


def layout_method_call(draw: Draw) -> Call:
    ranks = draw(st.integers(1, 4))
    layout = some_layout(draw, ranks)
    x = torch.randn(layout.t_global, 2)
    parts = [layout.shard(x, rank) for rank in range(ranks)]
    rank = {"rank": ranks - 1}
    not_ranks = {"rank": [*INDICES, ranks]}
    not_sizes = [*SIZES, 10**30, ranks + 1]
    bad_x = [None, *of_type(Tensor), x[1:], x[:0], torch.zeros(())]
    bad_parts = [None, 3, "x", object(), [], parts[1:], [*parts, parts[0]], [part[1:] for part in parts], ["x"] * ranks]
    calls = [
        Call(layout.local_rows, rank, not_ranks),
        Call(layout.local_positions, rank, not_ranks),
        Call(layout.local_padding, rank, not_ranks),
        Call(
            layout.segments,
            {"a2a_size": 1, "group_index": 0},
            {"a2a_size": not_sizes, "group_index": not_ranks["rank"]},
        ),
        Call(layout.chains, {"a2a_size": 1}, {"a2a_size": not_sizes}),
        Call(layout.shard, {"x": x, **rank}, {"x": bad_x, **not_ranks}),
        Call(layout.unshard, {"parts": parts}, {"parts": [*bad_parts, [None] * ranks, [1.5] * ranks]}),
        Call(layout.to, {"device": "cpu"}, {"device": NOT_DEVICES}),
    ]
    return draw(st.sampled_from(calls))


def exchange_call(draw: Draw, group: Any = None) -> Call:
    ranks = 1 if group is None else group.size()
    layout = some_layout(draw, ranks)
    heads = [ranks * n for n in draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))]
    function = draw(st.sampled_from((cp_to_hp, hp_to_cp)))
    rows, share = (layout.t_local, 1) if function is cp_to_hp else (layout.t_global, ranks)
    x = torch.randn(rows, sum(heads) // share)
    good: dict[str, Any] = {"x": x, "layout": layout, "group": group, "sections": heads}
    bad_x = [None, *of_type(Tensor), x[0], x[1:], x[:, 1:], torch.zeros(()), x.bool(), x.to(torch.complex64)]
    wrong = {
        "x": [*bad_x, x.to("meta"), [], [None], ["x"], [x, x[1:]], [x, x.double()], torch.cat([x, x], 1)],
        "layout": [None, *of_type(), some_layout(draw, ranks + 1)],
        "group": ["x", 3, object(), [], *([None] if ranks > 1 else [])],
        "sections": [3, "ab", 1.5, [1.5], [None], ["a"], [-1], [[]], [sum(heads) + ranks], [*heads, ranks], object(),
                     [float("nan")], [10**30], [*heads, -ranks, ranks], [[[1]]], {}, [True, "x"]],
        "a2a_size": [*(s for s in SIZES if s is not None), ranks + 1, 10**30],
    }  # fmt: skip
    return Call(function, good, wrong)


def mixer_call(draw: Draw, group: Any = None) -> Call:
    ranks = 1 if group is None else group.size()
    H, ratio, K, V = (draw(st.integers(1, n)) for n in (2, 2, 4, 4))
    dims = GdnDims(ranks * H, ranks * H * ratio, K, V, 3)
    layout = some_layout(draw, ranks)
    projected = torch.randn(layout.t_local, dims.in_proj_dim)
    HV = dims.num_v_heads
    parameters = {
        "conv1d_weight": torch.randn(dims.conv_dim, 1, 3),
        "A_log": torch.zeros(HV),
        "dt_bias": torch.ones(HV),
        "out_norm_weight": torch.ones(V),
    }
    good = {"projected": projected, "dims": dims, "layout": layout, "group": group, **parameters}
    half = (torch.bfloat16, torch.float64)
    wrong: dict[str, list[Any]] = {
        "projected": [None, *tensors(projected)],
        "dims": [None, *of_type(), (1, 2, 3, 4)],
        "layout": [*of_type(), some_layout(draw, ranks + 1)],
        "group": ["x", 3, object(), []],
        "a2a_size": [*(s for s in SIZES if s is not None), ranks + 1, 10**30],
        "norm_eps": ["1", None, float("nan"), -1.0, [], object()],
        "backend": NOT_BACKENDS,
        "conv1d_bias": tensors(torch.zeros(dims.conv_dim)),
        **{name: [None, *tensors(p, dtypes=half if p.shape == (HV,) and name != "out_norm_weight" else ())]
           for name, p in parameters.items()},
    }  # fmt: skip
    return Call(gdn_cp.gated_delta_net_mixer, good, wrong)


def module_call(draw: Draw) -> Call:
    H, ratio = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    good = {"hidden_size": 8, "num_k_heads": H, "num_v_heads": H * ratio, "head_k_dim": 4, "head_v_dim": 2}
    wrong: dict[str, list[Any]] = {name: [*SIZES] for name in (*good, "conv_kernel")}
    wrong["num_v_heads"] = [*SIZES, *([H * ratio + 1] if H > 1 else [])]
    wrong |= {"norm_eps": ["1", None, float("nan"), -1.0, [], object()], "device": NOT_DEVICES}
    wrong["dtype"] = ["float32", 1, torch.int32, torch.bool, torch.complex64, object()]
    return Call(GatedDeltaNet, good, wrong)


def forward_call(draw: Draw) -> Call:
    layer = GatedDeltaNet(8, 1, 2, 4, 2)
    layout = some_layout(draw, 1)
    x = torch.randn(layout.t_local, 8)
    wrong: dict[str, list[Any]] = {
        "hidden_states": [
            None,
            *of_type(Tensor),
            x[1:],
            x[:, 1:],
            x[None, None],
            torch.zeros(()),
            x.long(),
            x.to("meta"),
        ],
        "layout": [None, *of_type(), some_layout(draw, 2)],
        "group": ["x", 3, object(), []],
        "a2a_size": [*(s for s in SIZES if s is not None), 2, 10**30],
        "backend": NOT_BACKENDS,
    }
    return Call(layer.forward, {"hidden_states": x, "layout": layout}, wrong)


ENTRIES: dict[str, Callable[[Draw], Call]] = {
    "chunk_gated_delta_rule": lambda draw: delta_rule(draw, chunk=True),
    "fused_recurrent_gated_delta_rule": lambda draw: delta_rule(draw, chunk=False),
    "fused_gdn_gate": gate_call,
    "ThdLayout": layout_call,
    "ThdLayout.batched": batched_call,
    "ThdLayout methods": layout_method_call,
    "pad_cu_seqlens": padding_call,
    "exchange": exchange_call,
    "mixer": mixer_call,
    "GatedDeltaNet": module_call,
    "GatedDeltaNet.forward": forward_call,
}


def show(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"tensor {tuple(value.shape)} {value.dtype} {value.device} grad={value.requires_grad}"
    return repr(value)


def check(call: Call, draw: Draw) -> None:
    """Draw one wrong argument; the call must refuse it by name."""
    name = draw(st.sampled_from(sorted(call.wrong)))
    value = call.wrong[name][draw(st.integers(0, len(call.wrong[name]) - 1))]
    what = f"{call.function.__qualname__}({name}={show(value)})"
    try:
        call.function(**{**call.arguments, name: value})
    except Exception as error:
        refusal = error
    else:
        pytest.fail(f"{what}: was accepted")
    assert isinstance(refusal, (ValueError, TypeError)), f"{what}: raised {type(refusal).__name__}: {refusal}"
    # What torch or Python itself complains of does not name our argument.
    assert re.search(rf"\b{name}\b", str(refusal)), f"{what}: {type(refusal).__name__} does not name it: {refusal}"


def quiet(examples: int) -> Any:
    return settings(
        max_examples=max(1, examples),
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink),
    )


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_wrong_argument_is_refused_by_name(entry):
    @quiet(EXAMPLES // len(ENTRIES) + 1)
    @given(data=st.data())
    def fuzz(data: Any) -> None:
        check(ENTRIES[entry](data.draw), data.draw)

    fuzz()


@pytest.mark.parametrize("entry", ENTRIES)
def test_the_calls_that_are_made_wrong_are_right(entry):
    @quiet(20)
    @given(data=st.data())
    def run(data: Any) -> None:
        call = ENTRIES[entry](data.draw)
        assert call.function(**call.arguments) is not None or entry == "ThdLayout methods"

    run()


def _fuzz_on_two_ranks(rank: int, world_size: int, examples: int) -> int:
    """The collective functions in a real group: both ranks draw the same, so they refuse alike and nobody waits."""
    import torch.distributed as dist

    count = 0

    def fuzz(make: Any) -> None:
        @settings(quiet(examples), derandomize=True)
        @given(data=st.data())
        def one(data: Any) -> None:
            nonlocal count
            count += 1
            check(make(data.draw, dist.group.WORLD), data.draw)

        one()

    fuzz(exchange_call)
    fuzz(mixer_call)
    return count


def test_ranks_of_a_group_refuse_alike_and_nobody_waits(run_ranks):
    counts = run_ranks(_fuzz_on_two_ranks, 2, max(10, EXAMPLES // 20), timeout=240)
    assert counts[0] == counts[1] >= 20
