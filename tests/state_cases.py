"""What the tests of state passing share: batches to cut, and a group's rows told by a loop over its segments."""

from __future__ import annotations

from itertools import accumulate

import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from torch import Tensor

from gdn_cp.comm.layout import ThdLayout

Case = tuple[str, list[int], int]
"""Layout kind ("zigzag", "contiguous", or "batched" for contiguous cuts of each sequence), boundaries, a2a_size."""


# A few worlds of many random cases each. A failure names its case, so it need not be made smaller by more worlds.
few_worlds = settings(max_examples=2, deadline=None, phases=[Phase.generate])


def divisors(size: int) -> list[int]:
    return [d for d in range(1, size + 1) if size % d == 0]


def build(kind: str, cu: list[int], cp_size: int) -> ThdLayout:
    if kind == "batched":
        return ThdLayout.batched(len(cu) - 1, cu[1], cp_size, kind="contiguous")
    return getattr(ThdLayout, kind)(cu, cp_size)


@st.composite
def packs(draw, cp_size: int, kind: str) -> list[int]:
    """Boundaries for `cp_size` ranks: zero-length and very short sequences, chunks of one token, some long ones."""
    counts = draw(st.lists(st.one_of(st.integers(3, 12), st.integers(0, 2)), min_size=1, max_size=4))
    if kind == "zigzag":
        lengths = [2 * cp_size * n for n in counts]
    elif kind == "batched":
        lengths = [cp_size * max(1, counts[0])] * len(counts)
    else:
        lengths = [n * draw(st.sampled_from([1, 5])) for n in counts]
        lengths[draw(st.integers(0, len(lengths) - 1))] += -sum(lengths) % cp_size
    return [0, *accumulate(lengths)]


def group_rows(layout: ThdLayout, a2a_size: int, group_index: int) -> Tensor:
    """int64: the natural rows of a group's buffer, token by token."""
    table = layout.segments(a2a_size, group_index)
    rows = []
    for slot, (sequence, start) in enumerate(zip(table.sequence_ids, table.starts, strict=True)):
        tokens = table.cu_seqlens[slot + 1] - table.cu_seqlens[slot]
        rows += [layout.cu_seqlens[sequence] + start + token for token in range(tokens)]
    return torch.tensor(rows, dtype=torch.int64)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over that of `expected`; of the difference alone where nothing is expected."""
    expected = expected.double()
    size = float(expected.norm())
    return float((actual.double() - expected).norm()) / (size if size > 0 else 1.0)
