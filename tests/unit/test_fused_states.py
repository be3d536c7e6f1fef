"""The fused mixer with states passing between ranks against the composed one: every cut, padding, any a2a_size.

Both compute in float32, in Triton's interpreter on a CPU: tolerance as in `test_fused_mixer`.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

pytest.importorskip("triton")

from gdn_cp import GdnDims, ThdLayout, gated_delta_net_mixer, state_exchange
from gdn_cp.comm import halo_tables
from gdn_cp.comm.groups import cp_groups
from gdn_cp.comm.row_maps import group_rows
from gdn_cp.fused_mixer import fused_call, fused_mixer
from tests.state_cases import group_rows as rows_of_group
from tests.unit.test_fused_mixer import DEVICE, ROUNDING, errors, inputs, layer, parameters_of, results


def fused_with_states(module, x: Tensor, layout: ThdLayout, group: dist.ProcessGroup, a2a_size: int) -> Tensor:
    parameters, groups = parameters_of(module), cp_groups(group, a2a_size)
    call = fused_call(x, parameters, module.dims, layout=layout, group=group, eps=module.norm_eps, groups=groups)
    return fused_mixer(x, parameters, call)


def composed(module, x: Tensor, layout: ThdLayout, group: dist.ProcessGroup, a2a_size: int) -> Tensor:
    call = {"layout": layout, "group": group, "a2a_size": a2a_size, "backend": "reference"}
    return gated_delta_net_mixer(x, **module.mixer_arguments(), **call)


CASES = {
    # The second sequence ends inside rank 0's first segment of it: whole segments, and halos, are padding.
    "padded zigzag": (partial(ThdLayout.zigzag, [0, 72, 80], seqlens=[63, 2]), GdnDims(2, 2, 16, 16, 4)),
    # Segments shorter than the halo, a sequence that lies on one rank, no sequence at all.
    "contiguous": (partial(ThdLayout.contiguous, [0, 2, 2, 3, 20, 24]), GdnDims(1, 4, 16, 16, 4)),
}
RUNS = (("padded zigzag", 1, True), ("padded zigzag", 2, False), ("contiguous", 1, True), ("contiguous", 1, False))
"""(batch, a2a_size, whether laws and halo are gathered by all)."""


def on_ranks(rank: int, world: int) -> dict[str, float]:
    found = {}
    for name, a2a_size, gathered in RUNS:
        (cut, dims), way = CASES[name], "gathered" if gathered else "composed"
        state_exchange.GATHER_BYTES = halo_tables.GATHER_BYTES = 2**30 if gathered else 0
        layout = cut(cp_size=world)
        module, (x, dy) = layer(dims, bias=name != "contiguous"), inputs(layout, dims, rank)
        call = layout, dist.group.WORLD, a2a_size
        got, expected = (results(mixer, module, x, dy, *call) for mixer in (fused_with_states, composed))
        difference = errors(got, expected, dist.group.WORLD)
        found |= {f"{name}, a2a_size {a2a_size}, {way}, {what}": error for what, error in difference.items()}
    return found


@pytest.mark.skipif(DEVICE == "cuda", reason="gloo carries CPU rows, which the kernels take in the interpreter only")
def test_output_and_gradients_are_those_of_the_composed_mixer(run_ranks):
    for rank, found in enumerate(run_ranks(on_ranks, 4)):
        beyond = {name: error for name, error in found.items() if not error < ROUNDING}
        assert found
        assert not beyond, f"rank {rank}: {beyond}"


@pytest.mark.parametrize("a2a_size", [1, 2, 4])
@pytest.mark.parametrize("layout", [ThdLayout.zigzag([0, 16, 32], 4), ThdLayout.contiguous([0, 5, 16], 4)], ids=str)
def test_rows_of_a_group_are_in_the_order_of_its_segments(layout, a2a_size):
    for group in range(4 // a2a_size):
        ranks = range(group * a2a_size, (group + 1) * a2a_size)
        rank_major = torch.cat([layout.local_rows(rank) for rank in ranks])
        rows = group_rows(layout, a2a_size, group)
        natural = rank_major if rows is None else rank_major[rows.long()]
        assert torch.equal(natural, rows_of_group(layout, a2a_size, group))
