"""The sigmoid and the exponential in few instructions, for kernels that would else wait for their arithmetic.

A sigmoid takes four instructions, Triton's own thirteen. Memory-bound kernels move 4 to 8 bytes for each sigmoid, so
that at the speed of memory a multiprocessor has some 20 issue slots for an element. What is left out are the detours of
Triton's exponential and division around denormal numbers, which 1 / (1 + e) never needs: where e underflows the result
is 1, and where it overflows the result is 0, off by less than 1e-38. An exponential takes two, not five, and is 0 where
it would be denormal.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import triton
import triton.language as tl

if TYPE_CHECKING:
    from gdn_cp.kernels.compile_report import CompileCase

# Triton's interpreter, chosen when kernels are defined, cannot run PTX.
_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x) of float32 x, to a few units in the last place, 0 below about -87."""
    if _INTERPRETED:
        return tl.sigmoid(x)
    # -log2(e); ex2 and rcp err by at most 2 and 1 units in the last place.
    return tl.inline_asm_elementwise(
        "{ mul.f32 $0, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 $0, $0; add.f32 $0, $0, 0f3F800000; "
        "rcp.approx.ftz.f32 $0, $0; }",
        "=f,f",
        [x],
        dtype=tl.float32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def exp(x):
    """e^x of float32 x, to a few units in the last place, 0 below about -87."""
    if _INTERPRETED:
        return tl.exp(x)
    return tl.inline_asm_elementwise(
        "{ mul.f32 $0, $1, 0f3FB8AA3B; ex2.approx.ftz.f32 $0, $0; }",
        "=f,f",
        [x],
        dtype=tl.float32,
        is_pure=True,
        pack=1,
    )


def compile_cases() -> list[CompileCase]:
    """None: what is here is compiled inside the kernels that call it."""
    return []
