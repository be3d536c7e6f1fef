"""Which `a2a_size` a call takes: the one asked for, or the planner's for the batch, made once per layout.

The answer depends on the layout, the heads and the request alone, which are equal on every rank of a context-parallel
group, so the ranks agree without a word. Different groups (data-parallel replicas) may take different sizes.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Literal
from weakref import WeakKeyDictionary

import torch.distributed as dist

from gdn_cp.comm.cuts import Cut
from gdn_cp.comm.groups import check_a2a_size, cp_groups
from gdn_cp.comm.layout import ThdLayout
from gdn_cp.comm.peer_vote import read_request
from gdn_cp.comm.planner import HeadDims, plan

A2aSize = int | Literal["auto", "largest"] | None
"""A divisor of cp_size; "largest" that the heads allow; "auto" for the planner's choice; None for all ranks."""

_KINDS = {Cut.ZIGZAG: "zigzag", Cut.FLAT: "contiguous", Cut.EACH: "batched"}
# Goes with its layout. Key: the heads and the element size, which layers of one model may differ in.
_chosen: WeakKeyDictionary[ThdLayout, dict[tuple[int, ...], int]] = WeakKeyDictionary()


def choose_a2a_size(a2a_size: A2aSize, layout: ThdLayout | None, dims: HeadDims, *, element_size: int = 2) -> int:
    """Return the a2a_size that a layer with `dims` takes for a batch.

    Args:
        a2a_size: an int is returned as it is, None becomes the layout's cp_size, "largest" the largest size that
            divides the heads (all ranks, where it can be), "auto" the fastest one, as `gdn_cp.comm.planner.plan`
            predicts; kept for the layout's life.
        layout: of the batch; None: one rank.
        dims: the heads of one tensor-parallel rank.
        element_size: bytes of an activation.

    Raises ValueError for another word, and for an int that does not divide cp_size.

    >>> from gdn_cp import GdnDims
    >>> layout = ThdLayout.zigzag([0, 4096], 4)
    >>> choose_a2a_size("auto", layout, GdnDims(3, 6, 128, 128))  # 3 heads divide by 1 alone
    1
    >>> choose_a2a_size("largest", layout, GdnDims(6, 12, 128, 128))
    2
    >>> choose_a2a_size(None, layout, GdnDims(4, 8, 128, 128))
    4
    """
    size = 1 if layout is None else layout.cp_size
    check_request(a2a_size, size)
    if a2a_size is None:
        return size
    if not isinstance(a2a_size, str):
        return int(a2a_size)
    if layout is None or size == 1:
        return 1
    if a2a_size == "largest":
        return possible_a2a_sizes(size, dims.num_k_heads, dims.num_v_heads)[-1]
    key = (dims.num_k_heads, dims.num_v_heads, dims.head_k_dim, dims.head_v_dim, dims.conv_kernel, element_size)
    made = _chosen.setdefault(layout, {})
    if key not in made:
        kind = _KINDS[layout._cut]
        peers = layout.device.type == "cuda" and read_request() != "nccl"
        made[key] = plan(layout.cu_seqlens, size, dims, kind=kind, element_size=element_size, peers=peers).a2a_size
    return made[key]


def possible_a2a_sizes(cp_size: int, num_k_heads: int, num_v_heads: int) -> list[int]:
    """The divisors of cp_size that divide the heads of a tensor-parallel rank; 1 is always among them."""
    return [a for a in range(1, cp_size + 1) if cp_size % a == 0 and num_k_heads % a == 0 and num_v_heads % a == 0]


def prepare_cp_groups(
    group: dist.ProcessGroup, dims: HeadDims, a2a_size: A2aSize = "auto", *, timeout: timedelta | None = None
) -> None:
    """Make the process groups that layers with `dims` may need on `group`; a collective call.

    A layer makes missing groups in its first forward. Where that could fall into other ranks' communication, or into
    the capture of a CUDA graph, let all ranks of `group` call this once at the start. `timeout` as in `cp_groups`.
    """
    size = group.size()
    check_request(a2a_size, size)
    if a2a_size is None:
        return
    possible_sizes = possible_a2a_sizes(size, dims.num_k_heads, dims.num_v_heads)
    choices = {"auto": possible_sizes, "largest": possible_sizes[-1:]}
    for possible in choices[a2a_size] if isinstance(a2a_size, str) else [a2a_size]:
        cp_groups(group, possible, timeout)


def check_request(a2a_size: A2aSize, cp_size: int) -> None:
    """Raise ValueError unless `a2a_size` is None, "auto", "largest" or a divisor of cp_size."""
    if isinstance(a2a_size, str):
        if a2a_size not in ("auto", "largest"):
            raise ValueError(
                f'a2a_size: got {a2a_size!r}; choose "auto", "largest", None or a divisor of cp_size = {cp_size}'
            )
    elif a2a_size is not None:
        check_a2a_size(a2a_size, cp_size)
