"""Where a state is lost: sums of gates along chunks against a threshold, for kernels that leave out what counts for
nothing.

A state that decays by e^(sum of gates) below the threshold's exponential is lost in rounding; see
`gdn_cp.kernels.segments.summarise_segments`. Gates are read from G [NT, HV, 64], the running sum within each chunk,
whose last entry is the chunk's sum.

Dimensions: NT chunks, HV value heads.
"""

# pyright: reportGeneralTypeIssues=false
from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

if TYPE_CHECKING:
    from gdn_cp.kernels.compile_report import CompileCase

# Chunks that are looked at together: most heads lose a state within a few, and every program of a kernel asks.
BLOCK = tl.constexpr(64)


@triton.jit
def last_start(G_ptr, chunk, steps, hv, threshold, HV: tl.constexpr):
    """The last of `steps` chunks from `chunk` on, from which to their end the gates sum to less than `threshold`; -1
    where there is none. For sums of -3 -4 -5 -4 and -8 it is 2."""
    i = tl.arange(0, BLOCK)
    start = tl.full((), -1, tl.int32)
    behind = 0.0
    left = steps
    while (left > 0) & (start < 0):
        step = left - BLOCK + i
        ends = G_ptr + ((chunk + step) * HV + hv) * 64 + 63
        gates = tl.load(ends, mask=step >= 0, other=0.0)
        # Ends of earlier chunks are masked, so zeros stand before the first.
        lost = (behind + tl.cumsum(gates, 0, reverse=True) < threshold) & (step >= 0)
        start = tl.max(tl.where(lost, step, -1), 0)
        behind += tl.sum(gates, 0)
        left -= BLOCK
    return start


@triton.jit
def first_end(G_ptr, chunk, steps, hv, threshold, HV: tl.constexpr):
    """The least number of chunks from `chunk` on whose gates sum to less than `threshold`; `steps` where none do. For
    sums of -4 -5 -4 -3 and -8 it is 2."""
    i = tl.arange(0, BLOCK)
    end = steps
    before = 0.0
    done = tl.zeros((), tl.int32)
    while (done < steps) & (end == steps):
        ends = G_ptr + ((chunk + done + i) * HV + hv) * 64 + 63
        gates = tl.load(ends, mask=done + i < steps, other=0.0)
        lost = (before + tl.cumsum(gates, 0) < threshold) & (done + i < steps)
        end = tl.min(tl.where(lost, done + i + 1, steps), 0)
        before += tl.sum(gates, 0)
        done += BLOCK
    return end


def compile_cases() -> list[CompileCase]:
    """None: what is here is compiled inside the kernels that call it."""
    return []
