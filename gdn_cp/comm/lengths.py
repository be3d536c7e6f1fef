"""Reading sequence lengths from the host, and refusing what no layout can use.

Everything here runs once per batch on the host. Each refusal is a ValueError (TypeError for a wrong type) that names
the argument, its value and the remedy, and depends on nothing but the arguments: ranks that are given the same batch
refuse alike, before any collective.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

IntVector = Sequence[int] | np.ndarray | Tensor
"""Whole numbers in one dimension: a list or tuple of ints, an integer numpy array or an integer tensor."""

MAX_TOKENS = 2**31 - 1  # boundaries travel as int32, the dtype that varlen kernels read
MAX_RANKS = 2**20  # far above any machine; tables are built with a few numbers for each rank


def read_size(value: Any, name: str, most: int = MAX_TOKENS) -> int:
    """Return `value` as an int from 1 to `most`; `name` is the argument's name in the message."""
    try:
        size = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected an int, got {value!r} of type {type(value).__name__}") from None
    if not 1 <= size <= most:
        raise ValueError(f"{name}: got {size}; it must be at least 1 and at most {most}")
    return size


def read_index(value: Any, size: int, name: str) -> int:
    """Return `value` as an int in [0, size)."""
    try:
        index = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected an int, got {value!r} of type {type(value).__name__}") from None
    if not 0 <= index < size:
        raise ValueError(f"{name}: got {index}; it must be at least 0 and less than {size}")
    return index


def read_ints(value: Any, name: str) -> np.ndarray:
    """Return `value` as an int64 array of one dimension.

    A CUDA tensor is accepted, and synchronises the host with its device: pass host-side lengths to avoid that.
    """
    if isinstance(value, Tensor):
        if value.device.type == "meta":
            raise ValueError(f"{name}: is a tensor on the meta device, which holds no values; pass host-side lengths")
        kind, whole = value.dtype, not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
        array = value.detach().cpu().numpy() if whole else np.empty(0)
    else:
        try:
            array = np.asarray(value)
        except ValueError:  # numpy's word for it does not name the argument
            raise ValueError(f"{name}: {value!r} is not one-dimensional; pass a flat list of ints") from None
        kind = array.dtype
        whole = isinstance(value, Sequence | np.ndarray) and (array.size == 0 or array.dtype.kind in "iu")
    if not whole:
        raise TypeError(f"{name}: expected whole numbers, got {kind}; pass a list of ints or an integer tensor")
    if array.ndim != 1:
        raise ValueError(f"{name}: expected one dimension, got shape {tuple(array.shape)}; flatten it first")
    return array.astype(np.int64)


def read_cu_seqlens(value: Any, name: str = "cu_seqlens") -> np.ndarray:
    """Return boundaries as int64 [N+1]: they start at 0 and never decrease (zero-length sequences are fine)."""
    cu = read_ints(value, name)
    if cu.size < 2:
        raise ValueError(
            f"{name}: got {cu.tolist()}; N sequences need N + 1 boundaries, at least 2 (an empty batch is [0, 0])"
        )
    if cu[0] != 0:
        raise ValueError(f"{name}: starts at {cu[0]}; it must start at 0, subtract the first entry from all")
    falls = np.flatnonzero(np.diff(cu) < 0)
    if falls.size:
        at = int(falls[0])
        raise ValueError(
            f"{name}: decreases from {cu[at]} to {cu[at + 1]} at sequence {at}; pass cumulative sums of the lengths"
        )
    if cu[-1] > MAX_TOKENS:
        raise ValueError(f"{name}: ends at {cu[-1]}, above {MAX_TOKENS} (int32 boundaries); use smaller batches")
    return cu


def read_lengths(value: Any, name: str) -> np.ndarray:
    """Return sequence lengths as int64 [N], none of them negative."""
    lengths = read_ints(value, name)
    negative = np.flatnonzero(lengths < 0)
    if negative.size:
        at = int(negative[0])
        raise ValueError(f"{name}: sequence {at} has length {lengths[at]}; a length must be at least 0")
    return lengths


def read_real_lengths(value: Any, cu: np.ndarray) -> np.ndarray:
    """Return the unpadded lengths int64 [N] of the padded boundaries `cu`; None means that nothing is padded."""
    padded = np.diff(cu)
    if value is None:
        return padded
    lengths = read_lengths(value, "seqlens")
    if lengths.size != padded.size:
        raise ValueError(
            f"seqlens: got {lengths.size} lengths for the {padded.size} sequences of cu_seqlens; "
            "pass the length without padding of each sequence"
        )
    longer = np.flatnonzero(lengths > padded)
    if longer.size:
        at = int(longer[0])
        raise ValueError(
            f"seqlens: sequence {at} has {lengths[at]} tokens, but cu_seqlens gives it {padded[at]} rows; "
            "pass padded boundaries as cu_seqlens (gdn_cp.comm.layout.pad_cu_seqlens makes them)"
        )
    return lengths


def check_divisible(lengths: np.ndarray, divisor: int, rule: str, name: str = "cu_seqlens") -> None:
    """Refuse lengths that `divisor` does not divide; `rule` is its formula, such as "2*cp_size"."""
    odd = np.flatnonzero(lengths % divisor)
    if odd.size:
        at = int(odd[0])
        raise ValueError(
            f"{name}: sequence {at} has length {lengths[at]}, not divisible by {rule} = {divisor}; "
            "pad it with gdn_cp.comm.layout.pad_cu_seqlens"
        )
