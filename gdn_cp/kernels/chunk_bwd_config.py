"""Launch settings of the chunked delta rule's backward, fixed for an architecture, dtype and head dims; see `configs`.

Dimensions: K, V head dims.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from gdn_cp.kernels.bwd_slices import chain_columns
from gdn_cp.kernels.configs import capability, is_hopper, multiprocessors, power_of_2
from gdn_cp.kernels.tuned import tuned_launches

FUSED_VERSIONS = ((3, 6),)
"""Versions of Triton with which `chunk_bwd_fused` was run on a GPU; 3.7 compiles it too."""


class BackwardLaunch(NamedTuple):
    """For each kernel (columns of the state per step, warps, pipeline stages, limit of registers or none); and whether
    the bulk copy engine is used."""

    chains: tuple[int, ...]
    scores: tuple[int, ...]
    dq: tuple[int, ...]
    dk: tuple[int, ...]
    tma: bool = False


def backward_config(device: torch.device, dtype: torch.dtype, K: int, V: int, walks: int) -> BackwardLaunch:
    """The shipped settings, or those of a tuning run where the user asked for them (see `tuned.py`)."""
    launch = _shipped_config(device, dtype, K, V, walks)
    tuned = tuned_launches(capability(device), dtype, K) if K == V else {}
    return launch._replace(**{name: tuned[name] for name in ("scores", "dq", "dk") if name in tuned})


@lru_cache(maxsize=256)
def _shipped_config(device: torch.device, dtype: torch.dtype, K: int, V: int, walks: int) -> BackwardLaunch:
    """Launch settings for head dims K and V; measured on sm_90 for K = V = 128, reasoned for others.

    A step of the chains is shorter with fewer columns of the state per program, which costs multiprocessors: `walks`,
    the number of (piece, value head) pairs, says how many are free.
    """
    if dtype == torch.float32:
        return BackwardLaunch((16, 8, 1), (16, 8, 1), (16, 8, 1), (16, 8, 1))
    block_v = max(16, min(64, int(power_of_2(V))))
    half = min(32, block_v)
    # 8 warps only where products have 128 rows: one of 64 rows is laid out for 128 then, and written past its end.
    warps = 8 if K > 64 else 4
    if not is_hopper(device):
        columns = 16 if K > 128 else half
        return BackwardLaunch((columns, 4, 2), (columns, 4, 1), (half, warps, 2), (half, warps, 2))
    if K > 128:
        return BackwardLaunch((16, 4, 2), (16, 4, 2), (half, 8, 2), (half, 8, 2))
    columns = chain_columns(walks, V, multiprocessors(device))
    if K <= 64:
        return BackwardLaunch((columns, 4, 3), (half, 4, 3), (half, 4, 3), (half, 4, 3), True)
    return BackwardLaunch((columns, 4, 3), (half, 4, 3), (block_v, 8, 3, 128), (half, 4, 3), True)


@lru_cache(maxsize=64)
def launch_options(launch: tuple[int, ...]) -> tuple[int, dict[str, int]]:
    """Columns per step, and the keyword arguments of a launch, which nobody may change."""
    block_v, warps, stages, *limit = launch
    options = {"BV": block_v, "STAGES": stages, "num_warps": warps, "num_stages": stages}
    return block_v, options | ({"maxnreg": limit[0]} if limit else {})
