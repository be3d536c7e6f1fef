"""The mixer and the plain layer: documents apart, padding without effect, any cut over ranks alike, clear refusals."""

from __future__ import annotations

import copy
import re
from itertools import accumulate
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from gdn_cp import GatedDeltaNet, GdnDims, ThdLayout, gated_delta_net_mixer
from gdn_cp.comm.layout import pad_cu_seqlens

HIDDEN = 24
DIMS = GdnDims(num_k_heads=4, num_v_heads=8, head_k_dim=8, head_v_dim=4, conv_kernel=4)
# Sums in float64 in another order: some thousand terms of 1e-16 each.
ROUNDING = 1e-12
# What a cut adds in float32: sums over tokens in another order, a rounding of 6e-8 for each of some hundred terms.
ROUNDING32 = 1e-5


def layer(dtype: torch.dtype = torch.float64, seed: int = 0, **kwargs: Any) -> GatedDeltaNet:
    torch.manual_seed(seed)
    return GatedDeltaNet(HIDDEN, 4, 8, 8, 4, dtype=dtype, **kwargs)


def mixer_arguments(module: GatedDeltaNet) -> dict[str, Any]:
    return {
        "dims": module.dims,
        "conv1d_weight": module.conv1d.weight,
        "conv1d_bias": module.conv1d.bias,
        "A_log": module.A_log,
        "dt_bias": module.dt_bias,
        "out_norm_weight": module.out_norm.weight,
    }


def relative(value: Tensor, expected: Tensor) -> float:
    return float((value - expected).detach().norm() / expected.detach().norm().clamp_min(1e-30))


def test_packed_documents_are_as_if_alone():
    module, lengths = layer(), [5, 1, 0, 70, 3]
    documents = [torch.randn(n, HIDDEN, dtype=torch.float64) for n in lengths]
    cu = [0, 5, 6, 6, 76, 79]
    packed = module(torch.cat(documents), layout=ThdLayout.zigzag(cu, 1))
    for document, rows in zip(documents, packed.split(lengths), strict=True):
        if len(document):
            assert relative(rows, module(document[None])[0]) < ROUNDING


def test_no_gradient_crosses_documents():
    module = layer()
    x = torch.randn(30, HIDDEN, dtype=torch.float64, requires_grad=True)
    out = module(x, layout=ThdLayout.zigzag([0, 9, 10, 30], 1))
    (gradient,) = torch.autograd.grad(out[9:10].sum(), x)
    assert gradient[9].abs().sum() > 0
    assert not gradient[:9].any()
    assert not gradient[10:].any()


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_padded_rows_are_zero_and_without_effect(bad):
    """Whatever stands in padded rows, and whatever gradient arrives there."""
    module = layer(conv_bias=True)
    padded = pad_cu_seqlens([0, 5, 6, 21], 2)
    layout = ThdLayout.zigzag(padded.cu_seqlens, 1, seqlens=padded.seqlens)
    real = torch.randn(21, module.dims.in_proj_dim, dtype=torch.float64)
    upstream = torch.randn(21, 32, dtype=torch.float64)
    results = []
    for x, dy, this_layout in (
        (real, upstream, ThdLayout.zigzag([0, 5, 6, 21], 1)),
        (padded.pad(real, bad), padded.pad(upstream, bad), layout),
    ):
        module.zero_grad()
        x = x.requires_grad_()
        out = gated_delta_net_mixer(x, **mixer_arguments(module), layout=this_layout)
        out.backward(dy)
        results.append((out, x.grad, {name: p.grad for name, p in module.named_parameters() if p.grad is not None}))
        if this_layout is layout:
            assert not out[padded.mask].any()
            assert not x.grad[padded.mask].any()
    (out, dx, gradients), (padded_out, padded_dx, padded_gradients) = results
    assert relative(padded.unpad(padded_out), out) < ROUNDING
    assert relative(padded.unpad(padded_dx), dx) < ROUNDING
    assert len(gradients) == 5
    for name, gradient in gradients.items():
        assert relative(padded_gradients[name], gradient) < ROUNDING, name


def test_batched_input_in_both_orders_equals_sequence_by_sequence():
    module = layer(conv_bias=True)
    x = torch.randn(3, 13, HIDDEN, dtype=torch.float64)
    expected = torch.cat([module(sequence[None]) for sequence in x])
    assert relative(module(x), expected) < ROUNDING
    assert relative(module(x, layout=ThdLayout.batched(3, 13, 1)), expected) < ROUNDING
    assert relative(module(x.transpose(0, 1), batch_first=False).transpose(0, 1), expected) < ROUNDING


def test_mixer_without_a_layout_is_one_sequence():
    module = layer()
    x = torch.randn(17, module.dims.in_proj_dim, dtype=torch.float64)
    alone = gated_delta_net_mixer(x, **mixer_arguments(module))
    assert torch.equal(alone, gated_delta_net_mixer(x, **mixer_arguments(module), layout=ThdLayout.zigzag([0, 17], 1)))


@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.bfloat16()])
def test_gate_parameters_stay_float32_through_casts(cast):
    module = layer(torch.float32)
    module(torch.randn(1, 4, HIDDEN)).sum().backward()
    before, gradient = module.A_log.detach().clone(), module.A_log.grad.clone()
    outer = cast(torch.nn.Sequential(module))
    assert outer[0].in_proj.weight.dtype == outer[0].out_norm.weight.dtype != torch.float32
    assert outer[0].A_log.dtype == outer[0].dt_bias.dtype == outer[0].A_log.grad.dtype == torch.float32
    assert torch.equal(outer[0].A_log, before)
    assert torch.equal(outer[0].A_log.grad, gradient)
    outer.to("meta")
    assert outer[0].A_log.device.type == "meta"
    assert GatedDeltaNet(HIDDEN, 4, 8, 8, 4, dtype=torch.bfloat16).A_log.dtype == torch.float32


def test_half_precision_is_near_float32():
    exact = layer(torch.float32)
    x = torch.randn(1, 40, HIDDEN)
    half = copy.deepcopy(exact).bfloat16()
    out = half(x.bfloat16())
    assert out.dtype == torch.bfloat16
    assert relative(out.float(), exact(x)) < 0.03  # some ten roundings of 2^-9 in a row


def test_dims_count_the_sections():
    assert DIMS.sections == (32, 32, 32, 32, 8, 8)
    assert (DIMS.conv_dim, DIMS.in_proj_dim) == (96, 144)
    assert DIMS.per_rank(4) == GdnDims(1, 2, 8, 4, 4)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((0, 8, 8, 4), "num_k_heads=0"),
        ((4, 6, 8, 4), "num_v_heads=6 must be a multiple of num_k_heads=4"),
        ((8, 4, 8, 4), "num_v_heads=4 must be a multiple"),
    ],
)
def test_dims_refuse_impossible_heads(sizes, message):
    with pytest.raises(ValueError, match=message):
        GdnDims(*sizes)


def _random_batches(cp_size: int) -> list[ThdLayout]:
    """Random packs of both layouts, with empty sequences and padding, and batches of equal sequences."""
    generator = torch.Generator().manual_seed(cp_size)
    layouts = []
    for index in range(4):
        lengths = torch.randint(0, 40, (5,), generator=generator).tolist()
        lengths[index % 5] = 0
        kind = ("zigzag", "contiguous")[index % 2]
        padded = pad_cu_seqlens([0, *accumulate(lengths)], cp_size, kind)
        make = ThdLayout.zigzag if kind == "zigzag" else ThdLayout.contiguous
        layouts.append(make(padded.cu_seqlens, cp_size, seqlens=padded.seqlens))
    return layouts + [ThdLayout.batched(2, 8 * cp_size, cp_size, kind=kind) for kind in ("zigzag", "contiguous")]


def _run_layer(module: GatedDeltaNet, x: Tensor, dy: Tensor, **call: Any) -> dict[str, Tensor]:
    module.zero_grad()
    x = x.clone().requires_grad_()
    out = module(x, **call)
    out.backward(dy)
    assert x.grad is not None
    return {"out": out.detach(), "input": x.grad}


def _run_mixer(module: GatedDeltaNet, projected: Tensor, **call: Any) -> tuple[Tensor, Tensor]:
    projected = projected.clone().requires_grad_()
    mixed = gated_delta_net_mixer(projected, **mixer_arguments(module), **call)
    mixed.square().sum().backward()
    assert projected.grad is not None
    return mixed.detach(), projected.grad


def _compare_cuts(rank: int, world_size: int) -> dict[str, Any]:
    """Errors against the uncut batch and whether the mixer's bits are the same, for cp 2 and cp 4."""
    pair = [dist.new_group([0, 1]), dist.new_group([2, 3])][rank // 2]
    errors: dict[str, float] = {}
    bitwise: dict[str, bool] = {}
    for dtype in (torch.float64, torch.float32):
        module = layer(dtype, conv_bias=True)
        for group in (pair, dist.group.WORLD):
            for index, layout in enumerate(_random_batches(group.size())):
                key = f"cp{group.size()} {dtype} {index}"
                torch.manual_seed(index)
                x, dy = torch.randn(2, layout.t_global, HIDDEN, dtype=dtype)
                projected = torch.randn(layout.t_global, DIMS.in_proj_dim, dtype=dtype)
                uncut = {"layout": ThdLayout.zigzag(layout.cu_seqlens, 1, seqlens=layout.seqlens)}
                cut = {"layout": layout, "group": group}

                def mine(whole: Tensor, layout=layout, group=group) -> Tensor:
                    return layout.shard(whole, group.rank())

                whole_layer = _run_layer(module, x, dy, **uncut)
                whole_grads = {name: p.grad.clone() for name, p in module.named_parameters()}
                part = _run_layer(module, mine(x), mine(dy), **cut)
                errors.update({f"{key} {name}": relative(part[name], mine(whole_layer[name])) for name in part})
                for name, p in module.named_parameters():
                    dist.all_reduce(p.grad, group=group)
                    errors[f"{key} {name}"] = relative(p.grad, whole_grads[name])

                pairs = zip(
                    _run_mixer(module, mine(projected), **cut), _run_mixer(module, projected, **uncut), strict=True
                )
                bitwise[key] = all(torch.equal(value, mine(whole)) for value, whole in pairs)
    return {"errors": errors, "bitwise": bitwise}


@pytest.fixture(scope="module")
def compared_cuts() -> list[dict[str, Any]]:
    from tests.ranks import run_ranks

    return run_ranks(_compare_cuts, 4)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", ROUNDING), ("float32", ROUNDING32)])
@pytest.mark.parametrize("cp", ["cp2", "cp4"])
def test_cut_over_ranks_equals_one_rank(compared_cuts, cp, dtype, tolerance):
    """Output, input gradient and every parameter gradient summed over ranks, on every rank."""
    for result in compared_cuts:
        errors = {key: e for key, e in result["errors"].items() if key.startswith(cp) and dtype in key}
        assert len(errors) == 6 * (2 + 7)
        assert all(error < tolerance for error in errors.values()), max(errors.items(), key=lambda item: item[1])


def test_mixer_bits_do_not_depend_on_the_cut(compared_cuts):
    for result in compared_cuts:
        assert len(result["bitwise"]) == 2 * 2 * 6
        assert all(result["bitwise"].values()), [key for key, same in result["bitwise"].items() if not same]


def _bad_calls(group: dist.ProcessGroup) -> dict[str, tuple[Any, str]]:
    """What a user can get wrong, and what the message must say."""
    module = layer(torch.float32)
    layout = ThdLayout.zigzag([0, 8, 16], 2)
    x = torch.randn(layout.t_local, HIDDEN)
    projected = torch.randn(layout.t_local, DIMS.in_proj_dim)
    good = mixer_arguments(module)

    def mixer(**changed: Any):
        return lambda: gated_delta_net_mixer(
            **{"projected": projected, "layout": layout, "group": group, **good, **changed}
        )

    def forward(hidden: Tensor, **call: Any):
        return lambda: module(hidden, **call)

    odd_heads = GatedDeltaNet(HIDDEN, 3, 6, 8, 4)
    gate = torch.zeros(8, dtype=torch.bfloat16)
    return {
        "no layout": (mixer(layout=None), "layout=None with a group of 2 ranks"),
        "packed rows without layout": (forward(x), "layout=None with packed rows"),
        "packed rows on ranks without layout": (forward(x, group=group), "layout=None with packed rows"),
        "batch on ranks without layout": (forward(x[None], group=group), r"ThdLayout.batched\(1, 16, 2, kind="),
        "layout without group": (forward(x, layout=layout), "layout.cp_size=2 but group has 1 rank"),
        "layout of another size": (mixer(layout=ThdLayout.zigzag([0, 16], 4)), "layout.cp_size=4 but group has 2"),
        "whole batch instead of a share": (
            mixer(projected=projected.repeat(2, 1)),
            "projected has 16 rows but layout.t_local=8",
        ),
        "width": (mixer(projected=projected[:, 1:]), r"shape \(8, 143\), expected \[rows, 144\]"),
        "integers": (mixer(projected=projected.long()), "dtype torch.int64"),
        "hidden width": (forward(x[:, 1:], layout=layout, group=group), r"shape \(8, 23\)"),
        "another batch": (
            forward(x.view(4, 2, HIDDEN), layout=layout, group=group),
            "holds 4 sequences of 2 local tokens",
        ),
        "flat cut of a batch": (
            forward(x.view(2, 4, HIDDEN), layout=ThdLayout.contiguous([0, 8, 16], 2), group=group),
            "holds 2 sequences of 4 local tokens",
        ),
        "a2a_size no divisor": (mixer(a2a_size=3), "a2a_size: got 3; it must divide cp_size = "),
        "heads not divisible": (
            lambda: odd_heads(x, layout=layout, group=group),
            r"num_k_heads=3 .* is not divisible by a2a_size=2",
        ),
        "A_log missing": (mixer(A_log=None), "A_log=None"),
        "A_log in bf16": (mixer(A_log=gate), "A_log has dtype torch.bfloat16, expected torch.float32"),
        "dt_bias in bf16": (mixer(dt_bias=gate), "dt_bias has dtype torch.bfloat16"),
        "A_log of another length": (mixer(A_log=torch.zeros(4)), r"A_log has shape \(4,\), expected \(8,\)"),
        "convolution": (mixer(conv1d_weight=torch.zeros(96, 4)), r"conv1d_weight has shape \(96, 4\)"),
        "norm": (mixer(out_norm_weight=torch.ones(8)), r"out_norm_weight has shape \(8,\)"),
        "parameter on another device": (mixer(A_log=good["A_log"].to("meta")), "A_log is on meta"),
        "layout on another device": (mixer(layout=layout.to("meta")), "layout is on meta"),
        "unknown backend": (mixer(backend="quick"), "unknown backend 'quick'"),
    }


def _refusals(rank: int, world_size: int) -> dict[str, str]:
    """By name of the bad call: nothing where it was refused as it should be, else what happened."""
    heard = {}
    for name, (call, message) in _bad_calls(dist.group.WORLD).items():
        try:
            call()
            heard[name] = "accepted"
        except ValueError as error:
            heard[name] = "" if re.search(message, str(error)) else str(error)
        count = torch.ones(1)
        dist.all_reduce(count)  # with a rank left inside a collective this would give another number, or never end
        assert count.item() == world_size
    return heard


def test_every_bad_call_is_refused_on_every_rank(run_ranks):
    for heard in run_ranks(_refusals, 2, timeout=60):
        assert len(heard) == 23
        assert not {name: what for name, what in heard.items() if what}
