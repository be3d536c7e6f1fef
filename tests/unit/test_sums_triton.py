"""Sums over programs, alone and several in one launch."""

import pytest
import torch

pytest.importorskip("triton")

from gdn_cp.kernels.sums_triton import LaterSums, TapSums, sum_partials, sum_taps

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = 1e-5


def test_sum_of_partials_spans_many_blocks():
    partial = torch.randn(200, 3, 5, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    expected = partial.double().sum(0)
    assert (sum_partials(partial) - expected).norm() < TOLERANCE * expected.norm()
    assert not sum_partials(partial[:0]).any()


@pytest.mark.parametrize(("heads", "shares", "share"), [(3, 1, 0), (5, 3, 2), (40, 2, 0)])
def test_sums_go_to_their_place_among_the_heads_of_all_shares(heads, shares, share):
    partial = torch.randn(70, 2, heads, device=DEVICE)
    placed = sum_partials(partial, shares=shares, share=share).view(2, shares, heads)
    assert torch.equal(placed[:, share], sum_partials(partial))
    assert not placed[:, [other for other in range(shares) if other != share]].any()
    assert not sum_partials(partial[:0], shares=shares, share=share).any()


def taps_job(partials: int, qk: int = 3, v: int = 5, shares: int = 2, bias: bool = True) -> TapSums:
    """Of random partial sums for three taps, results full of NaN."""
    partial = torch.randn(partials, 4, 2 * qk + v, device=DEVICE)
    dweight = torch.full((shares * (2 * qk + v), 3), torch.nan, device=DEVICE)
    return TapSums(partial, dweight, dweight[:, 0].clone() if bias else None, qk=qk, v=v, shares=shares, share=1)


@pytest.mark.parametrize("columns", [0, 1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_one_launch_gives_what_several_give(columns, bias):
    later, waiting, alone = LaterSums(), [], []
    for n, heads, shares in ((70, 40, 2), (130, 7, 1))[:columns]:
        partial = torch.randn(n, 2, heads, device=DEVICE)
        waiting.append(sum_partials(partial, shares=shares, share=shares - 1, later=later).fill_(torch.nan))
        alone.append(sum_partials(partial, shares=shares, share=shares - 1))
    job = taps_job(66, bias=bias)
    sum_taps(job, later)
    assert all(x.isnan().all() for x in (*waiting, job.dweight))
    later.launch()
    again = TapSums(job.partial, job.dweight.clone(), None if job.dbias is None else job.dbias.clone(), 3, 5, 2, 1)
    sum_taps(again)
    waiting += [x for x in (job.dweight, job.dbias) if x is not None]
    alone += [x for x in (again.dweight, again.dbias) if x is not None]
    assert all(torch.equal(x, y) for x, y in zip(waiting, alone, strict=True))
    later.launch()  # nothing is left


def test_taps_go_to_their_place_among_the_channels_of_all_shares():
    job = taps_job(130)
    sum_taps(job)
    assert job.dbias is not None
    total = job.partial.double().sum(0)  # taps, the last first, then the bias; sections of 3, 3 and 5 channels
    for got, expected in ((job.dweight, total[:3].flip(0).t()), (job.dbias[:, None], total[3:].t())):
        q, k, v = got.split((6, 6, 10))
        own = torch.cat([q[3:], k[3:], v[5:]]).double()
        assert (own - expected).norm() < TOLERANCE * expected.norm()
        assert not torch.cat([q[:3], k[:3], v[:5]]).any()
