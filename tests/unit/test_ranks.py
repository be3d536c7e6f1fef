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


def _return_what_no_pipe_carries(rank: int, world_size: int) -> object:
    return lambda: rank


def test_every_rank_answers(run_ranks):
    assert run_ranks(_sum_of_ranks, 3) == [3.0, 3.0, 3.0]


def test_failure_of_one_rank_is_heard(run_ranks):
    with pytest.raises(RankError, match="rank one says no"):
        run_ranks(_fail_on_one, 2, timeout=20)


def test_result_that_cannot_be_sent_is_named(run_ranks):
    with pytest.raises(RankError, match=r"rank 0: (.|\n)*_return_what_no_pipe_carries"):
        run_ranks(_return_what_no_pipe_carries, 1)


def test_silence_is_an_error(run_ranks):
    with pytest.raises(RankError, match="still running after 2 s"):
        run_ranks(_never_end, 2, timeout=2)
