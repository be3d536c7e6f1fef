"""Packing: every target exactly once an epoch, whole documents, the budget, arrays that cross no document."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gdn_cp.comm.layout import ThdLayout
from gdn_cp.training.packing import Piece, build_batch, check_budget, cut_into_pieces, pad_up, plan_epoch

MULTIPLE = 8
SETTINGS = settings(max_examples=60, deadline=None)
lengths_lists = st.lists(st.integers(1, 90), min_size=1, max_size=40)
budgets = st.integers(1, 8).map(lambda n: n * MULTIPLE)


def plan(lengths: list[int], budget: int, seed: int = 0) -> list[list[Piece]]:
    return plan_epoch(lengths, budget, MULTIPLE, np.random.default_rng(seed))


@SETTINGS
@given(lengths_lists, budgets, st.integers(0, 3))
def test_every_pair_once_an_epoch_and_budget_kept(lengths, budget, seed):
    seen = [np.zeros(length, dtype=int) for length in lengths]
    for pack in plan(lengths, budget, seed):
        assert pack
        assert sum(pad_up(piece.length, MULTIPLE) for piece in pack) <= budget
        for piece in pack:
            seen[piece.document][piece.start : piece.stop] += 1
    assert all((counts == 1).all() for counts in seen)


@SETTINGS
@given(lengths_lists, budgets)
def test_only_documents_over_the_budget_are_cut(lengths, budget):
    pieces = cut_into_pieces(lengths, budget)
    for document, length in enumerate(lengths):
        mine = [piece for piece in pieces if piece.document == document]
        assert [piece.length for piece in mine[:-1]] == [budget] * (len(mine) - 1)
        assert (len(mine) == 1) == (length <= budget)


def test_plan_is_a_function_of_the_seed():
    lengths = [5, 17, 30, 64, 100, 3] * 5
    assert plan(lengths, 64, 1) == plan(lengths, 64, 1)
    assert plan(lengths, 64, 1) != plan(lengths, 64, 2)


def test_short_documents_share_packs_tightly():
    lengths = [int(n) for n in np.random.default_rng(0).integers(1, 200, size=500)]
    packs = plan(lengths, 512)
    needed = sum(pad_up(length, MULTIPLE) for length in lengths)
    assert needed / (512 * len(packs)) > 0.95


@SETTINGS
@given(lengths_lists, budgets)
def test_arrays_stay_within_documents(lengths, budget):
    # Token value = 1000 * document + position, so that every row says where it comes from.
    documents = [1000 * d + np.arange(length + 1) for d, length in enumerate(lengths)]
    for pack in plan(lengths, budget):
        batch = build_batch(documents, pack, MULTIPLE, pad_id=-7)
        assert batch.num_targets == batch.loss_mask.sum() == sum(batch.seqlens)
        for piece, begin, end in zip(pack, batch.cu_seqlens, batch.cu_seqlens[1:], strict=False):
            real, padding = slice(begin, begin + piece.length), slice(begin + piece.length, end)
            origin = 1000 * piece.document + piece.start
            np.testing.assert_array_equal(batch.tokens[real], origin + np.arange(piece.length))
            np.testing.assert_array_equal(batch.labels[real], batch.tokens[real] + 1)
            np.testing.assert_array_equal(batch.position_ids[begin:end], np.arange(end - begin))
            assert batch.loss_mask[real].all()
            assert not batch.loss_mask[padding].any()
            assert (batch.tokens[padding] == -7).all()
            assert (batch.labels[padding] == -7).all()
            assert (end - begin) % MULTIPLE == 0


@pytest.mark.parametrize("cp", [1, 2, 4])
def test_one_pack_serves_every_context_parallel_size(cp):
    documents = [np.arange(20), np.arange(9), np.arange(4)]
    pack = [Piece(0, 0, 19), Piece(1, 0, 8), Piece(2, 0, 3)]
    batch = build_batch(documents, pack, MULTIPLE, pad_id=0)
    layout = ThdLayout.zigzag(batch.cu_seqlens, cp, seqlens=batch.seqlens)
    rows = np.concatenate([layout.local_rows(rank).numpy() for rank in range(cp)])
    np.testing.assert_array_equal(np.sort(rows), np.arange(len(batch.tokens)))
    padding = layout.global_padding()
    assert padding is not None
    np.testing.assert_array_equal(padding.numpy(), ~batch.loss_mask)


@pytest.mark.parametrize(("budget", "multiple"), [(0, 8), (12, 8), (-8, 8), (8, 0)])
def test_bad_budgets_are_refused(budget, multiple):
    with pytest.raises(ValueError, match="multiple"):
        check_budget(budget, multiple)
