"""The Triton backward against autograd of the float64 token recurrence, in float32 (interpreted without a GPU)."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gdn_cp.kernels import chunk_bwd, chunk_triton, piece_plan
from gdn_cp.kernels.chunk_triton import chunk_gated_delta_rule_triton
from gdn_cp.kernels.reference import recurrent_gated_delta_rule_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# A gradient is at the end of a path of at most about five sums of 64 terms in each of a few chunks: some 500 roundings
# of float32 in a row, if they never cancel.
TOLERANCE = 500 * 2.0**-24


@dataclass(frozen=True)
class Case:
    """One call; `lengths` packs sequences into one row, else B rows of T tokens."""

    B: int = 1
    T: int = 80
    H: int = 1
    HV: int = 2
    K: int = 16
    V: int = 16
    lengths: tuple[int, ...] | None = None
    norm: bool = True
    gate: str = "raw"  # raw: alpha with A_log and dt_bias; raw without bias; log: given in log space; none
    beta: str = "raw"  # raw: before the sigmoid; plain; none
    state: bool = True
    v_first: bool = False
    strength: float = 1.0


CASES = {
    "two value heads to a key head, partial chunk": Case(T=100),
    "batch of two, V larger than K, states as [V, K]": Case(B=2, T=70, H=2, V=32, v_first=True),
    "packed, with empty and one-token sequences": Case(HV=3, K=32, lengths=(0, 70, 0, 1, 65, 0)),
    "no gate": Case(T=66, gate="none", V=48),
    "log gate, no beta, no norm, head dim padded": Case(K=48, gate="log", beta="none", norm=False),
    "plain beta, no states, no bias": Case(gate="raw without bias", beta="plain", state=False),
    "decay of e^-30 in a chunk and more": Case(T=130, gate="log", strength=1.0),
    "hardly any decay": Case(T=130, gate="log", strength=1e-4),
}


def _inputs(case: Case) -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    B, T = (case.B, case.T) if case.lengths is None else (1, sum(case.lengths))
    N = B if case.lengths is None else len(case.lengths)
    q, k, v = (random(B, T, heads, dim) for heads, dim in ((case.H, case.K), (case.H, case.K), (case.HV, case.V)))
    if not case.norm:
        q, k = torch.nn.functional.normalize(q, dim=-1), torch.nn.functional.normalize(k, dim=-1)
    g = random(B, T, case.HV)
    g = {"none": None, "log": -case.strength * g.abs()}.get(case.gate, g)
    beta = random(B, T, case.HV)
    beta = {"none": None, "plain": beta.sigmoid()}.get(case.beta, beta)
    raw = case.gate.startswith("raw")
    state = random(N, case.HV, *((case.V, case.K) if case.v_first else (case.K, case.V)))
    tensors = {
        "q": q,
        "k": k,
        "v": v,
        "g": g,
        "beta": beta,
        "initial_state": state if case.state else None,
        "A_log": random(case.HV) if raw else None,
        "dt_bias": random(case.HV) if case.gate == "raw" else None,
    }
    return {name: None if x is None else x.float() for name, x in tensors.items()}


def _gradients(function, case: Case, dtype: torch.dtype, device: str, outputs: str = "both") -> dict[str, Tensor]:
    """Gradient of each input, for the same random gradients of o and of the final state."""
    leaves = {
        name: None if x is None else x.to(device, dtype).clone().requires_grad_() for name, x in _inputs(case).items()
    }
    bounds = None
    if case.lengths is not None:
        bounds = torch.tensor((0, *case.lengths)).cumsum(0).to(device, torch.int32)
    o, final = function(
        **leaves,
        scale=case.K**-0.5,
        output_final_state=True,
        use_qk_l2norm_in_kernel=case.norm,
        use_gate_in_kernel=case.gate.startswith("raw"),
        use_beta_sigmoid_in_kernel=case.beta == "raw",
        state_v_first=case.v_first,
        cu_seqlens=bounds,
    )
    generator = torch.Generator().manual_seed(1)
    loss = torch.zeros((), dtype=dtype, device=device)
    for name, x in (("o", o), ("state", final)):
        weight = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(device, dtype)
        if outputs in (name, "both"):
            loss = loss + (x * weight).sum()
    loss.backward()
    return {name: x.grad for name, x in leaves.items() if x is not None and x.grad is not None}


def _assert_close(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(got) == set(expected)
    for name, reference in expected.items():
        reference = reference.cpu()
        error = (got[name].cpu().double() - reference).norm() / reference.norm()
        assert error < TOLERANCE, f"gradient of {name}: relative error {error:.1e}"


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_gradients_equal_those_of_the_recurrence(case):
    expected = _gradients(recurrent_gated_delta_rule_reference, case, torch.float64, "cpu")
    _assert_close(_gradients(chunk_gated_delta_rule_triton, case, torch.float32, DEVICE), expected)


@pytest.mark.parametrize("outputs", ["o", "state"])
def test_states_may_be_transposed_outside_the_kernels(outputs, monkeypatch):
    """What is done for states [V, K] where the kernels must not read them so."""
    case = Case(T=66, V=32, v_first=True, gate="log", strength=1e-2)
    expected = _gradients(recurrent_gated_delta_rule_reference, case, torch.float64, "cpu", outputs)
    asked = []
    forward, backward = chunk_triton.rule_forward, chunk_triton.chunk_gated_delta_rule_bwd
    place = [*inspect.signature(forward).parameters].index("state_v_first")

    def spy_forward(*arguments: Any) -> Any:
        asked.append(arguments[place])
        return forward(*arguments)

    def spy_backward(*arguments: Any, **options: Any) -> Any:
        asked.append(options["state_v_first"])
        return backward(*arguments, **options)

    monkeypatch.setattr(chunk_triton, "rule_forward", spy_forward)
    monkeypatch.setattr(chunk_triton, "chunk_gated_delta_rule_bwd", spy_backward)
    monkeypatch.setattr(chunk_triton, "_turns_states", lambda state_v_first, device: state_v_first)
    got = _gradients(chunk_gated_delta_rule_triton, case, torch.float32, DEVICE, outputs)
    assert asked == [False, False]
    if outputs == "state":
        assert not got.pop("q").any()
        expected.pop("q", None)
    _assert_close(got, expected)


def test_only_where_they_were_seen_to_fail(monkeypatch):
    cuda = torch.device("cuda")
    for reads in (True, False):
        monkeypatch.setattr(chunk_triton, "_READS_V_FIRST", reads)
        assert chunk_triton._turns_states(True, cuda) is not reads
        assert not chunk_triton._turns_states(False, cuda)
        assert not chunk_triton._turns_states(True, torch.device("cpu"))


@pytest.mark.parametrize("outputs", ["o", "state"])
def test_loss_of_only_one_output(outputs):
    case = Case(T=66)
    expected = _gradients(recurrent_gated_delta_rule_reference, case, torch.float64, "cpu", outputs)
    got = _gradients(chunk_gated_delta_rule_triton, case, torch.float32, DEVICE, outputs)
    if outputs == "state":  # the recurrence's queries have no gradient then
        assert not got.pop("q").any()
        expected.pop("q", None)
    _assert_close(got, expected)


PACKED = Case(lengths=(130, 0, 1, 100, 0))


@pytest.mark.parametrize(
    ("case", "pieces"),
    [(Case(T=200), "0"), (PACKED, "0"), (PACKED, "1"), (Case(B=2, T=100, state=False), "0")],
    ids=["one sequence over all borders", "packed, borders within sequences and between them", "and pieces", "batch"],
)
def test_slices_of_two_chunks_change_nothing(case, pieces, monkeypatch):
    monkeypatch.setenv("GDN_CP_PIECE_CHUNKS", pieces)
    whole = _gradients(chunk_gated_delta_rule_triton, case, torch.float32, DEVICE)
    monkeypatch.setattr(chunk_triton, "slice_chunks", lambda *_: 2)
    monkeypatch.setattr(chunk_bwd, "summary_chunks", lambda *_: 2)
    sliced = _gradients(chunk_gated_delta_rule_triton, case, torch.float32, DEVICE)
    for name, gradient in whole.items():
        assert torch.equal(gradient, sliced[name]), f"gradient of {name}"


@pytest.mark.parametrize("case", [Case(T=230), PACKED], ids=["one", "packed"])
def test_backward_may_stay_whole_where_the_forward_is_cut(case, monkeypatch):
    whole = _gradients(chunk_gated_delta_rule_triton, case, torch.float32, DEVICE)
    monkeypatch.setattr(piece_plan, "best_cut", lambda *_: (16, 1, 0))
    _assert_close(_gradients(chunk_gated_delta_rule_triton, case, torch.float32, DEVICE), whole)


@pytest.mark.parametrize("case", [Case(T=230), Case(lengths=(200, 0, 70), v_first=True)], ids=["one", "packed"])
def test_sequences_cut_into_pieces(case, monkeypatch):
    """Pieces of one chunk: the first, inner ones with their maps, a last one that starts from the final gradient."""
    monkeypatch.setenv("GDN_CP_PIECE_CHUNKS", "1")
    expected = _gradients(recurrent_gated_delta_rule_reference, case, torch.float64, "cpu")
    _assert_close(_gradients(chunk_gated_delta_rule_triton, case, torch.float32, DEVICE), expected)


def test_same_bits_on_repetition():
    case = Case(HV=2, lengths=(70, 3))
    first, second = (_gradients(chunk_gated_delta_rule_triton, case, torch.float32, DEVICE) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_rows_of_zeros_have_finite_gradients():
    """Padded rows are zero in q, k, v: the norm's reciprocal must not make a NaN of their gradients, or of others'."""
    inputs = _inputs(Case(T=70))
    leaves = {name: x.clone() for name, x in inputs.items() if x is not None}
    for name in ("q", "k", "v"):
        leaves[name][:, 60:] = 0
    leaves = {name: x.to(DEVICE).requires_grad_() for name, x in leaves.items()}
    o, _ = chunk_gated_delta_rule_triton(
        **leaves,
        scale=1.0,
        output_final_state=False,
        use_qk_l2norm_in_kernel=True,
        use_gate_in_kernel=True,
        use_beta_sigmoid_in_kernel=True,
    )
    o.sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in leaves.values())


def test_gradient_of_a_beta_that_is_almost_or_exactly_zero():
    """One of dbeta's two forms is divided by beta."""
    case = Case(T=70, K=32, beta="plain")
    inputs = _inputs(case)
    assert inputs["beta"] is not None
    inputs["beta"][:, ::7] = 0.0
    inputs["beta"][:, 1::7] = 1e-30
    inputs["beta"][:, 2::7] = 1e-12
    inputs["beta"][:, 3::7] = -0.5

    def dbeta(function: Callable[..., Any], dtype: torch.dtype, device: str) -> Tensor:
        leaves = {name: None if x is None else x.to(device, dtype).requires_grad_() for name, x in inputs.items()}
        o, _ = function(
            **leaves, scale=1.0, output_final_state=False, use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True
        )
        beta = leaves["beta"]
        assert beta is not None
        return torch.autograd.grad(o.sum(), beta)[0]

    got = dbeta(chunk_gated_delta_rule_triton, torch.float32, DEVICE)
    expected = dbeta(recurrent_gated_delta_rule_reference, torch.float64, "cpu")
    assert (expected[:, ::7].abs() > 1e-3).all()
    _assert_close({"beta": got.cpu()}, {"beta": expected})


def test_gradient_before_a_sequence_keeps_what_rounding_the_last_step_lost():
    """Under a strong decay it is little but Q^T of dO scaled, which is rounded to 11 bits for the product: 2^-12.3 of
    the norm on average. The other roundings are of a term that is about as much smaller as one is than a query's norm,
    the root of K."""
    generator = torch.Generator().manual_seed(3)
    T, K = 40, 128

    def random(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

    q, k, v, do = (random(1, T, 1, dim) for dim in (K, K, 16, 16))
    k = torch.nn.functional.normalize(k.float(), dim=-1).half()
    g, beta = torch.full((1, T, 1), -2.0, device=DEVICE), random(1, T, 1, dtype=torch.float32).sigmoid()
    state = random(1, 1, K, 16, dtype=torch.float32)

    def gradient(function: Callable[..., Any], dtype: torch.dtype | None) -> Tensor:
        tensors = [x.to(dtype or x.dtype) for x in (q, k, v, g, beta, state)]
        tensors[5].requires_grad_()
        o, _ = function(*tensors[:5], 1.0, tensors[5], False)
        return torch.autograd.grad(o, tensors[5], do.to(o.dtype))[0].double()

    got = gradient(chunk_gated_delta_rule_triton, None)
    expected = gradient(recurrent_gated_delta_rule_reference, torch.float64)
    assert (got - expected).norm() < 2 * K**-0.5 * 2**-12.3 * expected.norm()


def _one_chunk_in_float16(beta: float, rows: int, state: bool) -> tuple[Tensor, Tensor]:
    """The gate's gradient of one chunk of orthogonal keys in float16, gate and beta in float32; and the exact one."""
    generator = torch.Generator().manual_seed(5)
    K, V = 64, 32

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE, torch.float16)

    q, v, do, h0 = random(1, rows, 1, K), random(1, rows, 1, V), random(1, rows, 1, V), random(1, 1, K, V)
    k = torch.eye(rows, K, dtype=torch.float16, device=DEVICE)[None, :, None]
    g = torch.linspace(-0.3, 0.0, rows, device=DEVICE)[None, :, None]

    def gradient(function: Callable[..., Any], dtype: torch.dtype | None) -> Tensor:
        leaf = g.to(dtype or g.dtype).requires_grad_()
        b = torch.full_like(leaf, beta).detach()
        initial = h0.to(dtype or torch.float32) if state else None
        o, _ = function(*(x.to(dtype or x.dtype) for x in (q, k, v)), leaf, b, 1.0, initial, False)
        return torch.autograd.grad(o, leaf, do.to(o.dtype))[0].double()

    return gradient(chunk_gated_delta_rule_triton, None), gradient(recurrent_gated_delta_rule_reference, torch.float64)


def test_gate_gradient_loses_nothing_by_rounding_the_outputs_gradient():
    """With beta = 0 and a state that float16 holds, all of it is sums of Q . (S dO^T), whose factors are as given."""
    got, expected = _one_chunk_in_float16(beta=0.0, rows=50, state=True)
    assert (got - expected).norm() < TOLERANCE * expected.norm()


def test_gate_gradient_loses_nothing_by_rounding_u_for_the_scores():
    """With orthogonal keys and no state, U = V / 3, and all of it is sums over dO U^T, by rows and by columns. U as
    rounded is off by 2^-12.3 of its norm on average; with its rest, rounded too, by less than float32's sums."""
    got, expected = _one_chunk_in_float16(beta=1 / 3, rows=50, state=False)
    assert (got - expected).norm() < TOLERANCE * expected.norm()


def test_query_gradient_of_value_heads_that_decay_very_differently():
    """They share an accumulator, which is kept in units of the decay of the head at hand."""
    case = Case(T=70, HV=4, K=32, gate="log")
    inputs = _inputs(case)
    strengths = torch.tensor([-3.0, -1e-3, -0.5, -40.0])
    inputs["g"] = strengths.expand(1, case.T, case.HV).contiguous()

    def dq(function: Callable[..., Any], dtype: torch.dtype, device: str) -> Tensor:
        leaves = {name: None if x is None else x.to(device, dtype).requires_grad_() for name, x in inputs.items()}
        flags = {"use_qk_l2norm_in_kernel": True, "use_beta_sigmoid_in_kernel": True}
        o, _ = function(**leaves, scale=-0.7, output_final_state=False, **flags)
        weights = torch.linspace(-1, 1, o.numel(), dtype=torch.float64).view(o.shape)
        q = leaves["q"]
        assert q is not None
        return torch.autograd.grad(o, q, weights.to(device, dtype))[0]

    got = dq(chunk_gated_delta_rule_triton, torch.float32, DEVICE)
    expected = dq(recurrent_gated_delta_rule_reference, torch.float64, "cpu")
    _assert_close({"q": got.cpu()}, {"q": expected})


def test_gradient_of_the_output_may_be_a_view():
    """A gradient arrives as autograd made it: transposed, expanded or with gaps between its rows."""
    case = Case(T=66, B=2)
    leaves = {name: None if x is None else x.to(DEVICE).requires_grad_() for name, x in _inputs(case).items()}
    flags = {"use_qk_l2norm_in_kernel": True, "use_gate_in_kernel": True, "use_beta_sigmoid_in_kernel": True}
    o, _ = chunk_gated_delta_rule_triton(**leaves, scale=1.0, output_final_state=False, **flags)
    do = torch.randn(case.V, case.T, case.HV, case.B, device=DEVICE).permute(3, 1, 2, 0)
    wanted = [x for x in leaves.values() if x is not None]
    for view in (do, torch.ones((), device=DEVICE).expand_as(o), torch.cat((do, do), 1)[:, : case.T]):
        from_view = torch.autograd.grad(o, wanted, view, retain_graph=True)
        from_copy = torch.autograd.grad(o, wanted, view.contiguous(), retain_graph=True)
        assert all(torch.equal(x, y) for x, y in zip(from_view, from_copy, strict=True))


def test_gradient_of_q_in_its_own_memory():
    draw = torch.Generator().manual_seed(0)
    T, H, HV, D = 100, 1, 2, 16
    qkv = torch.randn(1, T, (2 * H + HV) * D, generator=draw).to(DEVICE)
    q, k, v = (x.unflatten(2, (-1, D)) for x in qkv.split([H * D, H * D, HV * D], 2))
    g, beta, do = (torch.randn(1, T, HV, *rest, generator=draw).to(DEVICE) for rest in ((), (), (D,)))
    flags: dict[str, Any] = {
        "scale": 0.25, "initial_state": None, "cu_seqlens": None, "use_qk_l2norm_in_kernel": True,
        "use_gate_in_kernel": False, "use_beta_sigmoid_in_kernel": True, "state_v_first": False, "A_log": None,
        "dt_bias": None,
    }  # fmt: skip
    _, _, kept = chunk_triton.rule_forward(q, k, v, -g.abs(), beta, output_final_state=False, intra_card=0, **flags)
    call: Any = (do, None, q, k, v, -g.abs(), beta, *kept)
    expected = chunk_triton.rule_backward(*call, need_dh0=False, piece_chunks=0, **flags)
    got = chunk_triton.rule_backward(*call, need_dh0=False, piece_chunks=0, overwrite_q=True, **flags)
    assert got[0].data_ptr() == q.data_ptr()
    assert all(x is y is None or torch.equal(x, y) for x, y in zip(got, expected, strict=True))


COMPILED = """
import torch
from gdn_cp import chunk_gated_delta_rule

def loss(q, k, v, g, beta, A_log, cu_seqlens):
    o, _ = chunk_gated_delta_rule(
        q, k, v, g, beta, cu_seqlens=cu_seqlens, use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True, A_log=A_log,
        use_beta_sigmoid_in_kernel=True, backend="triton", intra_card=1,
    )
    return (2 * o).sum()

compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
for bounds in ([0, 30, 100], [0, 70, 75, 140]):
    T = bounds[-1]
    x = [torch.randn(1, T, 1, 16), torch.randn(1, T, 1, 16), torch.randn(1, T, 2, 16), torch.randn(1, T, 2)]
    x = [leaf.requires_grad_() for leaf in (*x, torch.randn(1, T, 2), torch.rand(2))]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    got, expected = (torch.autograd.grad(f(*x, cu_seqlens), x) for f in (compiled, loss))
    print(all(torch.equal(a, b) for a, b in zip(got, expected)))
"""


def test_torch_compile_sees_one_graph_for_all_lengths():
    environment = {key: x for key, x in os.environ.items() if key != "TORCHDYNAMO_DISABLE"}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[2]), "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, env=environment)
    assert done.stdout.split() == ["True", "True"], done.stderr[-2000:]
