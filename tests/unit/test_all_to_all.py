"""The exchange against the brute-force one: by index for many cp sizes, then on 2 and 4 ranks, with gradients."""

from __future__ import annotations

from itertools import accumulate
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gdn_cp.comm import packing
from gdn_cp.comm.all_to_all import cp_to_hp, hp_to_cp
from gdn_cp.comm.layout import ThdLayout, _build_head_perm_for_split_sections
from tests import brute_force_exchange as brute
from tests.state_cases import group_rows
from tests.unit.test_layout import batches, build

SECTIONS = (8, 4, 12)
BATCHES = {
    "zigzag": ([0, 0, 8, 32, 32, 40, 40], "zigzag"),
    "zigzag_one_sequence": ([0, 16], "zigzag"),
    "zigzag_all_empty": ([0, 0, 0], "zigzag"),
    "contiguous": ([0, 3, 3, 10, 24], "flat"),
}


def simulate(buffers: list[Tensor]) -> list[Tensor]:
    """What an all-to-all does to every rank's buffer [P*t, W]."""
    blocks = [buffer.unflatten(0, (len(buffers), buffer.shape[0] // len(buffers))) for buffer in buffers]
    return [torch.cat([block[rank] for block in blocks]) for rank in range(len(buffers))]


@pytest.mark.parametrize("kind", ["zigzag", "flat"])
def test_packing_around_an_all_to_all_equals_brute_force(kind):
    @settings(max_examples=40, deadline=None)
    @given(batches(kind), st.lists(st.integers(0, 2), min_size=1, max_size=4))
    def check(batch, heads):
        cu, ranks = batch
        made, held_by = build(kind, cu, ranks), brute.owners(cu, ranks, kind)
        sections = tuple(count * ranks for count in heads)
        widths = tuple((width,) for width in sections)
        local = [torch.randn(made.t_local, sum(sections)) for _ in range(ranks)]
        expected = brute.cp_to_hp(local, held_by, sections)
        sent = [packing.pack_cp(x.split(list(sections), 1), widths, ranks) for x in local]
        shares = [packing.unpack_hp(buffer, widths, ranks, made.to_natural) for buffer in simulate(sent)]
        for mine, truth in zip(shares, expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine, truth, strict=True))
        back = brute.hp_to_cp(shares, held_by)
        sent = [packing.pack_hp(share, widths, ranks, made.to_rank_major) for share in shares]
        returned = [packing.unpack_cp(buffer, widths, ranks) for buffer in simulate(sent)]
        for mine, truth, x in zip(returned, back, local, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine, truth, strict=True))
            assert torch.equal(torch.cat(mine, dim=1), x)

    check()


def test_head_perm_and_one_plain_all_to_all_equal_the_sections():
    made, local = ThdLayout.zigzag([0, 8, 24], 4), [torch.randn(6, 24) for _ in range(4)]
    perm = _build_head_perm_for_split_sections(SECTIONS, 4, "cpu")
    sent = [packing.pack_cp([x[:, perm]], ((24,),), 4) for x in local]
    plain = [packing.unpack_hp(buffer, ((24,),), 4, made.to_natural)[0] for buffer in simulate(sent)]
    expected = brute.cp_to_hp(local, brute.owners(made.cu_seqlens, 4, "zigzag"), SECTIONS)
    assert all(torch.equal(mine, torch.cat(truth, dim=1)) for mine, truth in zip(plain, expected, strict=True))


def whole_batch(made: ThdLayout, columns: int, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """Every rank's rows, made alike on all ranks."""
    torch.manual_seed(seed)
    x = (
        torch.randn(made.t_global, columns)
        if dtype.is_floating_point
        else torch.randint(-99, 99, (made.t_global, columns))
    )
    return [made.shard(x.to(dtype), rank) for rank in range(made.cp_size)]


def same(mine, truth) -> bool:
    """Bitwise equality of two sequences of tensors, in shape and dtype too."""
    return len(mine) == len(truth) and all(
        a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(mine, truth, strict=True)
    )


def check_values_and_gradients(rank: int, world: int, name: str) -> dict[str, bool]:
    cu, kind = BATCHES[name]
    made, held_by = build(kind, cu, world), brute.owners(cu, world, kind)
    local = [x.requires_grad_() for x in whole_batch(made, sum(SECTIONS), torch.float32)]
    expected = brute.cp_to_hp(local, held_by, SECTIONS)
    x = local[rank].detach().clone().requires_grad_()
    shares = cp_to_hp(x, made, dist.group.WORLD, sections=SECTIONS)
    back = hp_to_cp([share * share for share in shares], made, dist.group.WORLD, sections=SECTIONS)
    truth = brute.hp_to_cp([[share * share for share in mine] for mine in expected], held_by)
    # Any function of all outputs of all ranks will do as a loss, with another weight at every place.
    weights = whole_batch(made, sum(SECTIONS), torch.float32, seed=1)
    loss = sum((torch.cat(y, 1) * w).sum() for y, w in zip(truth, weights, strict=True))
    (gradient,) = torch.autograd.grad(loss, local[rank], materialize_grads=True)  # an empty batch has no path to it
    (torch.cat(back, 1) * weights[rank]).sum().backward()
    assert x.grad is not None
    round_trip = hp_to_cp(cp_to_hp(x, made, dist.group.WORLD), made, dist.group.WORLD)
    other_way = cp_to_hp(hp_to_cp(shares, made, dist.group.WORLD), made, dist.group.WORLD)
    return {
        "cp_to_hp": same(shares, expected[rank]),
        "hp_to_cp": same(back, truth[rank]),
        "gradient": same([x.grad], [gradient]),
        "round_trip": same([round_trip], [x]),
        "round_trip_from_hp": same(other_way, shares),
    }


def check_dtypes(rank: int, world: int) -> dict[str, bool]:
    made = ThdLayout.zigzag([0, 8, 24], world)
    held_by = brute.owners(made.cu_seqlens, world, "zigzag")
    found = {}
    for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.uint8, torch.int32, torch.int64):
        local = whole_batch(made, 8, dtype)
        there = cp_to_hp(local[rank], made, dist.group.WORLD)
        found[f"{dtype} there"] = same([there], brute.cp_to_hp(local, held_by, [8])[rank])
        found[f"{dtype} back"] = same([hp_to_cp(there, made, dist.group.WORLD)], [local[rank]])
    return found


def check_shapes(rank: int, world: int) -> dict[str, bool]:
    made = ThdLayout.zigzag([0, 8, 24], world)
    group = dist.group.WORLD
    x = whole_batch(made, 24, torch.float32)[rank]
    q, k, v = x.split(SECTIONS, 1)
    shares = cp_to_hp(x, made, group, sections=SECTIONS)
    heads = cp_to_hp([q.unflatten(1, (4, 2)), v.unflatten(1, (4, 3))], made, group)
    batched = ThdLayout.batched(2, 8, world)
    rows = whole_batch(batched, 4, torch.float32)[rank]
    return {
        "tensors": same(cp_to_hp((q, k, v), made, group), shares),
        "sections_in_one_tensor": same(
            cp_to_hp(x, made, group, sections=(SECTIONS[:2], 12)), [torch.cat(shares[:2], 1), shares[2]]
        ),
        "sections_in_tensors": same(
            cp_to_hp((x[:, :12], v), made, group, sections=((8, 4), 12)), [torch.cat(shares[:2], 1), shares[2]]
        ),
        "sections_back": same(
            hp_to_cp(torch.cat(shares, 1), made, group, sections=(SECTIONS[:2], 12)), [torch.cat([q, k], 1), v]
        ),
        "heads": same(heads, [shares[0].unflatten(1, (-1, 2)), shares[2].unflatten(1, (-1, 3))]),
        "heads_back": same(hp_to_cp(heads, made, group), [q.unflatten(1, (4, 2)), v.unflatten(1, (4, 3))]),
        "heads_in_sections": same(
            cp_to_hp(x[:, :16].unflatten(1, (8, 2)), made, group, sections=(4, 4)),
            [y.unflatten(1, (-1, 2)) for y in cp_to_hp(x[:, :16], made, group, sections=(8, 8))],
        ),
        "contiguous_results": all(y.is_contiguous() for y in (*shares, *heads)),
        "transposed_input": same([cp_to_hp(q.t().contiguous().t(), made, group)], shares[:1]),
        "strided_input_back": same([hp_to_cp(shares[0].t().contiguous().t(), made, group)], [q]),
        "batched": same([hp_to_cp(cp_to_hp(rows, batched, group), batched, group)], [rows]),
    }


def check_autograd(rank: int, world: int) -> dict[str, bool]:
    made, group = ThdLayout.contiguous([0, 3, 16], world), dist.group.WORLD
    data = whole_batch(made, 8, torch.float32)[rank]
    found = {}

    x = data.clone().requires_grad_()
    a, _unused = cp_to_hp(x, made, group, sections=(4, 4))
    a.sum().backward()  # an expanded gradient for one result, none for the other
    found["expanded_and_missing"] = same([x.grad], [torch.tensor([1.0] * 4 + [0.0] * 4).expand_as(x)])

    def square_there_and_back(x: Tensor) -> Tensor:
        return hp_to_cp(cp_to_hp(x, made, group) ** 2, made, group)

    for reentrant in (False, True):
        x = data.clone().requires_grad_()
        result = checkpoint(square_there_and_back, x, use_reentrant=reentrant)
        assert isinstance(result, Tensor)
        result.sum().backward()
        found[f"checkpoint_{reentrant}"] = same([result, x.grad], [data**2, 2 * data])

    x = data.clone().requires_grad_()
    (first,) = torch.autograd.grad((square_there_and_back(x) * x).sum(), x, create_graph=True)  # 3 x^2
    (second,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(second, 6 * data)  # float32 defaults: two more roundings than the formula
    found["second_derivative"] = True

    x = data.clone().requires_grad_()
    share = cp_to_hp(x, made, group)
    share.mul_(3)  # results are no views: what follows may work in place
    share.sum().backward()
    found["in_place_after"] = same([x.grad, x.detach()], [torch.full_like(x, 3.0), data])

    calls = []
    original = dist.all_to_all_single
    with mock.patch.object(dist, "all_to_all_single", lambda *a, **k: calls.append(1) or original(*a, **k)):
        x = data.clone().requires_grad_()
        shares = cp_to_hp((x, 2 * x), made, group, sections=((4, 4), 8))
        found["one_collective_forward"] = len(calls) == 1
        sum(share.sum() for share in shares).backward()
        found["one_collective_backward"] = len(calls) == 2
    return found


CHECKS = {"dtypes": check_dtypes, "shapes": check_shapes, "autograd": check_autograd}


def check_all(rank: int, world: int) -> dict[str, bool]:
    """All checks on one world: starting one costs more than running them."""
    found = {}
    for name, check in CHECKS.items():
        found |= {f"{name}: {key}": value for key, value in check(rank, world).items()}
    for name in BATCHES:
        found |= {f"{name}: {key}": value for key, value in check_values_and_gradients(rank, world, name).items()}
    return found


@pytest.mark.parametrize("world", [2, 4])
def test_exchange_equals_brute_force_on_every_rank(run_ranks, world):
    for rank, found in enumerate(run_ranks(check_all, world)):
        assert [key for key, right in found.items() if not right] == [], f"rank {rank}"
        assert len(found) > 40


def exchange_in_groups(rank: int, world: int) -> dict[str, bool]:
    """All a2a_sizes: columns of the rank's share, rows of the group's segments; back again; the gradient likewise."""
    found = {}
    for name, (cu, kind) in BATCHES.items():
        made = build(kind, cu, world)
        x = torch.arange(cu[-1] * 8, dtype=torch.float64).view(-1, 8)
        for a2a_size in (1, 2, 4):
            local = made.shard(x, rank).requires_grad_()
            rows = group_rows(made, a2a_size, rank // a2a_size)
            wide = [part.chunk(a2a_size, 1)[rank % a2a_size] for part in x[rows].split([4, 4], 1)]
            parts = cp_to_hp(local, made, dist.group.WORLD, sections=(4, 4), a2a_size=a2a_size)
            back = hp_to_cp(parts, made, dist.group.WORLD, a2a_size=a2a_size)
            (gradient,) = torch.autograd.grad(parts, local, wide)
            case = f"{name}, a2a_size {a2a_size}"
            found[case] = all(torch.equal(a, b) for a, b in zip(parts, wide, strict=True))
            found[f"{case} and back"] = torch.equal(torch.cat(back, 1), local)
            found[f"{case}, gradient"] = torch.equal(gradient, local)
    return found


def test_exchange_inside_groups_of_neighbours(run_ranks):
    for found in run_ranks(exchange_in_groups, 4):
        assert len(found) == 36
        assert all(found.values()), found


def refused_calls(rank: int, world: int) -> dict[str, str]:
    """The message of each refused call, and at the end a good exchange: nobody waits for a collective of the others."""
    made, group = ThdLayout.zigzag([0, 8, 24], world), dist.group.WORLD
    x = whole_batch(made, 8, torch.float32)[rank]
    pair = dist.new_group([0])
    calls = {
        "columns": lambda: cp_to_hp(x[:, :5], made, group),
        "section": lambda: cp_to_hp(x, made, group, sections=(5, 3)),
        "section_inside": lambda: cp_to_hp(x, made, group, sections=((5, 3),)),
        "sections_sum": lambda: cp_to_hp(x, made, group, sections=(4, 2)),
        "sections_sum_back": lambda: hp_to_cp(cp_to_hp(x, made, group), made, group, sections=(2, 2)),
        "sections_of_tensors": lambda: cp_to_hp((x, x), made, group, sections=(8, 4)),
        "section_type": lambda: cp_to_hp(x, made, group, sections=(4.0, 4)),  # type: ignore[arg-type]
        "rows": lambda: cp_to_hp(x[1:], made, group),
        "rows_back": lambda: hp_to_cp(x, made, group),
        "rows_of_second": lambda: cp_to_hp((x, x[1:]), made, group),
        "one_dimension": lambda: cp_to_hp(x[:, 0], made, group),
        "section_empty": lambda: cp_to_hp(x, made, group, sections=((), 8)),
        "no_tensors": lambda: cp_to_hp((), made, group),
        "no_tensor": lambda: cp_to_hp([x, 3], made, group),  # type: ignore[list-item]
        "dtype": lambda: cp_to_hp(x.bool(), made, group),
        "dtypes_differ": lambda: cp_to_hp((x, x.double()), made, group),
        "device": lambda: cp_to_hp(x.to("meta"), made, group),
        "group_none": lambda: cp_to_hp(x, made, None),
        "group_too_small": lambda: cp_to_hp(x, ThdLayout.zigzag([0, 16], 4), group),
        "group_not_member": lambda: cp_to_hp(x, made, dist.GroupMember.NON_GROUP_MEMBER if rank else 3),  # type: ignore[arg-type]
        "layout": lambda: cp_to_hp(x, [0, 8, 24], group),  # type: ignore[arg-type]
        "a2a_size": lambda: cp_to_hp(x, made, group, a2a_size=3),
    }
    del pair
    messages = {}
    for name, call in calls.items():
        try:
            call()
            messages[name] = "accepted"
        except (ValueError, TypeError) as error:
            messages[name] = f"{type(error).__name__}: {error}"
    messages["good"] = str(torch.equal(hp_to_cp(cp_to_hp(x, made, group), made, group, a2a_size=world), x))
    return messages


MESSAGES = {
    "columns": "ValueError: x: has a section of 5 columns, not divisible by the group's 2 ranks; the number of heads",
    "section": "ValueError: sections: (5, 3) has a section of 5 columns, not divisible by the group's 2 ranks",
    "section_inside": "ValueError: sections: ((5, 3),) has a section of 5 columns, not divisible",
    "sections_sum": "ValueError: sections: (4, 2) sum to 6, but x has 8 columns over all ranks; give every section's",
    "sections_sum_back": "ValueError: sections: (2, 2) sum to 4, but x has 8 columns over all ranks",
    "sections_of_tensors": "ValueError: sections: (8, 4) sum to [8, 4], but the tensors have [8, 8] columns",
    "section_type": "TypeError: sections: 4.0 is no width; every entry is an int or a tuple of ints",
    "section_empty": "ValueError: sections: () has no width; every entry is an int or a tuple of ints",
    "rows": "ValueError: x: has shape (11, 8); cp_to_hp takes [12, columns] or [12, heads, dim] (this rank's rows",
    "rows_back": "ValueError: x: has shape (12, 8); hp_to_cp takes [24, columns] or [24, heads, dim] (the whole",
    "rows_of_second": "ValueError: x[1]: has shape (11, 8)",
    "one_dimension": "ValueError: x: has shape (12,)",
    "no_tensors": "ValueError: x: got no tensors; pass at least one",
    "no_tensor": "TypeError: x[1]: expected a tensor, got int",
    "dtype": "ValueError: x: has dtype torch.bool, which no backend carries; cast it to one of",
    "dtypes_differ": "ValueError: x[1]: has dtype torch.float64, the first tensor torch.float32; one exchange carries",
    "device": "ValueError: x: is on meta, the layout on cpu; move the layout once with layout.to('meta')",
    "group_none": "ValueError: group: has 1 rank(s) (None), but the layout was built for cp_size = 2; pass the group",
    "group_too_small": "ValueError: group: has 2 rank(s), but the layout was built for cp_size = 4",
    "group_not_member": "TypeError: group: expected a process group or None, got",
    "layout": "TypeError: layout: expected a gdn_cp.ThdLayout, got list",
    "a2a_size": "ValueError: a2a_size: got 3; it must divide cp_size = 2: one of [1, 2]",
    "good": "True",
}


def test_refusals_on_every_rank_and_nobody_hangs(run_ranks):
    for messages in run_ranks(refused_calls, 2, timeout=60):
        assert messages.keys() == MESSAGES.keys()
        for name, start in MESSAGES.items():
            assert messages[name].startswith(start), name


def one_rank(rank: int, world: int) -> bool:
    made = ThdLayout.zigzag([0, 3, 8], 1)
    x = torch.randn(8, 4)
    return cp_to_hp(x, made, dist.group.WORLD) is x and hp_to_cp(x, made, dist.group.WORLD) is x


def test_one_rank_copies_nothing(run_ranks):
    made = ThdLayout.zigzag([0, 3, 8], 1)
    x = torch.randn(8, 4)
    assert cp_to_hp(x, made, None) is x
    a, b = cp_to_hp(x, made, None, sections=(1, 3))
    assert same([a, b], x.split([1, 3], 1))
    assert a.data_ptr() == x.data_ptr()
    assert run_ranks(one_rank, 1) == [True]


def exchange_on_gpus(rank: int, world: int) -> dict[str, bool]:
    host = ThdLayout.zigzag([0, *accumulate([64, 0, 128, 192])], world, seqlens=[60, 0, 128, 190])
    group = dist.group.WORLD
    x = whole_batch(host, 48, torch.bfloat16)
    expected = brute.cp_to_hp(x, brute.owners(host.cu_seqlens, world, "zigzag"), (16, 32))
    mine = x[rank].cuda().requires_grad_()
    cp_to_hp(mine, host.to("cuda"), group).sum().backward()  # NCCL connects at its first collective
    torch.cuda.synchronize()
    mine.grad = None
    torch.cuda.set_sync_debug_mode("error")
    try:
        made = ThdLayout.zigzag(host.cu_seqlens, world, seqlens=host.seqlens, device="cuda")
        shares = cp_to_hp(mine, made, group, sections=(16, 32))
        back = torch.cat(hp_to_cp(shares, made, group), 1)
        (back * mine.detach()).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert mine.grad is not None
    return {
        "cp_to_hp": same([share.cpu() for share in shares], expected[rank]),
        "hp_to_cp": same([back], [mine]),
        "gradient": same([mine.grad], [mine.detach()]),
    }


@pytest.mark.multi_gpu
def test_exchange_over_nccl_equals_brute_force_and_never_synchronises(run_ranks):
    for found in run_ranks(exchange_on_gpus, 2, backend="nccl"):
        assert found == {"cp_to_hp": True, "hp_to_cp": True, "gradient": True}
