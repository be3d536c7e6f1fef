"""The fused mixer's moves of rows against the plain exchange: what arrives, where it stands, and the way back.

Rows only travel, so everything is compared bit by bit; padded rows hold NaN, which must go nowhere.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from gdn_cp import ThdLayout
from gdn_cp.comm.all_to_all import cp_to_hp, hp_to_cp
from gdn_cp.comm.row_maps import rank_major_rows
from gdn_cp.comm.transport import CollectiveTransport, LocalTransport, MixerColumns, RowBuffer

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def layouts(cp_size: int) -> list[ThdLayout]:
    """Every cut, with and without padding and empty sequences."""
    step = 2 * cp_size
    bounds = [0, step, step, 4 * step, 6 * step]
    return [
        ThdLayout.zigzag(bounds, cp_size),
        ThdLayout.zigzag(bounds, cp_size, seqlens=[step - 1, 0, 2 * step + 1, 2 * step]),
        ThdLayout.contiguous([0, 1, step], cp_size),
        ThdLayout.contiguous([0, 3, 2 * step], cp_size, seqlens=[2, 2 * step - 4]),
        ThdLayout.batched(2, 2 * step, cp_size),
    ]


def read(buffer: RowBuffer, columns: MixerColumns) -> Tensor:
    """q|k|v|beta|alpha of one share in natural order, as a kernel reads them."""
    width = columns.conv // columns.ranks
    gates = buffer.data.narrow(1, buffer.gates, 2 * columns.heads // columns.ranks)
    x = torch.cat([buffer.data[:, :width], gates], 1)
    if buffer.rows is None:
        return x
    places = buffer.rows.long()
    return torch.where(places[:, None] >= 0, x[torch.where(places < 0, -1 - places, places)], 0)


def write(buffer: RowBuffer, columns: MixerColumns, x: Tensor) -> None:
    """The reverse of `read`."""
    width = columns.conv // columns.ranks
    rows = torch.arange(len(x), device=x.device) if buffer.rows is None else buffer.rows.long()
    x = torch.where(rows[:, None] >= 0, x, 0)
    rows = torch.where(rows < 0, -1 - rows, rows)
    buffer.data[rows, :width] = x[:, :width]
    buffer.data[rows, buffer.gates : buffer.gates + x.shape[1] - width] = x[:, width:]


def round_trip(layout: ThdLayout, columns: MixerColumns, group: dist.ProcessGroup | None) -> dict[str, bool]:
    """What each move gives is what the plain exchange gives."""
    rank, P = (0 if group is None else group.rank()), columns.ranks
    rows, padding = rank_major_rows(layout), layout.local_padding(rank)
    transport = LocalTransport(columns, rows) if group is None else CollectiveTransport(columns, group, rows, padding)
    torch.manual_seed(rank)
    projected = torch.randn(layout.t_local, columns.width + 16, device=layout.device)[:, : columns.width]
    real = (
        torch.ones(layout.t_local, 1, dtype=torch.bool, device=layout.device) if padding is None else ~padding[:, None]
    )
    clean = torch.where(real, projected, 0)
    projected = torch.where(real, projected, torch.nan)

    def exchanged(x: Tensor) -> Tensor:
        qkv, _, gates = x.split((columns.conv, columns.v, 2 * columns.heads), 1)
        sections = ((columns.qk, columns.qk, columns.v), (columns.heads, columns.heads))
        return torch.cat(cp_to_hp((qkv, gates), layout, group, sections=sections), 1)

    same = {}
    for keep_z in (True, False):
        buffer, z = transport.send_in(projected, keep_z)
        same[f"in {keep_z}"] = torch.equal(read(buffer, columns), exchanged(clean))
        same[f"z {keep_z}"] = torch.equal(z.nan_to_num(), projected.narrow(1, columns.conv, columns.v).nan_to_num())
        same[f"z kept {keep_z}"] = group is None or z.is_contiguous() == keep_z
    o = torch.randn(layout.t_global, columns.v // P, device=layout.device)
    returned = transport.return_out(o).data.transpose(0, 1).flatten(1)
    expected = hp_to_cp(o, layout, group)
    same["out"] = torch.equal(torch.where(real, returned, 0), torch.where(real, expected, 0))
    d_out = torch.where(real, torch.randn(layout.t_local, columns.v, device=layout.device), 0)
    d_buffer = transport.out_grad_buffer(d_out)
    d_buffer.copy_(d_out.unflatten(1, (d_buffer.shape[0], -1)).transpose(0, 1))
    d_o = transport.send_out_grad(d_buffer)
    same["out gradient"] = torch.equal(d_o, cp_to_hp(d_out, layout, group)) and d_o.is_contiguous()
    d_projected = torch.full_like(projected, torch.nan)
    d_in = transport.in_grad_buffer(d_projected)
    d_x = torch.randn(layout.t_global, (columns.conv + 2 * columns.heads) // P, device=layout.device)
    write(d_in, columns, d_x)
    transport.return_in_grad(d_in, d_projected)
    sections = (columns.qk // P, columns.qk // P, columns.v // P, columns.heads // P, columns.heads // P)
    parts = [hp_to_cp(part.contiguous(), layout, group) for part in d_x.split(sections, 1)]
    received = torch.cat([d_projected[:, : columns.conv], d_projected[:, columns.gates :]], 1)
    same["in gradient"] = torch.equal(received, torch.where(real, torch.cat(parts, 1), 0))
    z_columns = d_projected.narrow(1, columns.conv, columns.v)
    same["z left alone"] = bool(z_columns.isnan().all())
    if group is not None:  # a transport of one rank has the norm write it in place
        dz = torch.where(real, torch.randn(z_columns.shape, device=layout.device), 0)
        transport.return_in_grad(d_in, d_projected, dz)
        same["z's gradient"] = torch.equal(z_columns, dz)
        again = torch.cat([d_projected[:, : columns.conv], d_projected[:, columns.gates :]], 1)
        same["the rest again"] = torch.equal(again, received)
    return same


def _on_ranks(rank: int, world_size: int) -> dict[str, bool]:
    groups = {4: dist.group.WORLD, 2: [dist.new_group([0, 1]), dist.new_group([2, 3])][rank // 2]}
    shapes = [(24, 16, 4), (16, 40, 12)]
    return {
        f"cp{P} layout {index} {shape} {name}": same
        for P, group in groups.items()
        for index, layout in enumerate(layouts(P))
        for shape in shapes[: 1 if index else 2]
        for name, same in round_trip(layout, MixerColumns(*shape, P), group).items()
    }


def test_moves_on_one_rank():
    for layout in layouts(1):
        layout = layout.to(DEVICE)
        same = round_trip(layout, MixerColumns(16, 48, 6, 1), None)
        assert len(same) == 10
        assert all(same.values()), same


@pytest.mark.skipif(DEVICE == "cuda", reason="gloo carries CPU rows, which the kernels take in the interpreter only")
def test_moves_on_two_and_four_ranks(run_ranks):
    for same in run_ranks(_on_ranks, 4):
        assert len(same) == 2 * 6 * 12
        assert all(same.values()), [name for name, equal in same.items() if not equal]
