"""What the fused mixer does between its exchanges: the convolution and the delta rule of one share of the heads.

Where no states pass between ranks, that is a function of tensors alone, and so its launches are recorded
(`gdn_cp.launch_recording`): `run_share` and `differentiate_share`.

Dimensions: T rows of the batch, D channels of a share, H, HV its query/key and value heads, K, V their dims.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gdn_cp.kernels.chunk_triton import rule_backward, rule_forward
from gdn_cp.kernels.conv1d_triton import Channels, GateColumns, convolve_rows
from gdn_cp.kernels.sums_triton import LaterSums
from gdn_cp.launch_recording import Tensors, replayable

if TYPE_CHECKING:
    from gdn_cp.gated_delta_net import GdnDims

RULE = {"use_qk_l2norm_in_kernel": True, "use_gate_in_kernel": True, "use_beta_sigmoid_in_kernel": True}
"""How the mixer calls the delta rule."""


@dataclass(frozen=True)
class Share:
    """The heads that one of `shares` ranks has of all: `heads`, the share-th part."""

    heads: GdnDims
    shares: int
    share: int

    @cached_property
    def channels(self) -> Channels:
        """Of the convolution."""
        qk, _, v, *_ = self.heads.sections
        return Channels(qk, v, self.shares, self.share)

    def gates(self, column: int) -> GateColumns:
        """Beta and alpha, beta beginning at a column."""
        return GateColumns(column, 2 * self.heads.num_v_heads)

    def convolve(
        self, x: Tensor, rows: Tensor | None, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor | None,
        num_rows: int, **options: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
        """The convolution of the share's rows, with the layer's parameters: see `convolve_rows`."""
        return convolve_rows(
            x, weight.flatten(1), bias, cu_seqlens, self.channels, num_rows, rows=rows, **options
        )  # fmt: skip

    def by_heads(self, qkv: Tensor, gates: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """q, k, v, alpha and beta as the rule takes them, views."""
        heads, (qk, _, *_) = self.heads, self.heads.sections
        begin, first = qkv.storage_offset(), gates.storage_offset()
        (rows, _), (row, _), gate_row = qkv.shape, qkv.stride(), gates.stride(0)

        # One call for each where splitting, unflattening and unsqueezing are three: host time that the GPU waits for.
        def section(column: int, count: int, dim: int) -> Tensor:
            return qkv.as_strided((1, rows, count, dim), (rows * row, row, dim, 1), begin + column)

        def gate(column: int) -> Tensor:
            shape, strides = (1, rows, heads.num_v_heads), (rows * gate_row, gate_row, 1)
            return gates.as_strided(shape, strides, first + column)

        q, k = (section(column, heads.num_k_heads, heads.head_k_dim) for column in (0, qk))
        v = section(2 * qk, heads.num_v_heads, heads.head_v_dim)
        return q, k, v, gate(heads.num_v_heads), gate(0)

    def own_heads(self, parameter: Tensor) -> Tensor:
        """The share's part of a parameter [HV of all], a view."""
        return parameter.narrow(0, self.share * self.heads.num_v_heads, self.heads.num_v_heads)


def run_share(
    own: Share, x: Tensor, rows: Tensor | None, weight: Tensor, bias: Tensor | None, A_log: Tensor, dt_bias: Tensor,
    cu_seqlens: Tensor | None, *, num_rows: int, gate_column: int, keep: bool, intra_card: int | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensors]:  # fmt: skip
    """(o [1, T, HV, V], the gates' columns, with `keep` a copy of x, what the rule's backward needs)."""
    tensors = (x, rows, weight, bias, A_log, dt_bias, cu_seqlens)
    o, gates, kept, *of_rule = replayable(_forward, tensors, (own, num_rows, gate_column, keep, intra_card))
    assert o is not None
    assert gates is not None
    return o, gates, kept, tuple(of_rule)


def _forward(
    x: Tensor, rows: Tensor | None, weight: Tensor, bias: Tensor | None, A_log: Tensor, dt_bias: Tensor,
    cu_seqlens: Tensor | None, own: Share, num_rows: int, gate_column: int, keep: bool, intra_card: int | None,
) -> Tensors:  # fmt: skip
    qkv, gates, kept = own.convolve(
        x, rows, weight, bias, cu_seqlens, num_rows, gates=own.gates(gate_column), keep=keep
    )
    assert gates is not None
    q, k, v, alpha, beta = own.by_heads(qkv, gates)
    o, _, of_rule = rule_forward(
        q, k, v, alpha, beta, scale=own.heads.head_k_dim**-0.5, initial_state=None, output_final_state=False,
        A_log=own.own_heads(A_log), dt_bias=own.own_heads(dt_bias), cu_seqlens=cu_seqlens, state_v_first=False,
        intra_card=intra_card, lean=True, **RULE,
    )  # fmt: skip
    return o, gates, kept, *of_rule


def differentiate_share(
    own: Share, x: Tensor, rows: Tensor | None, gates: Tensor, d_o: Tensor, scratch: Tensor | None, weight: Tensor,
    bias: Tensor | None, A_log: Tensor, dt_bias: Tensor, cu_seqlens: Tensor | None, of_rule: Tensors, *,
    piece_chunks: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor]:  # fmt: skip
    """Gradients of q, k, v, alpha and beta; partial sums of those of A_log and dt_bias (None: there are none), and
    [2, HV of all], where their sum is to go.

    q, k and v are computed anew, in `scratch` [T, D] if it is given.
    """
    tensors = (x, rows, gates, d_o, scratch, weight, bias, A_log, dt_bias, cu_seqlens, *of_rule)
    found: Any = replayable(_backward, tensors, (own, piece_chunks))
    return found


def _backward(
    x: Tensor, rows: Tensor | None, gates: Tensor, d_o: Tensor, scratch: Tensor | None, weight: Tensor,
    bias: Tensor | None, A_log: Tensor, dt_bias: Tensor, cu_seqlens: Tensor | None, *rest: Any,
) -> Tensors:  # fmt: skip
    *of_rule, own, piece_chunks = rest
    qkv, _, _ = own.convolve(x, rows, weight, bias, cu_seqlens, len(gates), y=scratch)
    q, k, v, alpha, beta = own.by_heads(qkv, gates)
    del qkv
    later = LaterSums()
    found = rule_backward(
        d_o.view(v.shape), None, q, k, v, alpha, beta, *of_rule, scale=own.heads.head_k_dim**-0.5,
        initial_state=None, A_log=own.own_heads(A_log), dt_bias=own.own_heads(dt_bias), cu_seqlens=cu_seqlens,
        state_v_first=False, need_dh0=False, piece_chunks=piece_chunks, overwrite_q=scratch is None,
        shares=own.shares, share=own.share, later=later, **RULE,
    )  # fmt: skip
    if later.columns:
        partial, total = later.columns[0].partial, later.columns[0].total
    else:
        partial, total = None, torch.stack((found.dA_log, found.ddt_bias))  # type: ignore[arg-type]
    return found.dq, found.dk, found.dv, found.dg, found.dbeta, partial, total
