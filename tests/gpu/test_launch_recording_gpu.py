"""Replayed launches on a GPU: the bits and the peak memory of the calls before them, on other tensors each time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from gdn_cp import GatedDeltaNet, ThdLayout, chunk_gated_delta_rule, launch_recording
from gdn_cp.launch_bare import is_known
from gdn_cp.launch_recording import Recording

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not is_known(), reason="recorded with Triton 3.5 to 3.7 alone"),
]

H, HV, D = 2, 4, 128


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    launch_recording._recordings.clear()
    yield
    launch_recording._recordings.clear()


def inputs(T: int, seed: int, states: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    shapes = {"q": (H, D), "k": (H, D), "v": (HV, D), "g": (HV,), "beta": (HV,), "do": (HV, D)}
    made = {name: torch.randn(1, T, *dims, device="cuda").bfloat16() for name, dims in shapes.items()}
    made["A_log"], made["dt_bias"] = torch.randn(2, HV, device="cuda")
    if states:
        made["initial_state"], made["dht"] = torch.randn(2, states, HV, D, D, device="cuda")
    return made


def step(given: dict[str, Tensor], cu_seqlens: Tensor | None, **options: Any) -> list[Tensor]:
    """Output, final state and every gradient."""
    leaves = {name: x.detach().requires_grad_() for name, x in given.items() if name not in ("do", "dht")}
    with_states = "initial_state" in given
    o, final = chunk_gated_delta_rule(
        **leaves, cu_seqlens=cu_seqlens, use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True,
        use_beta_sigmoid_in_kernel=True, output_final_state=with_states, backend="triton", **options,
    )  # fmt: skip
    if not with_states:
        return [o.detach(), *torch.autograd.grad(o, list(leaves.values()), given["do"])]
    assert final is not None
    gradients = torch.autograd.grad((o, final), list(leaves.values()), (given["do"], given["dht"]))
    return [o.detach(), final.detach(), *gradients]


def bounds(*lengths: int) -> Tensor:
    return torch.tensor([0, *lengths], device="cuda").cumsum(0).int()


def plain(run: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """What `run` gives where nothing is recorded."""
    with monkeypatch.context() as patch:
        patch.setattr(launch_recording, "_recordings", _Nothing())
        return run()


class _Nothing(dict[Any, Any]):
    """Says of every call that it is the first."""

    def __contains__(self, key: object) -> bool:
        return False


@pytest.mark.parametrize(
    ("T", "packs", "states", "options"),
    [
        (1000, [None], 1, {}),
        (1000, [(500, 300, 200), (1, 998, 1), (0, 64, 936)], 3, {}),
        (8192, [None], 0, {"intra_card": 16}),
        (8192, [(8000, 192), (100, 8092)], 0, {"intra_card": 16}),
        (8192, [(8000, 192), (100, 8092)], 2, {"state_v_first": True}),
    ],
)
def test_replays_have_the_bits_of_calls(T, packs, states, options, monkeypatch):
    cu_seqlens = [None if lengths is None else bounds(*lengths) for lengths in packs]
    for seed in range(6):
        given, pack = inputs(T, seed, states), cu_seqlens[seed % len(packs)]
        got = step(given, pack, **options)
        expected = plain(lambda given=given, pack=pack: step(given, pack, **options), monkeypatch)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert [type(found) for found in launch_recording._recordings.values()] == [Recording, Recording]


def mixer_step(module: GatedDeltaNet, layout: ThdLayout, seed: int) -> list[Tensor]:
    torch.manual_seed(seed)
    x, dy = torch.randn(2, layout.t_local, 256, device="cuda", dtype=torch.bfloat16)
    x.requires_grad_()
    out = module(x, layout=layout)
    return [out.detach(), *torch.autograd.grad(out, [x, *module.parameters()], dy)]


def test_the_mixer_replays_its_share(monkeypatch):
    torch.manual_seed(0)
    module = GatedDeltaNet(256, H, HV, D, D, device="cuda", dtype=torch.bfloat16)
    layouts = [ThdLayout.zigzag([0, *ends, 4096], 1, device="cuda") for ends in ([1000, 2000], [1, 4000])]
    for seed in range(6):
        layout = layouts[seed % 2]
        got = mixer_step(module, layout, seed)
        expected = plain(lambda layout=layout, seed=seed: mixer_step(module, layout, seed), monkeypatch)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert [type(found) for found in launch_recording._recordings.values()] == [Recording, Recording]


def test_a_replay_needs_no_more_memory_than_a_call(monkeypatch):
    torch.manual_seed(0)
    module = GatedDeltaNet(256, H, HV, D, D, device="cuda", dtype=torch.bfloat16)
    layout = ThdLayout.zigzag([0, 32768], 1, device="cuda")

    def peak() -> int:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        mixer_step(module, layout, 0)
        return torch.cuda.max_memory_allocated() - before

    for _ in range(3):
        mixer_step(module, layout, 0)
    rest = 2**20  # of a block, up to which the allocator does not cut it off: a replay's blocks lie otherwise
    assert peak() <= plain(peak, monkeypatch) + 2 * rest


def test_replays_are_captured_and_follow_streams():
    given = inputs(2000, 0, 1)
    expected = step(given, None)
    for _ in range(2):
        step(given, None)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)
        given["v"].mul_(2)  # behind the sleep: who launches elsewhere reads v as it was
        doubled = step(given, None)
    torch.cuda.synchronize()
    assert not torch.equal(doubled[0], expected[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(given, None)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, doubled, strict=True))
    given["v"].mul_(0.5)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))
