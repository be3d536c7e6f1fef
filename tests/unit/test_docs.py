"""The snippets and commands of docs/huggingface.md and docs/megatron.md run, one after the other as a reader would."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("megatron.core")
pytest.importorskip("psutil")

from tests.unit.test_dist_checkpoint import saving_allowed

ROOT = Path(__file__).resolve().parents[2]


def blocks(document: str, *languages: str) -> list[str]:
    """The document's fenced blocks in these languages; of a diff, what it makes."""
    text = (ROOT / "docs" / document).read_text(encoding="utf-8")
    found = []
    for language, body in re.findall(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        if language == "diff":
            body = "\n".join(line[1:] for line in body.splitlines() if not line.startswith("-"))
        if language in languages:
            found.append(body)
    return found


def start_megatron(cp: int) -> None:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from gdn_cp.megatron import install_cpu_shim

    install_cpu_shim()
    parallel_state.initialize_model_parallel(context_parallel_size=cp)
    model_parallel_cuda_manual_seed(1)
    torch.manual_seed(0)


def execute(snippets: list[str], names: dict[str, Any] | None = None) -> dict[str, Any]:
    names = {} if names is None else names
    for snippet in snippets:
        exec(compile(snippet, "<snippet>", "exec"), names)
    return names


@saving_allowed()
def _run_megatron_document(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    import torch.distributed as dist
    from megatron.core import parallel_state

    os.chdir(folder)
    start_megatron(world_size)
    snippets = blocks("megatron.md", "diff", "python")
    assert len(snippets) == 6
    names = execute(snippets[:3])
    gradients = {name: p.grad.clone() for name, p in names["model"].named_parameters()}
    execute(snippets[3:4], names)
    model = names["model"]
    model.zero_grad()
    execute(snippets[4:], names)
    first = names["losses"][0].clone()
    dist.all_reduce(first)
    dynamic = {name: p.grad.clone() for name, p in model.named_parameters()}
    for gradient in dynamic.values():
        dist.all_reduce(gradient)
    # The pack of both ranks, by one rank alone, is the reference.
    model.zero_grad()
    tokens = torch.randint(0, 256, (64,), generator=torch.Generator().manual_seed(0))
    whole = names["loss_of"]([13, 32, 19], tokens, names["alone"])
    whole.backward()
    alone = {name: p.grad.clone() for name, p in model.named_parameters()}
    # Of the micro-batches one was shared and one each rank's own, here the same on both.
    model.zero_grad()
    (names["loss_of"]([13, 32, 19], tokens, names["alone"]) / 2).backward()
    names["loss_of"]([20, 7, 5], tokens[:32], names["alone"]).backward()
    assert parallel_state.get_context_parallel_world_size() == 2
    return {
        "loss": float(2 * first - whole.detach()),
        "gradients": {n: float((gradients[n] - x).norm() / x.norm()) for n, x in alone.items()},
        "dynamic": {n: float((dynamic[n] - p.grad).norm() / p.grad.norm()) for n, p in model.named_parameters()},
        "alone": float(names["losses"][1]),
        "layer": all(bool(p.grad.isfinite().all()) for p in names["layer"].parameters()),
    }


def test_the_megatron_document_runs_and_its_gradients_are_right(run_ranks, tmp_path):
    for result in run_ranks(_run_megatron_document, 2, str(tmp_path), timeout=240):
        assert abs(result["loss"]) < 1e-5
        assert max(result["gradients"].values()) < 1e-4, result["gradients"]
        assert max(result["dynamic"].values()) < 1e-4, result["dynamic"]
        assert 2.0 < result["alone"] < 4.0  # half of about log(256)
        assert result["layer"]


def _run_huggingface_document(rank: int, world_size: int, folder: str) -> bool:
    os.chdir(folder)
    start_megatron(1)
    names = execute(blocks("huggingface.md", "python"))
    before, after = names["TensorFolder"](names["folder"]), names["TensorFolder"](names["trained"])
    assert before.keys() == after.keys()
    return all(torch.equal(before[name].to(after[name].dtype), after[name]) for name in after)


def test_the_huggingface_document_runs(run_ranks, tmp_path):
    pytest.importorskip("transformers")
    from tests.unit.test_huggingface import theirs

    theirs("qwen3_next").save_pretrained(tmp_path / "Qwen-folder")
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    commands = "\n".join(blocks("huggingface.md", "bash")).strip().splitlines()
    assert len(commands) == 2
    for command in commands:
        words = [sys.executable if word == "python" else word for word in shlex.split(command)]
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "new-Qwen-folder" / "config.json").is_file()
    assert run_ranks(_run_huggingface_document, 1, str(tmp_path), timeout=120) == [True]
