"""Rotary embeddings of packed batches by position: for any layout, without waiting for the device.

Megatron itself cuts the table of embeddings sequence by sequence on the host, reading the boundaries from the device in
every layer, and knows the zigzag order only. Here each row takes the embedding of its position in its sequence.
"""

from __future__ import annotations

from copy import copy
from itertools import pairwise
from typing import Any

from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor

from gdn_cp.comm.layout import ThdLayout
from gdn_cp.megatron.packed import GdnPackedSeqParams, cp_group_of, is_packed, layout_of_packed

_KEPT = "_gdn_cp_rows"


class PackedSelfAttention(SelfAttention):
    """Megatron's self-attention with rotary embeddings by the layout's positions.

    Megatron's own way remains for `apply_rope_fusion` and `rotary_interleaved`; it needs the zigzag layout.
    """

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        *args: Any,
        rotary_pos_emb: Tensor | tuple[Tensor, Tensor] | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Run Megatron's attention; arguments as there, `rotary_pos_emb` and `packed_seq_params` by keyword.

        Raises:
            ValueError: for a table of embeddings shorter than the longest sequence, and for a contiguous layout where
                Megatron's own way is needed.
        """
        if rotary_pos_emb is not None and is_packed(packed_seq_params):
            group = cp_group_of(packed_seq_params, self.pg_collection.cp)
            cp_size = 1 if group is None else group.size()
            rows = hidden_states.shape[0] * (self.pg_collection.tp.size() if self.config.sequence_parallel else 1)
            layout = layout_of_packed(packed_seq_params, rows, cp_size, hidden_states.device)
            if not (self.config.apply_rope_fusion or self.config.rotary_interleaved):
                batch = _rows_of(packed_seq_params, layout, 0 if group is None else group.rank())
                rotary_pos_emb = batch.embeddings(rotary_pos_emb)
                packed_seq_params = batch.without_boundaries
            elif layout.kind != "zigzag" and cp_size > 1:
                raise ValueError(
                    f"{layout}: Megatron's rotary embedding under apply_rope_fusion or rotary_interleaved knows the "
                    "zigzag layout only"
                )
        return super().forward(
            hidden_states,
            attention_mask,
            *args,
            rotary_pos_emb=rotary_pos_emb,
            packed_seq_params=packed_seq_params,
            **kwargs,
        )


class _Rows:
    """A batch's rows as the attention layers need them; made in the first layer and kept with the batch."""

    def __init__(self, packed_seq_params: PackedSeqParams, layout: ThdLayout, rank: int) -> None:
        self.layout, self.rank = layout, rank
        self.positions = layout.local_positions(rank)
        self.longest = max((b - a for a, b in pairwise(layout.cu_seqlens)), default=0)
        whole_batch = copy(packed_seq_params)  # not the object itself, which will refer to this one
        vars(whole_batch).pop(_KEPT, None)
        # Without boundaries Megatron multiplies row by row with the embeddings that it is given.
        self.without_boundaries = GdnPackedSeqParams(
            qkv_format="thd", cp_group=packed_seq_params.cp_group, layout=layout, whole_batch=whole_batch
        )
        self._taken: list[tuple[Tensor, Tensor]] = []

    def embeddings(self, table: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The embeddings [t, 1, d] of this rank's rows from Megatron's table(s) by position, [positions, 1, 1, d]."""
        q_table, k_table = table if isinstance(table, tuple) else (table, table)
        q_rows = self._take(q_table)
        return q_rows, q_rows if k_table is q_table else self._take(k_table)

    def _take(self, table: Tensor) -> Tensor:
        for seen, rows in self._taken:
            if seen is table:
                return rows
        if table.shape[0] < self.longest:
            raise ValueError(
                f"packed_seq_params.max_seqlen_q gives {table.shape[0]} rotary positions, but the longest sequence has "
                f"{self.longest} rows: set it to the longest padded length"
            )
        rows = table.index_select(0, self.positions).squeeze(1)
        self._taken.append((table, rows))
        return rows


def _rows_of(packed_seq_params: PackedSeqParams, layout: ThdLayout, rank: int) -> _Rows:
    rows: _Rows | None = getattr(packed_seq_params, _KEPT, None)
    if rows is None or rows.layout is not layout or rows.rank != rank:
        rows = _Rows(packed_seq_params, layout, rank)
        setattr(packed_seq_params, _KEPT, rows)
    return rows
