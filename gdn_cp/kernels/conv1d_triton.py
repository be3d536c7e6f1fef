"""Causal depthwise convolution with SiLU over packed rows in Triton, and its gradients: one pass over memory each way.

The work is cut along the chunk table of the batch: the rows of a chunk belong to one sequence, so that only a chunk's
first rows need rows before it (those of the chunk before, unless the chunk is its sequence's first) and its last rows
need gradients behind it. A program walks down its chunks a row at a time with the last W - 1 rows in registers, so that
a row is read once and no row asks where its sequence starts.

The backward computes the convolution anew from x. Sums over rows for the weight and bias are float32 sums of each
program, added in a fixed order by a second kernel. No atomics, so a repetition gives the same bits; and no element of y
or dx depends on the cut, so that a channel has the bits that it has alone.

Dimensions: T rows, D channels, W taps (2 to 8), C rows of a chunk (64), BD channels of a program, P row programs.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportReturnType=false, reportGeneralTypeIssues=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false
# triton.jit hides the options of a launch and the tuples of a kernel from a type checker
# ruff: noqa: RUF005 -- triton.jit joins tuples but does not unpack one inside another
from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn_cp.kernels.activations_triton import sigmoid
from gdn_cp.kernels.configs import launches, multiprocessors
from gdn_cp.kernels.tables import CHUNK, ChunkTables, chunk_tables, dense

if TYPE_CHECKING:
    from gdn_cp.kernels.compile_report import CompileCase

MIN_TAPS, MAX_TAPS = 2, 8
MAX_WARPS = 4
FORWARD_BYTES = 16  # of a row that one thread reads
FORWARD_GROUP = 8  # rows whose loads are issued together
# In the backward a thread also holds W + 1 sums and W - 1 unfinished rows for each channel. With 4 channels and 4 rows
# of x and of dy at a time 16 warps fit on a multiprocessor for W = 4; with 8 channels 8 warps, which compute too long
# between loads to keep the memory busy.
BACKWARD_CHANNELS = 4
BACKWARD_GROUP = 4
# Programs for each multiprocessor below which chunks are not joined. Joined chunks share one read of the weights and
# one partial sum; too few programs leave multiprocessors idle at the end.
PROGRAMS_PER_SM = 6
MAX_FORWARD_CHUNKS = 4


@triton.jit
def _row(base, row, row_stride):
    """Address of a row of the packed batch, in 64 bits. Every load and store of rows passes here: a map of rows into
    an exchange buffer belongs in this function."""
    return base + row.to(tl.int64) * row_stride


@triton.jit
def _pushed(newest, window, N: tl.constexpr):
    """The window of the last N values after one more: (newest, window[0], ..., window[N - 2])."""
    moved = (newest,)
    for j in tl.static_range(N - 1):
        moved = moved + (window[j],)
    return moved


@triton.jit
def _zeros(N: tl.constexpr, BD: tl.constexpr):
    """N float32 vectors of zeros."""
    vectors = ()
    for j in tl.static_range(N):  # noqa: B007 (a compiled loop variable must not be called _, which keeps its type)
        vectors = vectors + (tl.zeros([BD], tl.float32),)
    return vectors


@triton.jit
def _load_taps(weight, i_d, D: tl.constexpr, W: tl.constexpr, WP: tl.constexpr, BD: tl.constexpr):
    """Float32 taps of BD channels as a tuple: entry j, [BD], multiplies the row j before, weight[:, W - 1 - j].

    Weight rows are read whole and taken apart in registers; reading a tap at a time would fetch each sector W times.
    """
    o_d, o_w = i_d * BD + tl.arange(0, BD), tl.arange(0, WP)
    mask = (o_d[:, None] < D) & (o_w[None, :] < W)
    tile = tl.load(weight + o_d[:, None] * W + o_w[None, :], mask=mask, other=0.0).to(tl.float32)
    taps = ()
    for j in tl.static_range(W):
        taps = taps + (tl.sum(tl.where(o_w[None, :] == W - 1 - j, tile, 0.0), axis=1),)
    return taps


@triton.jit
def _load_bias(bias, o_d, m_d, HAS_BIAS: tl.constexpr, BD: tl.constexpr):
    b = tl.zeros([BD], tl.float32)
    if HAS_BIAS:
        b += tl.load(bias + o_d, mask=m_d, other=0.0).to(tl.float32)
    return b


@triton.jit
def _chunk(chunks, i_t):
    """(sequence, first row, valid rows, whether rows of the sequence come before) of a chunk; unused: no valid rows."""
    sequence = tl.load(chunks + i_t * 4)
    unused = sequence < 0
    first = tl.where(unused, 0, tl.load(chunks + i_t * 4 + 1))
    count = tl.where(unused, 0, tl.load(chunks + i_t * 4 + 2))
    return sequence, first, count, (tl.load(chunks + i_t * 4 + 3) > 0) & (count > 0)


@triton.jit
def _rows_before(x, first, has_past, o_d, m_d, x_row, W: tl.constexpr):
    """Rows first - 1, ..., first - (W - 1) in float32, zeros where the sequence starts at `first`."""
    window = ()
    for j in tl.static_range(1, W):
        window = window + (tl.load(_row(x, first - j, x_row) + o_d, mask=m_d & has_past, other=0.0).to(tl.float32),)
    return window


@triton.jit
def _convolved(newest, window, taps, b, W: tl.constexpr):
    """b + taps[0] * newest + sum over j of taps[j] * window[j - 1], float32 [BD], in this order."""
    y = b + taps[0] * newest
    for j in tl.static_range(1, W):
        y += taps[j] * window[j - 1]
    return y


@triton.jit(do_not_specialize=["num_chunks", "chunks_per_program"])
def conv1d_forward_kernel(
    x, weight, bias, y, chunks, num_chunks, chunks_per_program, x_row,
    D: tl.constexpr, W: tl.constexpr, WP: tl.constexpr, BD: tl.constexpr, GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """One program: BD channels of `chunks_per_program` consecutive chunks.

    For W = 4 and a chunk of rows 64..127 of a sequence it loads rows 63, 62, 61, then walks: row 64 with them, row 65
    with 64, 63, 62, and so on, GROUP rows between two rounds of loads.
    """
    n_d: tl.constexpr = (D + BD - 1) // BD
    i_p, i_d = tl.program_id(0) // n_d, tl.program_id(0) % n_d
    o_d = i_d * BD + tl.arange(0, BD)
    m_d = o_d < D
    taps = _load_taps(weight, i_d, D, W, WP, BD)
    b = _load_bias(bias, o_d, m_d, HAS_BIAS, BD)
    for i_t in range(i_p * chunks_per_program, tl.minimum((i_p + 1) * chunks_per_program, num_chunks)):
        _sequence, first, count, has_past = _chunk(chunks, i_t)
        window = _rows_before(x, first, has_past, o_d, m_d, x_row, W)
        for k in range(0, count, GROUP):
            rows = ()
            for u in tl.static_range(GROUP):
                m_row = m_d & (k + u < count)
                rows = rows + (tl.load(_row(x, first + k + u, x_row) + o_d, mask=m_row, other=0.0),)
            for u in tl.static_range(GROUP):
                newest = rows[u].to(tl.float32)
                out = _convolved(newest, window, taps, b, W)
                if SILU:
                    out *= sigmoid(out)
                m_row = m_d & (k + u < count)
                tl.store(_row(y, first + k + u, D) + o_d, out.to(y.dtype.element_ty), mask=m_row)
                window = _pushed(newest, window, W - 1)


@triton.jit
def _step_back(newest, dy, window, behind, taps, b, W: tl.constexpr, SILU: tl.constexpr):
    """Backward of one row: its gradient before the activation, the finished dx of the row W - 1 before, and the
    unfinished dx of the W - 1 rows between.

    behind[j] is what later rows gave so far to the dx of the row j + 1 before this one. With W = 3 and d_t the gradient
    before the activation, row 7 starts dx_7 = taps[0] d_7, adds taps[1] d_7 to dx_6 and finishes dx_5 with taps[2] d_7.
    """
    d = dy.to(tl.float32)
    if SILU:
        y = _convolved(newest, window, taps, b, W)
        s = sigmoid(y)
        d *= s * (1.0 + y * (1.0 - s))
    unfinished = (taps[0] * d,)
    for j in tl.static_range(1, W - 1):
        unfinished = unfinished + (behind[j - 1] + taps[j] * d,)
    return d, behind[W - 2] + taps[W - 1] * d, unfinished


@triton.jit
def _rows_after(chunks, i_t, num_chunks, sequence, count, C: tl.constexpr, W: tl.constexpr):
    """How many of the W - 1 rows behind a chunk belong to its sequence: those of the next chunk, if it does."""
    has_next = (i_t + 1 < num_chunks) & (count == C)
    next_sequence = tl.load(chunks + (i_t + 1) * 4, mask=has_next, other=-1)
    next_count = tl.load(chunks + (i_t + 1) * 4 + 2, mask=has_next, other=0)
    return tl.where(has_next & (next_sequence == sequence), tl.minimum(next_count, W - 1), 0)


@triton.jit(do_not_specialize=["num_chunks", "chunks_per_program"])
def conv1d_backward_kernel(
    dy, x, weight, bias, dx, partial, chunks, num_chunks, chunks_per_program, x_row, dy_row,
    D: tl.constexpr, W: tl.constexpr, WP: tl.constexpr, BD: tl.constexpr, GROUP: tl.constexpr, C: tl.constexpr,
    HAS_BIAS: tl.constexpr, SILU: tl.constexpr, PARAMETERS: tl.constexpr,
):  # fmt: skip
    """One program: BD channels of `chunks_per_program` consecutive chunks. partial is [P, W + 1, D] float32: the sums
    of tap W - 1 - j in row j, that of the bias in row W; left alone unless PARAMETERS.

    With d_t = dy_t * silu'(y_t), dx_t = sum_j taps[j] d_{t+j} and dtaps[j] = sum_t d_t x_{t-j}. dx of row t is finished
    W - 1 rows later, so a chunk's walk goes on for W - 1 rows behind it, whose own sums belong to the next chunk.
    """
    n_d: tl.constexpr = (D + BD - 1) // BD
    i_p, i_d = tl.program_id(0) // n_d, tl.program_id(0) % n_d
    o_d = i_d * BD + tl.arange(0, BD)
    m_d = o_d < D
    taps = _load_taps(weight, i_d, D, W, WP, BD)
    b = _load_bias(bias, o_d, m_d, HAS_BIAS, BD)
    sums = _zeros(W + 1, BD)
    for i_t in range(i_p * chunks_per_program, tl.minimum((i_p + 1) * chunks_per_program, num_chunks)):
        sequence, first, count, has_past = _chunk(chunks, i_t)
        after = _rows_after(chunks, i_t, num_chunks, sequence, count, C, W)
        window = _rows_before(x, first, has_past, o_d, m_d, x_row, W)
        behind = _zeros(W - 1, BD)
        for k in range(0, count, GROUP):
            x_rows, dy_rows = (), ()
            for u in tl.static_range(GROUP):
                m_row = m_d & (k + u < count)
                x_rows = x_rows + (tl.load(_row(x, first + k + u, x_row) + o_d, mask=m_row, other=0.0),)
                dy_rows = dy_rows + (tl.load(_row(dy, first + k + u, dy_row) + o_d, mask=m_row, other=0.0),)
            for u in tl.static_range(GROUP):
                newest = x_rows[u].to(tl.float32)
                d, finished, behind = _step_back(newest, dy_rows[u], window, behind, taps, b, W, SILU)
                done = k + u - (W - 1)
                m_done = m_d & (done >= 0) & (done < count)
                tl.store(_row(dx, first + done, D) + o_d, finished.to(dx.dtype.element_ty), mask=m_done)
                if PARAMETERS:
                    sums = _added(sums, d, newest, window, W)
                window = _pushed(newest, window, W - 1)
        walked = tl.cdiv(count, GROUP) * GROUP
        for u in tl.static_range(W - 1):
            m_row = m_d & (walked + u < count + after)
            newest = tl.load(_row(x, first + walked + u, x_row) + o_d, mask=m_row, other=0.0).to(tl.float32)
            dy_next = tl.load(_row(dy, first + walked + u, dy_row) + o_d, mask=m_row, other=0.0)
            d, finished, behind = _step_back(newest, dy_next, window, behind, taps, b, W, SILU)
            done = walked + u - (W - 1)
            m_done = m_d & (done >= 0) & (done < count)
            tl.store(_row(dx, first + done, D) + o_d, finished.to(dx.dtype.element_ty), mask=m_done)
            window = _pushed(newest, window, W - 1)
    if PARAMETERS:
        for j in tl.static_range(W + 1):
            tl.store(partial + (i_p.to(tl.int64) * (W + 1) + j) * D + o_d, sums[j], mask=m_d)


@triton.jit
def _added(sums, d, newest, window, W: tl.constexpr):
    """The sums of the taps and, last, of the bias after one more row: d times the rows that each tap multiplied."""
    added = (sums[0] + d * newest,)
    for j in tl.static_range(1, W):
        added = added + (sums[j] + d * window[j - 1],)
    return added + (sums[W] + d,)


@triton.jit
def conv1d_reduce_kernel(
    partial, dweight, dbias, num_partials,
    D: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """One program: the sum over the first dimension of partial [P, W + 1, D] for one tap (or the bias) and BD channels,
    blocks of ROWS partials one after the other, then one tree. dweight is [D, W]."""
    n_d: tl.constexpr = (D + BD - 1) // BD
    j, i_d = tl.program_id(0) // n_d, tl.program_id(0) % n_d
    o_d, o_p = i_d * BD + tl.arange(0, BD), tl.arange(0, ROWS)
    sums = tl.zeros([ROWS, BD], tl.float32)
    for start in range(0, num_partials, ROWS):
        row = (start + o_p[:, None]).to(tl.int64) * (W + 1) + j
        mask = (start + o_p[:, None] < num_partials) & (o_d[None, :] < D)
        sums += tl.load(partial + row * D + o_d[None, :], mask=mask, other=0.0)
    total = tl.sum(sums, axis=0)
    tl.store(dweight + o_d * W + (W - 1 - j), total.to(dweight.dtype.element_ty), mask=(o_d < D) & (j < W))
    if HAS_BIAS:
        tl.store(dbias + o_d, total.to(dbias.dtype.element_ty), mask=(o_d < D) & (j == W))


def unsupported(x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    """Why these kernels cannot serve a call whose shapes fit each other; None when they can."""
    W = weight.shape[-1]
    if not MIN_TAPS <= W <= MAX_TAPS:
        return f"{W} taps, not {MIN_TAPS} to {MAX_TAPS}"
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"{name} is {tensor.dtype}"
    return None


def _block(D: int, channels_per_thread: int) -> tuple[int, int]:
    """(channels, warps) of a program: no more warps than D fills."""
    warps = min(MAX_WARPS, triton.next_power_of_2(triton.cdiv(D, 32 * channels_per_thread)))
    return min(32 * channels_per_thread * warps, triton.next_power_of_2(D)), warps


def _chunks_per_program(tables: ChunkTables, column_blocks: int, device: torch.device) -> int:
    return max(1, tables.num_chunks * column_blocks // (PROGRAMS_PER_SM * multiprocessors(device)))


def _by_rows(x: Tensor) -> Tensor:
    """x, copied only if its channels are not side by side: a section of a wider tensor is read where it lies."""
    return x if x.stride(1) == 1 and x.stride(0) >= 0 else x.contiguous()


@launches
def conv1d_forward(x: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor | None, silu: bool) -> Tensor:
    """y [T, D] in x's dtype from x [T, D], weight [D, W], bias [D] or None; see `conv1d.causal_conv1d`."""
    T, D = x.shape
    W = weight.shape[1]
    y = torch.empty(T, D, dtype=x.dtype, device=x.device)
    if y.numel():
        x, tables = _by_rows(x), chunk_tables(1, T, cu_seqlens, x.device)
        BD, warps = _block(D, FORWARD_BYTES // x.element_size())
        n_d = triton.cdiv(D, BD)
        joined = min(MAX_FORWARD_CHUNKS, _chunks_per_program(tables, n_d, x.device))
        conv1d_forward_kernel[(triton.cdiv(tables.num_chunks, joined) * n_d,)](
            x, weight.contiguous(), dense(bias), y, tables.chunks, tables.num_chunks, joined, x.stride(0),
            D=D, W=W, WP=triton.next_power_of_2(W), BD=BD, GROUP=FORWARD_GROUP, HAS_BIAS=bias is not None, SILU=silu,
            num_warps=warps,
        )  # fmt: skip
    return y


@launches
def conv1d_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor | None, silu: bool, parameters: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias), each in the dtype of what it is the gradient of.

    dweight and dbias are empty without `parameters`, dbias also without a bias.
    """
    T, D = x.shape
    W = weight.shape[1]
    dx = torch.empty(T, D, dtype=x.dtype, device=x.device)
    dweight, dbias = _empty_parameter_gradients(weight, bias, parameters)
    if not dx.numel():
        return dx, dweight.zero_(), dbias.zero_()
    x, dy, tables = _by_rows(x), _by_rows(dy), chunk_tables(1, T, cu_seqlens, x.device)
    BD, warps = _block(D, BACKWARD_CHANNELS)
    n_d = triton.cdiv(D, BD)
    joined = _chunks_per_program(tables, n_d, x.device)
    programs = triton.cdiv(tables.num_chunks, joined)
    partial = torch.empty(programs if parameters else 0, W + 1, D, dtype=torch.float32, device=x.device)
    conv1d_backward_kernel[(programs * n_d,)](
        dy, x, weight.contiguous(), dense(bias), dx, partial, tables.chunks, tables.num_chunks, joined, x.stride(0),
        dy.stride(0),
        D=D, W=W, WP=triton.next_power_of_2(W), BD=BD, GROUP=BACKWARD_GROUP, C=CHUNK, HAS_BIAS=bias is not None,
        SILU=silu, PARAMETERS=parameters, num_warps=warps,
    )  # fmt: skip
    if parameters:
        block = min(32, triton.next_power_of_2(D))
        conv1d_reduce_kernel[((W + (bias is not None)) * triton.cdiv(D, block),)](
            partial, dweight, dbias, programs, D=D, W=W, ROWS=64, BD=block, HAS_BIAS=bias is not None, num_warps=4
        )
    return dx, dweight, dbias


def _empty_parameter_gradients(weight: Tensor, bias: Tensor | None, parameters: bool) -> tuple[Tensor, Tensor]:
    dweight = weight.new_empty(weight.shape if parameters else (0,))
    return dweight, weight.new_empty(0) if bias is None or not parameters else bias.new_empty(bias.shape)


@torch.library.custom_op("gdn_cp::causal_conv1d", mutates_args=())
def causal_conv1d_op(x: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor | None, silu: bool) -> Tensor:
    """`conv1d_forward` as a torch operator, so that torch.compile and activation checkpointing see one node."""
    return conv1d_forward(x, weight, bias, cu_seqlens, silu)


@torch.library.custom_op("gdn_cp::causal_conv1d_backward", mutates_args=())
def causal_conv1d_backward_op(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor | None, silu: bool, parameters: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`conv1d_backward` as a torch operator."""
    return conv1d_backward(dy, x, weight, bias, cu_seqlens, silu, parameters)


@causal_conv1d_op.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor | None, silu: bool) -> Tensor:
    return x.new_empty(x.shape)


@causal_conv1d_backward_op.register_fake
def _(dy, x, weight, bias, cu_seqlens, silu, parameters):
    return x.new_empty(x.shape), *_empty_parameter_gradients(weight, bias, parameters)


def _setup_context(ctx, inputs, output) -> None:
    x, weight, bias, cu_seqlens, silu = inputs
    ctx.save_for_backward(x, weight, bias, cu_seqlens)
    ctx.silu = silu


def _backward(ctx, dy: Tensor):
    x, weight, bias, cu_seqlens = ctx.saved_tensors
    parameters = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    dx, dweight, dbias = causal_conv1d_backward_op(dy, x, weight, bias, cu_seqlens, ctx.silu, parameters)
    if not parameters:
        return dx, None, None, None, None
    return dx, dweight, None if bias is None else dbias, None, None


causal_conv1d_op.register_autograd(_backward, setup_context=_setup_context)


def compile_cases() -> list[CompileCase]:
    """bfloat16 channels of a section of a projection with 4 taps; float32; 8 taps and every option."""
    cases = [
        *_cases_of("bf16", "*bf16", "*bf16", 4, True),
        *_cases_of("fp32", "*fp32", "*fp32", 4, True),
        *_cases_of("bf16/W8", "*bf16", "*fp32", 8, False),
    ]
    from gdn_cp.kernels.compile_report import CompileCase

    sums = {"partial": "*fp32", "dweight": "*bf16", "dbias": "*bf16", "num_partials": "i32"}
    constants = {"D": 2048, "W": 4, "ROWS": 64, "BD": 32, "HAS_BIAS": True}
    return [*cases, CompileCase("conv1d.reduce", conv1d_reduce_kernel, sums, constants)]


def _cases_of(name: str, x: str, weight: str, W: int, main: bool, D: int = 2048) -> list[CompileCase]:
    """Forward and backward for one set of types; the bias is left out with 4 taps, as in Qwen3-Next."""
    from gdn_cp.kernels.compile_report import CompileCase

    pointers = {"x": x, "weight": weight, "chunks": "*i32", **({"bias": weight} if W > 4 else {})}
    numbers = {"num_chunks": "i32", "chunks_per_program": "i32", "x_row": "i32"}
    constants = {"D": D, "W": W, "WP": triton.next_power_of_2(W), "HAS_BIAS": W > 4, "SILU": True}
    if W <= 4:
        constants["bias"] = None
    BD, warps = _block(D, FORWARD_BYTES // (2 if x == "*bf16" else 4))
    forward = CompileCase(
        f"conv1d.forward/{name}", conv1d_forward_kernel, {**pointers, **numbers, "y": x},
        {**constants, "BD": BD, "GROUP": FORWARD_GROUP}, num_warps=warps, divisible=("x_row",), main=main,
    )  # fmt: skip
    BD, warps = _block(D, BACKWARD_CHANNELS)
    backward = CompileCase(
        f"conv1d.backward/{name}", conv1d_backward_kernel,
        {**pointers, **numbers, "dy": x, "dx": x, "partial": "*fp32", "dy_row": "i32"},
        {**constants, "BD": BD, "GROUP": BACKWARD_GROUP, "C": CHUNK, "PARAMETERS": True},
        num_warps=warps, divisible=("x_row", "dy_row"), main=main,
    )  # fmt: skip
    return [forward, backward]
