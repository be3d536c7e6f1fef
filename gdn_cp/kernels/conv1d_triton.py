"""Causal depthwise convolution with SiLU over packed rows in Triton, and its gradients: one pass over memory each way.

The backward computes the convolution anew from x. Sums over rows for the weight and bias are float32 sums of each
program, added in a fixed order by a second kernel. No atomics, so a repetition gives the same bits; and no element of y
or dx depends on the cut, so that a channel has the bits that it has alone. The kernels are in `conv1d_kernels`.

Dimensions: T rows, D channels, W taps (2 to 8), BD channels of a program, P row programs.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportReturnType=false
# triton.jit hides the options of a launch from a type checker
from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from gdn_cp.kernels.configs import cdiv, launches, multiprocessors, power_of_2
from gdn_cp.kernels.conv1d_kernels import conv1d_backward_kernel, conv1d_forward_kernel
from gdn_cp.kernels.sums_triton import LaterSums, TapSums, sum_taps
from gdn_cp.kernels.tables import CHUNK, ChunkTables, chunk_tables, dense
from gdn_cp.launch import run_kernel

if TYPE_CHECKING:
    from gdn_cp.kernels.compile_report import CompileCase

MIN_TAPS, MAX_TAPS = 2, 8
MAX_WARPS = 4
FORWARD_BYTES = 16  # of a row that one thread reads
FORWARD_GROUP = 8  # rows whose loads are issued together
FORWARD_REGISTERS = 128  # what that takes with up to 4 taps
# In the backward a thread also holds W + 1 sums and W - 1 unfinished rows for each channel. With 4 channels, and 4 rows
# of x and of dy in work while the next 4 are loaded, it takes about 160 registers for W = 4: 12 warps fit on a
# multiprocessor. With 8 channels 8 warps did, even without loading ahead, which left the memory idle between loads.
BACKWARD_CHANNELS = 4
BACKWARD_GROUP = 4
# Programs for each multiprocessor below which chunks are not joined. Joined chunks share one read of the weights and
# one partial sum; but a multiprocessor has few programs at once, and the last of them, if they are long, leave others
# idle: 5 chunks took 10 % longer than 1 to 4 on an H200.
PROGRAMS_PER_SM = 6
MAX_FORWARD_CHUNKS = 2
MAX_BACKWARD_CHUNKS = 4


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
    warps = min(MAX_WARPS, power_of_2(cdiv(D, 32 * channels_per_thread)))
    return min(32 * channels_per_thread * warps, power_of_2(D)), warps


def _chunks_per_program(tables: ChunkTables, column_blocks: int, device: torch.device) -> int:
    return max(1, tables.num_chunks * column_blocks // (PROGRAMS_PER_SM * multiprocessors(device)))


def _by_rows(x: Tensor) -> Tensor:
    """x, copied only if its channels are not side by side: a section of a wider tensor is read where it lies."""
    return x if x.stride(1) == 1 and x.stride(0) >= 0 else x.contiguous()


class Channels(NamedTuple):
    """The channels of x: q, k and v of widths qk, qk, v, the share-th of `shares` equal parts of each section of the
    parameters, which hold `shares` times as many. One section has qk = 0."""

    qk: int
    v: int
    shares: int = 1
    share: int = 0

    @property
    def count(self) -> int:
        """Channels of x."""
        return 2 * self.qk + self.v


class GateColumns(NamedTuple):
    """Columns of x that are copied and not convolved: `count` of them (beta and alpha, half each) from `first` on."""

    first: int
    count: int


class Halo(NamedTuple):
    """Rows of x before sequences, from elsewhere: `rows` [R, at least D], last stride 1, in the channels of x, and
    `at` int32 [N, W - 1], which of them is how far before a sequence's first row (column j: j + 1; -1: none, zeros)."""

    rows: Tensor
    at: Tensor
    transient: bool = False
    """Whether `rows` will be used again, so that what the backward needs must be copied out by who reads it."""


class SectionGradients(NamedTuple):
    """Gradients of the convolved q, k [T, qk], v [T, v] and of the copied beta, alpha [T, heads], all contiguous."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dbeta: Tensor
    dalpha: Tensor


@lru_cache(maxsize=64)
def _constants(channels: Channels, gates: GateColumns | None, W: int, per_thread: int) -> tuple[dict[str, int], int]:
    """(compile-time sizes, blocks of channels) of a launch; blocks lie in one section."""
    qk, v = channels.qk, channels.v
    BD, warps = _block(min(qk, v) if qk else v, per_thread)
    count = 0 if gates is None else gates.count
    sizes = {
        "QK": qk, "V": v, "SHARES": channels.shares, "W": W, "WP": power_of_2(W), "BD": BD, "C": CHUNK,
        "GATES": count, "BG": power_of_2(max(count, 1)), "num_warps": warps,
    }  # fmt: skip
    return sizes, 2 * cdiv(qk, BD) + cdiv(v, BD)


def _registers(W: int, halo: bool, kept_halo: bool) -> dict[str, int]:
    """What reads a halo may have no more registers than without: a few more cost a program on the multiprocessor.

    What copies the halo too takes no more of itself, and told so ptxas would make its loop longer.
    """
    return {"maxnreg": FORWARD_REGISTERS} if halo and W <= 4 and not kept_halo else {}


@launches
def convolve_rows(
    x: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor | None, channels: Channels, num_rows: int,
    *, silu: bool = True, rows: Tensor | None = None, gates: GateColumns | None = None, keep: bool = False,
    y: Tensor | None = None, halo: Halo | None = None, kept_halo: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """The convolution of rows that stand anywhere, and a copy of the columns behind them, in one launch.

    Args:
        x: [R, at least D], channels in columns 0 .. D - 1, last stride 1.
        weight, bias: [shares * D, W], [shares * D] or None.
        cu_seqlens: boundaries of the batch's T = num_rows rows, or None for one sequence.
        channels: of x, and where they are among the parameters'.
        num_rows: T.
        rows: int32 [T], the row of x at which row i of the batch stands, -1 - r if it is padding (zeros) at r; or None.
        gates: columns to copy.
        keep: also copy what was read of x.
        y: [T, D] with last stride 1, to be written; None: a new one.
        halo: what stands before the sequences of `cu_seqlens`; None: nothing.
        kept_halo: [N, W - 1, D] contiguous: receives what was read of the halo of each sequence that has rows, as
            `Halo.at` orders it, zeros where there is none.

    Returns:
        y, the gates' columns [T, count] or None, and x [T, D] or None; in x's dtype and the batch's order.
    """
    D = channels.count

    def empty(width: int) -> Tensor:
        return torch.empty(num_rows, width, dtype=x.dtype, device=x.device)

    y = empty(D) if y is None else y
    copied, kept = None if gates is None else empty(gates.count), empty(D) if keep else None
    if y.numel():
        tables = chunk_tables(1, num_rows, cu_seqlens, x.device)
        sizes, n_d = _constants(channels, gates, weight.shape[1], FORWARD_BYTES // x.element_size())
        joined = min(MAX_FORWARD_CHUNKS, _chunks_per_program(tables, n_d, x.device))
        run_kernel(conv1d_forward_kernel, cdiv(tables.num_chunks, joined) * (n_d + (gates is not None)),
            x, rows, *_halo_arguments(halo), weight.contiguous(), dense(bias), y, kept, kept_halo, copied,
            tables.chunks, tables.num_chunks, joined, x.stride(0), _row_stride(halo), y.stride(0), channels.share,
            0 if gates is None else gates.first,
            **sizes, GROUP=FORWARD_GROUP, HAS_BIAS=bias is not None, SILU=silu, MAPPED=rows is not None, KEEP=keep,
            HALO=halo is not None, **_registers(weight.shape[1], halo is not None, kept_halo is not None),
        )  # fmt: skip
    return y, copied, kept


@launches
def convolve_rows_backward(
    x: Tensor, gradients: SectionGradients | Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor | None,
    channels: Channels, dx: Tensor, *, silu: bool = True, parameters: bool = True, rows: Tensor | None = None,
    dx_rows: Tensor | None = None, gates: GateColumns | None = None, halo: Halo | None = None,
    d_halo: Halo | None = None, later: LaterSums | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Write the gradient of x (and of the copied columns) to dx [R, at least D], whose rows `dx_rows` places, columns
    as `channels` and `gates` say; other columns are left alone, padded rows become zeros.

    `gradients`: of the results of `convolve_rows`; one tensor [T, D] where channels have one section. x, `rows` and
    `halo` as there. With `halo`, `d_halo` receives its rows' gradients, where `at` says; other rows are left alone.

    Returns (dweight, dbias) in the parameters' shapes and dtypes, zeros for channels of other shares; empty without
    `parameters`, dbias also without a bias. With `later` they are filled when that is launched.
    """
    D, W = channels.count, weight.shape[1]
    one_section = isinstance(gradients, Tensor)
    dq, dk, dv, dbeta, dalpha = (gradients,) * 3 + (None, None) if one_section else gradients
    num_rows = dv.shape[0]
    dweight, dbias = _empty_parameter_gradients(weight, bias, parameters)
    if not num_rows * D:
        return dweight.zero_(), dbias.zero_()
    tables = chunk_tables(1, num_rows, cu_seqlens, x.device)
    sizes, n_d = _constants(channels, gates, W, BACKWARD_CHANNELS)
    joined = min(MAX_BACKWARD_CHUNKS, _chunks_per_program(tables, n_d, x.device))
    programs = cdiv(tables.num_chunks, joined)
    partial = torch.empty(programs if parameters else 0, W + 1, D, dtype=torch.float32, device=x.device)
    run_kernel(conv1d_backward_kernel, programs * (n_d + (gates is not None)),
        dq, dk, dv, dbeta, dalpha, x, rows, *_halo_arguments(halo), weight.contiguous(), dense(bias), dx, dx_rows,
        *_halo_arguments(d_halo), partial, tables.chunks, tables.num_chunks, joined, x.stride(0), _row_stride(halo),
        dq.stride(0), dk.stride(0), dv.stride(0), dx.stride(0), _row_stride(d_halo), channels.share,
        0 if gates is None else gates.first,
        **sizes, GROUP=BACKWARD_GROUP, HAS_BIAS=bias is not None, SILU=silu, PARAMETERS=parameters,
        MAPPED=rows is not None, DX_MAPPED=dx_rows is not None, HALO=halo is not None,
    )  # fmt: skip
    if parameters:
        d_bias = None if bias is None else dbias
        c = channels
        sum_taps(TapSums(partial, dweight, d_bias, qk=c.qk, v=c.v, shares=c.shares, share=c.share), later)
    return dweight, dbias


def _halo_arguments(halo: Halo | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if halo is None else (halo.rows, halo.at)


def _row_stride(halo: Halo | None) -> int:
    return 0 if halo is None else halo.rows.stride(0)


def conv1d_forward(x: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor | None, silu: bool) -> Tensor:
    """y [T, D] in x's dtype from x [T, D], weight [D, W], bias [D] or None; see `conv1d.causal_conv1d`."""
    return convolve_rows(_by_rows(x), weight, bias, cu_seqlens, Channels(0, x.shape[1]), x.shape[0], silu=silu)[0]


def conv1d_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor | None, silu: bool, parameters: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias), each in the dtype of what it is the gradient of.

    dweight and dbias are empty without `parameters`, dbias also without a bias.
    """
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    channels = Channels(0, x.shape[1])
    dweight, dbias = convolve_rows_backward(
        _by_rows(x), _by_rows(dy), weight, bias, cu_seqlens, channels, dx, silu=silu, parameters=parameters
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
    """bfloat16 channels of a section of a projection with 4 taps; float32; 8 taps and every option; one of 4 shares of
    Qwen3-Next's channels, between exchange buffers, alone and with a copy of x; all of them with a halo, between
    exchange buffers and in a rank's own memory."""
    cases = [
        *_cases_of("bf16", "*bf16", "*bf16", Channels(0, 2048)),
        *_cases_of("fp32", "*fp32", "*fp32", Channels(0, 2048)),
        *_cases_of("bf16/W8", "*bf16", "*fp32", Channels(0, 2048), W=8, main=False),
        *_cases_of("exchange", "*bf16", "*bf16", Channels(512, 1024, 4, 1), heads=8),
        *_cases_of("exchange/kept", "*bf16", "*bf16", Channels(512, 1024, 4, 1), heads=8, keep=True),
        *_cases_of("halo", "*bf16", "*bf16", Channels(2048, 4096), heads=32, halo=True, keep_halo=True),
        *_cases_of("halo/own", "*bf16", "*bf16", Channels(2048, 4096), heads=32, halo=True, keep_halo=True, own=True),
    ]

    return cases


def _cases_of(
    name: str, x: str, weight: str, channels: Channels, *, W: int = 4, heads: int = 0, keep: bool = False,
    main: bool = True, halo: bool = False, keep_halo: bool = False, own: bool = False,
) -> list[CompileCase]:  # fmt: skip
    """Forward and backward for one set of types; the bias is left out with 4 taps, as in Qwen3-Next. With heads rows
    are mapped, but for a rank's `own`, and gates copied; where x was kept, only the gradient's rows are mapped."""
    from gdn_cp.kernels.compile_report import CompileCase

    strides = ("x_row", "y_row", "dx_row", "dq_row", "dk_row", "dv_row", "halo_row", "d_halo_row")
    tables = ("rows", "dx_rows", "chunks", "halo_at", "d_halo_at")
    types = dict.fromkeys(("weight", "bias"), weight) | dict.fromkeys(tables, "*i32")
    numbers = ("num_chunks", "chunks_per_program", "share", "gate_column", *strides)
    types |= {"partial": "*fp32"} | dict.fromkeys(numbers, "i32")
    gates = GateColumns(channels.count, 2 * heads) if heads else None
    mapped = gates is not None and not own
    constants: dict[str, Any] = {"HAS_BIAS": W > 4, "SILU": True, "KEEP": keep, "PARAMETERS": True, "HALO": halo}
    constants |= {} if halo else dict.fromkeys(("halo", "halo_at", "d_halo", "d_halo_at"))
    constants |= {} if keep_halo else {"kept_halo": None}
    constants |= {"DX_MAPPED": mapped} | ({} if W > 4 else {"bias": None}) | ({} if keep else {"kept": None})
    if not mapped:
        constants |= {"dx_rows": None}
    if gates is None:
        constants |= dict.fromkeys(("gates", "d_beta", "d_alpha"))
    cases = []
    for kind, kernel, per_thread, group in (
        ("forward", conv1d_forward_kernel, FORWARD_BYTES // (2 if x == "*bf16" else 4), FORWARD_GROUP),
        ("backward", conv1d_backward_kernel, BACKWARD_CHANNELS, BACKWARD_GROUP),
    ):
        sizes, _blocks = _constants(channels, gates, W, per_thread)
        sizes = dict(sizes)
        warps = sizes.pop("num_warps")
        map_x = mapped and not (keep and kind == "backward")
        given = constants | sizes | {"GROUP": group, "MAPPED": map_x} | ({} if map_x else {"rows": None})
        given = {n: value for n, value in given.items() if n in kernel.arg_names}
        signature = {n: types.get(n, x) for n in kernel.arg_names if n not in given}
        divisible = tuple(n for n in strides if n in signature)
        limit = _registers(W, halo, keep_halo) if kind == "forward" else {}
        options: dict[str, Any] = {"num_warps": warps, "divisible": divisible, "main": main, **limit}
        # Two registers of the loop over chunks wait in memory during that over rows.
        options["spills_allowed"] = own and kind == "forward"
        cases.append(CompileCase(f"conv1d.{kind}/{name}", kernel, signature, given, **options))
    return cases
