"""A Megatron model's prefill and decode against its own forward on the whole sequences, token by token."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("megatron.core")

from tests.unit.test_megatron_parallel import VOCAB, build_model

BATCH, PROMPT, TOTAL = 3, 70, 80  # a prompt of more than one chunk
EXACT = 1e-5  # float32 sums in another order


def tokens() -> Tensor:
    return torch.randint(0, VOCAB, (BATCH, TOTAL), generator=torch.Generator().manual_seed(3))


def logits_of(model: Any, ids: Tensor, context: Any = None) -> Tensor:
    start = 0 if context is None else context.sequence_len_offset
    positions = torch.arange(start, start + ids.shape[1], device=ids.device).expand(BATCH, -1)
    return model(ids, positions, None, inference_context=context, runtime_gather_output=True)


def error(value: Tensor, expected: Tensor) -> float:
    return float((value - expected).norm() / expected.norm())


@torch.no_grad()
def _infer(rank: int, world_size: int) -> dict[str, Any]:
    from megatron.core.inference.contexts import StaticInferenceContext

    from gdn_cp.megatron import GdnInferenceContext

    ids, results = tokens(), {}
    model = build_model(tp=world_size).eval()
    whole = logits_of(model, ids)
    # Megatron's own context: a prompt, then token by token.
    context: Any = StaticInferenceContext(BATCH, TOTAL)
    context.materialize_only_last_token_logits = False
    parts = [logits_of(model, ids[:, :PROMPT], context)]
    context.sequence_len_offset = PROMPT
    for at in range(PROMPT, TOTAL):
        parts.append(logits_of(model, ids[:, at : at + 1], context))
        context.sequence_len_offset += 1
    results["by_token"] = error(torch.cat(parts, 1), whole)
    # A new batch in the same context begins anew.
    context.sequence_len_offset = 0
    results["anew"] = error(logits_of(model, ids[:, :PROMPT], context), whole[:, :PROMPT])
    for v_first, state_dtype in ((False, None), (True, None), (True, torch.bfloat16)):
        context = GdnInferenceContext(BATCH, TOTAL, slots=4, state_v_first=v_first, state_dtype=state_dtype)
        logits_of(model, ids[:, :PROMPT], context)
        context.sequence_len_offset = PROMPT
        worst = 0.0
        for at, wrong in ((PROMPT, 2), (PROMPT + 1, 0), (PROMPT + 4, 3), (PROMPT + 4, 1)):  # drafts that are rejected
            packet = ids[:, at : at + 3].clone()
            packet[:, 3 - wrong :] = (packet[:, 3 - wrong :] + 1) % VOCAB
            found = logits_of(model, packet, context)
            worst = max(worst, error(found[:, : 3 - wrong], whole[:, at : at + 3 - wrong]) if wrong < 3 else 0.0)
            context.sequence_len_offset += 3 - wrong
        assert context.sequence_len_offset == PROMPT + 6
        worst = max(worst, error(logits_of(model, ids[:, PROMPT + 6 :][:, :3], context), whole[:, PROMPT + 6 :][:, :3]))
        results[f"packets, v_first={v_first}, {state_dtype}"] = worst
        cache = context.key_value_memory_dict[1].cache
        assert cache.state.dtype == (state_dtype or torch.float32)
        assert cache.state_v_first == v_first
    return results


@pytest.mark.parametrize("tp", [1, 2])
def test_prefill_and_decode_give_the_logits_of_the_full_forward(run_ranks, tp):
    for results in run_ranks(_infer, tp):
        for name, found in results.items():
            # A bfloat16 state is rounded after the prefill and after each of at most 12 decoded tokens.
            limit = 13 * 2.0**-9 if "bfloat16" in name else EXACT
            assert found < limit, f"{name}: {found}"
        assert results["packets, v_first=True, torch.bfloat16"] > EXACT  # it was in use


def _refuse(rank: int, world_size: int) -> list[str]:
    from megatron.core.packed_seq_params import PackedSeqParams

    from gdn_cp.megatron import GdnInferenceContext

    model = build_model(cp=world_size)
    layer = model.decoder.layers[0].self_attention
    x = torch.randn(4, BATCH, 32)
    messages = []

    def refused(**changed: Any) -> None:
        context = GdnInferenceContext(BATCH, TOTAL)
        arguments: dict[str, Any] = {"inference_context": context}
        for name, value in changed.items():
            arguments[name] = value(context) if callable(value) else value
        with pytest.raises(ValueError, match="inference_context") as caught:
            layer(x, None, **arguments)
        messages.append(str(caught.value))

    def at(offset: int) -> Any:
        def place(context: Any) -> Any:
            if offset < 4:
                layer(x, None, inference_context=context)
            context.sequence_len_offset = offset
            return context

        return place

    def part(context: Any) -> Any:
        context.batch_size_offset = 1
        return context

    if world_size > 1:
        layer.eval()
        refused()
        return messages
    refused()
    layer.eval()
    refused(packed_seq_params=PackedSeqParams(qkv_format="thd"))
    refused(inference_context=object())
    refused(inference_context=part)
    refused(inference_context=at(5))
    with pytest.raises(ValueError, match="slots=1 each may be 0 to 0"):
        layer(x, None, inference_context=at(3)(GdnInferenceContext(BATCH, TOTAL)))
    return messages


def test_what_inference_cannot_do_is_refused(run_ranks):
    (messages,) = run_ranks(_refuse, 1)
    expected = ("call model.eval()", "equal length", "object", "batch_size_offset=1", "has seen 0 tokens")
    assert len(messages) == len(expected)
    for message, part in zip(messages, expected, strict=True):
        assert part in message
    assert (
        run_ranks(_refuse, 2)
        == [["inference_context was given with context parallelism: infer with context_parallel_size=1"]] * 2
    )


def _run_snippet(rank: int, world_size: int, snippet: str) -> dict[str, Any]:
    names: dict[str, Any] = {"torch": torch, "model": build_model(tp=world_size)}
    exec(compile(snippet, "<snippet>", "exec"), names)
    kept = names["context"].key_value_memory_dict[1]
    return {"offset": names["context"].sequence_len_offset, "seen": kept.cache.lengths.tolist(), "length": kept.length}


def test_snippet_of_the_document_runs(run_ranks):
    text = (Path(__file__).resolve().parents[2] / "docs" / "inference.md").read_text(encoding="utf-8")
    _plain, snippet = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert run_ranks(_run_snippet, 2, snippet) == [{"offset": 22, "seen": [22, 22, 22], "length": 22}] * 2
