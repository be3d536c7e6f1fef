"""Whether ranks exchange through peers' memory: what each finds missing, and one answer for all."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("triton")

from gdn_cp.comm import peer_vote
from gdn_cp.comm.peer_vote import VARIABLE, Facts, _place, decide, find_problem, peer_memory, read_request


def test_request_is_the_argument_then_the_variable(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert read_request() == "auto"
    monkeypatch.setenv(VARIABLE, "nccl")
    assert read_request() == "nccl"
    assert read_request("peer") == "peer"
    monkeypatch.setenv(VARIABLE, "fast")
    with pytest.raises(ValueError, match=r"GDN_CP_EXCHANGE: got 'fast'; choose"):
        read_request()
    with pytest.raises(ValueError, match=r"request: got 'slow'"):
        read_request("slow")


def facts(gpu: str, place: str = "here", problem: str = "") -> Facts:
    return Facts("auto", place, gpu, problem)


@pytest.mark.parametrize(
    ("everyone", "expected"),
    [
        ([facts("a"), facts("b")], ""),
        ([facts("a"), facts("b", "there")], "rank 1 runs elsewhere"),
        ([facts("a"), facts("a")], "rank 1 shares this GPU"),
        ([facts("a", problem="no torch"), facts("b")], "no torch"),
        ([facts("a"), facts("b", "there", "said by rank 1 itself")], ""),
        ([facts("a"), facts("b"), facts("c")], "no NVLink to rank 2"),
    ],
)
def test_each_rank_says_what_keeps_it_from_its_peers(everyone: list[Facts], expected: str):
    links = {("a", "b"): "", ("a", "c"): "no NVLink"}
    assert find_problem(everyone, 0, lambda mine, theirs: links[mine, theirs]).startswith(expected)
    assert bool(find_problem(everyone, 0, lambda mine, theirs: links[mine, theirs])) == bool(expected)


def test_one_objection_sends_all_to_nccl_with_one_line(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.WARNING)
    assert decide("auto", ["", ""], 0)
    assert not caplog.records
    assert [decide("auto", ["", "no NVLink to rank 0"], rank) for rank in (0, 1)] == [False, False]
    assert [r.getMessage() for r in caplog.records] == [
        "exchange through NCCL, not through peers' memory: rank 1: no NVLink to rank 0"
    ]
    with pytest.raises(ValueError, match=r'"peer" is not possible here \(rank 1: no NVLink'):
        decide("peer", ["", "no NVLink to rank 0"], 0)


def test_processes_of_one_folder_share_a_place():
    assert _place() == _place()
    assert len(_place()) > 10


class Group:
    """A process group, as far as the vote's caller looks at it."""

    def size(self) -> int:
        return 2


def test_the_vote_travels_by_way_of_the_tensors_gpu(monkeypatch: pytest.MonkeyPatch):
    """Ranks that never called `torch.cuda.set_device` would all vote on the first GPU, which NCCL refuses."""
    current: list[torch.device] = []
    votes: list[list[torch.device]] = []

    @contextmanager
    def make_current(device: torch.device) -> Iterator[None]:
        current.append(device)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", make_current)
    monkeypatch.setattr(peer_vote, "_vote", lambda *_: votes.append(list(current)) is not None)
    device, group = torch.device("cuda", 1), Group()
    for _ in range(2):
        assert peer_memory(group, device, "nccl") is None  # type: ignore[arg-type]
    assert votes == [[device]], "one vote, on the tensors' device"
    assert not current


def open_where_forbidden(rank: int, world: int, wanted: str) -> tuple[str, str]:
    """What a rank gets where its neighbour's system forbids shared memory: the answer, or the refusal."""

    class Memory:
        def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
            pass

        def open(self) -> None:
            if rank == 1:
                raise RuntimeError("pidfd_getfd: not permitted")

    peer_vote.PeerMemory = Memory  # type: ignore[assignment, misc]  # of this process alone
    group = dist.group.WORLD
    assert group is not None
    try:
        return str(peer_vote._open(group, torch.device("cpu"), wanted)), ""
    except ValueError as error:
        return "", str(error)


def test_memory_that_one_system_forbids_is_nobodys(run_ranks):
    assert run_ranks(open_where_forbidden, 2, "auto") == [("None", "")] * 2
    for answer, refusal in run_ranks(open_where_forbidden, 2, "peer"):
        assert not answer
        assert "rank 1: torch's symmetric memory: pidfd_getfd: not permitted" in refusal


def ask_on_cpu(rank: int, world: int) -> str:
    group = dist.group.WORLD
    assert group is not None
    assert peer_memory(group, torch.device("cpu")) is None
    try:
        peer_memory(group, torch.device("cpu"), "peer")
    except ValueError as error:
        return str(error)
    return ""


def test_ranks_without_gpus_are_asked_nothing(run_ranks):
    assert (
        run_ranks(ask_on_cpu, 2)
        == ['GDN_CP_EXCHANGE: "peer" needs GPUs, but the tensors are on cpu; choose "auto"'] * 2
    )
