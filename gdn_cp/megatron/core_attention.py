"""Causal attention for Megatron models on packed batches under context parallelism, without Transformer Engine.

Megatron's own core attention refuses packed input and context parallelism. Here the ranks trade tokens for heads, as
the Gated DeltaNet layers do, each runs torch's attention over whole sequences of its heads, and they trade back.

Dimensions: t local rows, T rows of the batch, n query and m key/value heads of a tensor-parallel rank, d head dim, s
local tokens and b sequences of an unpacked batch.
"""

from __future__ import annotations

import inspect
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from gdn_cp.comm.all_to_all import cp_to_hp, hp_to_cp
from gdn_cp.comm.layout import ThdLayout
from gdn_cp.megatron.packed import cp_group_of, is_packed, layout_of_batch, layout_of_packed

_PLAIN_SETTINGS = {"window_size": None, "softmax_type": "vanilla", "apply_query_key_layer_scaling": False}


class CoreAttention(MegatronModule):
    """Causal softmax attention per sequence, head-parallel over the context-parallel group.

    Takes what Megatron's Attention passes to a core attention. Key/value heads are repeated first where they are fewer
    than the ranks. Padded rows give zeros and take part in nothing. On CUDA in half precision torch's variable-length
    flash attention runs over the whole batch, elsewhere torch's attention sequence by sequence; neither waits for the
    device.

    Raises:
        ValueError: for what it does not do: dropout, windows, sinks, masks that are not causal.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config)
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        if dropout:
            raise ValueError(f"attention_dropout={dropout}: set it to 0, dropout of attention is not supported")
        if attention_type != "self" or attn_mask_type not in (AttnMaskType.causal, AttnMaskType.padding_causal):
            raise ValueError(
                f"attention_type={attention_type!r}, {attn_mask_type}: only causal self-attention is supported"
            )
        for name, plain in _PLAIN_SETTINGS.items():
            if getattr(config, name) != plain:
                raise ValueError(f"config.{name}={getattr(config, name)!r} is not supported: leave it {plain!r}")
        if pg_collection is None:
            pg_collection = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
        self.pg_collection = pg_collection
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **_: Any,
    ) -> Tensor:
        """Attend within each sequence.

        Args:
            query: [t, n, d] packed, or [s, b, n, d].
            key: [t, m, d] or [s, b, m, d], as value. In decoding, [s', b, m, d] with s' - s tokens before the queries'.
            value: see key.
            attention_mask: ignored, the mask is causal.
            attn_mask_type: ignored, too (Megatron repeats the constructor's; for a decoded token it says none).
            attention_bias: only None.
            packed_seq_params: as in `gdn_cp.megatron.GatedDeltaNet.forward`.

        Returns:
            [t, n*d] or [s, b, n*d].
        """
        if attention_bias is not None:
            raise ValueError("attention_bias was given: it is not supported")
        group = cp_group_of(packed_seq_params, self.pg_collection.cp)
        cp_size = 1 if group is None else group.size()
        qkv = [query, key, value]
        if packed_seq_params is None and len(key) != len(query):
            return self._attend_to_cache(query, key, value, cp_size)
        if is_packed(packed_seq_params):
            layout = layout_of_packed(packed_seq_params, query.shape[0], cp_size, query.device)
            unpacked = None
        else:
            unpacked = query.shape[:2]
            layout = layout_of_batch(unpacked[1], unpacked[0] * cp_size, cp_size, query.device)
            qkv = [x.transpose(0, 1).flatten(0, 1) for x in qkv]

        padding = layout.local_padding(0 if group is None else group.rank())
        if padding is not None:  # a NaN of padding times a probability of zero would be a NaN
            qkv = [x.masked_fill(padding[:, None, None], 0) for x in qkv]
        q_hp, k_hp, v_hp = cp_to_hp(_with_enough_heads(qkv, cp_size), layout, group)
        o_cp = hp_to_cp(_attend(q_hp, k_hp, v_hp, layout, self.softmax_scale), layout, group)
        if padding is not None:
            o_cp = o_cp.masked_fill(padding[:, None, None], 0)
        out = o_cp.flatten(1)
        return out if unpacked is None else out.unflatten(0, (unpacked[1], unpacked[0])).transpose(0, 1)

    def _attend_to_cache(self, query: Tensor, key: Tensor, value: Tensor, cp_size: int) -> Tensor:
        """The last tokens of each sequence attend to all up to themselves: [s, b, n, d] -> [s, b, n*d]."""
        if cp_size > 1 or len(key) < len(query):
            raise ValueError(
                f"{len(query)} query and {len(key)} key rows on {cp_size} context-parallel rank(s): a cache of keys "
                "needs context_parallel_size=1 and holds the queries' own"
            )
        allowed = torch.ones(len(query), len(key), dtype=torch.bool, device=query.device)
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        o = scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=allowed.tril(len(key) - len(query)),
            scale=self.softmax_scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return o.permute(2, 0, 1, 3).flatten(2)


def _with_enough_heads(qkv: list[Tensor], cp_size: int) -> list[Tensor]:
    """Repeat key/value heads so that every rank gets those that its query heads read."""
    q, k, v = qkv
    n, m = q.shape[1], k.shape[1]
    if n % cp_size or (m % cp_size and cp_size % m):
        raise ValueError(
            f"{n} query and {m} key/value heads of this tensor-parallel rank do not fall over {cp_size} "
            "context-parallel ranks: their number must divide the query heads, and divide or be a multiple of the "
            "key/value heads"
        )
    if m % cp_size == 0:
        return qkv
    return [q, k.repeat_interleave(cp_size // m, dim=1), v.repeat_interleave(cp_size // m, dim=1)]


def _attend(q: Tensor, k: Tensor, v: Tensor, layout: ThdLayout, scale: float | None) -> Tensor:
    """softmax(scale * q k^T) v, causal within each sequence: [T, n, d], [T, m, d], [T, m, d] -> [T, n, d]."""
    varlen = _varlen_attention()
    if varlen is not None and q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        return varlen(q, k, v, layout, scale)
    outputs, grouped = [], q.shape[1] != k.shape[1]
    for start, end in pairwise(layout.cu_seqlens):
        q_n, k_n, v_n = (x[start:end].transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        o = scaled_dot_product_attention(q_n, k_n, v_n, is_causal=True, scale=scale, enable_gqa=grouped)
        outputs.append(o.squeeze(0).transpose(0, 1))
    return torch.cat(outputs)


@lru_cache(maxsize=1)
def _varlen_attention() -> Any:
    """torch's variable-length flash attention (2.10 and later) behind our arguments; None where it is absent."""
    try:
        from torch.nn.attention.varlen import varlen_attn  # type: ignore[import-not-found]
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters
    if "scale" not in known:
        return None
    causal = {"is_causal": True} if "is_causal" in known else {"window_size": (-1, 0)}

    def attend(q: Tensor, k: Tensor, v: Tensor, layout: ThdLayout, scale: float | None) -> Tensor:
        arguments: dict[str, Any] = {"scale": scale, **causal}
        if q.shape[1] != k.shape[1]:
            if "enable_gqa" in known:
                arguments["enable_gqa"] = True
            else:
                k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        longest = max(b - a for a, b in pairwise(layout.cu_seqlens))
        cu = layout.cu_seqlens_tensor()
        out = varlen_attn(q, k, v, cu, cu, longest, longest, **arguments)
        assert isinstance(out, Tensor)  # without auxiliary outputs
        return out

    return attend
