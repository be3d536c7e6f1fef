"""The halo's tables against the whole batch's rows, for all ranks in one process: values, gradients, padding."""

from __future__ import annotations

import doctest

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gdn_cp.comm import halo_tables as module
from gdn_cp.comm.halo_tables import HaloTables, halo_tables
from gdn_cp.comm.layout import ThdLayout
from gdn_cp.comm.row_maps import group_rows as row_map
from tests.state_cases import build, divisors, group_rows, packs
from tests.unit.test_halo import KINDS, wanted_rows

WIDTH = 4


def travelled(ranks: list[HaloTables], sent: list[Tensor], *, forward: bool) -> list[Tensor]:
    """What each rank gets of what all send."""
    if ranks[0].counts is None:
        return [torch.cat(sent)] * len(ranks)
    sizes = [tables.counts if forward else tables.counts[::-1] for tables in ranks if tables.counts is not None]
    parts = [rows.split(out) for rows, (out, _) in zip(sent, sizes, strict=True)]
    assert all([len(part[g]) for part in parts] == back for g, (_, back) in enumerate(sizes))
    return [torch.cat([part[g] for part in parts]) for g in range(len(ranks))]


def at(places: Tensor, rows: Tensor) -> Tensor:
    """rows[places], zero for -1."""
    return torch.cat([rows, torch.zeros_like(rows[:1]) if len(rows) else rows.new_zeros(1)])[places.long()]


def check(layout: ThdLayout, a2a_size: int) -> None:
    groups = layout.cp_size // a2a_size
    maps = [row_map(layout, a2a_size, g) for g in range(groups)]
    tables = [halo_tables(layout, a2a_size, g, WIDTH, maps[g], 8) for g in range(groups)]
    wanted = [wanted_rows(layout, a2a_size, g, WIDTH) for g in range(groups)]
    if not any(wanted):
        assert tables == [None] * groups
        return
    ranks = [part for part in tables if part is not None]
    assert len(ranks) == groups
    # Row r of the batch holds r + 1 where it stands in its group's buffer, padding holds 0.
    rows = [group_rows(layout, a2a_size, g) for g in range(groups)]
    held = list(zip(rows, maps, strict=True))
    standing = [torch.arange(len(r)) if m is None else torch.where(m < 0, -1 - m, m).long() for r, m in held]
    padding = torch.cat([torch.zeros(len(r), dtype=torch.bool) if m is None else m < 0 for r, m in held])
    real = torch.zeros(layout.t_global, dtype=torch.bool)
    real[torch.cat(rows)] = ~padding
    places = list(zip(rows, standing, strict=True))
    buffers = [torch.zeros(len(r)).index_copy_(0, s, torch.where(real[r], r + 1.0, 0)) for r, s in places]
    arrived = travelled(ranks, [at(t.sent, b) for t, b in zip(ranks, buffers, strict=True)], forward=True)
    expected_sums = torch.zeros(layout.t_global)
    gradients = []
    for g, table in enumerate(ranks):
        before, offset = at(table.before, arrived[g]), 0
        places = torch.arange(table.before.numel()).view_as(table.before)
        assert torch.equal(table.in_order, torch.where(table.before < 0, -1, places))
        gradient = torch.full((table.returns,), torch.nan)
        for slot, returned in enumerate(table.returned.tolist()):
            used = [place for place in returned if place >= 0]
            halo = wanted[g][offset : offset + len(used)][::-1]
            offset += len(used)
            assert before[slot, : len(used)].tolist() == [float(row + 1) * bool(real[row]) for row in halo]
            assert not before[slot, len(used) :].any()
            for place, row in zip(used, halo, strict=True):
                gradient[place] = 100 * g + slot + 1
                expected_sums[row] += 100 * g + slot + 1
        assert offset == len(wanted[g])
        gradients.append(gradient)
    returned = travelled(ranks, gradients, forward=False)
    sums = [torch.zeros(len(r)) for r in rows]
    for g, table in enumerate(ranks):
        kept = table.owners >= 0
        sums[g][table.owners[kept].long()] = at(table.addends[kept], returned[g]).sum(1)
        assert torch.equal(sums[g][standing[g]], torch.where(real[rows[g]], expected_sums[rows[g]], 0))


@pytest.mark.parametrize("most", [0, 2**30], ids=["to whoever wants them", "gathered"])
@given(st.data())
def test_rows_and_gradients_arrive_where_they_belong(most, data):
    world, kind = data.draw(st.sampled_from([2, 4, 6])), data.draw(st.sampled_from(KINDS))
    layout = build(kind, data.draw(packs(world, kind)), world)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "GATHER_BYTES", most)
        for a2a_size in divisors(world)[:-1]:
            check(layout, a2a_size)


@pytest.mark.parametrize("most", [0, 2**30])
def test_padded_rows_travel_as_zeros_and_get_no_gradient(most, monkeypatch):
    monkeypatch.setattr(module, "GATHER_BYTES", most)
    check(ThdLayout.zigzag([0, 72, 80], 4, seqlens=[63, 2]), 1)
    check(ThdLayout.zigzag([0, 72, 80], 4, seqlens=[63, 2]), 2)


def test_example_and_doctests():
    layout = ThdLayout.zigzag([0, 8], 2)
    first, second = (halo_tables(layout, 1, g, 4, None, 8) for g in range(2))
    assert first is not None
    assert second is not None
    assert (first.sent.tolist(), second.sent.tolist()) == ([0, 1, -1, -1], [0, 1, 2, 3])
    assert first.before.tolist() == [[-1, -1, -1], [7, 6, 5]]
    assert second.before.tolist() == [[1, 0, -1], [5, 4, 1]]
    assert halo_tables(layout, 1, 0, 4, None, 8) is first
    assert doctest.testmod(module).failed == 0
