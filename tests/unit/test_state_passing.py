"""The mixer with state passing, every (cp, a2a_size): output and every gradient on each rank against one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gdn_cp import GdnDims, gated_delta_net_mixer
from gdn_cp.comm.groups import cp_groups
from gdn_cp.comm.layout import ThdLayout, pad_cu_seqlens
from gdn_cp.kernels.segments import RuleOptions, TokenInputs
from gdn_cp.state_passing import state_passing_delta_rule
from tests.state_cases import build, divisors, few_worlds, group_rows, packs, relative_error

Results = dict[str, Tensor]
# Sums in float64 in another order: some thousand terms of 1e-16 each.
ROUNDING = 1e-12
# In float32 the same of 6e-8 each, for each of some hundred terms.
TOLERANCE = {torch.float64: ROUNDING, torch.float32: 1e-5}


def parameters(dims: GdnDims, dtype: torch.dtype, decay: float = 0.0) -> Results:
    """Parameters of a mixer; the larger `decay`, the faster its heads forget."""
    draw = torch.Generator().manual_seed(5)
    gate = torch.float64 if dtype == torch.float64 else torch.float32
    shapes = {
        "conv1d_weight": (dims.conv_dim, 1, dims.conv_kernel),
        "conv1d_bias": (dims.conv_dim,),
        "A_log": (dims.num_v_heads,),
        "dt_bias": (dims.num_v_heads,),
        "out_norm_weight": (dims.head_v_dim,),
    }
    made = {name: torch.randn(*shape, generator=draw, dtype=torch.float64) for name, shape in shapes.items()}
    made["A_log"] = 0.5 * made["A_log"] - 2 + decay
    return {name: x.to(gate if name in ("A_log", "dt_bias") else dtype) for name, x in made.items()}


def batch(dims: GdnDims, tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The projection's output and the gradient of the mixer's, the same wherever they are made."""
    draw = torch.Generator().manual_seed(6)
    width = dims.num_v_heads * dims.head_v_dim
    return (
        torch.randn(tokens, dims.in_proj_dim, generator=draw, dtype=torch.float64).to(dtype),
        torch.randn(tokens, width, generator=draw, dtype=torch.float64).to(dtype),
    )


def run_mixer(dims: GdnDims, projected: Tensor, d_out: Tensor, decay: float = 0.0, **call: Any) -> Results:
    """Output, input gradient and parameter gradients of one call."""
    leaves = {name: x.requires_grad_() for name, x in parameters(dims, projected.dtype, decay).items()}
    x = projected.clone().requires_grad_()
    out = gated_delta_net_mixer(x, dims=dims, **leaves, **call)
    out.backward(d_out)
    return {"out": out.detach(), "projected": x.grad} | {name: leaf.grad for name, leaf in leaves.items()}


def single_process(dims: GdnDims, cu: list[int], dtype: torch.dtype, backend: str, decay: float = 0.0) -> Results:
    projected, d_out = batch(dims, cu[-1], dtype)
    return run_mixer(dims, projected, d_out, decay, layout=ThdLayout.zigzag(cu, 1), backend=backend)


Cut = tuple[str, list[int], Results]
"""Layout kind, boundaries, the result of one process, of the dtype in which to compare."""


def size_of(name: str, expected: Results, dims: GdnDims) -> float:
    """What an error is measured by: the size of the whole result, of which a rank may hold next to nothing.

    The gradients of A_log and dt_bias are sums over tokens that may cancel; a sum is rounded as its terms are large.
    Those of dt_bias are the gradient of alpha, those of A_log that times softplus / sigmoid >= 1.
    """
    size = float(expected[name].double().norm())
    if name not in ("A_log", "dt_bias"):
        return size
    d_alpha = expected["projected"][:, -dims.num_v_heads :]
    return max(size, float(d_alpha.double().norm()))


def errors_of_cuts(rank: int, world: int, cuts: list[Cut], dims: GdnDims) -> dict[str, float]:
    """This rank's error of everything over its tolerance, for each cut and each a2a_size that divides the heads."""
    errors = {}
    for kind, cu, expected in cuts:
        dtype = expected["out"].dtype
        layout = build(kind, cu, world)
        projected, d_out = (layout.shard(x, rank) for x in batch(dims, cu[-1], dtype))
        for a2a_size in divisors(world):
            if dims.num_k_heads % a2a_size:
                continue
            actual = run_mixer(dims, projected, d_out, layout=layout, group=dist.group.WORLD, a2a_size=a2a_size)
            for name, value in actual.items():
                if name in ("out", "projected"):
                    wanted = layout.shard(expected[name], rank)
                else:
                    dist.all_reduce(value)  # the sum over the group is the gradient
                    wanted = expected[name]
                scale = size_of(name, expected, dims) or 1.0
                error = float((value.double() - wanted.double()).norm()) / scale
                errors[f"{name}, {kind} {cu}, a2a_size {a2a_size}, {dtype}"] = error / TOLERANCE[dtype]
    return errors


def worst(results: list[dict[str, float]]) -> tuple[float, int, str]:
    return max((error, rank, name) for rank, errors in enumerate(results) for name, error in errors.items())


@pytest.mark.parametrize(("world", "heads"), [(2, (2, 4)), (4, (4, 4)), (4, (3, 6)), (6, (3, 6)), (8, (8, 8))], ids=str)
def test_every_a2a_size_on_random_packs(run_ranks, world, heads):
    dims = GdnDims(*heads, head_k_dim=4, head_v_dim=3, conv_kernel=4)

    @few_worlds
    @given(st.data())
    def check(data):
        packed = [(kind, data.draw(packs(world, kind))) for kind in ("zigzag", "contiguous")]
        cuts = [
            (kind, cu, single_process(dims, cu, dtype, backend))
            for kind, cu in packed
            if cu[-1]  # of an empty batch one process has no gradients to compare with
            for dtype, backend in ((torch.float64, "recurrent"), (torch.float32, "reference"))
        ]
        if cuts:
            error, rank, name = worst(run_ranks(errors_of_cuts, world, cuts, dims))
            assert error < 1, f"rank {rank}: {name}"

    check()


def test_long_sequences_of_many_chunks_and_batched_input(run_ranks):
    dims = GdnDims(2, 4, head_k_dim=16, head_v_dim=8)
    cuts = [
        (kind, cu, single_process(dims, cu, torch.float64, "reference"))
        for kind, cu in (("zigzag", [0, 560, 568, 696]), ("contiguous", [0, 3, 430, 600]), ("batched", [0, 300, 600]))
    ]
    error, rank, name = worst(run_ranks(errors_of_cuts, 4, cuts, dims))
    assert error < 1, f"rank {rank}: {name}"


def padded_rows(rank: int, world: int, dims: GdnDims, real: list[int], bad: float) -> dict[str, float]:
    padded = pad_cu_seqlens(real, world)
    layout = ThdLayout.zigzag(padded.cu_seqlens, world, seqlens=padded.seqlens)
    expected = single_process(dims, real, torch.float64, "reference")
    projected, d_out = batch(dims, real[-1], torch.float64)
    local = [layout.shard(padded.pad(x, bad), rank) for x in (projected, d_out)]
    errors = {}
    for a2a_size in divisors(world):
        actual = run_mixer(dims, *local, layout=layout, group=dist.group.WORLD, a2a_size=a2a_size)
        for name, value in actual.items():
            if name in ("out", "projected"):
                wanted = layout.shard(padded.pad(expected[name], 0.0), rank)
            else:
                dist.all_reduce(value)
                wanted = expected[name]
            errors[f"{name}, a2a_size {a2a_size}"] = relative_error(value, wanted)
    return errors


def test_padded_rows_are_without_effect(run_ranks):
    dims = GdnDims(2, 4, head_k_dim=4, head_v_dim=3)
    error, rank, name = worst(run_ranks(padded_rows, 2, dims, [0, 5, 6, 21], float("nan")))
    assert error < ROUNDING, f"rank {rank}: {name}"


def bf16_errors(rank: int, world: int, dims: GdnDims, cu: list[int], decays: list[float]) -> list[tuple]:
    """Per decay (relative errors of out and of the input gradient): one process, state passing, and repeated bits."""
    results = []
    for decay in decays:
        exact = [batch(dims, cu[-1], torch.bfloat16)[i].double() for i in range(2)]
        rounded = {name: x.double() for name, x in parameters(dims, torch.bfloat16, decay).items()}
        leaves = {name: x.requires_grad_() for name, x in rounded.items()}
        x = exact[0].clone().requires_grad_()
        out = gated_delta_net_mixer(x, dims=dims, **leaves, layout=ThdLayout.zigzag(cu, 1))
        out.backward(exact[1])
        whole = single_process(dims, cu, torch.bfloat16, "reference", decay)

        layout = ThdLayout.zigzag(cu, world)
        local = [layout.shard(y, rank) for y in batch(dims, cu[-1], torch.bfloat16)]
        call = {"layout": layout, "group": dist.group.WORLD, "a2a_size": 1}
        first, again = (run_mixer(dims, *local, decay, **call) for _ in range(2))
        same = all(torch.equal(first[name], again[name]) for name in first)
        errors = []
        for name, wanted in (("out", out.detach()), ("projected", x.grad)):
            assert wanted is not None
            parts = [torch.empty_like(first[name]) for _ in range(world)]
            dist.all_gather(parts, first[name])
            cut = relative_error(layout.unshard(parts), wanted)
            errors.append((relative_error(whole[name], wanted), cut))
        results.append((errors, same))
    return results


def test_bfloat16_error_does_not_grow_with_the_cut_and_bits_repeat(run_ranks):
    dims = GdnDims(2, 2, head_k_dim=16, head_v_dim=16)
    # Ordinary heads, and heads that forget nothing (g = -e^-40).
    for results in run_ranks(bf16_errors, 4, dims, [0, 512], [0.0, -40.0]):
        for errors, same in results:
            assert same
            for whole, cut in errors:
                assert cut < 1.2 * whole


def one_node_of_a_world(rank: int, world: int, dims: GdnDims, cut: Cut) -> dict[str, float]:
    """Two context-parallel groups of half the world each, as data parallelism has them: both at once."""
    half = world // 2
    made = [dist.new_group(list(range(i * half, (i + 1) * half))) for i in range(2)]
    group = made[rank // half]
    kind, cu, expected = cut
    layout = build(kind, cu, half)
    local = [layout.shard(x, rank % half) for x in batch(dims, cu[-1], torch.float64)]
    errors = {}
    for a2a_size in divisors(half):
        actual = run_mixer(dims, *local, layout=layout, group=group, a2a_size=a2a_size)
        for name in ("out", "projected"):
            errors[f"{name} {a2a_size}"] = relative_error(actual[name], layout.shard(expected[name], rank % half))
    return errors


def test_groups_inside_a_larger_world(run_ranks):
    dims = GdnDims(4, 4, head_k_dim=4, head_v_dim=3)
    cut = ("zigzag", [0, 40, 64], single_process(dims, [0, 40, 64], torch.float64, "reference"))
    error, rank, name = worst(run_ranks(one_node_of_a_world, 8, dims, cut))
    assert error < ROUNDING, f"rank {rank}: {name}"


def truncated_output(rank: int, world: int, tokens: int, decay: float) -> tuple[float, float]:
    """Relative change of the output and of v's gradient by truncation."""
    draw = torch.Generator().manual_seed(3)
    heads = (1, tokens, 2)
    q, k = (torch.nn.functional.normalize(torch.randn(*heads, 8, generator=draw).double(), dim=-1) for _ in range(2))
    v, d_out = (torch.randn(*heads, 8, generator=draw).double() for _ in range(2))
    g, beta = -decay * torch.rand(heads, generator=draw).double(), torch.rand(heads, generator=draw).double()
    layout, groups = ThdLayout.contiguous([0, tokens], world), cp_groups(dist.group.WORLD, 1)
    rows = group_rows(layout, 1, rank)
    results = []
    for truncate in (False, True):
        local = [x[:, rows].requires_grad_() for x in (q, k, v, g, beta)]
        o = state_passing_delta_rule(TokenInputs(*local), RuleOptions(), layout, groups, truncate=truncate)
        o.backward(d_out[:, rows])
        results.append((o.detach(), local[2].grad))
    (o, dv), (o_cut, dv_cut) = results
    return relative_error(o_cut, o), relative_error(dv_cut, dv)


def test_truncation_is_within_its_bound_and_off_by_default(run_ranks):
    # 64 tokens a rank lose some 12 nats: what comes from two segments before is at most e^-10 = 4.5e-5 of itself.
    results = run_ranks(truncated_output, 4, 256, 0.38)
    for errors in results:
        assert max(errors) < 4.5e-5
    assert max(max(errors) for errors in results) > 0
    # Where a segment loses 1 nat nothing is truncated, and not a bit is different.
    assert run_ranks(truncated_output, 2, 64, 0.03) == [(0.0, 0.0)] * 2


def switched_mixer(rank: int, world: int) -> float:
    """The largest relative difference that the mixer's `truncate_states` makes to this rank's output."""
    dims = GdnDims(1, 2, head_k_dim=8, head_v_dim=8)
    layout = ThdLayout.contiguous([0, 96 * world], world)
    projected, d_out = (layout.shard(x, rank) for x in batch(dims, 96 * world, torch.float64))
    call = {"layout": layout, "group": dist.group.WORLD, "a2a_size": 1, "intra_card": 0}
    # exp(A_log) of about 0.4 and softplus(dt_bias) of about 1: 96 tokens lose far more than 10 nats.
    whole, cut = (run_mixer(dims, projected, d_out, 1.0, truncate_states=on, **call) for on in (False, True))
    return relative_error(cut["out"], whole["out"])


def test_the_mixer_truncates_states_where_it_is_told_to(run_ranks):
    errors = run_ranks(switched_mixer, 3)
    assert 0 < max(errors) < 4.5e-5
