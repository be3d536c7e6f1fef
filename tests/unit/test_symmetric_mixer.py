"""The fused mixer over peers' memory against one rank with the whole batch: output, input and parameter gradients.

Ranks are threads (tests/host_peers.py); as in test_fused_mixer.py all is float32 in Triton's interpreter. Buffers are
transient here: what the backward needs has to survive a second micro-batch that comes before it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("threads share one GPU's memory here; see tests/gpu/test_symmetric.py", allow_module_level=True)

from gdn_cp import GdnDims, ThdLayout
from gdn_cp.comm.symmetric import PeerTransport, natural_rows
from gdn_cp.comm.transport import MixerColumns
from gdn_cp.fused_mixer import FusedCall, fused_mixer
from tests.host_peers import HostArena, run_threads
from tests.unit.test_fused_mixer import ROUNDING, composed, layer, parameters_of

P = 2
DIMS = GdnDims(2, 4, 16, 16, 4)
COLUMNS = MixerColumns(32, 64, 4, P)


def call_of(layout: ThdLayout, arena: HostArena) -> FusedCall:
    return FusedCall(
        heads=DIMS.per_rank(P),
        shares=P,
        share=arena.rank,
        cu_seqlens=layout.cu_seqlens_tensor(),
        padding=layout.local_padding(arena.rank),
        transport=PeerTransport(COLUMNS, arena, natural_rows(layout, P, 0)),
        eps=1e-6,
        keep=True,
    )


def two_micro_batches(arena: HostArena, layout: ThdLayout, batches: list[tuple[Tensor, Tensor]]) -> list[Any]:
    """Both forwards, then both backwards."""
    module, forwards = layer(DIMS), []
    for x, _ in batches:
        leaf = layout.shard(x, arena.rank).requires_grad_()
        forwards.append((leaf, fused_mixer(leaf, parameters_of(module), call_of(layout, arena))))
    found = []
    for (leaf, out), (_, dy) in zip(forwards, batches, strict=True):
        module.zero_grad()
        out.backward(layout.shard(dy, arena.rank))
        found.append([out.detach(), leaf.grad, [p.grad.clone() for p in parameters_of(module) if p is not None]])
    return found


@pytest.mark.parametrize("seqlens", [None, [5, 0, 3]])
def test_two_micro_batches_in_flight_equal_one_rank(seqlens: list[int] | None):
    layout = ThdLayout.zigzag([0, 8, 8, 12], P, seqlens=seqlens)
    whole = ThdLayout.zigzag([0, 8, 8, 12], 1, seqlens=seqlens)
    padding = layout.global_padding()
    torch.manual_seed(1)
    batches = [(torch.randn(12, DIMS.in_proj_dim), torch.randn(12, DIMS.sections[3])) for _ in range(2)]
    if padding is not None:
        batches = [tuple(x.masked_fill(padding[:, None], torch.nan) for x in batch) for batch in batches]  # type: ignore[misc]
    size = layout.t_global * (COLUMNS.share_width + 32) * 4
    ranks = run_threads(lambda arena: two_micro_batches(arena, layout, batches), P, size)
    for index, (x, dy) in enumerate(batches):
        module, leaf = layer(DIMS), x.clone().requires_grad_()
        out = composed(module, leaf, whole, None)
        out.backward(dy)
        close(layout.unshard([rank[index][0] for rank in ranks]), out.detach())
        close(layout.unshard([rank[index][1] for rank in ranks]), leaf.grad)
        for parameter, *parts in zip(parameters_of(module), *(rank[index][2] for rank in ranks), strict=True):
            close(sum(parts), parameter.grad, 10)


def close(x: Any, expected: Any, room: float = 1.0) -> None:
    """Within rounding; sums over all tokens cancel, which leaves them ten times as much."""
    assert (x - expected).norm() <= room * ROUNDING * expected.norm()
