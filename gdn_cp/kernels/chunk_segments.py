"""The Triton delta rule over segments that other ranks continue: what it computes before and after states travel.

    forward     prepare -> walk for (S_ext | M) -> [states travel] -> walk for o
    backward    products -> walk for dS_ext -> [gradients of states travel] -> the rule's backward

The forward prepares its chunks once for both walks, and keeps for the backward what the whole rule's forward keeps. The
walk for summaries leaves out what no rank asks for: the M of a chain's first segment, everything of its last. Where the
card would be idle, segments are cut into pieces; then pieces are summarised, and the segment's law is composed of
theirs (`chunk_pieces`), as are the pieces' states from the one that arrives: no token is walked a third time. What each
half launches is a function of tensors, and recorded (`gdn_cp.launch_recording`).

Dimensions: T tokens, n segments, H query/key heads, HV value heads, K, V head dims, NP pieces (bound).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from gdn_cp.kernels.bwd_slices import slice_chunks
from gdn_cp.kernels.chunk_bwd import (
    Slices,
    chunk_gated_delta_rule_bwd,
    prepare_first_slice,
    segment_gradients,
    start_backward,
)
from gdn_cp.kernels.chunk_fwd import Walk
from gdn_cp.kernels.chunk_pieces import piece_states, whole_laws
from gdn_cp.kernels.chunk_prepare import Prepared, prepare
from gdn_cp.kernels.configs import on_device
from gdn_cp.kernels.piece_plan import ChainPlan, chain_plan
from gdn_cp.kernels.sums_triton import ColumnSums, LaterSums, SharedSums
from gdn_cp.kernels.tables import ChunkTables, chunk_tables, even_rows
from gdn_cp.launch_recording import Tensors, replayable

if TYPE_CHECKING:
    from gdn_cp.kernels.segments import LawRoom, RuleOptions, TokenInputs

Kept = tuple[Tensor | None, ...]


def _rows(x: Tensor | None) -> Tensor | None:
    return None if x is None else even_rows(x)


@dataclass(frozen=True)
class _Settings:
    """What launches of the forward depend on besides tensors."""

    scale: float
    intra_card: int | None
    norm: bool
    gate: bool
    sigmoid: bool

    def plan(self, q: Tensor, v: Tensor, n: int) -> ChainPlan:
        """How n segments are walked."""
        (_, T, HV, V), K = v.shape, q.shape[3]
        return chain_plan(q.device, q.dtype, n, T, HV, K, V, intra_card=self.intra_card, summarised=True)


class _Chunks(NamedTuple):
    """The inputs of every walk: rows, what `prepare` made of them, and the segments."""

    q: Tensor
    k: Tensor
    v: Tensor
    prepared: Prepared
    cu_seqlens: Tensor
    roles: Tensor

    def walk(self, settings: _Settings) -> tuple[Walk, ChunkTables]:
        """The launches of a walk, and its tables."""
        plan = settings.plan(self.q, self.v, len(self.roles))
        tables = chunk_tables(1, self.v.shape[1], self.cu_seqlens, self.q.device, plan.cut)
        return Walk(self.q, self.k, self.v, self.prepared, tables, settings.scale, False, plan.launch), tables


def _chunks_of(tensors: tuple[Any, ...]) -> _Chunks:
    """The other way round of `TritonSegments._tensors`."""
    q, k, v, G, bt, rq, rk, Ag, X, Yt, cu_seqlens, roles = tensors
    return _Chunks(q, k, v, Prepared(G, bt, rq, rk, Ag, X, Yt), cu_seqlens, roles)


def _prepare(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None, A_log: Tensor | None,
    dt_bias: Tensor | None, cu_seqlens: Tensor, settings: _Settings,
) -> Tensors:  # fmt: skip
    plan = settings.plan(q, v, len(cu_seqlens) - 1)
    p = prepare(
        q, k, g, beta, chunk_tables(1, v.shape[1], cu_seqlens, q.device, plan.cut), scale=settings.scale,
        num_v_heads=v.shape[2], A_log=A_log, dt_bias=dt_bias, use_qk_l2norm_in_kernel=settings.norm,
        use_gate_in_kernel=settings.gate, use_beta_sigmoid_in_kernel=settings.sigmoid,
    )  # fmt: skip
    return p.G, p.bt, p.rq, p.rk, p.Ag, p.X, p.Yt


def _summarise(*arguments: Any) -> Tensors:
    """(laws of segments, of pieces if segments are cut), see `TritonSegments.summarise`."""
    *tensors, laws, lost, settings, truncate, slots = arguments
    chunks = _chunks_of(tuple(tensors))
    walk, tables = chunks.walk(settings)
    roles = chunks.roles
    if not walk.cut:
        return walk.summarise(roles=roles, truncate=truncate, rows=slots, out=laws, lost=lost), None
    of_pieces = None
    if lost is not None:
        of_pieces = torch.empty(tables.num_pieces, lost.shape[1], dtype=lost.dtype, device=lost.device)
    sums = walk.summarise(roles=roles, truncate=truncate, lost=of_pieces)
    flags = None if lost is None or of_pieces is None else (of_pieces, lost)
    return whole_laws(sums, tables.pieces, roles, chunks.v.shape[3], slots, laws, flags), sums


def _run(*arguments: Any) -> Tensors:
    """(o, states at slices of the backward, states at pieces), see `TritonSegments.run`."""
    *tensors, entering, sums, settings = arguments
    chunks = _chunks_of(tuple(tensors))
    walk, tables = chunks.walk(settings)
    (HV, V), K, count = chunks.v.shape[2:], chunks.q.shape[3], tables.num_chunks
    length = slice_chunks(count, HV, K, V, chunks.q.element_size(), True)
    checkpoints = starts = None
    if length:
        shape = (-(-count // length), HV, K, V)
        checkpoints = torch.empty(shape, dtype=torch.float32, device=chunks.q.device)
    if walk.cut:
        starts = piece_states(sums, tables.pieces, V, entering, chunks.roles)
    o = walk.run(entering, starts, checkpoints=checkpoints, slice_chunks=length)
    return o, checkpoints, starts


class TritonSegments:
    """`gdn_cp.kernels.segments.SegmentRule` by these kernels; arguments are checked there."""

    def __init__(
        self, inputs: TokenInputs, options: RuleOptions, cu_seqlens: Tensor, roles: Tensor, scale: float,
        intra_card: int | None,
    ) -> None:  # fmt: skip
        q, k, v = even_rows(inputs.q), even_rows(inputs.k), even_rows(inputs.v)
        flags = options.use_qk_l2norm_in_kernel, options.use_gate_in_kernel, options.use_beta_sigmoid_in_kernel
        self.settings = _Settings(scale, intra_card, *flags)
        self.piece_chunks = self.settings.plan(q, v, len(roles)).backward_cut
        given = (_rows(inputs.g), _rows(inputs.beta), inputs.A_log, inputs.dt_bias)
        with on_device(q.device):
            self.prepared = replayable(_prepare, (q, k, v, *given, cu_seqlens), (self.settings,))
        self._tensors = (q, k, v, *self.prepared, cu_seqlens, roles)
        self.sums: Tensor | None = None
        self.starts: Tensor | None = None
        self.checkpoints: Tensor | None = None

    def summarise(self, truncate: float | None, slots: int = 0, room: LawRoom | None = None) -> Tensor:
        """The laws (S_ext | M) [max(n, slots), HV, K, V + K] of all segments, written where `roles` ask for it; in
        `room`, if there is one, with the flags that it has room for."""
        tensors = (*self._tensors, *(room or (None, None)))
        with on_device(tensors[0].device):
            laws, self.sums = replayable(_summarise, tensors, (self.settings, truncate, slots))
        assert laws is not None
        return laws

    def run(self, entering: Tensor) -> Tensor:
        """o [1, T, HV, V], given the states [n, HV, K, V] that enter the segments."""
        with on_device(entering.device):
            found = replayable(_run, (*self._tensors, entering, self.sums), (self.settings,))
        o, self.checkpoints, self.starts = found
        assert o is not None
        return o

    def kept(self) -> Kept:
        """What the backward needs besides the inputs and the entering states; after `run`."""
        pieces = (self.starts, self.sums) if self.starts is not None and self.piece_chunks else (None, None)
        return *self.prepared[:5], self.checkpoints, *pieces


@dataclass(frozen=True)
class _BackwardSettings:
    """What launches of the backward depend on besides tensors."""

    scale: float
    piece_chunks: int
    norm: bool
    gate: bool
    sigmoid: bool


def _start(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, prepared: Kept, cu_seqlens: Tensor, checkpoints: Tensor | None,
    settings: _BackwardSettings,
) -> Slices:  # fmt: skip
    return start_backward(
        do, q, k, v, Prepared(*prepared), cu_seqlens, scale=settings.scale, checkpoints=checkpoints,  # type: ignore[arg-type]
        piece_chunks=settings.piece_chunks,
    )  # fmt: skip


def _state_gradient(*arguments: Any) -> Tensors:
    """(dS_ext, and X and Yt of all chunks if they were made), see `TritonSegmentsBackward.state_gradient`."""
    do, q, k, v, *prepared, cu_seqlens, checkpoints, roles, sums, out, settings, truncate, slots = arguments
    slices = _start(do, q, k, v, tuple(prepared), cu_seqlens, checkpoints, settings)
    found = segment_gradients(do, slices, roles, sums, slots, truncate, out)
    return found, *(slices.products or (None, None))


def _finish(*arguments: Any, slices: Slices | None = None) -> Tensors:
    """The rule's gradients, see `TritonSegmentsBackward.finish`; with a share to sum for, instead of the last two what
    is to be summed to them (or None) and where. X and Yt: those of all chunks, or None. `slices`: has those of the
    first slice."""
    do, q, k, v, *prepared, cu_seqlens, checkpoints = arguments[:11]
    g, beta, A_log, dt_bias, starts, sums, X, Yt, entering, d_leaving, settings, share = arguments[11:]
    slices = slices or _start(do, q, k, v, tuple(prepared), cu_seqlens, checkpoints, settings)
    if X is not None:
        slices.products, slices.prepared_slice = (X, Yt), (0, slices.tables.num_chunks)
    later = LaterSums()
    found = chunk_gated_delta_rule_bwd(
        do, d_leaving, q, k, v, g, beta, slices.prepared, cu_seqlens, scale=settings.scale, initial_state=entering,
        A_log=A_log, dt_bias=dt_bias, use_qk_l2norm_in_kernel=settings.norm, use_gate_in_kernel=settings.gate,
        use_beta_sigmoid_in_kernel=settings.sigmoid, state_v_first=False, need_dh0=False, checkpoints=checkpoints,
        piece_states=None if starts is None else (starts, sums), piece_chunks=settings.piece_chunks, slices=slices,
        refine_given=False,  # where other ranks continue a sequence, it is no short one
        **({} if share is None else {"shares": share[0], "share": share[1], "later": later}),
    )  # fmt: skip
    of_heads: Tensors = found.dA_log, found.ddt_bias
    if later.columns:
        of_heads = later.columns[0].partial, later.columns[0].total
    elif share is not None:
        of_heads = None, torch.stack(of_heads)  # type: ignore[arg-type]
    return found.dq, found.dk, found.dv, found.dg, found.dbeta, *of_heads


class TritonSegmentsBackward:
    """`gdn_cp.kernels.segments.SegmentBackward` by these kernels."""

    def __init__(
        self, inputs: TokenInputs, options: RuleOptions, cu_seqlens: Tensor, roles: Tensor, scale: float,
        piece_chunks: int, kept: Kept, entering: Tensor, d_output: Tensor, needed: tuple[bool, ...],
        truncate: float | None,
    ) -> None:  # fmt: skip
        self.inputs, self.roles, self.entering, self.needed, self.truncate = inputs, roles, entering, needed, truncate
        flags = options.use_qk_l2norm_in_kernel, options.use_gate_in_kernel, options.use_beta_sigmoid_in_kernel
        self.settings = _BackwardSettings(scale, piece_chunks, *flags)
        *prepared, checkpoints, self.starts, self.sums = kept
        rows = (even_rows(x) for x in (d_output, inputs.q, inputs.k, inputs.v))
        self._tensors: tuple[Any, ...] = (*rows, *prepared, cu_seqlens, checkpoints)
        self._products: tuple[Tensor | None, ...] = None, None
        self._slices: Slices | None = None

    def state_gradient(self, slots: int = 0, out: Tensor | None = None) -> Tensor:
        """dS_ext [max(n, slots), HV, K, V]: the gradient before each segment that a state enters, if that behind it is
        zero; in `out`, if it is given."""
        tensors = (*self._tensors, self.roles, self.sums, out)
        with on_device(self.roles.device):
            found = replayable(_state_gradient, tensors, (self.settings, self.truncate, slots))
        d_ext, self._products = found[0], found[1:]
        assert d_ext is not None
        return d_ext

    def prepare(self) -> None:
        """Launch what `finish` begins with, which needs no gradient of a state."""
        if self._products[0] is None:
            do, q, k, v, *prepared, cu_seqlens, checkpoints = self._tensors
            self._slices = _start(do, q, k, v, tuple(prepared), cu_seqlens, checkpoints, self.settings)
            prepare_first_slice(do, self._slices)

    def finish(self, d_leaving: Tensor, sums: SharedSums | None = None) -> tuple[Tensor | None, ...]:
        """The gradients of the fields of the inputs, None where not needed, given those of the states that leave.

        With `sums` those of A_log and dt_bias are float32, of the heads of all shares, and filled when it is launched.
        """
        x = self.inputs
        given = (_rows(x.g), _rows(x.beta), x.A_log, x.dt_bias, self.starts, self.sums)
        tensors = (*self._tensors, *given, *self._products, self.entering, d_leaving)
        settings = self.settings, None if sums is None else (sums.shares, sums.share)
        self._products = None, None
        with on_device(d_leaving.device):
            if self._slices is None:
                found = replayable(_finish, tensors, settings)
            else:  # they let go of their first products when those are done with, as a replay cannot
                slices, self._slices = self._slices, None
                found = _finish(*tensors, *settings, slices=slices)
        gradients = tuple(
            dx.to(x.dtype).view(x.shape) if needed and x is not None and dx is not None else None
            for x, dx, needed in zip(self.inputs.tensors()[:5], found[:5], self.needed[:5], strict=True)
        )
        return *gradients, *self._of_heads(found[5], found[6], sums)

    def _of_heads(self, first: Tensor | None, second: Tensor | None, sums: SharedSums | None) -> Kept:
        """The gradients of A_log and dt_bias out of the last two results of `_finish`."""
        if sums is None:
            given = (self.inputs.A_log, self.inputs.dt_bias)
            return tuple(
                dx.to(x.dtype).view(x.shape) if needed and x is not None and dx is not None else None
                for x, dx, needed in zip(given, (first, second), self.needed[5:], strict=True)
            )
        assert second is not None
        if first is not None:
            sums.later.add(ColumnSums(first, second, sums.shares, sums.share))
        return second.unbind()
