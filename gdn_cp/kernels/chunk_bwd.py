"""The backward of the chunked delta rule: which kernels run, on which buffers, and how much memory they may take.

    prepare_products -> chains (S and dS of every chunk, M) -> local gradients -> rows (dbeta, dg) -> sums over chunks

The states and their gradients of all chunks are by far the largest buffers: 4 K V bytes for each chunk and value head,
in a 16-bit type. So a long batch is worked on in slices of consecutive chunks, last slice first, which share one set of
buffers: the gradient of the state is carried from slice to slice, and the state at the start of each slice was kept by
the forward (`checkpoints`). Where sequences are cut into pieces, or continued on other ranks, the gradients alone are
walked over all slices first, from which the gradient at the end of each piece, or before each segment, follows.

Dimensions: B batch, T tokens, H q/k heads, HV value heads, K, V head dims, N sequences, C = 64, NT chunks (bound).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from gdn_cp.kernels.bwd_slices import SLICE_BYTES, concurrent_pieces, slice_chunks, summary_chunks
from gdn_cp.kernels.chunk_bwd_borders import GivenStates, borders_kernel, borders_options
from gdn_cp.kernels.chunk_bwd_chains import chains_kernel
from gdn_cp.kernels.chunk_bwd_config import FUSED_VERSIONS, backward_config, launch_options
from gdn_cp.kernels.chunk_bwd_local import dk_kernel, dq_kernel, scores_kernel
from gdn_cp.kernels.chunk_bwd_rows import RowSums, least_beta, row_gradients, row_sums
from gdn_cp.kernels.chunk_pieces import piece_gradients, whole_gradients
from gdn_cp.kernels.chunk_prepare import Prepared, prepare_leading_products, prepare_products
from gdn_cp.kernels.configs import bulk_copy_fits, cdiv, dot_precision, is_hopper, launches, power_of_2
from gdn_cp.kernels.sums_triton import LaterSums, sum_partials
from gdn_cp.kernels.tables import CHUNK, ChunkTables, chunk_tables, dense
from gdn_cp.launch import describe, run_kernel
from gdn_cp.launch_bare import TRITON


# pyright: reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false
class Gradients(NamedTuple):
    """Gradients of the operation's inputs, each None where the input is None or its gradient was not asked for."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dg: Tensor | None
    dbeta: Tensor | None
    dh0: Tensor | None
    dA_log: Tensor | None  # noqa: N815
    ddt_bias: Tensor | None


@launches
def chunk_gated_delta_rule_bwd(
    do: Tensor,
    dht: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    prepared: Prepared,
    cu_seqlens: Tensor | None,
    *,
    scale: float,
    initial_state: Tensor | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    use_qk_l2norm_in_kernel: bool,
    use_gate_in_kernel: bool,
    use_beta_sigmoid_in_kernel: bool,
    state_v_first: bool,
    need_dh0: bool,
    overwrite_q: bool = False,
    checkpoints: Tensor | None = None,
    piece_states: tuple[Tensor, Tensor] | None = None,
    piece_chunks: int = 0,
    slices: Slices | None = None,
    refine_given: bool = True,
    shares: int = 1,
    share: int = 0,
    later: LaterSums | None = None,
) -> Gradients:
    """Gradients of `chunk_gated_delta_rule` from those of its output and final state.

    Args:
        do: [B, T, HV, V] gradient of o, strides as q's.
        dht: [N, HV, K, V] float32 gradient of the final state (as `state_v_first` says), or None.
        q, k, v, g, beta, initial_state, A_log, dt_bias, cu_seqlens, flags: as the public operation's; q, k, v with a
            contiguous last dimension and evenly spaced rows.
        prepared: what the forward kept: G, bt, rq, rk, Ag.
        overwrite_q: let dq take the memory of q, which nobody needs any more.
        checkpoints: [S, HV, K, V] float32, states before chunks 0, L, 2L, .. with L = ceil(NT / S); None: everything in
            one slice.
        piece_states: with sequences cut into pieces of piece_chunks chunks, the state at the start of each piece
            [NP, HV, K, V], and the summaries [NP, HV, K, V + K] whose last K columns are M of S_out = S_ext + M S_in.
        slices: what `start_backward` gave for the same arguments, if it was called before.
        refine_given: whether dg gets back what rounding initial_state and dht takes, by one more launch
            (`chunk_bwd_borders`).
        shares, share: these heads are the share-th of so many; dA_log and ddt_bias are [shares * HV], zeros elsewhere.
        later: whose launch fills these two; None: at once.

    Returns:
        Gradients: dq, dk, dv, dg, dbeta in the dtypes of the inputs; dh0, dA_log, ddt_bias float32.
    """
    run = slices or start_backward(
        do, q, k, v, prepared, cu_seqlens, scale=scale, checkpoints=checkpoints, piece_chunks=piece_chunks
    )
    tables, HV = run.tables, run.HV
    out = _allocate(q, k, v, g, beta, tables.num_sequences if need_dh0 else None, state_v_first, overwrite_q)
    parts = None  # of the chunks in dA_log and ddt_bias
    if use_gate_in_kernel:
        parts = torch.empty(tables.num_chunks, 2, HV, dtype=torch.float32, device=q.device)
    initial_state, dht = dense(initial_state), dense(dht)
    starts = ends = None
    if piece_states is not None:
        starts, sums = piece_states
        ends = piece_gradients(run.summarise(dht, state_v_first), sums, tables.pieces)
    # For K > 128 that kernel takes more shared memory than some GPUs have.
    refine_given = refine_given and (q.shape[3] <= 128 or is_hopper(q.device))
    given = GivenStates(initial_state, dht, state_v_first) if refine_given else None
    fused = run.can_fuse(out, given)
    parts_of_dots = CHUNK if fused else 1
    rows = row_sums(tables.num_chunks, HV, q.device, g is not None, beta is not None, parts_of_dots)
    for index, c0, c1 in run.bounds():
        checkpoint = None if checkpoints is None else checkpoints[index]
        run.chains(index, c0, c1, initial_state, dht, checkpoint, starts, ends, out, state_v_first)
        if c1 > c0:
            run.local(c0, c1, out, rows, given, fused)
    row_gradients(
        rows, prepared.bt, g, dense(A_log), dense(dt_bias), tables.chunks, out.dg, out.dbeta, parts,
        sigmoid=use_beta_sigmoid_in_kernel, least=least_beta(q.dtype),
    )  # fmt: skip
    if parts is None:
        return out
    dA_log, ddt_bias = sum_partials(parts, shares=shares, share=share, later=later).unbind()
    return out._replace(dA_log=dA_log, ddt_bias=ddt_bias if dt_bias is not None else None)


@launches
def start_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, prepared: Prepared, cu_seqlens: Tensor | None, *, scale: float,
    checkpoints: Tensor | None, piece_chunks: int = 0,
) -> Slices:  # fmt: skip
    """The backward of one batch before anything is launched; arguments as `chunk_gated_delta_rule_bwd`'s."""
    tables = chunk_tables(*v.shape[:2], cu_seqlens, q.device, piece_chunks)
    NT = tables.num_chunks
    length = NT if checkpoints is None else cdiv(NT, checkpoints.shape[0])
    return Slices(q, k, v, do, prepared, tables, scale, max(length, 1))


@launches
def segment_gradients(
    do: Tensor, run: Slices, roles: Tensor, sums: Tensor | None, rows: int = 0, truncate: float | None = None,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """dS_ext [max(N, rows), HV, K, V] float32: the gradient before each segment that a state enters, zero behind it.

    Args:
        do: gradient of the output, as given to `start_backward`.
        run: what that returned.
        roles: int32 [N], see `chunk_pieces`; the rest of the result is not written.
        sums: the forward's summaries [NP, HV, K, V + K] where segments are cut into pieces.
        truncate: the sum of gates below which a state is lost.
        out: where to write, instead of `rows`.
    """
    if sums is None:
        return run.summarise(None, False, roles, rows, truncate, out)
    summaries = run.summarise(None, False, roles, 0, truncate)
    return whole_gradients(summaries, sums, run.tables.pieces, roles, rows, out)


@launches
def prepare_first_slice(do: Tensor, run: Slices) -> None:
    """Launch the products of the slice that the backward works on first, while gradients of states are on their way."""
    _, c0, c1 = run.bounds()[0]
    if c1 > c0:
        run.prepare(c0, c1)


class Slices:
    """The launches over the slices of one batch, which share their buffers."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, do: Tensor, prepared: Prepared, tables: ChunkTables, scale: float,
        size: int,
    ) -> None:  # fmt: skip
        self.q, self.k, self.v, self.do = q, k, v, do
        self.prepared, self.tables, self.scale, self.size = prepared, tables, scale, size
        self.H, self.K = q.shape[2:]
        self.HV, self.V = v.shape[2:]
        # The table's bound on pieces has one spare for each sequence where sequences are cut.
        pieces = max(tables.num_pieces - tables.num_sequences, tables.num_sequences)
        walks = concurrent_pieces(pieces, tables.num_chunks, size) * self.HV
        self.config = backward_config(q.device, q.dtype, self.K, self.V, walks)
        self.tma = self.config.tma and bulk_copy_fits(q, k, v, do)
        self.constants = {
            "H": self.H, "HV": self.HV, "K": self.K, "V": self.V, "BK": max(16, power_of_2(self.K)),
            "C": CHUNK, "TMA": self.tma, "PRECISION": dot_precision(q.dtype),
        }  # fmt: skip
        self.products: tuple[Tensor, Tensor] | None = None
        self.prepared_slice = (0, 0)  # which chunks `products` are of
        self.h: Tensor | None = None
        self.dh: Tensor | None = None
        self.M: Tensor | None = None
        self.carries: tuple[Tensor, ...] = ()
        self.described: dict[tuple[int, int], TensorDescriptor] = {}  # by (id, width), of tensors that self holds

    def bounds(self, size: int = 0) -> list[tuple[int, int, int]]:
        """(index, first chunk, end) of each slice, last slice first; one empty slice where there is no chunk.

        `size`: chunks of a slice; 0: those of the whole backward.
        """
        NT, size = self.tables.num_chunks, size or self.size
        starts = range(0, max(NT, 1), size)
        return [(index, c0, min(c0 + size, NT)) for index, c0 in reversed(list(enumerate(starts)))]

    def summarise(
        self, dht: Tensor | None, state_v_first: bool, roles: Tensor | None = None, rows: int = 0,
        truncate: float | None = None, out: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """The gradient [max(NP, rows), HV, K, V] of the state before each piece, from that behind it: zero, `dht` for
        last pieces.

        Of all pieces but the first of each sequence; with `roles`, of all pieces of the segments that a state enters.
        `out`: where to write, instead of `rows`.
        """
        shape = (max(self.tables.num_pieces, rows), self.HV, self.K, self.V)
        summaries = torch.empty(shape, dtype=torch.float32, device=self.q.device) if out is None else out
        size = self.tables.num_chunks
        if roles is None:
            size = summary_chunks(size, self.HV, self.K, self.q.element_size())
        # Else the gradients of k and v have no memory yet, of which the products of all chunks take as much: so heads
        # that forget slowly are walked in all segments at once.
        for index, c0, c1 in self.bounds(size):
            absent = [None] * 3  # states of the forward
            self._walk(index, c0, c1, (roles, *absent, dht, None), (None,) * 5, summaries, state_v_first, truncate)
        return summaries

    def chains(
        self, index: int, c0: int, c1: int, initial_state: Tensor | None, dht: Tensor | None, checkpoint: Tensor | None,
        starts: Tensor | None, ends: Tensor | None, out: Gradients, state_v_first: bool,
    ) -> None:  # fmt: skip
        """States and state gradients of chunks c0 .. c1 - 1 into h and dh, M, dv; dh0 of sequences that begin."""
        if self.h is None:
            shape = (self.size, self.HV, self.K, self.V)
            self.h, self.dh = (torch.empty(shape, dtype=self.q.dtype, device=self.q.device) for _ in range(2))
            self.M = torch.empty(self.size, self.HV, CHUNK, self.V, dtype=self.q.dtype, device=self.q.device)
        assert self.dh is not None
        assert self.M is not None
        bv = self.config.chains[0]
        results = (self.matrices(self.h, bv), self.matrices(self.dh, bv), self.matrices(self.M, bv), out.dv, out.dh0)
        states = (None, initial_state, starts, checkpoint, dht, ends)
        self._walk(index, c0, c1, states, results, None, state_v_first)

    def _walk(
        self, index: int, c0: int, c1: int, states: tuple[Tensor | None, ...], results: tuple[Any, ...],
        summaries: Tensor | None, state_v_first: bool, truncate: float | None = None,
    ) -> None:  # fmt: skip
        q, k, v, do, tables = self.q, self.k, self.v, self.do, self.tables
        X, Yt = self._products(c0, c1, states[0], truncate, summaries is None)
        bv, options = launch_options(self.config.chains)
        directions = 2 if summaries is None else 1
        run_kernel(chains_kernel, directions * tables.num_pieces * self.HV * cdiv(self.V, bv),
            self.tokens(q, self.K), self.tokens(k, self.K), self.tokens(v, bv), self.tokens(do, bv), *self.factors(),
            self.matrices(X, CHUNK), self.matrices(Yt, CHUNK), tables.pieces, *states, *self._carries(index, c1),
            *results, summaries, self.scale, c0, c1, tables.num_chunks, *_strides(q, k, v, do), V_FIRST=state_v_first,
            SUMMARY=summaries is not None, TRUNCATE=truncate, **options, **self.constants,
        )  # fmt: skip

    def prepare(self, c0: int, c1: int) -> None:
        """Make X and Yt of chunks c0 .. c1 - 1, kept until all is done with the first of them."""
        if not self._has_products(c0, c1):
            self.products, self.prepared_slice = self._multiply(c0, c1), (c0, c1)

    def _has_products(self, c0: int, c1: int) -> bool:
        return self.products is not None and self.prepared_slice[0] <= c0 and c1 <= self.prepared_slice[1]

    def _products(
        self, c0: int, c1: int, roles: Tensor | None, truncate: float | None, keep: bool
    ) -> tuple[Tensor, Tensor]:
        """X and Yt of chunks c0 .. c1 - 1; those of a whole batch are kept if they are few, for summaries need them and
        the walks after them too, unless slices are small to save memory. Else those of a slice are, with `keep`, and
        those of a summary are made where it goes, as `roles` and `truncate` say."""
        count, size = c1 - c0, self.q.element_size()
        few = self.HV * CHUNK * (self.K + CHUNK) * size * count <= SLICE_BYTES // 2
        lean = self.size < count and not slice_chunks(count, self.HV, self.K, self.V, size)
        if keep or (count == self.tables.num_chunks and few and not lean):
            self.prepare(c0, c1)
        if not self._has_products(c0, c1):
            whole = self.tables.num_pieces == self.tables.num_sequences
            if roles is None or truncate is None or not whole:
                return self._multiply(c0, c1)
            tokens, scale = (self.q, self.k, self.prepared, self.tables), self.scale
            return prepare_leading_products(*tokens, roles, truncate, scale=scale)
        return self._kept_products(c0, c1)

    def _kept_products(self, c0: int, c1: int) -> tuple[Tensor, Tensor]:
        assert self.products is not None
        if (c0, c1) == self.prepared_slice:
            return self.products
        first = self.prepared_slice[0]
        X, Yt = self.products
        return X[c0 - first : c1 - first], Yt[c0 - first : c1 - first]

    def _multiply(self, c0: int, c1: int) -> tuple[Tensor, Tensor]:
        q, k, chunks = self.q, self.k, {"first_chunk": c0, "num_chunks": c1 - c0}
        return prepare_products(q, k, self.prepared, self.tables, scale=self.scale, **chunks)

    def _carries(self, index: int, c1: int) -> tuple[Tensor | None, Tensor | None]:
        """Where the gradient that crosses a slice's end comes from, and where that which crosses its start goes.

        Two by turns, but one of two slices: the last does not read it, the first does not write it.
        """
        if c1 == self.tables.num_chunks:  # the slice that is worked on first, with `index` before it
            shape = (min(index, 2), self.HV, self.K, self.V)
            self.carries = torch.empty(shape, dtype=torch.float32, device=self.q.device).unbind() if index else ()
        if not self.carries:
            return None, None
        count = len(self.carries)
        return self.carries[index % count], self.carries[(index + 1) % count]

    def can_fuse(self, out: Gradients, given: GivenStates | None) -> bool:
        """Whether all that is local to a chunk can be one kernel's: on Hopper, where head dims, types and strides are
        those that it is written for, and none of what the three kernels hand on is asked for."""
        device = self.q.device
        if self.K != 128 or self.V != 128 or not self.tma or TRITON not in FUSED_VERSIONS:
            return False
        if device.type != "cuda" or not is_hopper(device):  # Triton's interpreter knows nothing of Gluon
            return False
        if given is not None and given.rounded_for(self.q.dtype):
            return False
        return bulk_copy_fits(out.dq, out.dk)

    def local(self, c0: int, c1: int, out: Gradients, rows: RowSums, given: GivenStates | None, fused: bool) -> None:
        """dq, dk of chunks c0 .. c1 - 1, and their part of `rows`, which are of all chunks; with what rounding took
        from states that are `given`. `fused`: by one kernel, see `can_fuse`."""
        assert self.h is not None
        assert self.dh is not None
        assert self.M is not None
        if fused:
            from gdn_cp.kernels.chunk_bwd_fused import local_gradients  # which other versions of Triton do not know

            q, k, v, do, factors, chunks = self.q, self.k, self.v, self.do, self.factors(), self.tables.chunks
            states = self.h, self.dh, self.M, self.prepared.Ag
            local_gradients(q, k, v, do, *states, factors, chunks, out.dq, out.dk, rows, self.scale, c0, c1)
        else:
            self._local(c0, c1, out, rows, given)
        if c0 == self.prepared_slice[0]:  # slices come last first
            self.products, self.prepared_slice = None, (0, 0)

    def _local(self, c0: int, c1: int, out: Gradients, rows: RowSums, given: GivenStates | None) -> None:
        q, k, do, chunks = self.q, self.k, self.do, self.tables.chunks
        assert self.h is not None
        assert self.dh is not None
        U, D, F = self._scores(c0, c1)
        bv, options = launch_options(self.config.scores)
        M = self.matrices(self.M, bv)
        run_kernel(scores_kernel, (c1 - c0) * self.HV,
            q, k, self.tokens(self.v, bv), self.tokens(do, bv), *self.factors(), self.prepared.Ag,
            self.matrices(self.h, bv), M, chunks, M, self.matrices(U, bv), D, F, rows.dG, rows.db,
            self.scale, c0, *_strides(q, k, self.v, do), LEAST_BETA=least_beta(q.dtype), **options, **self.constants,
        )  # fmt: skip
        bv, options = launch_options(self.config.dk)
        run_kernel(dk_kernel, (c1 - c0) * self.H,
            q, k, self.prepared.G, self.prepared.rk, self.matrices(self.h, bv), self.matrices(self.dh, bv), chunks,
            self.matrices(self.M, bv), self.matrices(U, bv), D, F, out.dk, rows.k_dots, rows.state_dots,
            c0, *_strides(q, k), **options, **self.constants,
        )  # fmt: skip
        if given is not None and rows.dG is not None and given.rounded_for(q.dtype):
            self.put_back(c0, c1, U, rows, given)
        bv, options = launch_options(self.config.dq)
        run_kernel(dq_kernel, (c1 - c0) * self.H,
            q, k, self.tokens(do, bv), self.prepared.G, self.prepared.rq, self.matrices(self.h, bv), chunks, D,
            out.dq, rows.q_dots, self.scale, c0, *_strides(q, k, do, out.dq), **options, **self.constants,
        )  # fmt: skip

    def put_back(self, c0: int, c1: int, U: Tensor, rows: RowSums, given: GivenStates) -> None:
        """Add to `rows` what rounding took from given states. After the sums of dk_kernel, and before q may go."""
        q, k, v, do, pieces = self.q, self.k, self.v, self.do, self.tables.pieces
        constants = {name: x for name, x in self.constants.items() if name != "TMA"}
        run_kernel(borders_kernel, 2 * self.tables.num_pieces * self.HV,
            q, k, v, do, *self.factors(), self.prepared.Ag, self.h, self.dh, self.M, U, pieces, given.initial_state,
            given.dht, rows.dG, rows.k_dots, rows.state_dots, self.scale, c0, c1, *_strides(q, k, v, do),
            V_FIRST=given.v_first, **borders_options(self.K, self.V), **constants,
        )  # fmt: skip

    def _scores(self, c0: int, c1: int) -> list[Tensor]:
        """Memory for U, D and F of chunks c0 .. c1 - 1: X and Yt, if they were kept, are done with."""
        shape, kept = (c1 - c0, self.HV, CHUNK), []
        if self.K == self.V and self._has_products(c0, c1):
            X, Yt = self._kept_products(c0, c1)
            kept = [X.view(*shape, self.V), Yt]
        widths = (self.V, CHUNK, CHUNK)[len(kept) :]
        return [*kept, *(torch.empty(*shape, width, dtype=self.q.dtype, device=self.q.device) for width in widths)]

    def factors(self) -> tuple[Tensor | None, ...]:
        """Row factors of all chunks."""
        return self.prepared.G, self.prepared.bt, self.prepared.rq, self.prepared.rk

    def tokens(self, x: Tensor, width: int) -> Tensor | TensorDescriptor:
        """An input [B, T, heads, D], for tiles of 64 rows and `width` columns: a descriptor, or itself without TMA."""
        if not self.tma:
            return x
        made = self.described.get((id(x), width))
        if made is None:
            shape = [x.shape[0] * x.shape[1], x.shape[2] * x.shape[3]]
            made = self.described[id(x), width] = describe(x, shape, [x.stride(1), 1], [CHUNK, width])
        return made

    def matrices(self, x: Tensor, width: int) -> Tensor | TensorDescriptor:
        """x [.., R, D] contiguous, for tiles of R rows and `width` columns: a descriptor, or x itself without TMA."""
        if not self.tma:
            return x
        made = self.described.get((id(x), width))
        if made is None:
            rows, columns = x.shape[-2:]
            made = describe(x, [x.numel() // columns, columns], [columns, 1], [rows, width])
            if x is self.h or x is self.dh or x is self.M:
                self.described[id(x), width] = made
        return made


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in (x.stride(1), x.stride(2))]


def _allocate(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None, num_states: int | None, state_v_first: bool,
    overwrite_q: bool,
) -> Gradients:  # fmt: skip
    """Empty gradients of the inputs, contiguous, but dq in q's memory with `overwrite_q`; dh0 for `num_states`."""

    def like(x: Tensor) -> Tensor:
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)

    dh0 = None
    if num_states is not None:
        dims = (v.shape[3], q.shape[3]) if state_v_first else (q.shape[3], v.shape[3])
        dh0 = torch.empty(num_states, v.shape[2], *dims, dtype=torch.float32, device=q.device)
    dg = None if g is None else like(g)
    dbeta = None if beta is None else like(beta)
    return Gradients(q if overwrite_q else like(q), like(k), like(v), dg, dbeta, dh0, None, None)
