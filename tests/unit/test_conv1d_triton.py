"""The Triton convolution against the float64 one in plain torch: values, gradients, boundaries, strides, repetition.

float32 keeps about 1e-7 of each element; a sum of up to 300 of them, in any order, stays below 300 * 6e-8 ~ 2e-5.
"""

from itertools import accumulate
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from gdn_cp.kernels import conv1d_triton
from gdn_cp.kernels.backends import wants_kernels
from gdn_cp.kernels.conv1d import causal_conv1d, causal_conv1d_reference
from gdn_cp.kernels.conv1d_triton import (
    Channels,
    GateColumns,
    Halo,
    SectionGradients,
    causal_conv1d_backward_op,
    causal_conv1d_op,
    conv1d_backward,
    convolve_rows,
    convolve_rows_backward,
)
from gdn_cp.kernels.sums_triton import TapSums, sum_taps

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = 2e-5


def make_inputs(
    T: int, D: int, W: int, *, bias: bool = True, dtype: torch.dtype = torch.float32
) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(T + 10 * D + 100 * W)
    shapes = [(T, D), (D, W), (D,)]
    x, weight, b = (torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes)
    return [x, weight, b if bias else None]


def rounding(dtype: torch.dtype) -> float:
    """Relative error of one rounding to dtype: half an ulp; Triton's interpreter cuts bfloat16's digits off instead."""
    return torch.finfo(dtype).eps * (1 if dtype == torch.bfloat16 and DEVICE == "cpu" else 0.5)


def boundaries(lengths: list[int], dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=dtype, device=DEVICE)


def relative_error(x: Tensor, expected: Tensor) -> float:
    return ((x.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def leaves_of(inputs: list[Tensor | None], dtype: torch.dtype | None = None) -> list[Tensor | None]:
    return [None if t is None else t.detach().to(dtype or t.dtype, copy=True).requires_grad_() for t in inputs]


def check(inputs: list[Tensor | None], cu_seqlens: Tensor | None, silu: bool = True, tolerance: float = TOLERANCE):
    """Values and every gradient of the kernels against the float64 reference."""
    leaves, exact = leaves_of(inputs), leaves_of(inputs, torch.float64)
    y = causal_conv1d_op(*leaves, cu_seqlens, silu)
    expected = causal_conv1d_reference(*exact, cu_seqlens, silu)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    y.backward(dy)
    expected.backward(dy.double())
    assert y.dtype == leaves[0].dtype
    assert y.is_contiguous()
    assert relative_error(y, expected) < tolerance
    for leaf, wanted in zip(leaves, exact, strict=True):
        if leaf is not None:
            assert leaf.grad.dtype == leaf.dtype
            assert relative_error(leaf.grad, wanted.grad) < tolerance


@pytest.mark.parametrize(
    ("lengths", "D", "W"),
    [
        ([1], 1, 4),
        ([130], 20, 4),  # a chunk cut by the group of rows, three chunks of one sequence
        ([64, 64], 8, 2),  # chunks end where sequences do
        ([0, 65, 0, 0, 3, 0], 24, 8),  # one row behind a chunk, where 7 are wanted; empty sequences
        ([3, 66, 5], 40, 3),
    ],
)
def test_packed_rows_and_gradients_match_float64(lengths: list[int], D: int, W: int):
    check(make_inputs(sum(lengths), D, W), boundaries(lengths))


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_options_on_one_sequence(silu: bool, bias: bool):
    check(make_inputs(66 if silu and bias else 9, 6, 4, bias=bias), None, silu)


def test_programs_of_several_chunks(monkeypatch: pytest.MonkeyPatch):
    """Chunks of 64, 2, 10 and 5 rows, two to a program; int64 boundaries."""
    monkeypatch.setattr(conv1d_triton, "_chunks_per_program", lambda *_: 2)
    check(make_inputs(81, 9, 3), boundaries([66, 10, 0, 5], torch.int64))


def test_cut_changes_no_bit_of_rows(monkeypatch: pytest.MonkeyPatch):
    (x, weight, bias), cu_seqlens = make_inputs(69, 12, 3), boundaries([66, 3])
    y = causal_conv1d_op(x, weight, bias, cu_seqlens, True)
    dx = conv1d_backward(x, x, weight, bias, cu_seqlens, True, False)[0]
    monkeypatch.setattr(conv1d_triton, "_chunks_per_program", lambda *_: 3)
    assert torch.equal(causal_conv1d_op(x, weight, bias, cu_seqlens, True), y)
    part = slice(3, 8)
    alone = (x[:, part], weight[part], bias[part], cu_seqlens, True)
    assert torch.equal(causal_conv1d_op(*alone), y[:, part])
    assert torch.equal(conv1d_backward(x[:, part], *alone, False)[0], dx[:, part])


def test_sections_of_wider_tensors_are_read_in_place():
    whole = make_inputs(11, 32, 4)[0]
    x, dy = whole[:, 8:24], whole[:, 16:]
    _, weight, bias = make_inputs(11, 16, 4)
    cu_seqlens = boundaries([5, 6])
    assert conv1d_triton._by_rows(x).data_ptr() == x.data_ptr()
    strided = conv1d_backward(dy, x, weight, bias, cu_seqlens, True, True)
    dense = conv1d_backward(dy.contiguous(), x.contiguous(), weight, bias, cu_seqlens, True, True)
    assert torch.equal(
        causal_conv1d_op(x, weight, bias, cu_seqlens, True),
        causal_conv1d_op(x.contiguous(), weight, bias, cu_seqlens, True),
    )
    assert all(torch.equal(a, b) for a, b in zip(strided, dense, strict=True))
    transposed = x.t().contiguous().t()
    assert torch.equal(conv1d_backward(dy, transposed, weight, bias, cu_seqlens, True, True)[1], dense[1])


def test_nan_of_one_sequence_stays_in_it_forward_and_backward():
    # Behind a full chunk, which would take its rows behind it from the next one, were that of its sequence.
    x, weight, bias = leaves_of(make_inputs(70, 4, 4))
    with torch.no_grad():
        x[64:66] = torch.nan
    y = causal_conv1d_op(x, weight, bias, boundaries([64, 2, 4]), True)
    clean = [*range(64), *range(66, 70)]
    assert y[clean].isfinite().all()
    dy = torch.ones_like(y)
    dy[64:66] = torch.nan
    (dx,) = torch.autograd.grad(y, [x], dy)
    assert dx[clean].isfinite().all()
    assert dx[64:66].isnan().all()


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_extreme_values_saturate_as_silu_does():
    x = torch.tensor([-200.0, -90.0, -20.0, 0.0, 20.0, 90.0, 1e4], device=DEVICE)[:, None].requires_grad_()
    weight = torch.tensor([[0.0, 1.0]], device=DEVICE)
    y = causal_conv1d_op(x, weight, None, None, True)
    (dx,) = torch.autograd.grad(y.sum(), [x])
    exact = x.detach().double().requires_grad_()
    expected = torch.nn.functional.silu(exact)
    (wanted,) = torch.autograd.grad(expected.sum(), [exact])
    # e^20 takes the rounding of 20 * log2(e), 2^-20, and the exponential's own few units of 2^-24.
    assert torch.allclose(y.double(), expected, rtol=4e-6, atol=1e-35)
    assert torch.allclose(dx.double(), wanted, rtol=4e-6, atol=1e-35)


def test_repetition_gives_the_same_bits():
    lengths = [700, 200] if DEVICE == "cuda" else [9, 6]
    x, weight, bias = make_inputs(sum(lengths), 5, 4)
    arguments = (x, x, weight, bias, boundaries(lengths), True, True)
    first, second = (causal_conv1d_backward_op(*arguments) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_sum_of_partials_spans_many_blocks():
    partial = torch.randn(130, 3, 5, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    dweight, dbias = torch.empty(5, 2, device=DEVICE), torch.empty(5, device=DEVICE)
    sum_taps(TapSums(partial, dweight, dbias, qk=0, v=5, shares=1, share=0))
    total = partial.double().sum(0)
    assert relative_error(dweight, total[:2].flip(0).t()) < TOLERANCE
    assert relative_error(dbias, total[2]) < TOLERANCE


@pytest.mark.parametrize("padded", [True, False])
def test_share_of_an_exchange_buffer_equals_the_rows_alone(padded: bool):
    """q|k|v of share 1 of 3 in rows of any order, NaN where nobody may look; what is read of x and written to dx."""
    qk, v, heads, shares, share, T, R = 5, 7, 3, 3, 1, 70, 75
    D = 2 * qk + v
    x, weight, bias = make_inputs(T, D, 3)
    _, whole_weight, whole_bias = make_inputs(T, D * shares, 3)
    own = torch.cat([torch.arange(w) + s + share * w for s, w in ((0, qk), (3 * qk, qk), (6 * qk, v))]).to(DEVICE)
    weight, bias, cu_seqlens = whole_weight[own], whole_bias[own], boundaries([66, 0, 4])
    padding = torch.zeros(T, 1, dtype=torch.bool, device=DEVICE)
    padding[63:66] = padded
    x = torch.where(padding, 0, x)
    gates = torch.where(padding, 0, torch.randn(T, 2 * heads).to(DEVICE))
    places = torch.randperm(R)[:T].to(DEVICE)
    rows = torch.where(padding[:, 0], -1 - places, places).int()
    buffer, dx = torch.full((2, R, D + 2 * heads + 3), torch.nan, device=DEVICE)
    buffer[places, :-3] = torch.where(padding, torch.nan, torch.cat([x, gates], 1))
    channels, columns = Channels(qk, v, shares, share), GateColumns(D, 2 * heads)

    y, copied, kept = convolve_rows(
        buffer, whole_weight, whole_bias, cu_seqlens, channels, T, rows=rows, gates=columns, keep=True
    )
    assert torch.equal(y, causal_conv1d_op(x, weight, bias, cu_seqlens, True))
    assert torch.equal(copied, gates)
    assert torch.equal(kept, x)

    dy = torch.where(padding, 0, torch.randn(T, D).to(DEVICE))
    dgates = torch.randn(T, 2 * heads).to(DEVICE)
    gradients = SectionGradients(
        *(g.contiguous() for g in (*dy.split((qk, qk, v), 1), dgates[:, :heads], dgates[:, heads:]))
    )
    for source, source_rows in ((buffer, rows), (kept, None)):
        dx.fill_(torch.nan)
        dweight, dbias = convolve_rows_backward(
            source, gradients, whole_weight, whole_bias, cu_seqlens, channels, dx, rows=source_rows, dx_rows=rows,
            gates=columns,
        )  # fmt: skip
        expected = conv1d_backward(dy, x, weight, bias, cu_seqlens, True, True)
        assert torch.equal(dx[places, :-3], torch.where(padding, 0, torch.cat([expected[0], dgates], 1)))
        assert dx.isnan().sum() == 3 * R + (R - T) * (D + 2 * heads)
        for gradient, part in ((dweight, expected[1]), (dbias, expected[2])):
            assert relative_error(gradient[own], part.double()) < TOLERANCE
            assert torch.count_nonzero(gradient) == torch.count_nonzero(gradient[own])


def test_only_what_needs_a_gradient_gets_one():
    x, weight, bias = make_inputs(5, 4, 4)
    (dx,) = torch.autograd.grad(causal_conv1d_op(x.requires_grad_(), weight, bias, None, True).sum(), [x])
    both = conv1d_backward(torch.ones_like(x), x.detach(), weight, bias, None, True, True)
    assert torch.equal(dx, both[0])
    weight.requires_grad_()
    (dweight,) = torch.autograd.grad(causal_conv1d_op(x.detach(), weight, bias, None, True).sum(), [weight])
    assert torch.equal(dweight, both[1])


def test_no_rows_and_no_channels():
    x, weight, bias = leaves_of(make_inputs(0, 4, 4))
    causal_conv1d_op(x, weight, bias, boundaries([0, 0]), True).sum().backward()
    assert x.grad.shape == (0, 4)
    assert not weight.grad.any()
    assert not bias.grad.any()


def test_checkpointed_gradients_are_the_same():
    inputs, cu_seqlens = make_inputs(7, 4, 3), boundaries([3, 4])
    gradients = []
    for checkpointed in (False, True):
        leaves = leaves_of(inputs)

        def run(*arguments: Tensor) -> Tensor:
            return causal_conv1d_op(*arguments, cu_seqlens, True)

        y = torch.utils.checkpoint.checkpoint(run, *leaves, use_reentrant=False) if checkpointed else run(*leaves)
        gradients.append(torch.autograd.grad(y.sum(), leaves))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("bias", [True, False])
def test_registered_operators_obey_their_schema(bias: bool):
    x, weight, b = make_inputs(4, 4, 2, bias=bias)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    arguments = (x, weight, b, boundaries([1, 3]), True)
    torch.library.opcheck(causal_conv1d_op, arguments, test_utils=checks)
    torch.library.opcheck(causal_conv1d_backward_op, (x, *arguments, True), test_utils=checks[:2])
    torch.library.opcheck(causal_conv1d_backward_op, (x, *arguments, False), test_utils=checks[:2])


@pytest.mark.parametrize(
    ("dtype", "W", "reason"),
    [
        (torch.float32, 4, None),
        (torch.bfloat16, 8, None),
        (torch.float32, 1, "1 taps, not 2 to 8"),
        (torch.float32, 9, "9 taps, not 2 to 8"),
        (torch.float64, 4, "x is torch.float64"),
    ],
)
def test_what_the_kernels_serve(dtype: torch.dtype, W: int, reason: str | None):
    assert conv1d_triton.unsupported(*make_inputs(2, 3, W, dtype=dtype)) == reason


@pytest.mark.parametrize(
    ("is_cuda", "dtype", "backend", "wanted"),
    [
        (True, torch.bfloat16, None, True),
        (True, torch.float32, "triton", True),
        (True, torch.float64, None, False),
        (True, torch.float32, "reference", False),
        (True, torch.float32, "recurrent", False),
        (False, torch.float32, None, False),
    ],
)
def test_when_kernels_are_wanted(
    is_cuda: bool, dtype: torch.dtype, backend: str | None, wanted: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("GDN_CP_BACKEND", raising=False)
    if backend is not None:
        monkeypatch.setenv("GDN_CP_BACKEND", backend)
    assert wants_kernels(SimpleNamespace(is_cuda=is_cuda, dtype=dtype)) is wanted


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_once(dtype: torch.dtype):
    """Each result is a float32 one rounded to dtype, so that the norm errs by no more than an element."""
    check(make_inputs(17, 6, 4, dtype=dtype), boundaries([5, 12]), tolerance=rounding(dtype) + TOLERANCE)


def test_float32_parameters_with_bfloat16_rows():
    x, _, _ = make_inputs(17, 6, 4, dtype=torch.bfloat16)
    _, weight, bias = make_inputs(17, 6, 4)
    check([x, weight, bias], None, tolerance=rounding(torch.bfloat16) + TOLERANCE)


@pytest.mark.parametrize("lengths", [(70, 2, 66), (2, 5)])
def test_a_halo_continues_sequences_cut_anywhere(lengths):
    """Three sequences' first parts before their second parts, the halo of each second part out of a shuffled buffer."""
    W, D, T = 4, 24, sum(lengths)
    x, weight, bias = (t for t in make_inputs(T, D, W) if t is not None)
    dy = torch.randn(T, D, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    cuts = [length // 2 for length in lengths]
    starts = [0, *accumulate(lengths)][:-1]
    halo_rows, at = [], []
    for start, cut in zip(starts, cuts, strict=True):
        at += [[-1] * (W - 1), [-1] * (W - 1)]
        for j in range(min(W - 1, cut)):
            at[-1][j] = len(halo_rows)
            halo_rows.append(start + cut - 1 - j)
    places = torch.tensor(at, dtype=torch.int32, device=DEVICE)
    halo = Halo(x[halo_rows], places)
    parts = boundaries([n for length, cut in zip(lengths, cuts, strict=True) for n in (cut, length - cut)])
    channels, whole = Channels(0, D), boundaries(list(lengths))
    kept = torch.full((len(at), W - 1, D), torch.nan, device=DEVICE)
    y, _, _ = convolve_rows(x, weight, bias, parts, channels, T, halo=halo, kept_halo=kept)
    expected, _, _ = convolve_rows(x, weight, bias, whole, channels, T)
    assert torch.equal(y, expected)
    read = halo.rows[places.clamp(min=0).long()].masked_fill((places < 0)[..., None], 0)
    tokens = parts.diff() > 0
    assert torch.equal(kept[tokens], read[tokens])
    in_order = torch.arange(places.numel(), dtype=torch.int32, device=DEVICE).view_as(places)
    again = Halo(kept.flatten(0, 1), in_order.masked_fill(places < 0, -1))
    assert torch.equal(convolve_rows(x, weight, bias, parts, channels, T, halo=again)[0], y)

    dx, wanted, d_halo = torch.empty_like(x), torch.empty_like(x), Halo(torch.full_like(halo.rows, torch.nan), places)
    call = {"gradients": dy, "weight": weight, "bias": bias, "channels": channels}
    found = convolve_rows_backward(x, cu_seqlens=parts, dx=dx, halo=halo, d_halo=d_halo, **call)
    sums = convolve_rows_backward(x, cu_seqlens=whole, dx=wanted, **call)
    dx.index_add_(0, torch.tensor(halo_rows, device=DEVICE), d_halo.rows)
    for got, exact in ((dx, wanted), *zip(found, sums, strict=True)):
        assert relative_error(got, exact.double()) < TOLERANCE


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("lengths", "D", "W"), [([4000, 1, 0, 37, 3000], 1040, 4), ([2000] * 3, 2048, 8)])
def test_gpu_wide_rows(dtype: torch.dtype, lengths: list[int], D: int, W: int):
    # The longest run of additions in one place is that of a program's rows, then of the programs: below 300 here too.
    check(make_inputs(sum(lengths), D, W, dtype=dtype), boundaries(lengths), tolerance=rounding(dtype) + TOLERANCE)


@pytest.mark.gpu
def test_gpu_dispatch_and_its_switch(monkeypatch: pytest.MonkeyPatch):
    x, weight, bias = make_inputs(300, 64, 4, dtype=torch.bfloat16)
    cu_seqlens = boundaries([100, 200])
    y = causal_conv1d(x, weight[:, None], bias, cu_seqlens=cu_seqlens)
    assert torch.equal(y, causal_conv1d_op(x, weight, bias, cu_seqlens, True))
    monkeypatch.setenv("GDN_CP_BACKEND", "reference")
    reference = causal_conv1d(x, weight, bias, cu_seqlens=cu_seqlens)
    assert torch.equal(reference, causal_conv1d_reference(x, weight, bias, cu_seqlens, True))
    assert relative_error(y, reference.double()) < 2**-8


@pytest.mark.gpu
def test_gpu_waits_for_nothing_and_is_captured_in_a_graph():
    leaves, cu_seqlens = leaves_of(make_inputs(300, 64, 4, dtype=torch.bfloat16)), boundaries([100, 200])
    dy = torch.randn_like(leaves[0])

    def step() -> list[Tensor]:
        y = causal_conv1d(*leaves, cu_seqlens=cu_seqlens)
        return [y, *torch.autograd.grad(y, leaves, dy)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        expected = [t.clone() for t in step()]
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))
    cu_seqlens.copy_(boundaries([150, 150]))  # the captured chunk table follows the boundaries
    graph.replay()
    assert torch.equal(captured[0], causal_conv1d(*leaves, cu_seqlens=boundaries([150, 150])))
