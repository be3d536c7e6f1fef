"""Checkpoints that are whole or absent: written beside their place, marked complete, then moved there in one rename.

    <run>/checkpoints/step_00000050/
        manifest.json       written last: step, parallel sizes, data position, and every file with its size
        shared_tp0.pt       what all data- and context-parallel ranks hold alike (one file per tensor-parallel rank)
        rank_00000.pt       what is this rank's own: random states, and its shard of a distributed optimizer

The folder is shared by all ranks (one machine, or a file system that all nodes see). A folder without a manifest, or
with a file missing or shorter than the manifest says, is not a checkpoint and is never chosen.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

MANIFEST = "manifest.json"
_FORMAT = 1


def step_folder(root: Path, step: int) -> Path:
    """Where the checkpoint of a step lies under `root`."""
    return root / f"step_{step:08d}"


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a complete checkpoint; None where any part of it is missing or cut short."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"]
        if all((folder / name).stat().st_size == size for name, size in files.items()):
            return manifest
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    return None


def complete_checkpoints(root: Path) -> list[Path]:
    """Complete checkpoints under `root`, oldest step first."""
    if not root.is_dir():
        return []
    return [folder for folder in sorted(root.glob("step_*")) if read_manifest(folder) is not None]


def find_checkpoint(resume: str, root: Path) -> Path | None:
    """The checkpoint that `resume` means: "auto" is the newest complete one under `root` or None, else a path.

    The path is a checkpoint's folder, or a run's, whose newest is taken. Raises ValueError where the path holds no
    complete checkpoint. Rank 0 looks and tells the others, so that all ranks agree.
    """
    answer: list[Any] = [None, None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            answer[0] = _look_for(resume, root)
        except ValueError as error:
            answer[1] = str(error)
    if dist.is_initialized():
        dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise ValueError(answer[1])
    return answer[0]


def _look_for(resume: str, root: Path) -> Path | None:
    if resume == "auto":
        _take_back(root)
        found = complete_checkpoints(root)
        return found[-1] if found else None
    path = Path(resume)
    if read_manifest(path) is not None:
        return path
    found = complete_checkpoints(path / "checkpoints") or complete_checkpoints(path)
    if not found:
        raise ValueError(f"resume={resume!r} holds no complete checkpoint; give a run's folder, or use 'auto'")
    return found[-1]


def _take_back(root: Path) -> None:
    """Put a checkpoint back that was being replaced when the run was killed between the two renames of `_publish`."""
    for old in root.glob(".step_*.old"):
        final = old.with_name(old.name[1 : -len(".old")])
        if read_manifest(old) is not None and read_manifest(final) is None:
            shutil.rmtree(final, ignore_errors=True)
            old.rename(final)


def save_checkpoint(
    root: Path,
    step: int,
    facts: Mapping[str, Any],
    *,
    own: Mapping[str, Any],
    shared: Mapping[str, Any] | None,
    shared_index: int,
    keep: int,
) -> Path:
    """Write the checkpoint of `step` from all ranks together, and remove all but the newest `keep`.

    facts: JSON values for the manifest, equal on all ranks. own: this rank's tensors and numbers. shared: those that it
    writes on behalf of the ranks that hold the same, or None. shared_index: which group of such ranks it belongs to.
    Raises OSError on every rank where any rank could not write.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    final = step_folder(root, step)
    partial = root / f".{final.name}.partial"
    if rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    _barrier()
    sizes: dict[str, int] = {}
    failure = None
    try:
        sizes[f"rank_{rank:05d}.pt"] = _write(partial / f"rank_{rank:05d}.pt", own)
        if shared is not None:
            sizes[f"shared_tp{shared_index}.pt"] = _write(partial / f"shared_tp{shared_index}.pt", shared)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        failure = f"rank {rank}: {error}"
    reports = _gather((sizes, failure))
    failures = [failure for _, failure in reports if failure is not None]
    if failures:
        raise OSError(f"could not write the checkpoint {final}: " + "; ".join(failures))
    if rank == 0:
        files = {name: size for sizes, _ in reports for name, size in sizes.items()}
        manifest = {"format": _FORMAT, "step": step, **facts, "files": files}
        _publish(partial, final, manifest)
        for old in complete_checkpoints(root)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    _barrier()
    return final


def _publish(partial: Path, final: Path, manifest: Mapping[str, Any]) -> None:
    with (partial / MANIFEST).open("w", encoding="utf-8") as file:
        json.dump(manifest, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():  # a resumed run reaches a step again that an earlier attempt has written
        final.rename(old)
    partial.rename(final)
    _sync_folder(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _write(path: Path, content: Mapping[str, Any]) -> int:
    with path.open("wb") as file:
        torch.save(dict(content), file)
        file.flush()
        os.fsync(file.fileno())
    return path.stat().st_size


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load_checkpoint(folder: Path, shared_index: int) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """(manifest, own, shared) of this rank from a complete checkpoint, tensors on the CPU."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    manifest = read_manifest(folder)
    if manifest is None:
        raise ValueError(f"checkpoint {str(folder)!r} is not complete; use another one, or 'auto'")
    own, shared = (
        torch.load(folder / name, map_location="cpu", weights_only=True)
        for name in (f"rank_{rank:05d}.pt", f"shared_tp{shared_index}.pt")
    )
    return manifest, own, shared


def check_facts(manifest: Mapping[str, Any], facts: Mapping[str, Any], folder: Path) -> None:
    """Raise ValueError where the checkpoint was made under other facts (parallel sizes, data, model) than this run."""
    for name, value in facts.items():
        if manifest.get(name) != value:
            raise ValueError(
                f"checkpoint {str(folder)!r} was made with {name}={manifest.get(name)!r}, this run has {value!r}; "
                f"resume with the same {name}, or start anew without --resume"
            )


def _gather(value: Any) -> list[Any]:
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
