"""Launch settings read from a file: who gets them, and what is refused."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from gdn_cp.kernels.chunk_bwd_config import backward_config
from gdn_cp.kernels.configs import prepare_config
from gdn_cp.kernels.tuned import LAUNCHES_VARIABLE, SETTINGS, read_launch, tuned_launches

CPU = torch.device("cpu")  # counts as sm_90


def write(path, *entries):
    path.write_text(json.dumps({"entries": [dict(zip(KEYS, entry, strict=True)) for entry in entries]}))
    return str(path)


KEYS = ("capability", "dtype", "dim", "kernel", "launch")
ENTRIES = (
    (90, "bfloat16", 128, "dk", [64, 8, 2]),
    (90, "bfloat16", 128, "scores", [16, 4, 2, 168]),
    (90, "bfloat16", 128, "products", [8, 2]),
    (90, "bfloat16", 128, "solve", [32, 2]),
    (80, "bfloat16", 128, "dq", [16, 4, 2]),
)


def test_settings_replace_the_shipped_ones_where_they_fit(tmp_path, monkeypatch):
    shipped = backward_config(CPU, torch.bfloat16, 128, 128, 32)
    monkeypatch.setenv(LAUNCHES_VARIABLE, write(tmp_path / "launches.json", *ENTRIES))
    tuned = backward_config(CPU, torch.bfloat16, 128, 128, 32)
    assert tuned == shipped._replace(dk=(64, 8, 2), scores=(16, 4, 2, 168))
    prepared = prepare_config(CPU, torch.bfloat16, 128)
    assert (prepared.solve_block, prepared.solve_warps) == (32, 2)
    assert (prepared.products_warps, prepared.products_stages) == (8, 2)


def test_settings_of_other_dtypes_dims_and_gpus_are_not_taken(tmp_path, monkeypatch):
    names = {
        (dtype, dim): backward_config(CPU, dtype, dim, dim, 32)
        for dtype in (torch.float32, torch.float16)
        for dim in (64, 128)
    }
    unequal = backward_config(CPU, torch.bfloat16, 128, 64, 32)
    monkeypatch.setenv(LAUNCHES_VARIABLE, write(tmp_path / "launches.json", *ENTRIES))
    assert names == {(dtype, dim): backward_config(CPU, dtype, dim, dim, 32) for dtype, dim in names}
    assert unequal == backward_config(CPU, torch.bfloat16, 128, 64, 32)
    assert tuned_launches(80, torch.bfloat16, 128) == {"dq": (16, 4, 2)}
    assert tuned_launches(100, torch.bfloat16, 128) == {}


@pytest.mark.parametrize(
    "content",
    [
        "no JSON",
        "[]",
        json.dumps({"entries": [{"kernel": "dk"}]}),
        json.dumps({"entries": [dict(zip(KEYS, (90, "bfloat16", 128, "nonsense", [1, 2]), strict=True))]}),
        json.dumps({"entries": [dict(zip(KEYS, (90, "bfloat16", 128, "dk", [64, 8]), strict=True))]}),
        json.dumps({"entries": [dict(zip(KEYS, (90, "bfloat16", 128, "solve", [64, 1, 1]), strict=True))]}),
        json.dumps({"entries": [dict(zip(KEYS, (90, "bfloat16", 128, "products", [4, 0]), strict=True))]}),
    ],
)
def test_other_files_are_refused_by_name(tmp_path, monkeypatch, content):
    path = tmp_path / "launches.json"
    path.write_text(content)
    monkeypatch.setenv(LAUNCHES_VARIABLE, str(path))
    with pytest.raises(ValueError, match=r"GDN_CP_LAUNCHES=.*launches\.json.*tune_kernels"):
        prepare_config(CPU, torch.bfloat16, 128)


def test_a_missing_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv(LAUNCHES_VARIABLE, str(tmp_path / "missing.json"))
    with pytest.raises(ValueError, match="GDN_CP_LAUNCHES"):
        tuned_launches(90, torch.bfloat16, 128)


def test_the_tuning_script_refuses_without_a_gpu_and_has_candidates_that_can_be_read(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "scripts"))
    script = importlib.import_module("tune_kernels")
    assert set(script.CANDIDATES) == set(SETTINGS)
    for kernel, launches in script.CANDIDATES.items():
        for launch in launches:
            assert read_launch({"kernel": kernel, "launch": launch}) == launch
    if not torch.cuda.is_available():
        assert script.main(script.Options()) == 2
        assert "needs an NVIDIA GPU" in capsys.readouterr().out
