"""Memory of the fused mixer on GPUs, against the list of what is alive at the backward's peak (docs/design.md).

A bound is the sum of that list, counted in bytes per row, plus a few MiB for tables, norms, pieces of sequences and
what the allocator rounds up. It is less than the sum with the backward's states all in one slice.

Dimensions: T rows of the batch, P ranks, H query/key and HV value heads of a rank's share, D = K = V head dim.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from gdn_cp import GatedDeltaNet, GdnDims, ThdLayout, gated_delta_net_mixer
from gdn_cp.kernels.bwd_slices import LEAN_BYTES, slice_chunks

T, H, HV, D = 16384, 4, 8, 128
SLACK = 40 * 2**20
RESTS = 4 * 2**20  # up to 1 MiB each, which the allocator does not cut off of blocks: not the same ones in two calls
BUFFERS = 112 * 2**10 * HV * slice_chunks(T // 64, HV, D, D, 2, True)  # a slice's states and products
KEPT_BY_RULE = HV * (2 * 64 + 8) + H * 8  # a row of the inverses, gates, beta and norms


def measure(
    ranks: int, rank: int, holders: int = 1, hook: Callable[[torch.Tensor], None] | None = None
) -> tuple[int, int]:
    """(bytes kept after the forward besides the output, bytes at the peak), above what is there before.

    `holders` of the projection besides the mixer: 1, the caller's x is the projection; else a product of x is, which
    the caller holds with 2. With `hook` a product of the output is differentiated, and the hook gets its gradient.
    """
    torch.manual_seed(0)
    dims = GdnDims(H * ranks, HV * ranks, D, D, 4)
    sizes = (dims.num_k_heads, dims.num_v_heads, D, D, dims.conv_kernel)
    module = GatedDeltaNet(8, *sizes, dtype=torch.bfloat16, device="cuda")
    layout = ThdLayout.zigzag([0, T], ranks, device="cuda")
    group = dist.group.WORLD if ranks > 1 else None
    x = torch.randn(T // ranks, dims.in_proj_dim, device="cuda").bfloat16().requires_grad_()
    dy = torch.randn(T // ranks, HV * ranks * D, device="cuda").bfloat16()
    leaves = [x, *(p for name, p in module.named_parameters() if not name.startswith(("in_", "out_proj")))]
    found, one = (0, 0), torch.ones((), device="cuda", dtype=x.dtype)
    torch.cuda.empty_cache()  # blocks of earlier tests are cut elsewhere
    for _ in range(2):  # the first call makes tables, and memory for the exchange
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        held = x if holders == 1 else x * one
        out = gated_delta_net_mixer(held, **module.mixer_arguments(), layout=layout, group=group)
        held = None if holders == 0 else held
        kept = torch.cuda.memory_allocated() - before - out.untyped_storage().nbytes()
        if hook is not None:
            out.register_hook(hook)
            out = out * one
        gradients = torch.autograd.grad(out, leaves, dy)
        found = kept, torch.cuda.max_memory_allocated() - before
        del out, gradients, held
    return found


def test_bounds_tell_lean_slices_from_one():
    whole = 112 * 2**10 * HV * (T // 64)
    assert whole > LEAN_BYTES
    assert whole - BUFFERS > 2 * SLACK


@pytest.mark.gpu
def test_peak_on_one_gpu():
    kept, peak = measure(1, 0)
    o = 2 * HV * D
    projection = 2 * (2 * H * D + 2 * HV * D + 2 * HV)
    assert kept < T * (o + KEPT_BY_RULE) + SLACK
    # Output, gradient of the projection (q, k, v anew in it), gradients of o, q, k, v.
    rows = o + projection + o + 2 * (2 * H * D + HV * D)
    assert peak < T * (rows + KEPT_BY_RULE) + BUFFERS + SLACK


@pytest.mark.gpu
def test_gradient_of_o_in_the_projection_that_nobody_else_holds():
    """It takes z's place there, so that the peak is less by the size of o."""
    (kept, peak), (held, held_peak) = (measure(1, 0, holders) for holders in (0, 2))
    assert kept == held
    assert abs(held_peak - peak - T * 2 * HV * D) < RESTS


@pytest.mark.gpu
def test_gradient_of_the_output_that_nobody_else_holds():
    """It goes before the rule's backward, although autograd holds it: the peak is less by its size."""
    held: list[torch.Tensor] = []

    def keep(gradient: torch.Tensor) -> None:
        held.append(gradient)  # that of every call: none goes while another is measured

    (_, peak), (_, held_peak) = (measure(1, 0, hook=hook) for hook in (lambda _: None, keep))
    size = T * 2 * HV * D
    assert held[0].untyped_storage().nbytes() == size
    assert held_peak - peak >= size - RESTS


def _on_ranks(rank: int, world_size: int) -> tuple[int, int]:
    return measure(world_size, rank)


@pytest.mark.multi_gpu
@pytest.mark.parametrize("exchange", ["nccl", "auto"])
def test_peak_on_two_ranks(run_ranks, exchange: str, monkeypatch: pytest.MonkeyPatch):
    """Per row of the batch: local rows are half as many, and hold two ranks' heads."""
    monkeypatch.setenv("GDN_CP_EXCHANGE", exchange)
    conv, o = 2 * (2 * H * D + HV * D), 2 * HV * D
    for kept, peak in run_ranks(_on_ranks, 2, backend="nccl", timeout=240):
        assert kept < T * (conv + o + o + KEPT_BY_RULE) + SLACK  # rows before the convolution, z, o
        # Those rows, output, gradient of z; q, k, v anew; gradients of o, k, v (that of q is in q's place).
        rows = conv + o + o + conv + o + 2 * (H * D + HV * D)
        assert peak < T * (rows + KEPT_BY_RULE) + BUFFERS + SLACK
