"""A rank that stands still, a batch that differs and memory that is used up are reported, by rank, step and phase."""

from __future__ import annotations

import ctypes
import dataclasses
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from gdn_cp.comm.layout import ThdLayout
from gdn_cp.training import checkpoint
from gdn_cp.training.config import ParallelConfig, RunConfig, TrainConfig
from gdn_cp.training.faults import STALLED, BatchSizes, Progress, Watchdog, check_same_batch, describe_memory, located
from gdn_cp.training.packing import PackedBatch, Piece, build_batch
from tests.unit.test_training_parallel import DATA, MODEL, real_text

_server = multiprocessing.get_context("forkserver")


def stand_still() -> None:
    time.sleep(600)


def hold_the_interpreter() -> None:
    ctypes.PyDLL(None).sleep(600)  # a PyDLL keeps the interpreter's lock during the call


def work_slowly() -> None:
    """Nothing: the phases before took longer together than the watchdog waits."""


def watched(work: Callable[[], None], log: str, seconds: float) -> None:
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)
    progress = Progress(rank=5)
    with Watchdog(progress, seconds):
        for _ in range(8):
            progress.enter("data", step=6)
            time.sleep(seconds / 4)
        progress.enter("backward", step=7)
        work()
    time.sleep(2 * seconds)  # the watchdog must be gone
    os._exit(0)


def run_watched(folder: Path, work: Callable[[], None]) -> tuple[int | None, str]:
    log = folder / "log"
    process = _server.Process(target=watched, args=(work, str(log), 1.5))
    process.start()
    process.join(60)
    alive = process.is_alive()
    process.kill()
    assert not alive, "the watchdog did not end the process"
    return process.exitcode, log.read_text()


def test_a_rank_that_stands_still_is_named_and_ended(tmp_path):
    code, output = run_watched(tmp_path, stand_still)
    assert code == STALLED
    assert "watchdog (rank 5, step 7, phase backward): no progress for" in output
    assert "in stand_still" in output
    assert "in watched" in output


def test_an_interpreter_that_stands_still_is_ended_too(tmp_path):
    code, output = run_watched(tmp_path, hold_the_interpreter)
    assert code == 1
    assert "Timeout" in output
    assert "in hold_the_interpreter" in output


def test_slow_progress_is_progress(tmp_path):
    assert run_watched(tmp_path, work_slowly) == (0, "")


def pack(seed: int) -> PackedBatch:
    documents = [np.random.default_rng(seed).integers(0, 256, 31).astype(np.int32)] * 3
    return build_batch(documents, [Piece(0, 0, 30), Piece(1, 0, 17), Piece(2, 3, 9)], 8, pad_id=256)


def differ(rank: int, world_size: int) -> list[str]:
    """What the check says on each rank: equal packs, one rank's layout, one rank's tokens, mask, another group."""
    same = pack(1)
    mask = same.loss_mask.copy()
    mask[0] = False
    longer = dataclasses.replace(same, seqlens=(30, 18, 6))
    cases = [same, longer if rank == 2 else same, pack(2) if rank == 3 else same]
    cases.append(dataclasses.replace(same, loss_mask=mask) if rank in (0, 3) else same)
    groups = [dist.new_group([0, 1, 2, 3])] * 4 + [dist.new_group(ranks) for ranks in ([0, 2], [1, 3])][rank % 2 :][:1]
    cases.append(pack(2) if rank == 3 else same)
    found = []
    for group, batch in zip(groups, cases, strict=True):
        layout = ThdLayout.zigzag(batch.cu_seqlens, 2, seqlens=batch.seqlens)
        try:
            check_same_batch(batch, layout, group, "step 4, pack 1 of 2")
            found.append("same")
        except ValueError as error:
            found.append(str(error))
    return found


def test_ranks_with_another_batch_are_named(run_ranks):
    for rank, (same, layout, tokens, mask, pairs) in enumerate(run_ranks(differ, 4, timeout=60)):
        assert same == "same"
        assert layout.startswith(
            "step 4, pack 1 of 2: among global ranks [0, 1, 2, 3], in this order: layout: ranks [2]"
        )
        assert "step 4, pack 1 of 2: ranks [3] hold other tokens" in tokens
        assert "ranks [1, 2] hold other tokens, labels, positions or loss mask" in mask
        assert pairs == "same" if rank % 2 == 0 else "ranks [3] hold other tokens" in pairs


def choices(folder: Path, **run: Any) -> TrainConfig:
    (folder / "text").mkdir(exist_ok=True)
    for index, text in enumerate(real_text()):
        (folder / "text" / f"{index}.txt").write_bytes(text)
    return TrainConfig(
        model=MODEL,
        data=dataclasses.replace(DATA, data=folder / "text"),
        parallel=ParallelConfig(cp=2),
        run=RunConfig(**{"steps": 3, "checkpoint_every": 2, "device": "cpu", "out": folder / "run", **run}),
    )


def train_sabotaged(rank: int, world_size: int, sound: TrainConfig, other: TrainConfig) -> tuple[list[str], str, str]:
    """Phases of a sound run; what a run says whose rank 1 reads other tokens; and one that runs out of memory."""
    from megatron.core import parallel_state

    from gdn_cp.training import data, engine
    from gdn_cp.training.loop import train

    phases: list[str] = []
    enter, build, accumulating = Progress.enter, data.PackStream.build, engine.TorchEngine.accumulating

    def noting(self: Progress, phase: Any, step: int | None = None) -> None:
        phases.append(phase)
        enter(self, phase, step)

    Progress.enter = noting
    train(sound)
    Progress.enter = enter

    def build_other(self: Any, pieces: Any) -> PackedBatch:
        batch = build(self, pieces)
        return dataclasses.replace(batch, tokens=batch.tokens[::-1].copy()) if rank == 1 else batch

    def exhaust(self: Any, *, last: bool) -> Any:
        torch.empty(1 << 50)
        return accumulating(self, last=last)

    said = []
    for owner, name, fault in (
        (data.PackStream, "build", build_other),
        (engine.TorchEngine, "accumulating", exhaust),
    ):
        whole = getattr(owner, name)
        setattr(owner, name, fault)
        try:
            train(other)
        except (ValueError, torch.OutOfMemoryError) as error:
            said.append(f"{type(error).__name__}: {error}")
            parallel_state.destroy_model_parallel()
        setattr(owner, name, whole)
    return phases, said[0], said[1]


def test_a_run_says_where_it_stands_and_what_it_holds(run_ranks, tmp_path):
    pytest.importorskip("megatron.core")
    other = choices(tmp_path, out=tmp_path / "other", check_ranks=True, steps=1, resume="auto")
    step = ["data", *["data", "forward", "backward"] * DATA.packs_per_step, "reduce", "optimizer"]
    for phases, differing, memory in run_ranks(train_sabotaged, 2, choices(tmp_path), other):
        assert phases == [*step, *step, "checkpoint", *step, "checkpoint", "finish"]
        assert differing.startswith("ValueError: step 1, pack 1 of 2: ranks [1] hold other tokens")
        assert memory.startswith("OutOfMemoryError: rank ")
        assert "step 1, phase forward: out of memory. Pack: " in memory
        assert "rows on each rank. " in memory
        assert "GiB resident at the peak" in memory
        assert "DefaultCPUAllocator" in memory


def test_sizes_of_a_batch():
    sizes = BatchSizes.of(pack(1), cp_size=2)
    assert sizes == BatchSizes(tokens=53, sequences=3, longest=30, rows_per_rank=(32 + 24 + 8) // 2)
    assert str(sizes) == "53 tokens in 3 sequences, the longest of 30; 32 rows on each rank"


def test_memory_of_a_gpu(monkeypatch):
    for name, gib in (("memory_allocated", 2), ("memory_reserved", 5), ("max_memory_allocated", 4)):
        monkeypatch.setattr(torch.cuda, name, lambda device, gib=gib: gib * 2**30)
    expected = "2.00 GiB allocated (4.00 at the peak), 5.00 GiB reserved by this process"
    assert describe_memory(torch.device("cuda")) == expected
    progress = Progress(1, 9, "backward", BatchSizes.of(pack(1), 2))
    message = "rank 1, step 9, phase backward: out of memory. Pack: 53 tokens .* 2.00 GiB allocated .* GPU 0 is full"
    with pytest.raises(torch.OutOfMemoryError, match=message), located(progress, torch.device("cuda")):
        raise torch.OutOfMemoryError("GPU 0 is full")


def test_other_errors_pass_with_their_place(capsys):
    with pytest.raises(RuntimeError, match=r"^peer is gone$"), located(Progress(1, 9, "reduce"), torch.device("cpu")):
        raise RuntimeError("peer is gone")
    assert capsys.readouterr().err == "error (rank 1, step 9, phase reduce): RuntimeError: peer is gone\n"
    with pytest.raises(ValueError, match=r"^wrong$"), located(Progress(), torch.device("cpu")):
        raise ValueError("wrong")
    assert capsys.readouterr().err == ""


class Killed(BaseException):
    """Passes through every handler of the writer, and leaves the files as they are, as SIGKILL would."""


@pytest.mark.parametrize("step", [2, 3], ids=["replaced", "new"])
def test_no_kill_point_in_a_checkpoint_s_writing_loses_the_one_before(tmp_path, monkeypatch, step):
    """Each call that changes files is a kill point, before it and half way through."""

    def save(root: Path, step: int, value: float) -> Path:
        own, shared = {"value": value}, {"weight": torch.full((9,), value)}
        return checkpoint.save_checkpoint(root, step, {}, own=own, shared=shared, shared_index=0, keep=2)

    points, calls = 0, 0

    def mortal(call: Callable[..., Any], half: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **named: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == points:
                half(*arguments)
                raise Killed
            return call(*arguments, **named)

        return run

    def half_removed(folder: Path, **_: Any) -> None:
        for file in sorted(folder.glob("*"))[:1]:
            file.unlink()

    while True:
        root = tmp_path / str(points)
        save(root, 1, 1.0)
        save(root, 2, 2.0)
        points, calls = points + 1, 0
        with monkeypatch.context() as patch:
            patch.setattr(torch, "save", mortal(torch.save, lambda content, file: file.write(b"PK half")))
            patch.setattr(checkpoint.shutil, "rmtree", mortal(checkpoint.shutil.rmtree, half_removed))
            for owner, name in ((Path, "rename"), (Path, "mkdir"), (os, "fsync"), (checkpoint.json, "dump")):
                patch.setattr(owner, name, mortal(getattr(owner, name), lambda *_: None))
            try:
                save(root, step, 9.0)
                break
            except Killed:
                pass
        found = checkpoint.find_checkpoint("auto", root)
        assert found is not None, points
        manifest, own, shared = checkpoint.load_checkpoint(found, 0)
        assert manifest["step"] in (2, step), points
        assert own["value"] in ((9.0,) if manifest["step"] == 3 else (2.0, 9.0)), points
        assert torch.equal(shared["weight"], torch.full((9,), own["value"])), points
        assert checkpoint.read_manifest(save(root, step, 7.0)) is not None
    assert points > 10
