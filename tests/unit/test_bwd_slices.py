"""How the backward is cut into slices: sizes against what the buffers take, and how many pieces a slice holds."""

from __future__ import annotations

import doctest

import pytest

pytest.importorskip("triton")

from hypothesis import given
from hypothesis import strategies as st

from gdn_cp.kernels import bwd_slices


def test_examples():
    assert doctest.testmod(bwd_slices).failed == 0


def test_summaries_are_walked_in_longer_slices():
    chunks = 1024
    longer = bwd_slices.summary_chunks(chunks, HV=32, K=128)
    assert longer > bwd_slices.slice_chunks(chunks, HV=32, K=128, V=128)
    assert longer * 32 * 2 * 64 * (128 + 64) <= bwd_slices.SLICE_BYTES  # X and Y of every chunk and head
    assert bwd_slices.summary_chunks(0, HV=32, K=128) == 1


def test_slice_rule():
    assert bwd_slices.slice_chunks(512, HV=4, K=128, V=128) == 0
    chunks = 16384  # 1,048,576 tokens
    length = bwd_slices.slice_chunks(chunks, HV=32, K=128, V=128)
    # Per chunk and head, in bfloat16: two states, X and what follows it in the same memory, and U.
    assert 0 < length * 32 * 2 * (2 * 128 * 128 + 64 * 128 + 64 * 128) <= bwd_slices.SLICE_BYTES
    assert bwd_slices.slice_chunks(length, HV=32, K=128, V=128) == 0


def test_lean_slices_halve_the_buffers_of_middling_batches():
    """Qwen3-Next's heads among four ranks, 16,384 tokens: 256 chunks of 8 heads."""
    assert bwd_slices.slice_chunks(256, 8, 128, 128) == 0
    assert bwd_slices.slice_chunks(256, 8, 128, 128, 2, True) == 128
    assert bwd_slices.slice_chunks(257, 8, 128, 128, 2, True) == 129  # a bound on the chunks of two sequences
    assert bwd_slices.slice_chunks(64, 8, 128, 128, 2, True) == 0  # too small to matter
    chunks = 16384
    assert bwd_slices.slice_chunks(chunks, 32, 128, 128, 2, True) == bwd_slices.slice_chunks(chunks, 32, 128, 128)


@given(st.integers(1, 20000), st.sampled_from([1, 4, 32]), st.booleans())
def test_slices_are_even_and_cover_all_chunks(chunks, heads, lean):
    length = bwd_slices.slice_chunks(chunks, heads, 128, 128, 2, lean)
    if length:
        slices = -(-chunks // length)
        assert slices > 1
        assert length == -(-chunks // slices)  # what the backward infers from the number of states that were kept


@given(st.integers(1, 64), st.integers(1, 4096), st.integers(1, 4096))
def test_a_slice_holds_no_more_pieces_than_there_are(pieces, chunks, size):
    assert 1 <= bwd_slices.concurrent_pieces(pieces, chunks, min(size, chunks)) <= pieces
