"""The exchange between context-parallel and head-parallel order: one all-to-all for all tensors and sections.

In cp order a rank holds its own rows and all columns; in hp order it holds all rows, in natural order, and its share of
the columns of every section. The two functions are each other's inverse, in forward and in backward: the gradient of
the one is the other applied to the gradients, so nothing is ever scattered and added.

Example, P = 2, zigzag, one sequence of 4 rows, columns a b; what each rank holds:

    cp   rank 0: 0a 0b | 3a 3b     rank 1: 1a 1b | 2a 2b
    hp   rank 0: 0a 1a 2a 3a       rank 1: 0b 1b 2b 3b

With `a2a_size` = a < cp_size the exchange is that of a group of a neighbours: all rows then means all that the group
holds, in the order of its segments (`ThdLayout.segments`), and states have to pass between the groups.

Dimensions: P = cp_size ranks, a = a2a_size of them exchange, T tokens of the batch (padded rows included), t = T/P
local rows, D columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, overload

import torch
import torch.distributed as dist
from torch import Tensor

from gdn_cp.comm import packing
from gdn_cp.comm.groups import check_a2a_size, cp_groups
from gdn_cp.comm.layout import SegmentTable, ThdLayout

Section = int | Sequence[int]
"""A section's width over all ranks, or several widths that remain one tensor, divided width by width."""

# What both gloo and NCCL carry.
_DTYPES = (
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.int8,
    torch.uint8,
    torch.int32,
    torch.int64,
)


@overload
def cp_to_hp(
    x: Tensor,
    layout: ThdLayout,
    group: dist.ProcessGroup | None,
    *,
    sections: None = None,
    a2a_size: int | None = None,
) -> Tensor: ...
@overload
def cp_to_hp(
    x: Tensor,
    layout: ThdLayout,
    group: dist.ProcessGroup | None,
    *,
    sections: Sequence[Section],
    a2a_size: int | None = None,
) -> tuple[Tensor, ...]: ...
@overload
def cp_to_hp(
    x: Sequence[Tensor],
    layout: ThdLayout,
    group: dist.ProcessGroup | None,
    *,
    sections: Sequence[Section] | None = None,
    a2a_size: int | None = None,
) -> tuple[Tensor, ...]: ...
def cp_to_hp(
    x: Tensor | Sequence[Tensor],
    layout: ThdLayout,
    group: dist.ProcessGroup | None,
    *,
    sections: Sequence[Section] | None = None,
    a2a_size: int | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Trade "all columns of my rows" for "my columns of all rows".

    Args:
        x: one tensor [t, D] or [t, heads, dim], or a sequence of such tensors of one dtype. Rows are this rank's, in
            `layout.local_rows` order; any strides.
        layout: the batch's layout, the same on every rank, on x's device.
        group: the ranks that hold the batch, `layout.cp_size` of them; None for one rank.
        sections: for one tensor, its sections' widths, summing to D: every section is divided over the ranks by itself
            and the result is a tuple with one tensor each. An entry that is a tuple of widths gives one tensor with
            several sections side by side, as q|k|v stay together for a convolution. For a sequence of tensors, one
            such entry for each. Widths count heads for a tensor [t, heads, dim]. Without, a tensor is one section.
        a2a_size: ranks per all-to-all, a divisor of `layout.cp_size`; None for all. Ranks [g*a, (g+1)*a) exchange.
            With 1 < a < cp_size the first call makes process groups, see `gdn_cp.comm.groups.cp_groups`.

    Returns [a*t, D/a] or [a*t, heads/a, dim]: columns i*D_j/a to (i+1)*D_j/a of every section j for rank r, i = r % a;
    rows in the order of `layout.segments(a, r // a)`, which with a = cp_size is the natural order. A tuple if x is a
    sequence or has sections. With a = 1 nothing is copied: the results are x or views of it.

    Raises ValueError (TypeError for wrong types) before any communication for a column count that a does not divide, a
    wrong row count, dtype, device, group or a2a_size.

    Differentiable: one all-to-all forward, one (of the gradients) backward, on every rank of the group.
    """
    return _convert(_CP_TO_HP, x, layout, group, sections, a2a_size)


@overload
def hp_to_cp(
    x: Tensor,
    layout: ThdLayout,
    group: dist.ProcessGroup | None,
    *,
    sections: None = None,
    a2a_size: int | None = None,
) -> Tensor: ...
@overload
def hp_to_cp(
    x: Tensor,
    layout: ThdLayout,
    group: dist.ProcessGroup | None,
    *,
    sections: Sequence[Section],
    a2a_size: int | None = None,
) -> tuple[Tensor, ...]: ...
@overload
def hp_to_cp(
    x: Sequence[Tensor],
    layout: ThdLayout,
    group: dist.ProcessGroup | None,
    *,
    sections: Sequence[Section] | None = None,
    a2a_size: int | None = None,
) -> tuple[Tensor, ...]: ...
def hp_to_cp(
    x: Tensor | Sequence[Tensor],
    layout: ThdLayout,
    group: dist.ProcessGroup | None,
    *,
    sections: Sequence[Section] | None = None,
    a2a_size: int | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Trade "my columns of all rows" for "all columns of my rows": the inverse of `cp_to_hp`.

    Arguments, errors and gradients as there, except that x is [a*t, D/a] or [a*t, heads/a, dim], rows as it gives them.
    `sections` still counts widths over all ranks, so both directions take the same tuple:
    `hp_to_cp(cp_to_hp(x, layout, group, sections=s), layout, group, sections=s)` gives `x.split(s, 1)`.

    Returns [t, D] or [t, heads, dim], rows in `layout.local_rows` order.
    """
    return _convert(_HP_TO_CP, x, layout, group, sections, a2a_size)


_CP_TO_HP, _HP_TO_CP = "cp_to_hp", "hp_to_cp"


@dataclass(frozen=True, eq=False)
class _Exchange:
    """What one exchange needs besides the tensors; kept for the backward instead of any activation."""

    table: SegmentTable
    group: dist.ProcessGroup
    widths: packing.Widths

    def run(self, direction: str, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Convert tensors [rows, columns]; exactly one collective."""
        ranks = self.table.a2a_size
        if direction == _CP_TO_HP:
            received = _all_to_all(packing.pack_cp(tensors, self.widths, ranks), self.group)
            return packing.unpack_hp(received, self.widths, ranks, self.table.to_natural)
        sent = packing.pack_hp(tensors, self.widths, ranks, self.table.to_rank_major)
        return packing.unpack_cp(_all_to_all(sent, self.group), self.widths, ranks)


class _Convert(torch.autograd.Function):
    """One exchange with the inverse exchange as its gradient (and so differentiable any number of times)."""

    @staticmethod
    def forward(ctx: Any, direction: str, exchange: _Exchange, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.exchange = exchange
        ctx.inverse = _HP_TO_CP if direction == _CP_TO_HP else _CP_TO_HP
        return tuple(exchange.run(direction, tensors))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return None, None, *_Convert.apply(ctx.inverse, ctx.exchange, *grads)


def _all_to_all(sent: Tensor, group: dist.ProcessGroup) -> Tensor:
    received = torch.empty_like(sent)
    assert sent.is_contiguous()
    assert received.is_contiguous()  # gloo would write past a non-contiguous output without a word
    dist.all_to_all_single(received, sent, group=group)
    return received


def _convert(
    direction: str,
    x: Tensor | Sequence[Tensor],
    layout: ThdLayout,
    group: dist.ProcessGroup | None,
    sections: Sequence[Section] | None,
    a2a_size: int | None,
) -> Any:
    ranks = _check_group(layout, group, a2a_size)
    tensors = _check_tensors(direction, x, layout, ranks)
    scale = 1 if direction == _CP_TO_HP else ranks
    widths = _check_widths([tensor.shape[1] * scale for tensor in tensors], sections, isinstance(x, Tensor), ranks)
    if isinstance(x, Tensor) and sections is not None:
        tensors = list(x.split([sum(entry) // scale for entry in widths], dim=1))
    if group is None or ranks == 1:
        results = tensors  # one rank's local order is that of its segments, whatever the layout
    else:
        flat = [tensor.flatten(1) for tensor in tensors]
        per_head = [tensor.shape[2:].numel() for tensor in tensors]
        columns = tuple(tuple(w * n for w in entry) for entry, n in zip(widths, per_head, strict=True))
        groups = cp_groups(group, ranks)
        assert groups.a2a is not None
        exchange = _Exchange(layout.segments(ranks, groups.group_index), groups.a2a, columns)
        flat = _Convert.apply(direction, exchange, *flat)
        results = [
            y.unflatten(1, (-1, *tensor.shape[2:])) if tensor.ndim > 2 else y
            for y, tensor in zip(flat, tensors, strict=True)
        ]
    return results[0] if isinstance(x, Tensor) and sections is None else tuple(results)


def _check_group(layout: ThdLayout, group: dist.ProcessGroup | None, a2a_size: int | None) -> int:
    """Refuse a group or a2a_size that does not fit the layout; return the resolved a2a_size."""
    if not isinstance(layout, ThdLayout):
        raise TypeError(f"layout: expected a gdn_cp.ThdLayout, got {type(layout).__name__}")
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group: expected a process group or None, got {group!r} (is this rank a member of it?)")
    ranks = layout.cp_size if a2a_size is None else check_a2a_size(a2a_size, layout.cp_size)
    size = 1 if group is None else group.size()
    if size != layout.cp_size:
        raise ValueError(
            f"group: has {size} rank(s){' (None)' if group is None else ''}, but the layout was built for "
            f"cp_size = {layout.cp_size}; pass the group that holds the batch, or build the layout for this group"
        )
    return ranks


def _check_tensors(direction: str, x: Tensor | Sequence[Tensor], layout: ThdLayout, ranks: int) -> list[Tensor]:
    if not isinstance(x, Tensor | Sequence) or isinstance(x, str | bytes):
        raise TypeError(f"x: expected a tensor or a sequence of tensors, got {x!r} of type {type(x).__name__}")
    tensors = [x] if isinstance(x, Tensor) else list(x)
    if not tensors:
        raise ValueError("x: got no tensors; pass at least one")
    if direction == _CP_TO_HP:
        rows, owner = layout.t_local, "this rank's"
    else:
        rows = ranks * layout.t_local
        owner = "the whole batch's" if ranks == layout.cp_size else f"all rows of {ranks} neighbours,"
    for index, tensor in enumerate(tensors):
        name = "x" if isinstance(x, Tensor) else f"x[{index}]"
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        if tensor.ndim < 2 or tensor.shape[0] != rows:
            raise ValueError(
                f"{name}: has shape {tuple(tensor.shape)}; {direction} takes [{rows}, columns] or [{rows}, heads, dim] "
                f"({owner} rows under {layout}); flatten batched input to rows first"
            )
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"{name}: has dtype {tensor.dtype}, which no backend carries; cast it to one of {_DTYPES}")
        if tensor.dtype != tensors[0].dtype:
            raise ValueError(
                f"{name}: has dtype {tensor.dtype}, the first tensor {tensors[0].dtype}; one exchange carries one "
                "dtype, cast them alike"
            )
        if tensor.device != layout.device:
            raise ValueError(
                f"{name}: is on {tensor.device}, the layout on {layout.device}; move the layout once with "
                f"layout.to({str(tensor.device)!r})"
            )
    return tensors


def _read_section(entry: Any) -> tuple[int, ...]:
    widths = tuple(entry) if isinstance(entry, Sequence) else (entry,)
    if not all(isinstance(width, Integral) for width in widths):
        raise TypeError(f"sections: {entry!r} is no width; every entry is an int or a tuple of ints")
    if not widths:
        raise ValueError("sections: () has no width; every entry is an int or a tuple of ints")
    return tuple(int(width) for width in widths)


def _check_widths(
    totals: list[int], sections: Sequence[Section] | None, one_tensor: bool, ranks: int
) -> packing.Widths:
    """Return each result's section widths over all ranks; `totals` are the tensors' columns over all ranks."""
    if sections is None:
        widths = tuple((total,) for total in totals)
    elif not isinstance(sections, Sequence) or isinstance(sections, str | bytes):
        raise TypeError(f"sections: expected a sequence of widths, got {sections!r} of type {type(sections).__name__}")
    else:
        widths = tuple(_read_section(entry) for entry in sections)
        sums = [sum(entry) for entry in widths]
        if one_tensor and sum(sums) != totals[0]:
            raise ValueError(
                f"sections: {tuple(sections)} sum to {sum(sums)}, but x has {totals[0]} columns over all ranks; "
                "give every section's width over all ranks"
            )
        if not one_tensor and sums != totals:
            raise ValueError(
                f"sections: {tuple(sections)} sum to {sums}, but the tensors have {totals} columns over all ranks; "
                "give one entry per tensor"
            )
    for entry in widths:
        for width in entry:
            if width < 0 or width % ranks:
                named = "x: has" if sections is None else f"sections: {tuple(sections)} has"
                raise ValueError(
                    f"{named} a section of {width} columns, not divisible by the group's {ranks} ranks; "
                    "the number of heads must be a multiple of a2a_size"
                )
    return widths
