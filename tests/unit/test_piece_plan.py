"""The choice of intra-card pieces: against what was measured on an H200, and its overrides."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from gdn_cp.kernels.piece_plan import PIECES_VARIABLE, Shape, best_cut, chain_plan

CPU = torch.device("cpu")


def shape(tokens: int, heads: int, sequences: int = 1, summarised: bool = False) -> Shape:
    return Shape(132, sequences, tokens // sequences // 64, heads, 128, 128, summarised)


# Forward and backward on an H200 by (value heads, tokens, sequences): between which numbers of chunks to a piece the
# best of those lay that were measured (16, 32, 64 and one or two more); (0, 0): none was better than no cut.
MEASURED = {
    (4, 32768, 1): (32, 64),
    (4, 131072, 1): (64, 128),
    (8, 32768, 1): (64, 64),
    (8, 131072, 1): (47, 90),
    (8, 131072, 4): (47, 90),
    (8, 32768, 4): (0, 0),
    (16, 32768, 1): (0, 0),
    (16, 131072, 1): (0, 0),
    (16, 32768, 4): (0, 0),
    (16, 131072, 4): (0, 0),
    (32, 32768, 1): (0, 0),
    (32, 131072, 1): (0, 0),
    (32, 131072, 4): (0, 0),
}


@pytest.mark.parametrize(("measured", "pieces"), MEASURED.items(), ids=str)
def test_choice_is_near_what_was_measured_as_best(measured, pieces):
    heads, tokens, sequences = measured
    _, cut = best_cut(shape(tokens, heads, sequences))
    assert pieces[0] <= cut <= pieces[1]


def test_short_sequences_stay_whole():
    assert best_cut(shape(256, 4))[1] == 0
    assert best_cut(shape(65536, 32, 64))[1] == 0


def test_fixed_pieces_are_taken_and_only_columns_chosen():
    assert best_cut(shape(32768, 16), 0) == (32, 0)  # 64 programs of 32 columns, each step shorter than with 64
    assert best_cut(shape(32768, 16), 7)[1] == 7
    assert best_cut(shape(32768, 64), 0) == (64, 0)  # more programs than multiprocessors


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
