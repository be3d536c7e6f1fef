"""The fused mixer on GPUs: the composed one's bits, errors against float64, launches, graphs, and two ranks.

Tolerance: bfloat16 keeps 8 bits, so a stage errs by 2^-9 of its result; from the projection to a gradient are some
eight stages in a row (convolution, rule forward, norm, and their backwards), and the delta rule's own error is 0.6 %.
Gradients of A_log and dt_bias are measured against the sums of their terms' magnitudes: terms of both signs cancel in
them and roundings do not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from gdn_cp import GatedDeltaNet, GdnDims, ThdLayout, gated_delta_net, gated_delta_net_mixer
from gdn_cp.kernels.piece_plan import PIECES_VARIABLE

ERROR = 8 * 2**-9 + 6e-3
DIMS = GdnDims(4, 8, 128, 128, 4)
BOUNDS = [0, 64, 64, 320, 1024, 2048]
LENGTHS = [64, 0, 250, 704, 1000]
MOST_FORWARD, MOST_BACKWARD = 12, 20


def layer(dims: GdnDims = DIMS, dtype: torch.dtype = torch.bfloat16) -> GatedDeltaNet:
    torch.manual_seed(0)
    sizes = (dims.num_k_heads, dims.num_v_heads, dims.head_k_dim, dims.head_v_dim, dims.conv_kernel)
    module = GatedDeltaNet(8, *sizes, conv_bias=True, dtype=torch.bfloat16)
    torch.nn.init.normal_(module.out_norm.weight)
    return (module.double() if dtype == torch.float64 else module).cuda()


def batch(layout: ThdLayout, dims: GdnDims = DIMS) -> tuple[Tensor, Tensor]:
    """The whole batch's projection and output gradient, NaN in padded rows."""
    generator = torch.Generator().manual_seed(1)
    x, dy = (torch.randn(layout.t_global, width, generator=generator) for width in (dims.in_proj_dim, dims.sections[3]))
    padding = layout.global_padding()
    if padding is not None:
        x, dy = (rows.masked_fill(padding.cpu()[:, None], torch.nan) for rows in (x, dy))
    return x.bfloat16().cuda(), dy.bfloat16().cuda()


def results(module: GatedDeltaNet, x: Tensor, dy: Tensor, **call: Any) -> dict[str, Tensor]:
    """Output, input gradient and parameter gradients by name."""
    module.zero_grad()
    x = x.clone().requires_grad_()
    out = gated_delta_net_mixer(x, **module.mixer_arguments(), **call)
    out.backward(dy)
    assert x.grad is not None
    gradients = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    return {"out": out.detach(), "input": x.grad, **gradients}


def errors(got: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    assert got.keys() == expected.keys()
    size = {name: x.double().norm() for name, x in expected.items()}
    terms = expected["input"][:, -len(expected["A_log"]) :].double().abs().sum(0)
    size["A_log"] = size["dt_bias"] = terms[expected["A_log"] != 0].norm()
    return {name: ((got[name].double() - x.double()).norm() / size[name]).item() for name, x in expected.items()}


@contextmanager
def as_users_run() -> Iterator[None]:
    """Without the tests' poisoning of fresh memory, which launches a kernel for each tensor."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = before


def launched(step: Callable[[], Any]) -> list[str]:
    """Names of the kernels, copies and fills of one call."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        step()
        torch.cuda.synchronize()
    names = [event.name for event in profile.events() or () if event.device_type.name == "CUDA"]
    return [name for name in names if not name.startswith(("nccl:", "gdn"))]  # annotations are no launches


def count_launches(module: GatedDeltaNet, x: Tensor, dy: Tensor, **call: Any) -> tuple[list[str], list[str]]:
    """What the mixer launches forward and backward once it is warm; neither may wait for the device."""
    x = x.clone().requires_grad_()
    leaves = [x, *(p for name, p in module.named_parameters() if not name.startswith(("in_", "out_proj")))]
    found: list[list[str]] = []
    with as_users_run():
        for _ in range(2):
            made: dict[str, Tensor] = {}

            def forward(made: dict[str, Tensor] = made) -> None:
                made["out"] = gated_delta_net_mixer(x, **module.mixer_arguments(), **call)

            def backward(made: dict[str, Tensor] = made) -> None:
                torch.autograd.grad(made["out"], leaves, dy)

            found = [launched(forward), launched(backward)]
        torch.cuda.set_sync_debug_mode("error")
        try:
            forward()
            backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return found[0], found[1]


def replay_equals_eager(module: GatedDeltaNet, x: Tensor, dy: Tensor, **call: Any) -> bool:
    """A captured forward and backward, replayed on other rows than it was captured with."""
    static = torch.zeros_like(x).requires_grad_()

    def step() -> tuple[Tensor, Tensor]:
        out = gated_delta_net_mixer(static, **module.mixer_arguments(), **call)
        return out, torch.autograd.grad(out, static, dy)[0]

    with as_users_run():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        with torch.no_grad():
            static.copy_(x)
        graph.replay()
        torch.cuda.synchronize()
        captured = [tensor.clone() for tensor in captured]
        return all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("padded", [False, True])
def test_fused_equals_composed_and_float64(padded: bool, monkeypatch: pytest.MonkeyPatch):
    layout = ThdLayout.zigzag(BOUNDS, 1, seqlens=LENGTHS if padded else None, device="cuda")
    module, (x, dy) = layer(), batch(layout)
    used = []
    whole = gated_delta_net._mix_fused
    monkeypatch.setattr(gated_delta_net, "_mix_fused", lambda *args: used.append(1) or whole(*args))
    got = results(module, x, dy, layout=layout)
    again = results(module, x, dy, layout=layout)
    assert len(used) == 2
    assert all(torch.equal(got[name], again[name]) for name in got)
    monkeypatch.setattr(gated_delta_net, "_mix_fused", lambda *args: None)
    composed = results(module, x, dy, layout=layout)
    assert torch.equal(got["out"], composed["out"])
    assert torch.equal(got["input"], composed["input"])
    exact = results(layer(dtype=torch.float64), x.double(), dy.double(), layout=layout)
    found, of_composed = errors(got, exact), errors(composed, exact)
    assert all(error < ERROR for error in found.values()), found
    assert all(found[name] < 1.05 * error + 1e-4 for name, error in of_composed.items()), (found, of_composed)


@pytest.mark.gpu
def test_launches_and_graph_on_one_gpu():
    layout = ThdLayout.zigzag(BOUNDS, 1, device="cuda")
    module, (x, dy) = layer(), batch(layout)
    forward, backward = count_launches(module, x, dy, layout=layout)
    assert 0 < len(forward) <= MOST_FORWARD, forward
    assert 0 < len(backward) <= MOST_BACKWARD, backward
    assert replay_equals_eager(module, x, dy, layout=layout)


def _on_ranks(rank: int, world_size: int) -> dict[str, Any]:
    group, found = dist.group.WORLD, {}
    module = layer()
    cases = {
        "zigzag": ThdLayout.zigzag(BOUNDS, world_size, device="cuda"),
        "padded zigzag": ThdLayout.zigzag(BOUNDS, world_size, seqlens=LENGTHS, device="cuda"),
        "contiguous": ThdLayout.contiguous(BOUNDS, world_size, device="cuda"),
        "batched": ThdLayout.batched(3, 512, world_size, device="cuda"),
    }
    for name, layout in cases.items():
        x, dy = batch(layout)
        mine, d_mine = (layout.shard(rows, rank) for rows in (x, dy))
        got = results(module, mine, d_mine, layout=layout, group=group)
        seqlens = layout.seqlens
        whole = results(module, x, dy, layout=ThdLayout.zigzag(layout.cu_seqlens, 1, seqlens=seqlens, device="cuda"))
        for part in got:
            if part in ("out", "input"):
                found[f"{name} {part}"] = torch.equal(got[part], layout.shard(whole[part], rank))
            else:
                total = got[part].float()
                dist.all_reduce(total)
                got[part] = total
        sums = {part: whole[part] if part in ("out", "input") else got[part] for part in got}
        found[f"{name} parameters"] = max(errors(sums, whole).values()) < ERROR
    layout = cases["zigzag"]
    call = {"layout": layout, "group": group}
    mine, d_mine = (layout.shard(rows, rank) for rows in batch(layout))
    found["forward"], found["backward"] = count_launches(module, mine, d_mine, **call)
    found["graph"] = replay_equals_eager(module, mine, d_mine, **call)
    return found


@pytest.mark.multi_gpu
def test_two_ranks_have_the_bits_of_one(run_ranks, monkeypatch: pytest.MonkeyPatch):
    """Output and input gradient bit by bit with the same pieces of sequences; launches; a graph with the exchange."""
    monkeypatch.setenv(PIECES_VARIABLE, "0")
    for found in run_ranks(_on_ranks, 2, backend="nccl", timeout=240):
        forward, backward = found.pop("forward"), found.pop("backward")
        assert len(forward) <= MOST_FORWARD, forward
        assert len(backward) <= MOST_BACKWARD, backward
        assert len(found) == 4 * 3 + 1
        assert all(found.values()), found
