"""Launch configurations of the chunked delta-rule kernels, one fixed choice per architecture, dtype and head dims.

Nothing is tuned while training runs and no choice depends on lengths, so that a new packed length never costs a tuning
run and equal inputs give equal bits. Only sm_90 (H200) was measured. sm_80 and sm_100 follow by reasoning from their
shared memory and are untested.

Dimensions: K key head dim, V value head dim, BV columns of the state that one program carries.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Launch:
    """Settings of the prepare kernels. `precision` is what tl.dot is told for the input dtype."""

    precision: str = "tf32"
    solve_precision: str = "tf32x3"
    solve_block: int = 64
    solve_warps: int = 1
    products_warps: int = 4
    products_stages: int = 1


@dataclass(frozen=True)
class ChainLaunch:
    """Settings of the forward chain: columns of the state per program, warps, pipeline stages."""

    precision: str = "tf32"
    block_v: int = 64
    num_warps: int = 4
    num_stages: int = 2


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
    if K > 128:
        return ChainLaunch(block_v=32, num_warps=4, num_stages=2 if capability(device) != 80 else 1)
    return ChainLaunch(block_v=64 if V > 32 else max(16, V), num_warps=4, num_stages=2)
