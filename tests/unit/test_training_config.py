"""Choices that cannot run are refused with a remedy; learning rate and arithmetic follow their formulas."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise

import pytest
import torch

from gdn_cp.training.config import OptimConfig, TrainConfig, check_config
from gdn_cp.training.flops import matmul_weights, peak_tflops, training_flops
from gdn_cp.training.presets import PRESETS, QWEN3_NEXT_PROXY, TINY


def changed(config: TrainConfig, **fields: object) -> TrainConfig:
    """The config with fields replaced in whichever group has them."""
    for group in ("model", "data", "parallel", "optim", "run"):
        part = getattr(config, group)
        mine = {name: value for name, value in fields.items() if hasattr(part, name)}
        config = dataclasses.replace(config, **{group: dataclasses.replace(part, **mine)})
    return config


@pytest.mark.parametrize(
    ("world", "fields", "message"),
    [
        (3, {"cp": 2}, "3 ranks cannot be shared"),
        (2, {"tp": 0}, "at least 1"),
        (4, {"packs_per_step": 2}, "packs_per_step=2 must be a positive multiple of the 4"),
        (3, {"cp": 3}, "pad_multiple=8 must be a multiple of 6"),
        (
            8,
            {"cp": 8, "pad_multiple": 16, "a2a_size": None},
            "gdn_key_heads=4 must be a multiple of tp \\* a2a_size = 8",
        ),
        (8, {"cp": 8, "pad_multiple": 16, "attention_heads": 8, "a2a_size": 8}, 'a2a_size "largest" takes any number'),
        (8, {"cp": 8, "pad_multiple": 16}, "attention_heads=4, attention_groups=4: .* do not fall over cp=8"),
        (4, {"cp": 4, "a2a_size": 3}, "a2a_size: got 3; it must divide cp_size = 4: one of \\[1, 2, 4\\]"),
        (4, {"cp": 4, "a2a_size": "all"}, 'a2a_size: got \'all\'; choose "auto", "largest", None or a divisor'),
        (2, {"tp": 2, "gdn_key_heads": 3, "gdn_value_heads": 6}, "gdn_key_heads=3 must be a multiple of tp = 2"),
        (8, {"tp": 8}, "multiple of tp"),
        (1, {"gdn_value_heads": 6}, "gdn_value_heads=6 must be a multiple of gdn_key_heads=4"),
        (2, {"tp": 2, "vocab": 301}, "vocab=301"),
        (2, {"tp": 2, "attention_groups": 1}, "attention_groups=1 must be a multiple of tp = 2"),
        (1, {"steps": 0}, "steps=0"),
        (1, {"keep_checkpoints": 0}, "keep_checkpoints=0"),
        (1, {"timeout_minutes": 0.0}, "timeout_minutes"),
        (1, {"warmup_steps": -1}, "warmup_steps=-1"),
        (1, {"layers": 0}, "layers=0"),
    ],
)
def test_impossible_choices_are_refused(world, fields, message):
    with pytest.raises(ValueError, match=message):
        check_config(changed(TINY, **fields), world)


@pytest.mark.parametrize(
    ("world", "fields", "dp"),
    [(1, {}, 1), (2, {"cp": 2}, 1), (8, {"tp": 2, "cp": 2}, 2), (4, {"cp": 4, "a2a_size": 2}, 1)],
)
def test_data_parallelism_is_what_is_left(world, fields, dp):
    assert check_config(changed(TINY, **fields), world) == dp


@pytest.mark.parametrize("cp", [1, 2, 4, 8, 16])
def test_proxy_runs_on_every_usual_number_of_gpus(cp):
    assert check_config(changed(QWEN3_NEXT_PROXY, cp=cp), cp) == 1


def test_presets_can_be_written_down():
    for _, config in PRESETS.values():
        assert config.to_dict()["model"]["hidden"] == config.model.hidden


def test_learning_rate_warms_up_and_falls_to_its_floor():
    optim = OptimConfig(lr=1.0, min_lr=0.1, warmup_steps=4)
    rates = [optim.lr_at(step, 20) for step in range(1, 21)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert all(later < earlier for earlier, later in pairwise(rates[3:]))
    assert math.isclose(rates[-1], 0.1)
    assert math.isclose(optim.lr_at(12, 20), 0.55)  # the middle of the cosine
    assert math.isclose(optim.lr_at(99, 20), 0.1)
    assert OptimConfig(warmup_steps=0).lr_at(1, 1) >= OptimConfig().min_lr


def test_arithmetic_of_a_step():
    model = TINY.model
    gdn = model.hidden * (2 * 4 * 32 + 2 * 8 * 32 + 2 * 8) + 8 * 32 * model.hidden
    attention = model.hidden * (2 * 4 * 32 + 2 * 4 * 32) + 4 * 32 * model.hidden
    weights = 3 * gdn + attention + 4 * 3 * model.hidden * model.ffn + model.hidden * model.vocab
    assert matmul_weights(model) == weights
    rule = 3 * (4 * 64 * 32 * 4 + 8 * (2 * 64 * (32 + 2 * 32) + 6 * 32 * 32))
    squares = 6 * 4 * 32
    expected = 150 * (6 * weights + 3 * rule) + squares * (100**2 + 50**2)
    assert training_flops(model, [100, 50]) == expected


def test_a_cpu_has_no_known_peak():
    assert peak_tflops(torch.device("cpu")) is None
