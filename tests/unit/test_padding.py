"""The padding helper: what it makes fits the layout, is the least that fits, and keeps every token."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gdn_cp.comm.layout import ThdLayout, pad_cu_seqlens


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.integers(0, 20), min_size=1, max_size=5),
    st.sampled_from([1, 2, 3, 4, 8]),
    st.sampled_from(["zigzag", "contiguous"]),
    st.sampled_from([1, 2, 3]),
)
def test_padded_batch_fits_the_layout_and_keeps_every_token(lengths, cp_size, kind, local_multiple):
    batch = pad_cu_seqlens([0, *accumulate(lengths)], cp_size, kind, local_multiple=local_multiple)
    made = getattr(ThdLayout, kind)(batch.cu_seqlens, cp_size, seqlens=batch.seqlens)
    assert made.seqlens == tuple(lengths)
    assert made.t_local % local_multiple == 0
    unit = 2 * cp_size if kind == "zigzag" and cp_size > 1 else 1
    grown = [b - a - n for a, b, n in zip(batch.cu_seqlens, batch.cu_seqlens[1:], lengths, strict=False)]
    assert all(0 <= more < unit for more in grown[:-1])
    assert grown[-1] < unit + unit * cp_size * local_multiple
    mask = made.global_padding()
    assert batch.mask.tolist() == ([False] * made.t_global if mask is None else mask.tolist())
    x = torch.randn(sum(lengths), 2)
    padded = batch.pad(x, value=-1)
    assert torch.equal(batch.unpad(padded), x)
    assert bool((padded[batch.mask] == -1).all())
    assert torch.equal(padded[batch.row_map], x)


def test_nothing_is_padded_that_fits():
    batch = pad_cu_seqlens([0, 8, 8, 16], 4)
    assert batch.cu_seqlens == (0, 8, 8, 16)
    assert not batch.mask.any()


def test_total_pads_the_last_sequence_to_a_constant_shape():
    batch = pad_cu_seqlens([0, 3, 8], 2, total=24)
    assert batch.cu_seqlens == (0, 4, 24)
    assert batch.seqlens == (3, 5)
    assert int(batch.mask.sum()) == 24 - 8


REFUSED = {
    "kind": (lambda: pad_cu_seqlens([0, 3], 2, "ring"), r"kind: got 'ring'; choose"),
    "boundaries": (lambda: pad_cu_seqlens([1, 3], 2), r"cu_seqlens: starts at 1"),
    "cp_size": (lambda: pad_cu_seqlens([0, 3], 0), r"cp_size: got 0"),
    "local_multiple": (lambda: pad_cu_seqlens([0, 3], 2, local_multiple=0), r"local_multiple: got 0"),
    "total_too_small": (
        lambda: pad_cu_seqlens([0, 5], 2, total=4),
        r"total: got 4; it must be at least 8 and a multiple of 4",
    ),
    "total_not_divisible": (lambda: pad_cu_seqlens([0, 5], 2, total=10), r"total: got 10; it must be at least 8"),
    "too_large": (lambda: pad_cu_seqlens([0, 2**31 - 1], 2), r"cu_seqlens: padded .* has 2147483648 rows, above"),
    "pad_rows": (lambda: pad_cu_seqlens([0, 5], 2).pad(torch.ones(4)), r"x: has 4 rows; the batch has 5 real tokens"),
    "unpad_rows": (lambda: pad_cu_seqlens([0, 5], 2).unpad(torch.ones(4)), r"x: has 4 rows; the padded batch has 8"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusal_names_argument_value_and_remedy(case):
    call, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        call()
