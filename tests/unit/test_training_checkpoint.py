"""A checkpoint is whole or absent."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from gdn_cp.training.checkpoint import (
    MANIFEST,
    check_facts,
    complete_checkpoints,
    find_checkpoint,
    load_checkpoint,
    read_manifest,
    save_checkpoint,
    step_folder,
)

FACTS = {"tp": 1, "cp": 1, "model": {"hidden": 8}}


def save(root: Path, step: int, keep: int = 9) -> Path:
    state = {"weight": torch.full((100,), float(step))}
    return save_checkpoint(root, step, FACTS, own={"rng": step}, shared=state, shared_index=0, keep=keep)


def test_what_is_saved_is_loaded(tmp_path):
    manifest, own, shared = load_checkpoint(save(tmp_path, 3), shared_index=0)
    assert manifest["step"] == 3
    assert manifest["model"] == {"hidden": 8}
    assert own == {"rng": 3}
    assert torch.equal(shared["weight"], torch.full((100,), 3.0))


def test_only_the_newest_are_kept(tmp_path):
    for step in (1, 2, 10):
        save(tmp_path, step, keep=2)
    assert [folder.name for folder in complete_checkpoints(tmp_path)] == ["step_00000002", "step_00000010"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000002", "step_00000010"]


@pytest.mark.parametrize("damage", ["no manifest", "half a manifest", "short file", "missing file", "still partial"])
def test_a_checkpoint_cut_in_the_middle_is_not_taken(tmp_path, damage):
    older, newer = save(tmp_path, 1), save(tmp_path, 2)
    if damage == "no manifest":
        (newer / MANIFEST).unlink()
    elif damage == "half a manifest":
        text = (newer / MANIFEST).read_text()
        (newer / MANIFEST).write_text(text[: len(text) // 2])
    elif damage == "short file":
        os.truncate(newer / "shared_tp0.pt", 50)
    elif damage == "missing file":
        (newer / "rank_00000.pt").unlink()
    else:
        newer.rename(tmp_path / f".{newer.name}.partial")
    assert find_checkpoint("auto", tmp_path) == older
    with pytest.raises(ValueError, match="not complete"):
        load_checkpoint(newer, shared_index=0)


def test_leftovers_of_a_cut_write_do_no_harm(tmp_path):
    leftover = tmp_path / ".step_00000002.partial"
    leftover.mkdir()
    (leftover / "rank_00007.pt").write_bytes(b"old")
    folder = save(tmp_path, 2)
    manifest = read_manifest(folder)
    assert manifest is not None
    assert sorted(manifest["files"]) == ["rank_00000.pt", "shared_tp0.pt"]
    assert not (folder / "rank_00007.pt").exists()


def test_a_step_reached_again_replaces_its_checkpoint(tmp_path):
    folder = save(tmp_path, 2)
    os.truncate(folder / "shared_tp0.pt", 50)
    assert save(tmp_path, 2) == folder
    assert read_manifest(folder) is not None
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_where_resume_looks(tmp_path):
    root = tmp_path / "checkpoints"
    assert find_checkpoint("auto", root) is None
    save(root, 1)
    newest = save(root, 2)
    assert find_checkpoint("auto", root) == newest
    assert find_checkpoint(str(tmp_path), tmp_path / "elsewhere") == newest  # a run's folder
    assert find_checkpoint(str(step_folder(root, 1)), root) == step_folder(root, 1)
    with pytest.raises(ValueError, match="holds no complete checkpoint"):
        find_checkpoint(str(tmp_path / "nothing"), root)


def test_another_number_of_ranks_is_refused_by_name(tmp_path):
    manifest = json.loads((save(tmp_path, 1) / MANIFEST).read_text())
    check_facts(manifest, FACTS, tmp_path)
    with pytest.raises(ValueError, match=r"made with cp=1, this run has 2"):
        check_facts(manifest, {**FACTS, "cp": 2}, tmp_path)


def _save_with_a_failing_rank(rank: int, world_size: int, root: str) -> list[str]:
    """Save a good checkpoint, then one that rank 1 cannot write; both ranks must hear of it."""
    shared = {"x": torch.ones(3)} if rank == 0 else None
    folder = save_checkpoint(Path(root), 1, FACTS, own={"rank": rank}, shared=shared, shared_index=0, keep=1)
    _, own, _ = load_checkpoint(folder, shared_index=0)
    heard = [str(own["rank"])]
    if rank == 1:
        torch.save = _full_disk
    try:
        save_checkpoint(Path(root), 2, FACTS, own={}, shared=shared, shared_index=0, keep=1)
    except OSError as error:
        heard.append(str(error))
    return [*heard, str(find_checkpoint("auto", Path(root)))]


def _full_disk(*args: object) -> None:
    raise RuntimeError("no space left")


def test_a_rank_that_cannot_write_fails_on_every_rank(run_ranks, tmp_path):
    for rank, (own, error, newest) in enumerate(run_ranks(_save_with_a_failing_rank, 2, str(tmp_path))):
        assert own == str(rank)
        assert "rank 1: no space left" in error
        assert newest == str(step_folder(tmp_path, 1))
