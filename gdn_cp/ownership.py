"""Whether memory may be written over: only where nothing else, in Python or in torch, can ever read it.

A backward is done with some of its inputs long before it ends, but does not decide how long they live. Whether others
hold them (the graph, kept for another backward; a user; hooks) is counted, and compared with the count of a new tensor
that nobody else holds, made and counted the same way: what a count includes differs between versions of torch.
"""

from __future__ import annotations

import sys
from functools import lru_cache

import torch
from torch import Tensor


def all_of_a_storage(*aliases: Tensor) -> bool:
    """Whether these tensors, made by the caller and seen by nobody else, are all that holds their common storage.

    To ask about a tensor that was handed out, make an alias (`x.detach()`), drop x, and ask about the alias: x goes
    unless somebody else holds it, and a view of it, an array or a saved copy holds the storage as well.

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
    if any(x.untyped_storage()._cdata != first._cdata for x in aliases[1:]):
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
