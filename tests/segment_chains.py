"""State passing without ranks: the segments of every chain on one device, summarised, composed and run as ranks do."""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from gdn_cp.kernels.segments import RuleOptions, SegmentRule, TokenInputs, begin_segment_backward, merge_states

Chains = tuple[tuple[int, ...], ...]
"""Lengths of the segments of each sequence, in order."""


@lru_cache  # made once, so that a CUDA graph finds them on the device
def bounds(chains: Chains, device: torch.device | str) -> Tensor:
    """int32 boundaries of all segments."""
    lengths = [length for chain in chains for length in chain]
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


@lru_cache
def roles(chains: Chains, device: torch.device | str) -> Tensor:
    """int32: 1 where a state enters a segment, plus 2 where it goes on."""
    found = [(i > 0) + 2 * (i < len(chain) - 1) for chain in chains for i in range(len(chain))]
    return torch.tensor(found, dtype=torch.int32, device=device)


def run_in_segments(
    inputs: TokenInputs, options: RuleOptions, chains: Chains, d_output: Tensor, truncate: bool = False
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Output, and the gradient of each field of `inputs`, of the rule along sequences cut into segments."""
    device, needed = inputs.q.device, tuple(x is not None for x in inputs.tensors())
    cu_seqlens, parts = bounds(chains, device), roles(chains, device)
    with torch.no_grad():
        rule = SegmentRule(inputs, options, cu_seqlens, parts, (0, len(parts)), truncate=truncate)
        (ext, transfer), first = rule.summarise()
        assert first == 0
        entering = _compose(ext, transfer, chains, reverse=False)
        o = rule.run(entering)
        back = begin_segment_backward(inputs, options, cu_seqlens, parts, rule.kept(), entering, d_output, needed)
        leaving = _compose(back.state_gradient(), transfer, chains, reverse=True)
        return o, back.finish(leaving)


def _compose(ext: Tensor, transfer: Tensor, chains: Chains, *, reverse: bool) -> Tensor:
    """What enters each segment, or with `reverse` the gradient of what leaves it; zero at the chain's begin (end)."""
    found = torch.zeros(ext.shape, dtype=ext.dtype, device=ext.device)
    first = 0
    for chain in chains:
        order = list(range(first, first + len(chain)))
        first += len(chain)
        order = order[::-1] if reverse else order
        steps, heads = len(order) - 1, ext.shape[1]
        if steps:
            first_parts = torch.cat([ext[i] for i in order[:-1]])
            maps = torch.cat([transfer[i] for i in order[1:-1]]) if steps > 1 else transfer.flatten(0, 1)[:0]
            merged = merge_states(first_parts, maps, (heads,) * steps, transpose=reverse)
            for i, states in zip(order[1:], merged.split(heads), strict=True):
                found[i] = states
    return found
