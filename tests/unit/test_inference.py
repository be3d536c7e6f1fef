"""Prefill, decode and roll-back against the full forward of every sequence by itself.

Tolerances: in float32, sums in another order over a hundred tokens stay below 1e-5. A bfloat16 bank rounds the state
after prefill and after every token, 2^-9 relative each, and the rule's transitions are contractions, so n tokens add
no more than (n + 1) * 2^-9 to a state.
"""

from __future__ import annotations

import re
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gdn_cp import GatedDeltaNet, GdnDims, ThdLayout
from gdn_cp.inference import GdnCache, decode, decode_mixer, prefill, prefill_mixer

HIDDEN, EXACT = 24, 1e-5
LENGTHS = [5, 0, 1, 70, 2, 3]  # some shorter than the convolution's tail of 3
BOUNDS = [0, *accumulate(LENGTHS)]
CACHE_FIELDS = ("conv", "state", "lengths", "oldest")


def make_layer(dtype: torch.dtype = torch.float32, conv_kernel: int = 4) -> GatedDeltaNet:
    torch.manual_seed(0)
    return GatedDeltaNet(HIDDEN, 2, 4, 8, 4, conv_kernel, conv_bias=True, dtype=dtype)


def relative(value: Tensor, expected: Tensor) -> float:
    return float((value.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30))


def sequences(new: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """A prompt of every length of LENGTHS with `new` tokens after it."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n + new, HIDDEN, generator=generator).to(dtype) for n in LENGTHS]


def prompts_of(whole: list[Tensor]) -> Tensor:
    return torch.cat([x[:n] for x, n in zip(whole, LENGTHS, strict=True)])


def tokens_of(whole: list[Tensor], start: int, end: int) -> Tensor:
    """[B, end - start, hidden]: the tokens after the prompts."""
    return torch.stack([x[n + start : n + end] for x, n in zip(whole, LENGTHS, strict=True)])


@torch.no_grad()
def forward_of(layer: GatedDeltaNet, whole: list[Tensor]) -> list[Tensor]:
    return [layer(x[None])[0] for x in whole]


def start(layer: GatedDeltaNet, whole: list[Tensor], **options: Any) -> tuple[Tensor, GdnCache]:
    return prefill(layer, prompts_of(whole), layout=ThdLayout.zigzag(BOUNDS, 1), **options)


def same_cache(one: GdnCache, other: GdnCache) -> bool:
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in CACHE_FIELDS)


def mixer_cache(layer: GatedDeltaNet, whole: list[Tensor], **options: Any) -> GdnCache:
    with torch.no_grad():
        rows = layer.in_proj(prompts_of(whole))
    return prefill_mixer(rows, **layer.mixer_arguments(), layout=ThdLayout.zigzag(BOUNDS, 1), **options)[1]


@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("v_first", [False, True])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("conv_kernel", [4, 1])
def test_prefill_and_decode_equal_the_full_forward(slots, v_first, state_dtype, conv_kernel):
    layer, new = make_layer(conv_kernel=conv_kernel), 8
    whole = sequences(new)
    expected = forward_of(layer, whole)
    output, cache = start(layer, whole, slots=slots, state_v_first=v_first, state_dtype=state_dtype)
    assert relative(output, prompts_of(expected)) < EXACT
    addresses = [getattr(cache, name).data_ptr() for name in CACHE_FIELDS]
    for t in range(new):
        tolerance = EXACT if state_dtype == torch.float32 else (t + 2) * 2**-9
        error = relative(decode(layer, tokens_of(whole, t, t + 1), cache), tokens_of(expected, t, t + 1))
        assert error < tolerance
    assert cache.state.dtype == state_dtype
    assert list(cache.state.shape[-2:]) == ([4, 8] if v_first else [8, 4])
    assert cache.lengths.tolist() == [n + new for n in LENGTHS]
    assert addresses == [getattr(cache, name).data_ptr() for name in CACHE_FIELDS]


def test_prefill_keeps_final_states_and_the_last_inputs_of_the_convolution():
    layer = make_layer(torch.float64)
    whole = sequences(0, torch.float64)
    _, cache = start(layer, whole, slots=3)
    _, v_first = start(layer, whole, slots=3, state_v_first=True)
    token_by_token = GdnCache.empty(layer.dims, 1, dtype=torch.float64)
    for t in range(LENGTHS[3]):
        decode(layer, whole[3][None, t : t + 1], token_by_token)
    assert relative(cache.current_state()[3], token_by_token.current_state()[0]) < 1e-12
    assert torch.equal(v_first.current_state(), cache.current_state().transpose(-1, -2))
    for tail, x in zip(cache.conv_tail(), whole, strict=True):
        qkv = torch.nn.functional.linear(x, layer.in_proj.weight.detach())[:, : layer.dims.conv_dim]
        expected = torch.nn.functional.pad(qkv, (0, 0, 3, 0))[-3:].T
        assert relative(tail, expected) < 1e-12


@pytest.mark.parametrize("bad", [1.0, float("nan")])
def test_padded_rows_reach_neither_output_nor_cache(bad):
    layer, width = make_layer(), 72
    whole = sequences(2)
    expected, cache = start(layer, whole, slots=2)
    padded = torch.full((len(LENGTHS), width, HIDDEN), bad)
    for row, x, n in zip(padded, whole, LENGTHS, strict=True):
        row[:n] = x[:n]
    layout = ThdLayout.zigzag(range(0, len(LENGTHS) * width + 1, width), 1, seqlens=LENGTHS)
    output, from_padded = prefill(layer, padded, layout=layout, slots=2)
    for row, x, n in zip(output, expected.split(LENGTHS), LENGTHS, strict=True):
        assert relative(row[:n], x) < EXACT
        assert not row[n:].any()
    assert torch.equal(from_padded.lengths, cache.lengths)
    assert relative(from_padded.conv, cache.conv) < EXACT
    assert relative(from_padded.state, cache.state) < EXACT


def test_decode_from_an_empty_cache_equals_forward_of_a_batch():
    layer = make_layer()
    x = torch.randn(3, 11, HIDDEN, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = layer(x)
    cache = GdnCache.empty(layer.dims, 3, slots=4)
    parts = [decode(layer, part, cache) for part in x.split([1, 2, 5, 3], 1)]  # one packet longer than the ring
    assert relative(torch.cat(parts, 1), expected) < EXACT
    output, prefilled = prefill(layer, x, slots=4)
    assert relative(output, expected) < EXACT
    assert relative(prefilled.conv_tail(), cache.conv_tail()) < EXACT
    assert relative(prefilled.current_state(), cache.current_state()) < EXACT


@pytest.mark.parametrize("slots", [1, 4])
@pytest.mark.parametrize("v_first", [False, True])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_a_packet_has_the_bits_of_its_tokens_one_at_a_time(slots, v_first, state_dtype):
    layer, whole = make_layer(), sequences(0)
    options = {"slots": slots, "state_v_first": v_first, "state_dtype": state_dtype}
    packets, singles = (mixer_cache(layer, whole, **options) for _ in range(2))
    arguments = layer.mixer_arguments()
    generator = torch.Generator().manual_seed(3)
    for T in (3, 2, 3):
        projected = torch.randn(len(LENGTHS), T, layer.dims.in_proj_dim, generator=generator)
        together = decode_mixer(projected, packets, **arguments)
        alone = [decode_mixer(projected[:, t : t + 1], singles, **arguments) for t in range(T)]
        assert torch.equal(together, torch.cat(alone, 1))
        assert same_cache(packets, singles)


def test_packet_decode_on_the_triton_kernel_agrees_with_torch():
    pytest.importorskip("triton")
    layer, whole = make_layer(), sequences(3)
    if torch.cuda.is_available():
        pytest.skip("the kernel's own tests run it there; this one needs its interpreter")
    (_, one), (_, other) = start(layer, whole, slots=2), start(layer, whole, slots=2)
    tokens = tokens_of(whole, 0, 3)
    kernel = decode(layer, tokens, one, backend="triton")
    assert relative(kernel, decode(layer, tokens, other, backend="reference")) < EXACT
    assert relative(one.state, other.state) < EXACT


@pytest.mark.parametrize("v_first", [False, True])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_rejected_drafts_leave_no_trace(v_first, state_dtype):
    """Packets of drafts, wrong from some token on, each sequence accepting as many as were right, over many turns."""
    layer, whole = make_layer(), sequences(0)
    arguments, B = layer.mixer_arguments(), len(LENGTHS)
    options = {"slots": 4, "state_v_first": v_first, "state_dtype": state_dtype}
    drafting, plain = (mixer_cache(layer, whole, **options) for _ in range(2))
    generator = torch.Generator().manual_seed(4)
    steps = 40
    truth = torch.randn(B, steps + 4, layer.dims.in_proj_dim, generator=generator)
    expected = torch.cat([decode_mixer(truth[:, t : t + 1], plain, **arguments) for t in range(steps)], 1)
    done = torch.zeros(B, dtype=torch.int64)
    while int(done.max()) < steps - 3:
        T = int(torch.randint(1, 4, (), generator=generator))
        accepted = torch.randint(0, T + 1, (B,), generator=generator)
        at = done[:, None] + torch.arange(T)
        packet = truth[torch.arange(B)[:, None], at].clone()
        packet[torch.arange(T) >= accepted[:, None]] += 1
        output = decode_mixer(packet, drafting, **arguments)
        for b, n in enumerate(accepted.tolist()):
            assert torch.equal(output[b, :n], expected[b, done[b] : done[b] + n])
        drafting.roll_back(T - accepted)
        done += accepted
        assert drafting.lengths.tolist() == [n + m for n, m in zip(LENGTHS, done.tolist(), strict=True)]


def test_rolled_back_packet_of_the_layer_continues_as_the_full_forward():
    layer, new = make_layer(), 6
    whole = sequences(new)
    expected = forward_of(layer, whole)
    _, cache = start(layer, whole, slots=4)
    draft = tokens_of(whole, 0, 3).clone()
    draft[:, 1:] += 1
    first = decode(layer, draft, cache)
    assert relative(first[:, :1], tokens_of(expected, 0, 1)) < EXACT
    cache.roll_back(2)
    for t in range(1, new):
        assert relative(decode(layer, tokens_of(whole, t, t + 1), cache), tokens_of(expected, t, t + 1)) < EXACT


def test_roll_back_refuses_what_is_no_longer_kept():
    layer = make_layer()
    _, cache = prefill(layer, torch.randn(2, 6, HIDDEN), slots=4)
    with pytest.raises(ValueError, match=r"sequences \[0, 1\] cannot go back"):
        cache.roll_back(1)  # into the prefill
    decode(layer, torch.randn(2, 2, HIDDEN), cache)
    with pytest.raises(ValueError, match=r"sequences \[1\] cannot go back.*0 to \[2, 2\] are kept"):
        cache.roll_back([0, 3])
    with pytest.raises(ValueError, match="cannot go back"):
        cache.roll_back(torch.tensor([0, -1]))
    cache.roll_back([1, 0])
    assert cache.lengths.tolist() == [7, 8]
    decode(layer, torch.randn(2, 7, HIDDEN), cache)
    with pytest.raises(ValueError, match="slots=4 each may be 0 to 3"):
        cache.roll_back(4)
    cache.roll_back(2)
    with pytest.raises(ValueError, match="cannot go back"):
        cache.roll_back(2)  # three of the last packet are kept, two are taken back already
    for wrong in ("1", True, 1.0, [1.0, 0.0], None):
        with pytest.raises(TypeError, match="rejected"):
            cache.roll_back(wrong)  # type: ignore[arg-type]
    for shape in (torch.zeros(3, dtype=torch.int64), torch.zeros(2), [1]):
        with pytest.raises(ValueError, match=r"rejected must be int32 or int64 \[2\]"):
            cache.roll_back(shape)
    assert cache.lengths.tolist() == [12, 13]


def test_rows_without_a_sequence_give_zeros_and_stay_untouched():
    layer, whole = make_layer(), sequences(4)
    (_, cache), (_, full) = start(layer, whole, slots=3), start(layer, whole, slots=3)
    cache.lengths[3] = -1
    before = [getattr(cache, name)[3].clone() for name in CACHE_FIELDS]
    for T, at in ((1, 0), (2, 1)):
        output = decode(layer, tokens_of(whole, at, at + T), cache)
        expected = decode(layer, tokens_of(whole, at, at + T), full)
        assert not output[3].any()
        others = [0, 1, 2, 4, 5]
        assert relative(output[others], expected[others]) < EXACT
    cache.roll_back(1)
    for name, x in zip(CACHE_FIELDS, before, strict=True):
        assert torch.equal(getattr(cache, name)[3], x), name


def test_bfloat16_layer_and_inference_mode():
    layer = make_layer(torch.bfloat16)
    whole = sequences(4, torch.bfloat16)
    expected = forward_of(layer, whole)
    with torch.inference_mode():
        output, cache = start(layer, whole, slots=2, state_dtype=torch.bfloat16)
    assert cache.conv.dtype == torch.bfloat16
    # Activations are rounded to bfloat16 (2^-9) at every stage, of which there are about five.
    assert relative(output, prompts_of(expected)) < 5 * 2**-9
    for t in range(4):  # outside inference mode, with the cache that was made inside
        error = relative(decode(layer, tokens_of(whole, t, t + 1), cache), tokens_of(expected, t, t + 1))
        assert error < (5 + t + 2) * 2**-9


def test_malformed_arguments_are_refused_and_leave_the_cache():
    layer, whole = make_layer(), sequences(1)
    _, cache = start(layer, whole)
    _, untouched = start(layer, whole)
    B, token = len(LENGTHS), tokens_of(whole, 0, 1)
    other = GatedDeltaNet(HIDDEN, 2, 2, 8, 4)
    _, wide = start(make_layer(torch.float64), sequences(0, torch.float64))
    refusals: list[tuple[type[Exception], str, Any]] = [
        (TypeError, "layer must be", lambda: decode(torch.nn.Linear(1, 1), token, cache)),  # type: ignore[arg-type]
        (TypeError, "layer must be", lambda: prefill(None, token)),  # type: ignore[arg-type]
        (TypeError, "cache must be", lambda: decode(layer, token, None)),  # type: ignore[arg-type]
        (ValueError, rf"must be \[{B}, T >= 1", lambda: decode(layer, token[:2], cache)),
        (ValueError, rf"must be \[{B}, T >= 1", lambda: decode(layer, token[:, :0], cache)),
        (ValueError, rf"must be \[{B}, T >= 1", lambda: decode(layer, token[:, 0], cache)),
        (ValueError, "expected .*24", lambda: decode(layer, token[..., 1:], cache)),
        (ValueError, "has dtype", lambda: decode(layer, token.double(), cache)),
        (ValueError, "cache is of", lambda: decode(other, token, cache)),
        (ValueError, "cache keeps torch.float64", lambda: decode(layer, token, wide)),
        (ValueError, "unknown backend", lambda: decode(layer, token, cache, backend="cuda")),
        (ValueError, "unknown backend|backend", lambda: prefill(layer, token, backend="cuda")),
        (ValueError, "layout=None with packed rows", lambda: prefill(layer, token[:, 0])),
        (ValueError, "cp_size=2", lambda: prefill(layer, torch.ones(4, HIDDEN), layout=ThdLayout.zigzag([0, 8], 2))),
        (ValueError, "slots=0", lambda: prefill(layer, token, slots=0)),
        (TypeError, "slots='2'", lambda: prefill(layer, token, slots="2")),  # type: ignore[arg-type]
        (ValueError, "state_dtype", lambda: prefill(layer, token, state_dtype=torch.float16)),
        (TypeError, "state_dtype", lambda: prefill(layer, token, state_dtype="bf16")),  # type: ignore[arg-type]
        (TypeError, "state_v_first", lambda: prefill(layer, token, state_v_first=1)),  # type: ignore[arg-type]
        (ValueError, "batch=0", lambda: GdnCache.empty(layer.dims, 0)),
        (TypeError, "dims must be", lambda: GdnCache.empty((2, 4), 1)),  # type: ignore[arg-type]
        (TypeError, "dtype must be", lambda: GdnCache.empty(layer.dims, 1, dtype=None)),  # type: ignore[arg-type]
    ]
    for error, message, call in refusals:
        with pytest.raises(error, match=message):
            call()
    arguments = layer.mixer_arguments()
    rows = torch.ones(4, layer.dims.in_proj_dim)
    with pytest.raises(ValueError, match="layout=None"):
        prefill_mixer(rows, **arguments, layout=None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="projected must be"):
        decode_mixer(rows, cache, **arguments)
    with pytest.raises(TypeError, match="dims must be"):
        decode_mixer(rows[None].expand(B, -1, -1), cache, **{**arguments, "dims": None})
    assert same_cache(cache, untouched)


def test_snippet_of_the_document_runs():
    text = (Path(__file__).resolve().parents[2] / "docs" / "inference.md").read_text(encoding="utf-8")
    snippet, _megatrons = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(snippet, "<snippet>", "exec"), names)
    assert names["cache"].lengths.tolist() == [11, 6, 4]
    assert names["output"].shape == (14, 32)
    assert isinstance(names["cache"].dims, GdnDims)
