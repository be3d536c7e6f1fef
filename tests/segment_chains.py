"""State passing without ranks: the segments of every chain on one device, summarised, composed and run as ranks do."""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from gdn_cp.kernels.merge import merge_chains
from gdn_cp.kernels.segments import RuleOptions, SegmentRule, TokenInputs, begin_segment_backward

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
        laws, V = rule.summarise(), inputs.v.shape[3]
        maps = laws[..., V:]
        entering = _compose(laws[..., :V], maps, chains, rule.kernels, reverse=False)
        o = rule.run(entering)
        saved = rule.kept(), entering, d_output, needed
        back = begin_segment_backward(inputs, options, cu_seqlens, parts, *saved, truncate=truncate)
        leaving = _compose(back.state_gradient(), maps, chains, rule.kernels, reverse=True)
        return o, back.finish(leaving)


@lru_cache
def links(chains: Chains, heads: int, reverse: bool, device: torch.device | str) -> tuple[Tensor, Tensor, int]:
    """Units, links and steps of `gdn_cp.kernels.merge` for laws that stand segment by segment, head by head."""
    units, found = [], []
    first = 0
    for chain in chains:
        order = list(range(first, first + len(chain)))[:: -1 if reverse else 1]
        first += len(chain)
        for head in range(heads):
            units.append((len(found), len(order)))
            for i, n in enumerate(order):
                row, last = n * heads + head, i == len(order) - 1
                found.append((-1 if last else row, row if i > 0 and not last else -1, row, -1))
    tables = (torch.tensor(x, dtype=torch.int32, device=device) for x in (units, found))
    return *tables, max(map(len, chains))


def _compose(ext: Tensor, maps: Tensor, chains: Chains, kernels: bool, *, reverse: bool) -> Tensor:
    """What enters each segment, or with `reverse` the gradient of what leaves it; zero at the chain's begin (end)."""
    found = torch.empty(ext.shape, dtype=ext.dtype, device=ext.device)
    units, table, steps = links(chains, ext.shape[1], reverse, ext.device)
    flat = ext.flatten(0, 1), maps.flatten(0, 1)
    merge_chains(*flat, units, table, found.flatten(0, 1), steps=steps, transpose=reverse, kernels=kernels)
    return found
