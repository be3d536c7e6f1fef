"""The fused mixer over peers' memory on one GPU: ranks are threads, each other's memory is the same GPU's.

That needs no second GPU and still runs every kernel, table and slot of every rank in bfloat16; what it leaves out is
NVLink and the barrier. Forward and backward are called as autograd calls them: its one thread for each GPU cannot wait
for two ranks.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from gdn_cp import ThdLayout, fused_mixer
from gdn_cp.comm.symmetric import PeerTransport, natural_rows
from gdn_cp.comm.transport import MixerColumns
from gdn_cp.fused_mixer import FusedCall, MixerParameters
from gdn_cp.kernels.piece_plan import PIECES_VARIABLE
from tests.gpu.test_fused_mixer import BOUNDS, DIMS, LENGTHS, batch, layer, results
from tests.host_peers import HostArena, run_threads

pytestmark = pytest.mark.gpu


class Context:
    """What the mixer uses of autograd's context."""

    needs_input_grad = (False, *(True,) * 6)

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors

    def maybe_clear_saved_tensors(self) -> None:
        """Nothing is let go of."""


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("P", [2, 4])
def test_two_micro_batches_in_flight_have_the_bits_of_one_rank(P: int, padded: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(PIECES_VARIABLE, "0")  # the same heads then run the same code whatever the number of ranks
    seqlens = LENGTHS if padded else None
    layout = ThdLayout.zigzag(BOUNDS, P, seqlens=seqlens, device="cuda")
    qk, _, v, *_ = DIMS.sections
    columns, module = MixerColumns(qk, v, DIMS.num_v_heads, P), layer()
    conv = module.conv1d
    of_layer = MixerParameters(conv.weight, conv.bias, module.A_log, module.dt_bias, module.out_norm.weight)
    x, dy = batch(layout)
    batches = [(x, dy), (2 * x, dy)]

    @torch.no_grad()  # threads do not inherit it
    def run(arena: HostArena) -> list[tuple[Any, Any]]:
        made = []
        for rows, _ in batches:
            call = FusedCall(
                heads=DIMS.per_rank(P),
                shares=P,
                share=arena.rank,
                cu_seqlens=layout.cu_seqlens_tensor(),
                padding=layout.local_padding(arena.rank),
                transport=PeerTransport(columns, arena, natural_rows(layout, P, 0)),
                eps=module.norm_eps,
                keep=True,
            )
            ctx = Context()
            made.append((ctx, fused_mixer._forward(ctx, call, layout.shard(rows, arena.rank), of_layer)))
        return [
            (out, fused_mixer._backward(ctx, layout.shard(dy, arena.rank))[0])
            for (ctx, out), (_, dy) in zip(made, batches, strict=True)
        ]

    natural_rows(layout, P, 0)
    ranks = run_threads(run, P, layout.t_global * (columns.share_width + 64) * 2, "cuda")
    whole = ThdLayout.zigzag(BOUNDS, 1, seqlens=seqlens, device="cuda")
    for index, (rows, dy) in enumerate(batches):
        expected = results(module, rows, dy, layout=whole)
        assert torch.equal(layout.unshard([rank[index][0] for rank in ranks]), expected["out"])
        assert torch.equal(layout.unshard([rank[index][1] for rank in ranks]), expected["input"])
