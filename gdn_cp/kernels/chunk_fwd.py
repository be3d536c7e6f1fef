"""The walk along the sequence of the chunked delta rule: outputs, final states, and summaries of pieces.

`chunk_prepare` has left for every chunk two matrices X [K, C] and Y [C, C] (stored transposed), so that a step is

    R = beta (V - (rk gamma) K S)      S+ = e^(G_C) S + X R      O = s (rq gamma) Q S + Y R

with two products that wait for each other (K S, then X R) and two beside them. A program walks over one *piece* of one
sequence, for one value head and BV columns of the state: columns are independent of each other. Where there are too few
programs to fill the card, sequences are cut into several pieces (`tables.chunk_tables`), in three launches. Over a
piece the state obeys S_out = S_ext + M S_in, so

    1. each piece but the last of its sequence is summarised: S_ext from a zero state, and M, column by column, from the
       columns of the identity with V = 0, by the same walk. A first piece starts from the initial state and needs no M;
    2. the summaries are composed in order into the state at the start of each piece, in float32 (`chunk_pieces`);
    3. all pieces are walked at once from those states.

Where a sequence is a segment whose state comes from or goes to another rank (`chunk_segments`), its first and last
piece are summarised too, from zero, and the segment's own law follows from its pieces'.

Dimensions: B batch, T tokens, H query/key heads, HV value heads, K, V head dims, N sequences, C = 64 rows of a chunk,
NT chunks (bound), NP pieces (bound).
"""

from __future__ import annotations

# ruff: noqa: SIM102, SIM108  (an if on a tl.constexpr is decided when the kernel is compiled, `and` or a ternary is not)
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from gdn_cp.kernels.chunk_pieces import piece_states
from gdn_cp.kernels.chunk_prepare import Prepared
from gdn_cp.kernels.configs import (
    ChainLaunch,
    bulk_copy_fits,
    chain_config,
    launches,
    multiprocessors,
    options,
    power_of_2,
)
from gdn_cp.kernels.decay_triton import last_start
from gdn_cp.kernels.tables import ChunkTables, dense
from gdn_cp.launch import describe, run_kernel

if TYPE_CHECKING:
    from gdn_cp.kernels.compile_report import CompileCase


@triton.jit
def _row_factors(
    G_ptr, bt_ptr, rq_ptr, rk_ptr, c, h, hv, last, present, H: tl.constexpr, HV: tl.constexpr, NORM: tl.constexpr,
    SUMMARY: tl.constexpr,
):  # fmt: skip
    """G, its last value (number `last`), beta, rk and rq of chunk c."""
    i = tl.arange(0, 64)
    head = (c * HV + hv) * 64
    G = tl.load(G_ptr + head + i, mask=present & (i >= 0), other=0.0)
    G_last = tl.load(G_ptr + head + last, mask=present, other=0.0)
    beta = tl.load(bt_ptr + head + i, mask=present & (i >= 0), other=0.0)
    rk = tl.full((64,), 1.0, tl.float32)
    rq = tl.full((64,), 1.0, tl.float32)
    if NORM:
        rk = tl.load(rk_ptr + (c * H + h) * 64 + i, mask=present & (i >= 0), other=0.0)
        if not SUMMARY:
            rq = tl.load(rq_ptr + (c * H + h) * 64 + i, mask=present & (i >= 0), other=0.0)
    return G, G_last, beta, rk, rq


@triton.jit(do_not_specialize=["slice_chunks"])
def _chain_kernel(
    q_ptr, k_ptr, v_ptr, X_ptr, Yt_ptr, G_ptr, bt_ptr, rq_ptr, rk_ptr, pieces_ptr, roles_ptr, initial_ptr, starts_ptr,
    o_ptr, final_ptr, sums_ptr, lost_ptr, checkpoints_ptr,
    slice_chunks, scale, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    STATE_K: tl.constexpr, STATE_V: tl.constexpr, NORM: tl.constexpr, HAS_INITIAL: tl.constexpr,
    HAS_STARTS: tl.constexpr, STORE_FINAL: tl.constexpr,
    CHECKPOINTS: tl.constexpr, SUMMARY: tl.constexpr, TRUNCATE: tl.constexpr, TMA: tl.constexpr, DOT: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Program (piece p, value head hv, column block b), b fastest.

    With SUMMARY, the columns of block b come from S_ext for b < V / BV and from M above, into sums [NP, HV, K, V + K].
    `roles` [N] say which sequences are continued elsewhere (`chunk_pieces`); None: none. With TRUNCATE, S_ext is walked
    from the last chunk on from which the gates sum to less than that number, from zero; where there is one, M is zero.
    `lost` int32 [NP, HV] gets 1 there, for pieces whose M someone needs.
    """
    V_BLOCKS: tl.constexpr = (V + BV - 1) // BV
    BLOCKS: tl.constexpr = V_BLOCKS + ((K + BV - 1) // BV if SUMMARY else 0)
    pid = tl.program_id(0)
    block = pid % BLOCKS
    hv = (pid // BLOCKS) % HV
    p = (pid // (BLOCKS * HV)).to(tl.int64)
    n = tl.load(pieces_ptr + p * 8).to(tl.int64)
    if n < 0:
        return
    chunk = tl.load(pieces_ptr + p * 8 + 1).to(tl.int64)
    # 63, but ptxas cannot know it to be the same in all threads, as it could of a scalar load or of a sum of 32 bits.
    # What it reads from an address that is the same it moved to a uniform register as soon as it had asked for it, and
    # so each step waited for memory (45 of 286 us on an H200).
    field = tl.arange(0, 8)
    entry = tl.load(pieces_ptr + p * 8 + field).to(tl.int64)
    last = tl.sum(tl.where(field == 1, entry, 0), 0) - chunk + 63
    steps = tl.load(pieces_ptr + p * 8 + 2)
    row = tl.load(pieces_ptr + p * 8 + 3).to(tl.int64)
    end = tl.load(pieces_ptr + p * 8 + 4)
    is_first = tl.load(pieces_ptr + p * 8 + 5) != 0
    is_last = tl.load(pieces_ptr + p * 8 + 6) != 0
    if SUMMARY:
        entered = False
        leaves = False
        if roles_ptr is not None:
            role = tl.load(roles_ptr + n)
            entered = (role & 1) != 0
            leaves = (role & 2) != 0
        if (is_last & (leaves == 0)) | (is_first & (entered == 0) & (block >= V_BLOCKS)):
            return
    h = (hv // (HV // H)).to(tl.int64)
    i = tl.arange(0, 64)
    d = tl.arange(0, BK)
    e = block * BV + tl.arange(0, BV)
    state_mask = (d[:, None] < K) & (e[None, :] < V)

    # By masks, not in branches: with a state that comes out of a branch ptxas takes 11 registers more.
    S = tl.zeros((BK, BV), tl.float32)
    if HAS_INITIAL:
        initial = initial_ptr + (n * HV + hv) * (K * V) + d[:, None] * STATE_K + e[None, :] * STATE_V
        S = tl.load(initial, mask=state_mask & is_first, other=0.0)
    if HAS_STARTS:
        start = starts_ptr + (p * HV + hv) * (K * V) + d[:, None] * V + e[None, :]
        S = tl.where(is_first, S, tl.load(start, mask=state_mask & (is_first == 0), other=0.0))
    if SUMMARY:
        if block >= V_BLOCKS:
            S = tl.where(d[:, None] == (e - V_BLOCKS * BV)[None, :], 1.0, 0.0)
        start = tl.full((), -1, tl.int32)
        if TRUNCATE is not None:
            start = last_start(G_ptr, chunk, steps, hv, TRUNCATE, HV)
            if start >= 0:
                S = tl.zeros((BK, BV), tl.float32)
                # Of M nothing is left to walk.
                skipped = tl.where(block < V_BLOCKS, start, steps)
                chunk += skipped
                row += skipped * 64
                steps -= skipped
        if lost_ptr is not None:
            if block == V_BLOCKS:
                tl.store(lost_ptr + p * HV + hv, (start >= 0).to(tl.int32))

    qk_mask = d[None, :] < K
    k_tile = k_ptr
    q_tile = q_ptr
    v_tile = v_ptr
    if not TMA:
        k_tile = k_ptr + row * stride_kt + h * stride_kh + i[:, None] * stride_kt + d[None, :]
        q_tile = q_ptr + row * stride_qt + h * stride_qh + i[:, None] * stride_qt + d[None, :]
        v_tile = v_ptr + row * stride_vt + hv.to(tl.int64) * stride_vh + i[:, None] * stride_vt + e[None, :]
    o_tile = o_ptr
    if not SUMMARY:
        o_tile = o_ptr + (row * HV + hv) * V + i[:, None] * (HV * V) + e[None, :]
    # Row factors are fetched one step ahead into registers: the pipeline prefetches operands of products only, and to
    # wait for these at the top of a step would add the memory's latency to each. (Behind the step's last product they
    # came too late: 12 % slower, and the backward's walks 22 %.)
    G, G_last, beta, rk, rq = _row_factors(
        G_ptr, bt_ptr, rq_ptr, rk_ptr, chunk, h, hv, last, steps > 0, H, HV, NORM, SUMMARY
    )
    for step in tl.range(0, steps, num_stages=STAGES):
        part = (chunk + step) * HV + hv
        first = row.to(tl.int32) + step * 64
        valid = i[:, None] < end - first
        if CHECKPOINTS:
            if (chunk + step) % slice_chunks == 0:
                checkpoint = checkpoints_ptr + ((chunk + step) // slice_chunks * HV + hv) * (K * V)
                tl.store(checkpoint + d[:, None] * V + e[None, :], S, mask=state_mask)
        k_factor = tl.exp(G) * rk
        q_factor = tl.exp(G) * rq * scale
        beta_now = beta
        decay = tl.exp(G_last)
        G, G_last, beta, rk, rq = _row_factors(
            G_ptr, bt_ptr, rq_ptr, rk_ptr, chunk + step + 1, h, hv, last, step + 1 < steps, H, HV, NORM, SUMMARY
        )
        if TMA:
            k = k_ptr.load([first, (h * K).to(tl.int32)])
            v = v_ptr.load([first, hv * V + block * BV])
            if SUMMARY:
                v = tl.where(e[None, :] < V, v, 0.0)  # what lies beyond is another head's
            X = X_ptr.load([(part * K).to(tl.int32), 0])
        else:
            k = tl.load(k_tile, mask=valid & qk_mask, other=0.0)
            v = tl.load(v_tile, mask=valid & (e[None, :] < V), other=0.0)
            X_tile = X_ptr + part * (K * 64) + d[:, None] * 64 + i[None, :]
            X = tl.load(X_tile) if BK == K else tl.load(X_tile, mask=d[:, None] < K, other=0.0)
        S16 = S.to(X.dtype)
        KS = tl.dot(k, S16, input_precision=DOT)
        if not SUMMARY:
            if TMA:
                q = q_ptr.load([first, (h * K).to(tl.int32)])
            else:
                q = tl.load(q_tile, mask=valid & qk_mask, other=0.0)
            QS = tl.dot(q, S16, input_precision=DOT)
        R = (v.to(tl.float32) - KS * k_factor[:, None]) * beta_now[:, None]
        if TMA:
            R = tl.where(valid, R, 0.0)
        R = R.to(X.dtype)
        S = tl.dot(X, R, S * decay, input_precision=DOT)
        if not SUMMARY:
            if TMA:
                Yt = Yt_ptr.load([(part * 64).to(tl.int32), 0])
            else:
                Yt = tl.load(Yt_ptr + part * 4096 + i[:, None] * 64 + i[None, :])
            out = tl.dot(tl.trans(Yt), R, QS * q_factor[:, None], input_precision=DOT)
            tl.store(o_tile, out.to(o_ptr.dtype.element_ty), mask=valid & (e[None, :] < V))
        if not TMA:
            k_tile += 64 * stride_kt
            q_tile += 64 * stride_qt
            v_tile += 64 * stride_vt
        if not SUMMARY:
            o_tile += 64 * (HV * V)

    if SUMMARY:
        width: tl.constexpr = V + K
        column = tl.where(block < V_BLOCKS, e, V + e - V_BLOCKS * BV)
        limit = tl.where(block < V_BLOCKS, V, width)
        sums = sums_ptr + (p * HV + hv) * (K * width) + d[:, None] * width + column[None, :]
        tl.store(sums, S, mask=(d[:, None] < K) & (column[None, :] < limit))
    if STORE_FINAL:
        if is_last:
            final = final_ptr + (n * HV + hv) * (K * V) + d[:, None] * STATE_K + e[None, :] * STATE_V
            tl.store(final, S, mask=state_mask)


def _descriptors(q: Tensor, k: Tensor, v: Tensor, prepared: Prepared, block_v: int) -> tuple[TensorDescriptor, ...]:
    """Descriptors of q, k, v as [rows, heads * dim], X as [chunks * heads * K, 64], Yt as [chunks * heads * 64, 64]."""
    assert prepared.X is not None
    assert prepared.Yt is not None
    K = q.shape[3]

    def rows(x: Tensor, width: int) -> TensorDescriptor:
        shape = [x.shape[0] * x.shape[1], x.shape[2] * x.shape[3]]
        return describe(x, shape, [x.stride(1), 1], [64, width])

    def tiles(x: Tensor, height: int) -> TensorDescriptor:
        return describe(x, [x.numel() // 64, 64], [64, 1], [height, 64])

    return rows(q, K), rows(k, K), rows(v, block_v), tiles(prepared.X, K), tiles(prepared.Yt, 64)


class Walk:
    """The launches over one batch's pieces, which share all arguments but states and outputs."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, prepared: Prepared, tables: ChunkTables, scale: float,
        state_v_first: bool, launch: ChainLaunch,
    ) -> None:  # fmt: skip
        self.H, self.HV, self.K, self.V = q.shape[2], v.shape[2], q.shape[3], v.shape[3]
        self.tables, self.config, self.v = tables, launch, v
        self.block_v: int = min(launch.block_v, max(16, power_of_2(self.V)))
        self.tma = launch.tma and bulk_copy_fits(q, k, v)
        inputs = _descriptors(q, k, v, prepared, self.block_v) if self.tma else (q, k, v, prepared.X, prepared.Yt)
        self.inputs: tuple[Any, ...] = (*inputs, prepared.G, prepared.bt, prepared.rq, prepared.rk, tables.pieces)
        self.numbers: tuple[Any, ...] = (
            scale,
            q.stride(1),
            q.stride(2),
            k.stride(1),
            k.stride(2),
            v.stride(1),
            v.stride(2),
        )
        self.constants = {
            "H": self.H, "HV": self.HV, "K": self.K, "V": self.V, "BK": power_of_2(self.K),
            "BV": self.block_v, "STATE_K": 1 if state_v_first else self.V, "STATE_V": self.K if state_v_first else 1,
            "NORM": prepared.rk is not None, "TMA": self.tma, "DOT": launch.precision,
        }  # fmt: skip

    @property
    def cut(self) -> bool:
        """Whether a sequence may have several pieces."""
        return self.tables.num_pieces > self.tables.num_sequences

    def summarise(
        self, initial: Tensor | None = None, roles: Tensor | None = None, truncate: float | None = None, rows: int = 0,
        out: Tensor | None = None, lost: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """(S_ext | M) [max(NP, rows), HV, K, V + K] of the pieces whose law someone needs, first pieces from `initial`.

        `roles` int32 [N]: see `chunk_pieces`. `truncate`: the sum of gates below which a state is lost, a piece's M or
        what stands in its S_ext before them. `out`: where to write, instead of `rows`. `lost` int32 [NP, HV] contiguous
        gets 1 where the M of a piece that a state enters is lost, else 0.
        """
        sums = out
        if sums is None:
            rows = max(self.tables.num_pieces, rows)
            sums = self.v.new_empty(rows, self.HV, self.K, self.V + self.K, dtype=torch.float32)
        blocks = -(-self.V // self.block_v) - (-self.K // self.block_v)
        self._launch(blocks, initial, None, None, None, sums, None, 0, roles, truncate, lost)
        return sums

    def run(
        self, initial: Tensor | None, starts: Tensor | None, *, final: Tensor | None = None,
        checkpoints: Tensor | None = None, slice_chunks: int = 0,
    ) -> Tensor:  # fmt: skip
        """Walk over all pieces from `initial` [N, HV, K, V] and `starts` [NP, HV, K, V]: o [B, T, HV, V]."""
        o = torch.empty(self.v.shape, dtype=self.v.dtype, device=self.v.device)
        blocks = -(-self.V // self.block_v)
        self._launch(blocks, initial, starts, o, final, None, checkpoints, slice_chunks, None, None)
        return o

    def _launch(
        self, blocks: int, initial: Tensor | None, starts: Tensor | None, o: Tensor | None, final: Tensor | None,
        sums: Tensor | None, checkpoints: Tensor | None, slice_chunks: int, roles: Tensor | None,
        truncate: float | None, lost: Tensor | None = None,
    ) -> None:  # fmt: skip
        programs = self.tables.num_pieces * self.HV * blocks
        stages = self.config.num_stages
        if sums is not None and programs > multiprocessors(self.v.device):
            stages = self.config.summary_stages or stages
        outputs = (o, final, sums, lost, checkpoints)
        arguments = [*self.inputs, roles, initial, starts, *outputs, slice_chunks, *self.numbers]
        if programs:
            run_kernel(_chain_kernel, programs,
                *arguments,
                **self.constants,
                **options(
                    self.config.num_warps, stages, STAGES=stages, HAS_INITIAL=initial is not None,
                    HAS_STARTS=starts is not None, STORE_FINAL=final is not None, CHECKPOINTS=checkpoints is not None,
                    SUMMARY=sums is not None, TRUNCATE=truncate,
                ),
            )  # fmt: skip


@launches
def chain_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prepared: Prepared,
    tables: ChunkTables,
    *,
    scale: float,
    initial_state: Tensor | None,
    output_final_state: bool,
    state_v_first: bool,
    launch: ChainLaunch | None = None,
    checkpoints: Tensor | None = None,
    slice_chunks: int = 0,
) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor] | None]:
    """Outputs [B, T, HV, V] in v's dtype, final states if asked for, and what is known of pieces if there are several.

    Final states are float32 in the layout of `initial_state`. Of pieces: the state at the start of each that is not the
    first of its sequence [NP, HV, K, V], and the summaries (S_ext | M) [NP, HV, K, V + K] of those that are not the
    last, M only of those that are not the first; float32, the rest is not written.

    `prepared` and `tables` belong to the same batch; q, k, v need a contiguous last dimension and evenly spaced rows.
    `checkpoints` [ceil(NT / slice_chunks), HV, K, V] float32 receives the states before chunks 0, slice_chunks, ...
    """
    launch = launch or chain_config(q.device, q.dtype, q.shape[3], v.shape[3])
    HV, V = v.shape[2:]
    K, N = q.shape[3], tables.num_sequences
    state_shape = (N, HV, V, K) if state_v_first else (N, HV, K, V)
    final = torch.empty(state_shape, dtype=torch.float32, device=v.device) if output_final_state else None
    walk = Walk(q, k, v, prepared, tables, scale, state_v_first, launch)
    initial = dense(initial_state)
    states = None
    if walk.cut:
        sums = walk.summarise(initial)
        states = piece_states(sums, tables.pieces, V), sums
    starts = None if states is None else states[0]
    o = walk.run(initial, starts, final=final, checkpoints=checkpoints, slice_chunks=slice_chunks)
    return o, final, states


def compile_cases() -> list[CompileCase]:
    """The walk and its summary at Qwen3-Next's heads in bfloat16 for both block widths, and at head dim 64."""
    return [
        _chain_case("bf16", 128, 64, False, True),
        _chain_case("bf16", 128, 32, False, True),
        _chain_case("bf16", 128, 64, True, True),
        _chain_case("bf16", 64, 64, False, True),
        _chain_case("bf16", 256, 16, False, False),
        _chain_case("fp32", 64, 16, False, False),
    ]


def _chain_case(kind: str, dim: int, block_v: int, summary: bool, main: bool) -> CompileCase:
    from gdn_cp.kernels.compile_report import CompileCase

    launch = ChainLaunch("ieee", 16, 4, 1) if kind == "fp32" else ChainLaunch(block_v=block_v, num_stages=3, tma=True)
    if dim > 128:
        launch = ChainLaunch(block_v=block_v, num_stages=2, tma=True)
    blocks = {"q_ptr": [64, dim], "k_ptr": [64, dim], "v_ptr": [64, block_v], "X_ptr": [dim, 64], "Yt_ptr": [64, 64]}
    tiles = {name: f"tensordesc<{kind}{block}>" if launch.tma else f"*{kind}" for name, block in blocks.items()}
    floats = dict.fromkeys(
        (
            "G_ptr",
            "bt_ptr",
            "rq_ptr",
            "rk_ptr",
            "final_ptr",
            "initial_ptr",
            "sums_ptr",
            "checkpoints_ptr",
        ),
        "*fp32",
    )
    strides = ("stride_qt", "stride_qh", "stride_kt", "stride_kh", "stride_vt", "stride_vh")
    return CompileCase(
        name=f"chunk_fwd.{'summary' if summary else 'chain'}/{kind}/K{dim}/BV{block_v}",
        kernel=_chain_kernel,
        signature=tiles
        | floats
        | {"o_ptr": f"*{kind}", "pieces_ptr": "*i32", "scale": "fp32", "slice_chunks": "i32"}
        | (dict.fromkeys(("roles_ptr", "lost_ptr"), "*i32") if summary else {})
        | dict.fromkeys(strides, "i32"),
        constexprs={
            **({} if summary else dict.fromkeys(("roles_ptr", "lost_ptr"))), "starts_ptr": None,
            "H": 16, "HV": 32, "K": dim, "V": dim, "BK": dim, "BV": block_v, "STATE_K": dim,
            "STATE_V": 1, "NORM": True, "HAS_INITIAL": True, "HAS_STARTS": False, "CHECKPOINTS": not summary,
            "STORE_FINAL": not summary,
            "SUMMARY": summary, "TRUNCATE": -10.0 if summary else None, "TMA": launch.tma, "DOT": launch.precision,
            "STAGES": launch.num_stages,
        },
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        divisible=strides,
        main=main,
        spills_allowed=kind == "fp32",  # without tensor cores the products are unrolled
    )  # fmt: skip
