"""Whether memory may be used again: only where nothing else, in Python or in torch, can ever read it.

A backward is done with some of its inputs long before it ends, but does not decide how long they live. Whether others
hold them (the graph, kept for another backward; a user; hooks) is counted, and compared with the count of a new tensor
that nobody else holds, made and counted the same way: what a count includes differs between versions of torch. Torch
itself decides so whether a leaf may have a gradient's memory as it is.
"""

from __future__ import annotations

import sys
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def all_of_a_storage(*aliases: Tensor) -> bool:
    """Whether these tensors, made by the caller and seen by nobody else, are all that holds their common storage.

    To ask about a tensor that was handed out, make an alias (`x.detach()`), drop x, and ask about the alias: x goes
    unless somebody else holds it, and a view of it, an array or a saved copy holds the storage as well. Memory that
    torch did not allocate (of an array, by dlpack, of a replayed CUDA graph) is never all of anybody's.

    >>> x = torch.zeros(4, 2)
    >>> held = [x]
    >>> x = x.detach()
    >>> all_of_a_storage(x)
    False
    >>> held.clear()
    >>> all_of_a_storage(x), all_of_a_storage(x, x[0])
    (True, True)
    """
    first = aliases[0].untyped_storage()
    if not first.resizable() or any(x.untyped_storage()._cdata != first._cdata for x in aliases[1:]):
        return False
    alone = _of_new_tensor()
    if alone is None:
        return False
    del first
    tensors, wrappers = _count(aliases[0])
    return (tensors - len(aliases) + 1, wrappers) == alone


def _count(x: Tensor) -> tuple[int, int]:
    """How many hold the storage of x (tensors, and what torch itself counts), and how many its Python object."""
    storage = x.untyped_storage()
    return torch._C._storage_Use_Count(storage._cdata), sys.getrefcount(storage)


@lru_cache(maxsize=1)
def _of_new_tensor() -> tuple[int, int] | None:
    """`_count` of a tensor that nobody else holds; None where torch does not tell."""
    return _count(torch.empty(1)) if hasattr(torch._C, "_storage_Use_Count") else None


def is_last_use(gradients: tuple[Tensor, ...]) -> bool:
    """Whether autograd drops the first of `gradients` when the backward returns that was called with them, and nobody
    else holds it or its memory: then its storage may be emptied before.

    Only for a `once_differentiable` backward(ctx, *gradients), which gives what it was given: the references that its
    callers have count too. Call `counts_of_last_use` before the first such backward.

    A gradient that a user gave, that goes to other functions too, that a hook or a leaf took, is held by them. Under a
    dispatch mode, which may keep anything, and for memory that torch did not allocate, the answer is no.
    """
    gradient = gradients[0]
    if gradient.__class__ is not Tensor or not gradient.untyped_storage().resizable():
        return False
    del gradient
    return _count_gradient(gradients) in counts_of_last_use()


def counts_of_last_use() -> frozenset[tuple[int, ...]]:
    """`_count_gradient` of a gradient that another function has just computed, and of a view of one; empty where torch
    does not tell. The first call runs a backward of its own, on the CPU."""
    return frozenset() if torch._C._len_torch_dispatch_stack() else _of_new_gradients()


@lru_cache(maxsize=1)
def _of_new_gradients() -> frozenset[tuple[int, ...]]:
    found: list[tuple[int, ...]] = []
    if _of_new_tensor() is not None and hasattr(Tensor, "_use_count"):
        with torch.enable_grad():
            x = torch.ones(1, device="cpu", requires_grad=True)
            (_Counted.apply(x, found) * 2).backward()
            (_Counted.apply(x, found).unsqueeze(0) * 2).backward()
    return frozenset(found)


class _Counted(torch.autograd.Function):
    """A copy, whose gradient is counted."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, found: list[tuple[int, ...]]) -> Tensor:
        ctx.found = found
        return x.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        ctx.found.append(_count_gradient(gradients))
        return gradients[0].clone(), None


def _count_gradient(gradients: tuple[Tensor, ...]) -> tuple[int, ...]:
    """How many hold a gradient: its object in Python, its tensor in torch and its storage; if a view, its base too."""
    gradient: Any = gradients[0]
    base = gradient._base
    of_base = () if base is None else (sys.getrefcount(base), base._use_count())
    return sys.getrefcount(gradient), gradient._use_count(), *_count(gradient), *of_base
