"""Launch configurations of the chunked delta-rule kernels, one fixed choice per architecture, dtype and head dims.

Nothing is tuned while training runs and no choice depends on lengths, so that a new packed length never costs a tuning
run and equal inputs give equal bits. Only sm_90 (H200) was measured. sm_80 and sm_100 follow by reasoning from their
shared memory and are untested.

Dimensions: K key head dim, V value head dim, BV columns of the state that one program carries.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Launch:
    """Settings of the prepare kernels. `precision` is what tl.dot is told for the input dtype."""

    precision: str = "tf32"
    solve_precision: str = "tf32x3"
    solve_block: int = 64
    solve_warps: int = 1
    solve_registers: int | None = None
    products_warps: int = 4
    products_stages: int = 1


@dataclass(frozen=True)
class ChainLaunch:
    """Settings of the forward chain: columns of the state per program, warps, pipeline stages."""

    precision: str = "tf32"
    block_v: int = 64
    num_warps: int = 4
    num_stages: int = 2
    tma: bool = False


def capability(device: torch.device) -> int:
    """10 * major + minor of a CUDA device; 90 for others, where only Triton's interpreter can run."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def dot_precision(dtype: torch.dtype) -> str:
    """float32 products are float32 ("ieee", no tensor cores): splitting into tf32 would compute first operands."""
    return "ieee" if dtype == torch.float32 else "tf32"


def prepare_config(device: torch.device, dtype: torch.dtype, K: int) -> Launch:
    """Settings of the prepare kernels for key head dim K."""
    launch = Launch(precision=dot_precision(dtype))
    if dtype == torch.float32:
        launch = replace(launch, solve_precision="ieee", solve_block=16, products_warps=8)
    elif K > 128:
        launch = replace(launch, products_warps=8)
    return launch


def chain_config(device: torch.device, dtype: torch.dtype, K: int, V: int) -> ChainLaunch:
    """Settings of the forward chain for head dims K and V."""
    if dtype == torch.float32:
        return ChainLaunch("ieee", block_v=16, num_warps=8 if K > 64 else 4, num_stages=1)
    hopper = capability(device) >= 90
    if K > 128:
        return ChainLaunch(block_v=16, num_stages=2 if hopper else 1, tma=hopper)
    if not hopper:
        return ChainLaunch(block_v=32, num_stages=2)
    return ChainLaunch(block_v=64, num_stages=3, tma=True)


PIECES_VARIABLE = "GDN_CP_PIECE_CHUNKS"
_SUMMARY_STEP = 0.75  # of a step of the main walk: two products of four, no output
_MERGE_STEPS = 2.0  # steps of the main walk that composing one more piece costs
_LAUNCH_STEPS = 12.0  # two more launches


def piece_chunks(
    device: torch.device, num_sequences: int, num_rows: int, heads: int, K: int, V: int, block_v: int
) -> int:
    """Chunks of a piece for the forward chain; 0 when sequences are not to be cut.

    Cutting pays when the programs of whole sequences leave multiprocessors idle. The choice minimises a cost in steps of
    the walk, taking sequences to be of equal length since only their number is known on the host. It depends on shapes
    and on the card alone. The environment variable GDN_CP_PIECE_CHUNKS overrides it (0: never cut), for equal bits
    whatever the number of heads on a card.

    Args:
        device: of the call. num_sequences: N. num_rows: B*T. heads: HV.
        K, V: head dims. block_v: columns of the state per program.
    """
    override = os.environ.get(PIECES_VARIABLE)
    if override is not None:
        if not override.isdigit():
            raise ValueError(f"{PIECES_VARIABLE} is {override!r}: set it to a number of chunks >= 0, or unset it")
        return int(override)
    if device.type != "cuda" or num_sequences == 0:
        return 0
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return best_cut(processors, num_sequences, num_rows / num_sequences / 64, heads, -(-V // block_v), -(-K // block_v))


def best_cut(processors: int, sequences: int, chunks: float, heads: int, v_blocks: int, k_blocks: int) -> int:
    """Chunks of a piece that minimise the estimated time of `sequences` of `chunks` chunks each; 0 for no cut.

    For example 132 processors, one sequence of 1024 chunks, 8 heads and 2 + 2 blocks: 5 pieces of 205 chunks.
    """
    per_piece = sequences * heads * v_blocks
    best, best_pieces = chunks * -(-per_piece // processors), 1
    for pieces in range(2, max(2, processors // per_piece) + 1):
        summaries = sequences * heads * (v_blocks + (pieces - 2) * (v_blocks + k_blocks))
        waves = -(-per_piece * pieces // processors) + _SUMMARY_STEP * -(-summaries // processors)
        cost = chunks / pieces * waves + _MERGE_STEPS * pieces + _LAUNCH_STEPS
        if cost < 0.9 * best and chunks >= 4 * pieces:
            best, best_pieces = cost, pieces
    return 0 if best_pieces == 1 else math.ceil(chunks / best_pieces)
