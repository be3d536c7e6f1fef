"""Prefill and decode of the Megatron layer with Megatron's static inference context.

    context = GdnInferenceContext(max_batch_size=8, max_sequence_length=4096, slots=4)
    logits = model(prompts, positions, None, inference_context=context)      # prefill, positions from 0
    context.sequence_len_offset += prompts.shape[1]                          # as Megatron's engine does
    logits = model(tokens, positions, None, inference_context=context)       # a token of each sequence, or a packet
    context.sequence_len_offset += tokens.shape[1] - rejected                # drafts that were not accepted

The context says how many tokens are there; the layers follow it. Each keeps its `gdn_cp.inference.GdnCache` in
`context.key_value_memory_dict` under its number, where attention layers keep keys and values.

Dimensions: s tokens of each of b sequences, P and D the widths before and after the mixer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.inference.contexts import StaticInferenceContext
from torch import Tensor

from gdn_cp.inference import GdnCache, decode_mixer, prefill_mixer
from gdn_cp.megatron.packed import layout_of_batch
from gdn_cp.mixer_checks import check_count


class GdnInferenceContext(StaticInferenceContext):
    """Megatron's static context with choices for the GDN layers; a plain one means the defaults.

    Args:
        max_batch_size: sequences.
        max_sequence_length: tokens of the attention layers' caches, prompt included.
        slots: states kept of each sequence: the last slots - 1 tokens can be taken back.
        state_v_first: keep states as [V, K].
        state_dtype: float32 (None: so) or bfloat16.
        settings: further arguments of Megatron's context.

    Raises ValueError or TypeError for counts below 1 and another state_dtype.
    """

    def __init__(
        self,
        max_batch_size: int,
        max_sequence_length: int,
        *,
        slots: int = 1,
        state_v_first: bool = False,
        state_dtype: torch.dtype | None = None,
        **settings: Any,
    ) -> None:
        for name, count in (
            ("max_batch_size", max_batch_size),
            ("max_sequence_length", max_sequence_length),
            ("slots", slots),
        ):
            check_count(name, count)
        if not isinstance(state_v_first, bool):
            raise TypeError(f"state_v_first must be True or False, got {state_v_first!r}")
        if state_dtype not in (None, torch.float32, torch.bfloat16, torch.float64):
            raise ValueError(f"state_dtype={state_dtype}: choose torch.float32 or torch.bfloat16")
        super().__init__(max_batch_size, max_sequence_length, **settings)
        self.materialize_only_last_token_logits = slots == 1  # the logits of a packet are all needed
        self.gdn_cache_settings = {"slots": slots, "state_v_first": state_v_first, "state_dtype": state_dtype}


@dataclass
class _Kept:
    """A layer's cache and how many tokens of each sequence it has seen, known on the host."""

    cache: GdnCache
    length: int


def mix_with_cache(
    projected: Tensor, context: Any, layer_number: int, arguments: dict[str, Any], backend: str | None = None
) -> Tensor:
    """Mix the next s tokens of b sequences: [s, b, P] -> [s, b, D]; the context's cache of the layer is updated.

    Args:
        projected: the input projection of all heads of this tensor-parallel rank.
        context: Megatron's static context. At `sequence_len_offset` 0 the tokens are prompts (of equal length) and a
            new cache begins. Otherwise they follow that many tokens; where the cache has seen more, these are taken
            back first.
        layer_number: of the layer.
        arguments: dims, parameters and epsilon, see `gdn_cp.inference.prefill_mixer`.
        backend: implementation of the delta rule.

    Raises:
        ValueError: for a context of dynamic batching, parts of a batch, and an offset that the cache cannot go to.
    """
    if not isinstance(context, StaticInferenceContext) or context.batch_size_offset:
        raise ValueError(
            f"inference_context={type(context).__name__} with batch_size_offset="
            f"{getattr(context, 'batch_size_offset', None)}: only a whole batch in a StaticInferenceContext or a "
            "gdn_cp.megatron.GdnInferenceContext is supported"
        )
    tokens, batch, _width = projected.shape
    offset, by_sequence = context.sequence_len_offset, projected.transpose(0, 1)
    if offset == 0:
        mixed, cache = prefill_mixer(
            by_sequence.flatten(0, 1),
            **arguments,
            layout=layout_of_batch(batch, tokens, 1, projected.device),
            backend=backend,
            **getattr(context, "gdn_cache_settings", {}),
        )
        context.key_value_memory_dict[layer_number] = _Kept(cache, tokens)
        return mixed.unflatten(0, (batch, tokens)).transpose(0, 1)
    kept = context.key_value_memory_dict.get(layer_number)
    if not isinstance(kept, _Kept) or offset > kept.length:
        seen = kept.length if isinstance(kept, _Kept) else 0
        raise ValueError(
            f"inference_context.sequence_len_offset={offset}, but layer {layer_number} has seen {seen} tokens: add to "
            "it what each forward pass was given, and begin a batch with 0"
        )
    if offset < kept.length:
        kept.cache.roll_back(kept.length - offset)
        kept.length = offset
    mixed = decode_mixer(by_sequence, kept.cache, **arguments, backend=_decode_backend(backend))
    kept.length += tokens
    return mixed.transpose(0, 1)


def _decode_backend(backend: str | None) -> str | None:
    """The recurrent rule's name for a choice among the chunked ones."""
    return "reference" if backend == "recurrent" else backend
