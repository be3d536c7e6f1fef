"""States composed along chains of a table: plain torch against a loop over each chain, Triton against plain torch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gdn_cp.kernels.merge import KEEP, LAW, MAP, OUT, merge_chains

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Case:
    """Chains of the given numbers of links, whose matrices stand anywhere."""

    def __init__(self, counts: list[int], K: int, V: int, dtype: torch.dtype, device: str = "cpu"):
        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=dtype).to(device)

        total = sum(counts)
        first = torch.tensor([0, *counts]).cumsum(0)[:-1]
        units = torch.stack([first, torch.tensor(counts, dtype=torch.int64)], 1)
        links = torch.stack([torch.randperm(total) for _ in range(4)], 1)
        for start, count in units.tolist():
            links[start : start + 1, MAP] = -1  # nothing enters a chain
            links[start + count - 1 : start + count, LAW : MAP + 1] = -1  # whose last segment's law nobody needs
        links[::3, OUT] = -1
        links[1::3, KEEP] = -1
        # S_ext and M side by side, as they are gathered.
        laws = normal(total, K, V + K)
        self.ext, self.maps = laws[..., :V], laws[..., V:]
        self.units, self.links = units.int().to(device), links.int().to(device)
        self.steps, self.counts = max(counts, default=0), counts

    def merge(self, transpose: bool, kernels: bool) -> tuple[Tensor, Tensor]:
        """out and kept; what is not written is NaN."""
        out = torch.full(self.ext.shape, torch.nan, dtype=self.ext.dtype, device=self.ext.device)
        kept = torch.full(self.maps.shape, torch.nan, dtype=self.ext.dtype, device=self.ext.device)
        options = {"steps": self.steps, "transpose": transpose, "kept": kept, "kernels": kernels}
        merge_chains(self.ext, self.maps, self.units, self.links, out, **options)
        return out, kept


@given(st.lists(st.integers(1, 5), max_size=6), st.booleans(), st.integers(0, 2**20))
@settings(max_examples=20, deadline=None)
def test_ragged_chains_are_a_loop_over_each(counts, transpose, seed):
    torch.manual_seed(seed)
    case = Case(counts, 8, 6, torch.float64)
    out, kept = case.merge(transpose, kernels=False)
    expected, copied = torch.full_like(out, torch.nan), torch.full_like(kept, torch.nan)
    for start, count in case.units.tolist():
        state = torch.zeros(8, 6, dtype=torch.float64)
        for law, map_at, to, copy in case.links[start : start + count].tolist():
            if to >= 0:
                expected[to] = state
            if copy >= 0 and map_at >= 0:
                copied[copy] = case.maps[map_at]
            if law >= 0:
                M = case.maps[map_at] if map_at >= 0 else torch.zeros(8, 8, dtype=torch.float64)
                state = case.ext[law] + (M.T if transpose else M) @ state
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12, equal_nan=True)
    torch.testing.assert_close(kept, copied, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize(("K", "V"), [(16, 16), (48, 32)])
def test_the_kernel_is_plain_torch(K, V, transpose):
    pytest.importorskip("triton")
    torch.manual_seed(1)
    case = Case([3, 1, 4], K, V, torch.float32, DEVICE)
    case.maps.mul_(K**-0.5)  # so that products neither grow nor shrink
    (out, kept), (expected, copied) = (case.merge(transpose, kernels) for kernels in (True, False))
    assert torch.equal(kept.isnan(), copied.isnan())
    assert torch.equal(kept.nan_to_num(), copied.nan_to_num())
    assert torch.equal(out.isnan(), expected.isnan())
    # Three products in a row, each a sum of K terms rounded at most K times.
    error = (out - expected).nan_to_num().norm() / expected.nan_to_num().norm()
    assert error < 3 * K * 2.0**-24


def test_autocast_leaves_the_composition_in_float32():
    case = Case([3, 3], 8, 6, torch.float32)
    expected, _ = case.merge(False, kernels=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(case.merge(False, kernels=False)[0].nan_to_num(), expected.nan_to_num())
