"""The choice of a2a_size: what was asked for, or the planner's, once per layout and the same on every rank."""

from __future__ import annotations

import doctest
from datetime import timedelta
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from gdn_cp import GdnDims
from gdn_cp.comm import choice, groups
from gdn_cp.comm.choice import choose_a2a_size, possible_a2a_sizes, prepare_cp_groups
from gdn_cp.comm.layout import ThdLayout
from gdn_cp.comm.planner import plan

DIMS = GdnDims(4, 8, 16, 16)


def test_docstring_holds():
    assert doctest.testmod(choice).failed == 0


def test_what_is_asked_for_is_taken():
    layout = ThdLayout.zigzag([0, 64], 4)
    assert [choose_a2a_size(size, layout, DIMS) for size in (1, 2, 4, None)] == [1, 2, 4, 4]
    assert [choose_a2a_size(size, None, DIMS) for size in (1, None, "auto")] == [1, 1, 1]
    assert possible_a2a_sizes(12, 6, 12) == [1, 2, 3, 6]


@pytest.mark.parametrize(
    "layout",
    [
        ThdLayout.zigzag([0, 262144], 4),
        ThdLayout.zigzag(range(0, 65537, 1024), 4),
        ThdLayout.contiguous([0, 100000, 262144], 4),
        ThdLayout.batched(2, 131072, 4, kind="contiguous"),
    ],
    ids=str,
)
def test_auto_is_the_planners_choice_made_once_and_gone_with_its_layout(layout):
    kind = layout.kind if layout.cu_seqlens != (0, 131072, 262144) else "batched"
    large = GdnDims(16, 32, 128, 128)
    kept = len(choice._chosen)
    with mock.patch.object(choice, "plan", wraps=plan) as planner:
        found = [choose_a2a_size("auto", layout, dims) for dims in (large, large, DIMS, large)]
    assert planner.call_count == 2
    assert planner.call_args.kwargs["kind"] == kind
    wanted = plan(layout.cu_seqlens, 4, large, kind=kind).a2a_size
    assert found[0] == found[1] == found[3] == wanted
    assert len(choice._chosen) == kept + 1
    choice._chosen.pop(layout)


def test_choices_do_not_outlive_their_layout():
    layout, kept = ThdLayout.zigzag([0, 64], 2), len(choice._chosen)
    choose_a2a_size("auto", layout, DIMS)
    assert len(choice._chosen) == kept + 1
    del layout
    assert len(choice._chosen) == kept


@pytest.mark.parametrize(
    ("asked", "kind", "message"),
    [
        ("all", ValueError, 'a2a_size: got \'all\'; choose "auto", "largest", None or a divisor of cp_size = 4'),
        (3, ValueError, "a2a_size: got 3; it must divide cp_size = 4"),
        (0, ValueError, "a2a_size: got 0; it must be at least 1"),
        (1.5, TypeError, "a2a_size: expected an int"),
    ],
)
def test_other_requests_are_refused(asked, kind, message):
    with pytest.raises(kind, match=message):
        choose_a2a_size(asked, ThdLayout.zigzag([0, 64], 4), DIMS)


def prepare(rank: int, world: int) -> list[int]:
    """How many subgroups of WORLD there are after each call."""
    made = []
    for dims, asked in ((GdnDims(3, 6, 8, 8), "auto"), (DIMS, None), (DIMS, "auto"), (DIMS, 2)):
        prepare_cp_groups(dist.group.WORLD, dims, asked, timeout=timedelta(seconds=7))
        made.append(sorted(groups._made.get(dist.group.WORLD, {})))
    for group in groups._made[dist.group.WORLD][2]:
        assert group._get_backend(torch.device("cpu")).options._timeout == timedelta(seconds=7)
    return made


def test_groups_are_made_ahead_for_every_size_that_may_be_chosen(run_ranks):
    assert run_ranks(prepare, 4) == [[[], [], [2], [2]]] * 4
