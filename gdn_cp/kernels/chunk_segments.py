"""The Triton delta rule over segments that other ranks continue: what it computes before and after states travel.

    forward     prepare -> walk for (S_ext | M) -> [states travel] -> walk for o
    backward    products -> walk for dS_ext -> [gradients of states travel] -> the rule's backward

The forward prepares its chunks once for both walks, and keeps for the backward what the whole rule's forward keeps. The
walk for summaries leaves out what no rank asks for: the M of a chain's first segment, everything of its last. Where the
card would be idle, segments are cut into pieces; then pieces are summarised, and the segment's law is composed of
theirs (`chunk_pieces`), as are the pieces' states from the one that arrives: no token is walked a third time.

Dimensions: T tokens, n segments, H query/key heads, HV value heads, K, V head dims, NP pieces (bound).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gdn_cp.kernels.bwd_slices import slice_chunks
from gdn_cp.kernels.chunk_bwd import (
    chunk_gated_delta_rule_bwd,
    prepare_first_slice,
    segment_gradients,
    start_backward,
)
from gdn_cp.kernels.chunk_fwd import Walk
from gdn_cp.kernels.chunk_pieces import piece_states, whole_laws
from gdn_cp.kernels.chunk_prepare import Prepared, prepare
from gdn_cp.kernels.configs import on_device
from gdn_cp.kernels.piece_plan import chain_plan
from gdn_cp.kernels.tables import chunk_tables, even_rows

if TYPE_CHECKING:
    from gdn_cp.kernels.segments import LawRoom, RuleOptions, TokenInputs

Kept = tuple[Tensor | None, ...]


def _rows(x: Tensor | None) -> Tensor | None:
    return None if x is None else even_rows(x)


class TritonSegments:
    """`gdn_cp.kernels.segments.SegmentRule` by these kernels; arguments are checked there."""

    def __init__(
        self, inputs: TokenInputs, options: RuleOptions, cu_seqlens: Tensor, roles: Tensor, scale: float,
        intra_card: int | None,
    ) -> None:  # fmt: skip
        self.q, self.k, self.v = even_rows(inputs.q), even_rows(inputs.k), even_rows(inputs.v)
        self.roles = roles
        (_, T, HV, V), K = self.v.shape, self.q.shape[3]
        device = self.q.device
        plan = chain_plan(device, self.q.dtype, len(roles), T, HV, K, V, intra_card=intra_card, summarised=True)
        self.piece_chunks = plan.backward_cut
        self.tables = chunk_tables(1, T, cu_seqlens, device, plan.cut)
        self.prepared = prepare(
            self.q,
            self.k,
            _rows(inputs.g),
            _rows(inputs.beta),
            self.tables,
            scale=scale,
            num_v_heads=HV,
            A_log=inputs.A_log,
            dt_bias=inputs.dt_bias,
            use_qk_l2norm_in_kernel=options.use_qk_l2norm_in_kernel,
            use_gate_in_kernel=options.use_gate_in_kernel,
            use_beta_sigmoid_in_kernel=options.use_beta_sigmoid_in_kernel,
        )
        self.walk = Walk(self.q, self.k, self.v, self.prepared, self.tables, scale, False, plan.launch)
        self.sums: Tensor | None = None
        self.starts: Tensor | None = None
        self.checkpoints: Tensor | None = None

    def summarise(self, truncate: float | None, slots: int = 0, room: LawRoom | None = None) -> Tensor:
        """The laws (S_ext | M) [max(n, slots), HV, K, V + K] of all segments, written where `roles` ask for it; in
        `room`, if there is one, with the flags that it has room for."""
        laws, lost = room or (None, None)
        with on_device(self.q.device):
            if not self.walk.cut:
                return self.walk.summarise(roles=self.roles, truncate=truncate, rows=slots, out=laws, lost=lost)
            of_pieces = None
            if lost is not None:
                of_pieces = torch.empty(self.tables.num_pieces, lost.shape[1], dtype=lost.dtype, device=lost.device)
            self.sums = self.walk.summarise(roles=self.roles, truncate=truncate, lost=of_pieces)
            flags = None if lost is None or of_pieces is None else (of_pieces, lost)
            return whole_laws(self.sums, self.tables.pieces, self.roles, self.v.shape[3], slots, laws, flags)

    def run(self, entering: Tensor) -> Tensor:
        """o [1, T, HV, V], given the states [n, HV, K, V] that enter the segments."""
        (HV, V), K, chunks = self.v.shape[2:], self.q.shape[3], self.tables.num_chunks
        length = slice_chunks(chunks, HV, K, V, self.q.element_size(), True)
        if length:
            shape = (-(-chunks // length), HV, K, V)
            self.checkpoints = torch.empty(shape, dtype=torch.float32, device=self.q.device)
        with on_device(self.q.device):
            if self.walk.cut:
                assert self.sums is not None
                self.starts = piece_states(self.sums, self.tables.pieces, V, entering, self.roles)
            return self.walk.run(entering, self.starts, checkpoints=self.checkpoints, slice_chunks=length)

    def kept(self) -> Kept:
        """What the backward needs besides the inputs and the entering states; after `run`."""
        p = self.prepared
        pieces = (self.starts, self.sums) if self.walk.cut and self.piece_chunks else (None, None)
        return p.G, p.bt, p.rq, p.rk, p.Ag, self.checkpoints, *pieces


class TritonSegmentsBackward:
    """`gdn_cp.kernels.segments.SegmentBackward` by these kernels."""

    def __init__(
        self, inputs: TokenInputs, options: RuleOptions, cu_seqlens: Tensor, roles: Tensor, scale: float,
        piece_chunks: int, kept: Kept, entering: Tensor, d_output: Tensor, needed: tuple[bool, ...],
        truncate: float | None,
    ) -> None:  # fmt: skip
        self.inputs, self.options, self.cu_seqlens, self.roles, self.scale = inputs, options, cu_seqlens, roles, scale
        self.entering, self.needed, self.piece_chunks, self.truncate = entering, needed, piece_chunks, truncate
        G, bt, rq, rk, Ag, self.checkpoints, self.starts, self.sums = kept
        assert G is not None
        assert bt is not None
        assert Ag is not None
        self.prepared = Prepared(G, bt, rq, rk, Ag)
        self.q, self.k, self.v = even_rows(inputs.q), even_rows(inputs.k), even_rows(inputs.v)
        self.do = even_rows(d_output)
        self.slices = start_backward(
            self.do, self.q, self.k, self.v, self.prepared, cu_seqlens, scale=scale,
            checkpoints=self.checkpoints, piece_chunks=piece_chunks,
        )  # fmt: skip

    def state_gradient(self, slots: int = 0, out: Tensor | None = None) -> Tensor:
        """dS_ext [max(n, slots), HV, K, V]: the gradient before each segment that a state enters, if that behind it is
        zero; in `out`, if it is given."""
        return segment_gradients(self.do, self.slices, self.roles, self.sums, slots, self.truncate, out)

    def prepare(self) -> None:
        """Launch what `finish` begins with, which needs no gradient of a state."""
        prepare_first_slice(self.do, self.slices)

    def finish(self, d_leaving: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of the fields of the inputs, None where not needed, given those of the states that leave."""
        x, options = self.inputs, self.options
        pieces = None
        if self.starts is not None:
            assert self.sums is not None
            pieces = self.starts, self.sums
        found = chunk_gated_delta_rule_bwd(
            self.do,
            d_leaving,
            self.q,
            self.k,
            self.v,
            _rows(x.g),
            _rows(x.beta),
            self.prepared,
            self.cu_seqlens,
            scale=self.scale,
            initial_state=self.entering,
            A_log=x.A_log,
            dt_bias=x.dt_bias,
            use_qk_l2norm_in_kernel=options.use_qk_l2norm_in_kernel,
            use_gate_in_kernel=options.use_gate_in_kernel,
            use_beta_sigmoid_in_kernel=options.use_beta_sigmoid_in_kernel,
            state_v_first=False,
            need_dh0=False,
            checkpoints=self.checkpoints,
            piece_states=pieces,
            piece_chunks=self.piece_chunks,
            slices=self.slices,
            refine_given=False,  # where other ranks continue a sequence, it is no short one
        )
        gradients = (found.dq, found.dk, found.dv, found.dg, found.dbeta, found.dA_log, found.ddt_bias)
        return tuple(
            dx.to(x.dtype).view(x.shape) if needed and x is not None and dx is not None else None
            for x, dx, needed in zip(self.inputs.tensors(), gradients, self.needed, strict=True)
        )
