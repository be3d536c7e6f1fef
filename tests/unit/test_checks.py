"""The consistency check: every rank hears which ranks were given another batch."""

from __future__ import annotations

import torch.distributed as dist

from gdn_cp.comm.checks import assert_same_on_all_ranks
from gdn_cp.comm.layout import ThdLayout


def compare(rank: int, world: int) -> list[str]:
    """Messages of three checks: equal layouts, rank 2 with other lengths, ranks 1 and 2 with another kind."""
    same = ThdLayout.zigzag([0, 8, 24], 2)
    longer = ThdLayout.zigzag([0, 16, 24], 2) if rank == 2 else same
    kinds = same if rank == 0 else ThdLayout.contiguous([0, 8, 24], 2) if rank == 1 else longer
    messages = []
    for layout in (same, longer, kinds):
        try:
            assert_same_on_all_ranks(layout, dist.group.WORLD)
            messages.append("")
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_ranks_with_another_layout_are_named_on_every_rank(run_ranks):
    for rank, (equal, one_differs, all_differ) in enumerate(run_ranks(compare, 3)):
        assert equal == ""
        assert one_differs.startswith(
            f"layout: ranks [2] of the group were given another layout than the rest; this rank {rank}"
        )
        assert "same cu_seqlens" in one_differs
        assert all_differ.startswith("layout: ranks [1, 2] of the group")


def test_one_rank_has_nothing_to_compare():
    assert assert_same_on_all_ranks(ThdLayout.zigzag([0, 8], 1), None) is None
