"""The multi-rank runner itself: results in order, failures of each rank heard, silence ended."""

import time

import pytest
import torch
import torch.distributed as dist

from tests.ranks import RankError


def _sum_of_ranks(rank: int, world_size: int) -> float:
    x = torch.tensor([float(rank)])
    dist.all_reduce(x)
    return x.item()


def _fail_on_one(rank: int, world_size: int) -> None:
    if rank == 1:
        raise ValueError("rank one says no")
    dist.barrier()


def _never_end(rank: int, world_size: int) -> None:
    time.sleep(60)


def test_every_rank_answers(run_ranks):
    assert run_ranks(_sum_of_ranks, 3) == [3.0, 3.0, 3.0]


def test_failure_of_one_rank_is_heard(run_ranks):
    with pytest.raises(RankError, match="rank one says no"):
        run_ranks(_fail_on_one, 2, timeout=20)


def test_silence_is_an_error(run_ranks):
    with pytest.raises(RankError, match="still running after 2 s"):
        run_ranks(_never_end, 2, timeout=2)
