"""The choice of intra-card pieces: against what was measured on an H200, and its overrides."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from gdn_cp.kernels.piece_plan import PIECES_VARIABLE, Shape, best_cut, chain_plan

CPU = torch.device("cpu")
RESULTS = Path(__file__).parents[2] / "benchmarks/results"


def shape(tokens: int, heads: int, sequences: int = 1, summarised: bool = False) -> Shape:
    return Shape(132, sequences, tokens // sequences // 64, heads, 128, 128, summarised)


Times = dict[int, float]
"""Milliseconds of a pass by chunks to a piece."""


def measured() -> list[tuple[str, tuple[int, int, int], Times, Times]]:
    """Forward and backward on an H200 of (value heads, tokens, sequences), from each file of results."""
    found = []
    for name in ("segments-cuts-h200", "segments-h200"):
        batches: dict[tuple[int, int, int], tuple[Times, Times]] = {}
        for row in json.loads((RESULTS / f"{name}.json").read_text())["rows"]:
            key = (row["heads"][1], row["tokens"], row["sequences"])
            forward, backward = batches.setdefault(key, ({}, {}))
            forward[row["pieces"]] = row["forward"]
            backward[row.get("backward_pieces", row["pieces"])] = row["both"] - row["forward"]
        found += [(name, key, *times) for key, times in batches.items()]
    return found


def nearest(cut: int, times: Times) -> int:
    """The measured cut that is nearest to `cut` by ratio; none is near to 0 but 0."""
    return min(times, key=lambda other: abs(math.log(max(cut, 1e-9) / max(other, 1e-9))))


@pytest.mark.parametrize(("name", "batch", "forward", "backward"), measured(), ids=str)
def test_choice_is_within_three_percent_of_the_best_that_was_measured(name, batch, forward, backward):
    heads, tokens, sequences = batch
    _, *cuts = best_cut(shape(tokens, heads, sequences))
    taken = [times[nearest(cut, times)] for cut, times in zip(cuts, (forward, backward), strict=True)]
    assert taken[0] <= 1.03 * min(forward.values())
    possible = [forward[f] + backward[b] for f in forward for b in {0, f} & backward.keys()]
    assert sum(taken) <= 1.03 * min(possible)


@pytest.mark.parametrize("heads", [1, 2, 4, 8, 16, 32, 64])
@pytest.mark.parametrize("sequences", [1, 3, 16])
def test_the_backward_takes_the_forwards_cut_or_none(heads, sequences):
    for tokens in (4096, 65536, 2**20):
        _, cut, backward_cut = best_cut(shape(tokens, heads, sequences))
        assert backward_cut in (0, cut)


def test_short_sequences_stay_whole():
    assert best_cut(shape(256, 4))[1:] == (0, 0)
    assert best_cut(shape(65536, 32, 64))[1:] == (0, 0)


def test_fixed_pieces_are_taken_and_only_columns_chosen():
    assert best_cut(shape(32768, 16), 0) == (32, 0, 0)  # 64 programs of 32 columns, each step shorter than with 64
    assert best_cut(shape(32768, 16), 7)[1:] == (7, 7)
    assert best_cut(shape(32768, 64), 0) == (64, 0, 0)  # more programs than multiprocessors


def test_argument_goes_before_the_variable(monkeypatch):
    monkeypatch.setenv(PIECES_VARIABLE, "5")
    assert chain_plan(CPU, torch.float32, 1, 6400, 1, 16, 16)[1] == 5
    assert chain_plan(CPU, torch.float32, 1, 6400, 1, 16, 16, intra_card=3)[1] == 3
    monkeypatch.setenv(PIECES_VARIABLE, "many")
    with pytest.raises(ValueError, match="GDN_CP_PIECE_CHUNKS is 'many'"):
        chain_plan(CPU, torch.float32, 1, 64, 1, 16, 16)


def test_segments_are_cut_where_few_heads_are_left():
    """Two segments of 32 heads fill the card; with 4 heads pieces pay although the segments' laws are composed too."""
    assert best_cut(shape(16384, 32, 2, True))[1] == 0
    assert best_cut(shape(65536, 4, 2, True))[1] > 0
