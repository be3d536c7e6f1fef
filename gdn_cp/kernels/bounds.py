"""What every operation on packed sequences refuses of `cu_seqlens`, and its reading where that costs no waiting.

Dimensions: T tokens of the packed row, N sequences.
"""

from itertools import pairwise

import torch
from torch import Tensor


def check_cu_seqlens(cu_seqlens: Tensor, T: int, device: torch.device, owner: str) -> None:
    """Raise ValueError unless cu_seqlens is an int32 or int64 vector [N + 1] on `device`, that of the argument `owner`,
    and, where it is on the CPU, cuts T rows; TypeError for what is no tensor. Reading it on a GPU would wait for it,
    and while torch.compile traces there is nothing to read."""
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"cu_seqlens must be a torch.Tensor, got {type(cu_seqlens).__name__}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.dim() != 1 or len(cu_seqlens) < 2:
        raise ValueError(
            f"cu_seqlens must be an int32 or int64 vector of N + 1 >= 2 elements, got {cu_seqlens.dtype} "
            f"{list(cu_seqlens.shape)}"
        )
    if cu_seqlens.device != device:
        raise ValueError(
            f"cu_seqlens is on {cu_seqlens.device} but {owner} is on {device}: move cu_seqlens to {device}"
        )
    if device.type == "cpu" and not torch.compiler.is_compiling():
        read_bounds(cu_seqlens, T)


def read_bounds(cu_seqlens: Tensor, T: int) -> tuple[int, ...]:
    """The bounds of packed sequences on the host; waits for the device. Raises ValueError unless they cut T rows."""
    bounds = tuple(cu_seqlens.tolist())
    if bounds[0] != 0:
        raise ValueError(f"cu_seqlens must start at 0, got {bounds[0]}")
    for n, (start, end) in enumerate(pairwise(bounds)):
        if end < start:
            raise ValueError(f"cu_seqlens must not decrease, got {start} then {end} at sequence {n}")
    if bounds[-1] != T:
        raise ValueError(f"cu_seqlens must end at the token count {T}, got {bounds[-1]}: no row is dropped or added")
    return bounds
