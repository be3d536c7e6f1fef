"""Packed batches for Megatron: PackedSeqParams that carry the shared layout, and the layout of those that do not.

Megatron hands one `PackedSeqParams` object to every layer of a forward pass. Ours carries the `ThdLayout` of the batch,
so that no layer builds anything. From a plain one the layout is built at the first layer, which reads the boundaries
from the device once, and kept on that object.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any, TypeGuard

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from gdn_cp.comm.choice import A2aSize, check_request
from gdn_cp.comm.layout import ThdLayout

_KEPT = "_gdn_cp_layout"


@dataclass
class GdnPackedSeqParams(PackedSeqParams):
    """Megatron's PackedSeqParams with the batch's layout. Build it with `packed_seq_params_from_layout`.

    `layout` is shared by all layers. `a2a_size`: ranks that trade heads for tokens in the GDN layers, or "auto" or
    "largest" (see `gdn_cp.comm.choice`); None leaves it to each layer's own `a2a_size`. `a2a_size_taken` is
    written by the GDN layers: what the last one took (for logs). `whole_batch`: of which this is what Megatron's
    attention is to see, see `gdn_cp.megatron.rotary`.
    """

    layout: ThdLayout | None = None
    a2a_size: A2aSize = None
    a2a_size_taken: int | None = None
    whole_batch: PackedSeqParams | None = None


def packed_seq_params_from_layout(
    layout: ThdLayout, group: dist.ProcessGroup | None = None, a2a_size: A2aSize = None
) -> GdnPackedSeqParams:
    """Describe a batch to a Megatron model by its layout.

    Args:
        layout: of this batch, on the device of the model. Its padded boundaries become `cu_seqlens_*_padded`, the
            boundaries of the real tokens alone `cu_seqlens_*`, the longest padded length `max_seqlen_*`.
        group: the context-parallel group of this batch; None: the model's own.
        a2a_size: ranks that trade heads for tokens in the GDN layers of this batch, a divisor of the group's size, or
            "auto" or "largest" (see `gdn_cp.comm.choice`). None: as each layer says (see `get_gdn_layer_spec`).

    Raises:
        ValueError: for a group of another size than the layout's, and an a2a_size that does not divide it.
        TypeError: for arguments of other types.
    """
    if not isinstance(layout, ThdLayout):
        raise TypeError(f"layout must be a gdn_cp.ThdLayout, got {type(layout).__name__}")
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group must be a torch.distributed process group or None, got {type(group).__name__}")
    if group is not None and group.size() != layout.cp_size:
        raise ValueError(
            f"layout.cp_size={layout.cp_size} but group has {group.size()} rank(s): build the layout for this group"
        )
    check_request(a2a_size, layout.cp_size)
    padded = layout.cu_seqlens_tensor()
    real = padded
    if layout.local_padding(0) is not None:
        real = torch.tensor([0, *accumulate(layout.seqlens)], dtype=torch.int32)
        if padded.device.type == "cuda":
            real = real.pin_memory()  # a copy from pageable memory would synchronise
        real = real.to(padded.device, non_blocking=True)
    longest = max((b - a for a, b in pairwise(layout.cu_seqlens)), default=0)
    params = GdnPackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=real,
        cu_seqlens_kv=real,
        cu_seqlens_q_padded=padded,
        cu_seqlens_kv_padded=padded,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        layout=layout,
        a2a_size=a2a_size,
    )
    if group is not None:
        params.cp_group = group
    return params


def is_packed(packed_seq_params: PackedSeqParams | None) -> TypeGuard[PackedSeqParams]:
    """Tell whether the batch is packed rows (THD) rather than equal sequences (SBHD).

    Raises ValueError for a PackedSeqParams of another format than "thd", TypeError for another object.
    """
    if packed_seq_params is None:
        return False
    if not isinstance(packed_seq_params, PackedSeqParams):
        raise TypeError(f"packed_seq_params must be Megatron's PackedSeqParams, got {type(packed_seq_params).__name__}")
    if packed_seq_params.qkv_format != "thd":
        raise ValueError(f'packed_seq_params.qkv_format={packed_seq_params.qkv_format!r}: only "thd" is supported')
    return True


def cp_group_of(packed_seq_params: PackedSeqParams | None, default: dist.ProcessGroup) -> dist.ProcessGroup | None:
    """The context-parallel group of this batch, None for a single rank: the batch's own if it names one."""
    own = getattr(packed_seq_params, "cp_group", None)
    group = default if own is None else own
    return None if group.size() == 1 else group


def layout_of_packed(packed_seq_params: PackedSeqParams, rows: int, cp_size: int, device: torch.device) -> ThdLayout:
    """The layout of a packed batch of which each rank holds `rows` rows.

    A plain PackedSeqParams means Megatron's layout: per-sequence zigzag over the padded boundaries, real lengths from
    `cu_seqlens_q` where both are given. Built once and kept on the object.

    Raises:
        ValueError: where boundaries are missing, or do not fit the rows or the group.
    """
    layout: ThdLayout | None = getattr(packed_seq_params, "layout", None)
    if layout is None:
        layout = getattr(packed_seq_params, _KEPT, None)
        if layout is None or layout.cp_size != cp_size:
            layout = _build_layout(packed_seq_params, rows * cp_size, cp_size, device)
            setattr(packed_seq_params, _KEPT, layout)
    if layout.cp_size != cp_size or layout.t_local != rows:
        raise ValueError(
            f"packed_seq_params describes {layout.t_local} rows on each of {layout.cp_size} rank(s), but the layer got "
            f"{rows} rows and a group of {cp_size}: build it from this batch's layout"
        )
    return layout


def _build_layout(params: PackedSeqParams, total: int, cp_size: int, device: torch.device) -> ThdLayout:
    padded, real = params.cu_seqlens_q_padded, params.cu_seqlens_q
    boundaries = real if padded is None else padded
    if boundaries is None:
        raise ValueError(
            "packed_seq_params has neither cu_seqlens_q_padded nor cu_seqlens_q: without sequence boundaries documents "
            "would leak into each other; use gdn_cp.megatron.packed_seq_params_from_layout"
        )
    bounds = _host_values(boundaries)
    if bounds and bounds[-1] != total:
        raise ValueError(
            f"packed_seq_params ends at token {bounds[-1]}, but the layers hold {total} rows over {cp_size} rank(s): "
            "give cu_seqlens_q_padded with every row, padding included"
        )
    seqlens = None
    if padded is not None and real is not None and real is not padded:
        starts = _host_values(real)
        seqlens = [b - a for a, b in pairwise(starts)]
    return ThdLayout.zigzag(bounds, cp_size, seqlens=seqlens, device=device)


def _host_values(boundaries: Any) -> list[int]:
    return boundaries.tolist() if isinstance(boundaries, Tensor) else [int(bound) for bound in boundaries]


@lru_cache(maxsize=16)
def layout_of_batch(batch: int, seqlen: int, cp_size: int, device: torch.device) -> ThdLayout:
    """The layout of Megatron's unpacked batches: equal sequences, each cut by zigzag; any length on one rank."""
    return ThdLayout.batched(batch, seqlen, cp_size, kind="zigzag", device=device)
