"""A run that meets numbers that are not finite, or a folder that is taken, says so on every rank."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from gdn_cp.training.config import OptimConfig, ParallelConfig, RunConfig, TrainConfig
from gdn_cp.training.loop import train
from gdn_cp.training.metrics import METRICS_FILE, read_steps
from tests.unit.test_training_parallel import DATA, MODEL, real_text


def config(folder: Path, **run: Any) -> TrainConfig:
    """Two ranks of context parallelism; a learning rate that ruins the weights in the first step."""
    (folder / "text").mkdir(exist_ok=True)
    for index, text in enumerate(real_text()):
        (folder / "text" / f"{index}.txt").write_bytes(text)
    return TrainConfig(
        model=MODEL,
        data=dataclasses.replace(DATA, data=folder / "text"),
        parallel=ParallelConfig(cp=2),
        optim=OptimConfig(lr=1e30, warmup_steps=0),
        run=RunConfig(steps=3, checkpoint_every=-1, out=folder / "run", device="cpu", **run),
    )


def train_on_ranks(rank: int, world_size: int, choices: list[TrainConfig]) -> list[str]:
    """What each run raised, or its summary."""
    outcomes = []
    for choice in choices:
        try:
            outcomes.append(train(choice).line())
        except (ValueError, FloatingPointError) as error:
            outcomes.append(f"{type(error).__name__}: {error}")
            from megatron.core import parallel_state

            parallel_state.destroy_model_parallel()
    return outcomes


def test_not_finite_stops_or_skips_and_used_folders_are_refused(run_ranks, tmp_path):
    for name in ("stop", "skip"):
        (tmp_path / name).mkdir()
    stop = config(tmp_path / "stop")
    skip = config(tmp_path / "skip", on_nonfinite="skip")
    uneven = dataclasses.replace(stop, parallel=ParallelConfig(cp=3))
    outcomes = run_ranks(train_on_ranks, 2, [stop, skip, skip, uneven])
    for stopped, _, refused, impossible in outcomes:
        assert impossible.startswith("ValueError: 2 ranks cannot be shared by tp=1 x cp=3")
        assert stopped.startswith("FloatingPointError: step 2: loss nan")
        assert "--on-nonfinite skip" in stopped
        assert refused.startswith("ValueError")
        assert "already holds a run" in refused
        assert "--resume auto" in refused
    saved = torch.load(tmp_path / "stop" / "run" / "nonfinite" / "step_00000002.pt", weights_only=False)
    assert saved["step"] == 2
    assert len(saved["packs"]) == DATA.packs_per_step
    assert saved["packs"][0]["tokens"].shape == saved["packs"][0]["labels"].shape
    steps = read_steps(tmp_path / "skip" / "run" / METRICS_FILE)
    assert [step["skipped"] for step in steps] == [False, True, True]
    assert [step["loss"] is None for step in steps] == [False, True, True]
    assert outcomes[0][1].startswith("summary: 3 steps")


@pytest.mark.parametrize("device", ["cpu", "auto"])
def test_device_of_a_machine_without_gpu(device, monkeypatch):
    from gdn_cp.training.parallel import choose_device

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device(device).type == "cpu"


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    from gdn_cp.training.parallel import choose_device

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="local rank 2 has no GPU of its own, this machine has 2"):
        choose_device("auto")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert choose_device("cuda") == torch.device("cuda", 1)


def test_trained_weights_convert_to_hugging_face_and_back(run_ranks, tmp_path):
    from safetensors.torch import load_file

    from scripts import convert_hf

    choices = dataclasses.replace(config(tmp_path), parallel=ParallelConfig(tp=2), optim=OptimConfig())
    ungated = dataclasses.replace(
        choices,
        model=dataclasses.replace(MODEL, attention_gate=False),
        run=dataclasses.replace(choices.run, out=tmp_path / "ungated"),
    )
    for summaries in run_ranks(train_on_ranks, 2, [choices, ungated]):
        assert all(line.startswith("summary: 3 steps") for line in summaries)
    run, hf, back = tmp_path / "run", tmp_path / "hf", tmp_path / "back"
    assert convert_hf.main(["to-hf", "--source", str(run), "--target", str(hf)]) == 0
    assert convert_hf.main(["to-megatron", "--source", str(hf), "--target", str(back), "--no-zero-centered"]) == 0
    before, after = load_file(run / "weights.safetensors"), load_file(back / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():  # Hugging Face's norms hold the gain minus one, in the dtype of the matrices
        limit = 2.0**-24 if "norm" in name else 0.0
        assert (tensor - after[name]).abs().max() <= limit, name
    assert not (tmp_path / "ungated" / "model.json").exists()
