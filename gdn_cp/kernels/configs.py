"""Launch configurations of the chunked delta-rule kernels, one fixed choice per architecture, dtype and head dims.

Nothing is tuned while training runs and no choice depends on lengths, so that a new packed length never costs a tuning
run and equal inputs give equal bits. Only sm_90 (H200) was measured. sm_80 and sm_100 follow by reasoning from their
shared memory and are untested.

Dimensions: K key head dim, V value head dim, BV columns of the state that one program carries.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache, wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

_Rest = ParamSpec("_Rest")
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Launch:
    """Settings of the prepare kernels. `precision` is what tl.dot is told for the input dtype."""

    precision: str = "tf32"
    solve_precision: str = "tf32"
    solve_block: int = 64
    solve_warps: int = 1
    solve_registers: int | None = None
    products_warps: int = 4
    products_stages: int = 1


@dataclass(frozen=True)
class ChainLaunch:
    """Settings of the forward chain: columns of the state per program, warps, pipeline stages (of summaries: 0 for as
    many)."""

    precision: str = "tf32"
    block_v: int = 64
    num_warps: int = 4
    num_stages: int = 2
    summary_stages: int = 0
    tma: bool = False


def options(num_warps: int, num_stages: int, maxnreg: int | None = None, **constants: Any) -> dict[str, Any]:
    """Keywords of a launch: the compiler's options and the kernel's constants; type checkers know neither."""
    return {"num_warps": num_warps, "num_stages": num_stages, "maxnreg": maxnreg, **constants}


def capability(device: torch.device) -> int:
    """10 * major + minor of a CUDA device; 90 for others, where only Triton's interpreter can run."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device; 1 elsewhere, where only Triton's interpreter can run."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Make `device` the current one if it is another GPU: Triton launches on the current one, wherever tensors are."""
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    return torch.cuda.device(device) if elsewhere else nullcontext()


def launches(function: Callable[Concatenate[Tensor, _Rest], _Result]) -> Callable[Concatenate[Tensor, _Rest], _Result]:
    """Run a function that launches kernels on the device of its first argument."""

    @wraps(function)
    def run(x: Tensor, *args: _Rest.args, **kwargs: _Rest.kwargs) -> _Result:
        with on_device(x.device):
            return function(x, *args, **kwargs)

    return run


def bulk_copy_fits(*tensors: Tensor) -> bool:
    """Whether the bulk copy engine can read tensors [B, T, heads, dim]: packed heads, rows that do not overlap, dims
    that need no padding, 16-byte alignment."""
    for x in tensors:
        dim, row = x.shape[3], x.shape[2] * x.shape[3]
        packed = not dim & (dim - 1) and x.stride(2) == dim and x.stride(1) >= row
        aligned = not x.stride(1) % 8 and not x.data_ptr() % 16
        if not packed or not aligned or x.numel() == 0 or x.dtype == torch.float32:
            return False
    return True


def dot_precision(dtype: torch.dtype) -> str:
    """float32 products are float32 ("ieee", no tensor cores): splitting into tf32 would compute first operands."""
    return "ieee" if dtype == torch.float32 else "tf32"


def prepare_config(device: torch.device, dtype: torch.dtype, K: int) -> Launch:
    """Settings of the prepare kernels for key head dim K."""
    launch = Launch(precision=dot_precision(dtype))
    if dtype == torch.float32:
        launch = replace(launch, solve_precision="ieee", solve_block=16, products_warps=8)
    elif dtype == torch.float16:  # its rounding of A is no coarser than tf32's of the factors
        launch = replace(launch, solve_precision="tf32x3")
    if dtype != torch.float32 and K > 128:
        launch = replace(launch, products_warps=8)
    return launch


PIECES_VARIABLE = "GDN_CP_PIECE_CHUNKS"
# Microseconds of one step of the walk on an H200 at K = V = 128, by columns of the state per program: (main, summary).
_STEP = {64: (1.65, 1.2), 32: (1.25, 0.95)}
_MERGE = 5.0  # to compose one more piece
_LAUNCHES = 10.0  # the summary and the merge launch


def chain_config(device: torch.device, dtype: torch.dtype, K: int, V: int, block_v: int = 64) -> ChainLaunch:
    """Settings of the forward chain for head dims K and V, at most `block_v` columns of the state per program."""
    if dtype == torch.float32:
        return ChainLaunch("ieee", block_v=16, num_warps=8 if K > 64 else 4, num_stages=1)
    hopper = capability(device) >= 90
    if K > 128:
        return ChainLaunch(block_v=16, num_stages=2 if hopper else 1, tma=hopper)
    if not hopper or K & (K - 1) or V & (V - 1):
        return ChainLaunch(block_v=32, num_stages=2)
    return ChainLaunch(block_v=block_v, num_stages=3, tma=True)


def chain_plan(
    device: torch.device,
    dtype: torch.dtype,
    num_sequences: int,
    num_rows: int,
    heads: int,
    K: int,
    V: int,
    *,
    intra_card: int | None = None,
    summarised: bool = False,
) -> tuple[ChainLaunch, int]:
    """Settings of the forward chain, and the chunks of a piece it is cut into (0: sequences stay whole).

    It depends on shapes and on the card alone: lengths are on the device. `intra_card`, or else the environment
    variable GDN_CP_PIECE_CHUNKS, fixes the pieces (0: never cut). Columns of the state do not depend on each other, so
    with that set results have the same bits whatever the number of heads on a card.

    Args:
        device, dtype: of q. num_sequences: N. num_rows: B*T. heads: HV. K, V: head dims.
        intra_card: chunks of a piece; None: see above.
        summarised: sequences are segments whose laws are needed too, cut or not.

    Raises:
        ValueError: if GDN_CP_PIECE_CHUNKS is not a number.
    """
    override = os.environ.get(PIECES_VARIABLE)
    if override is not None and not override.isdigit():
        raise ValueError(f"{PIECES_VARIABLE} is {override!r}: set it to a number of chunks >= 0, or unset it")
    block_v, cut = best_cut(
        multiprocessors(device), max(num_sequences, 1), num_rows / max(num_sequences, 1) / 64, heads, K, V, summarised
    )
    launch = chain_config(device, dtype, K, V, block_v)
    if intra_card is not None:
        cut = intra_card
    elif override is not None:
        cut = int(override)
    elif not launch.tma or K > 128 or device.type != "cuda":
        cut = 0
    return launch, cut


def best_cut(
    processors: int, sequences: int, chunks: float, heads: int, K: int, V: int, summarised: bool = False
) -> tuple[int, int]:
    """Columns per program and chunks of a piece (0: no cut) of the least estimated time.

    `sequences` are taken to have `chunks` chunks each; if `summarised`, the law of each whole one is needed too.
    Cutting pays when the programs of whole sequences leave multiprocessors idle: for 132 processors, one sequence of
    1024 chunks, 4 heads and K = V = 128, whole sequences make 8 programs of 64 columns and 16 pieces make 128.
    """
    best, plan = float("inf"), (64, 0)
    for block_v, (main, summary) in _STEP.items():
        per_piece = sequences * heads * -(-V // block_v)
        per_summary = sequences * heads * -(-(K + V) // block_v)
        for pieces in range(1, max(1, processors // per_piece) + 1):
            steps = chunks / pieces
            cost = steps * main * -(-per_piece * pieces // processors)
            if pieces > 1 or summarised:
                walks = pieces * per_summary if summarised else per_piece + (pieces - 2) * per_summary
                cost += steps * summary * -(-walks // processors) + _LAUNCHES
                cost += _MERGE * pieces * (1 + summarised) if pieces > 1 else 0.0
            if cost < best and (pieces == 1 or steps >= 4):
                best, plan = cost, (block_v, 0 if pieces == 1 else math.ceil(steps))
    return plan
