"""Launch configurations of the chunked delta-rule kernels, one fixed choice per architecture, dtype and head dims.

Nothing is tuned while training runs and no choice depends on lengths, so that a new packed length never costs a tuning
run and equal inputs give equal bits; a file of settings tuned beforehand may replace some (`tuned.py`). Only sm_90
(H200) was measured. Other GPUs get settings that need no bulk copies and little shared memory; a test compiles them for
sm_80, sm_89, sm_100 and sm_120, where nothing was run.

Dimensions: K key head dim, V value head dim, BV columns of the state that one program carries.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache, wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

from gdn_cp.kernels.tuned import tuned_launches

_Rest = ParamSpec("_Rest")
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Launch:
    """Settings of the prepare kernels. `precision` is what tl.dot is told for the input dtype."""

    precision: str = "tf32"
    solve_precision: str = "tf32"
    solve_block: int = 64
    solve_warps: int = 1
    solve_stages: int = 2
    products_warps: int = 4
    products_stages: int = 1
    products_registers: int | None = None
    leading_registers: int | None = None  # of the products before heads have forgotten: addresses of a loop are many


@dataclass(frozen=True)
class ChainLaunch:
    """Settings of the forward chain: columns of the state per program, warps, pipeline stages.

    `summary_stages`: of summaries by more programs than there are multiprocessors, so that two fit on each; 0: as many.
    """

    precision: str = "tf32"
    block_v: int = 64
    num_warps: int = 4
    num_stages: int = 2
    summary_stages: int = 0
    tma: bool = False


def options(num_warps: int, num_stages: int, maxnreg: int | None = None, **constants: Any) -> dict[str, Any]:
    """Keywords of a launch: the compiler's options and the kernel's constants; type checkers know neither."""
    return {"num_warps": num_warps, "num_stages": num_stages, "maxnreg": maxnreg, **constants}


@lru_cache
def capability(device: torch.device) -> int:
    """10 * major + minor of a CUDA device; 90 for others, where only Triton's interpreter can run."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def is_hopper(device: torch.device) -> bool:
    """Whether a device has the settings that were measured; any other gets those that fit everywhere."""
    return capability(device) == 90


def cdiv(a: int, b: int) -> int:
    """a / b rounded up, on the host; Triton's own, made for kernels too, takes microseconds."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The least power of two that is not less than n >= 1, on the host."""
    return 1 << (n - 1).bit_length()


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device; 1 elsewhere, where only Triton's interpreter can run."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


# `torch.cuda.current_device` without its check whether CUDA has been started: whoever asks here has tensors there.
current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Make `device` the current one if it is another GPU: Triton launches on the current one, wherever tensors are."""
    elsewhere = device.type == "cuda" and device.index != current_device()
    return torch.cuda.device(device) if elsewhere else nullcontext()


def launches(function: Callable[Concatenate[Tensor, _Rest], _Result]) -> Callable[Concatenate[Tensor, _Rest], _Result]:
    """Run a function that launches kernels on the device of its first argument."""

    @wraps(function)
    def run(x: Tensor, *args: _Rest.args, **kwargs: _Rest.kwargs) -> _Result:
        device = x.device
        if device.type != "cuda" or device.index == current_device():
            return function(x, *args, **kwargs)
        with torch.cuda.device(device):
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
        # Left to itself ptxas takes 32 and spills thousands of bytes.
        launch = replace(launch, products_registers=128, leading_registers=128)
    elif dtype == torch.float16:  # its rounding of A is no coarser than tf32's of the factors
        launch = replace(launch, solve_precision="tf32x3")
    if dtype != torch.float32 and K > 128:
        launch = replace(launch, products_warps=8)
    elif dtype != torch.float32 and is_hopper(device):  # three programs of 128 threads fit on a multiprocessor then
        launch = replace(launch, products_registers=168)
    tuned = tuned_launches(capability(device), dtype, K)
    if "solve" in tuned:
        launch = replace(launch, solve_block=tuned["solve"][0], solve_warps=tuned["solve"][1])
    if "products" in tuned:
        launch = replace(launch, products_warps=tuned["products"][0], products_stages=tuned["products"][1])
    return launch


def chain_config(device: torch.device, dtype: torch.dtype, K: int, V: int, block_v: int = 64) -> ChainLaunch:
    """Settings of the forward chain for head dims K and V, at most `block_v` columns of the state per program."""
    if dtype == torch.float32:
        return ChainLaunch("ieee", block_v=16, num_warps=8 if K > 64 else 4, num_stages=1)
    hopper = is_hopper(device)
    if K > 128:
        return ChainLaunch(block_v=16, num_stages=2 if hopper else 1, tma=hopper)
    if not hopper or K & (K - 1) or V & (V - 1):
        return ChainLaunch(block_v=32, num_stages=2)
    return ChainLaunch(block_v=block_v, num_stages=3, summary_stages=2, tma=True)
