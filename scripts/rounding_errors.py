"""Which rounding makes which error: the chunked kernels' arithmetic with each of their bfloat16 roundings on or off.

    python scripts/rounding_errors.py --tokens 700 --output roundings.json

The formulas are those of `chunk_prepare`, `chunk_fwd`, `chunk_bwd_chains`, `chunk_bwd_local` and `chunk_bwd_borders` in
the same order, in float64 on the CPU, for heads that share nothing. Each tile that the kernels round, for a product or
to store it, passes through `Rounding`, which rounds what it is told to. Errors are against the float64 reference, of
results with all roundings, and with each alone. Roundings are independent, so squares of errors add up; what float32
and tf32 round is left out, since it is ten times less.

Dimensions: HV heads, T tokens, n chunks of C = 64 rows, K, V head dims.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from kernel_cases import LIMIT, Case, errors, loss_weights, machine, make_inputs, oracle, write_json
from torch import Tensor

C = 64
ROUNDINGS = {
    "A": "strict lower part of the inverse, stored",
    "P": "P in the product that makes Y",
    "Y": "Y, stored",
    "A rho": "A scaled, in the product that makes X",
    "X": "X, stored",
    "S": "state, in products and stored",
    "R": "R, in products",
    "dS": "gradient of the state, in products and stored",
    "dO": "scaled dO, in the walk of the gradient",
    "gamma M": "scaled M, in the walk of the gradient",
    "M": "M, stored",
    "W": "W, stored",
    "beta R": "beta R, in the product that makes U",
    "U": "U, stored",
    "u": "U, in the product that makes F",
    "D": "D, stored",
    "F": "F, stored",
    "results": "outputs and gradients, stored",
}

WALKS = {"A", "P", "Y", "A rho", "X", "R", "dO", "gamma M"}  # what changes states and their gradients themselves


class Rounding:
    """Rounds to bfloat16 what is called by one of `names`."""

    def __init__(self, names: set[str]) -> None:
        assert names <= set(ROUNDINGS)
        self.names = names

    def __call__(self, name: str, x: Tensor) -> Tensor:
        """The tile called `name`, rounded or as it is."""
        return x.to(torch.bfloat16).to(x.dtype) if name in self.names else x


@dataclass(frozen=True)
class Chunks:
    """One problem, by chunks: q, k, v, do [HV, n, C, dim], rows [HV, n, C], zero past the end; float64.

    `raw` is the gate before softplus, with its bias, `rate` [HV, 1] = -exp(A_log).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    do: Tensor
    raw: Tensor
    rate: Tensor
    G: Tensor
    beta: Tensor
    valid: Tensor
    rq: Tensor
    rk: Tensor
    state: Tensor
    dstate: Tensor
    scale: float


def chunks_of(case: Case, inputs: dict[str, Tensor]) -> Chunks:
    """The inputs of a case of one sequence with raw gate, sigmoid and norms, as many key heads as value heads."""
    T, HV = case.tokens, case.heads[1]
    assert case.heads[0] == HV
    assert case == Case(
        case.name, T, case.heads, case.dims, state_in=case.state_in, state_out=case.state_out, seed=case.seed
    )

    def chunks(x: Tensor) -> Tensor:
        padding = torch.zeros(-T % C, *x.shape[2:], dtype=torch.float64)
        return torch.cat((x[0].double(), padding)).unflatten(0, (-1, C)).movedim(2, 0)

    state = torch.zeros(HV, *case.dims, dtype=torch.float64)
    outputs = {"o": inputs["v"]} | ({"final_state": state[None]} if case.state_out else {})
    weights = loss_weights(outputs, case)
    valid = chunks(torch.ones(1, T, HV)) > 0
    q, k = chunks(inputs["q"]), chunks(inputs["k"])
    rate = -inputs["A_log"].double().exp()[:, None]
    raw = chunks(inputs["g"].double() + inputs["dt_bias"].double())
    g = torch.where(valid, rate[..., None] * torch.nn.functional.softplus(raw), 0.0)
    return Chunks(
        q=q,
        k=k,
        v=chunks(inputs["v"]),
        do=chunks(weights["o"]),
        raw=raw,
        rate=rate,
        G=g.cumsum(-1),
        beta=torch.where(valid, chunks(inputs["beta"]).sigmoid(), 0.0),
        valid=valid,
        rq=torch.where(valid, (q.square().sum(-1) + 1e-6).rsqrt(), 0.0),
        rk=torch.where(valid, (k.square().sum(-1) + 1e-6).rsqrt(), 0.0),
        state=inputs["initial_state"][0].double() if case.state_in else state,
        dstate=weights["final_state"][0].double() if case.state_out else state,
        scale=case.dims[0] ** -0.5,
    )


def emulate(x: Chunks, rounded: Rounding, refine_given: bool = True) -> dict[str, Tensor]:
    """Results by the names of `kernel_cases.run_with_gradients`; without `chunk_bwd_borders` if not `refine_given`."""
    lower = torch.ones(C, C, dtype=torch.bool).tril()
    strict = lower.tril(-1)
    Gam = torch.where(lower, x.G[..., :, None] - x.G[..., None, :], -math.inf).exp()
    KK, QK = x.k @ x.k.mT, x.q @ x.k.mT
    N = torch.where(strict, KK * (x.beta * x.rk)[..., None] * x.rk[..., None, :] * Gam, 0.0)
    eye = torch.eye(C, dtype=torch.float64).expand_as(N)
    A = rounded("A", torch.linalg.solve_triangular(N + eye, eye, upper=False, unitriangular=True).tril(-1))
    Pt = (QK * (x.rq * x.scale)[..., None] * x.rk[..., None, :] * Gam).mT
    Yt = rounded("Y", Pt + A.mT @ rounded("P", Pt))
    k_end = x.rk * (x.G[..., -1:] - x.G).exp()
    X = rounded("X", x.k.mT @ rounded("A rho", A * k_end[..., None]) + x.k.mT * k_end[..., None, :])
    found, S = _walk_up(x, X, Yt, rounded)
    gradients, dS, M = _walk_down(x, X, Yt, rounded)
    found |= gradients | _local(x, A, Gam, KK, QK, S, dS, M, k_end, rounded, refine_given)
    return {name: _by_tokens(x, y) if y.ndim > 2 and "state" not in name else y for name, y in found.items()}


def _by_tokens(x: Chunks, y: Tensor) -> Tensor:
    """[HV, n, C, ...] to [1, T, HV, ...]."""
    return y.flatten(1, 2)[:, : int(x.valid[0].sum())].transpose(0, 1)[None]


def _walk_up(x: Chunks, X: Tensor, Yt: Tensor, rounded: Rounding) -> tuple[dict[str, Tensor], Tensor]:
    """Outputs, and the states before all chunks as stored."""
    state, states, outputs = x.state, [], []
    for c in range(x.G.shape[1]):
        gamma = x.G[:, c].exp()
        S = rounded("S", state)
        R = x.beta[:, c, :, None] * (x.v[:, c] - (gamma * x.rk[:, c])[..., None] * (x.k[:, c] @ S))
        R = rounded("R", R)
        outputs.append(x.scale * (gamma * x.rq[:, c])[..., None] * (x.q[:, c] @ S) + Yt[:, c].mT @ R)
        states.append(S)
        state = gamma[:, -1, None, None] * state + X[:, c] @ R
    return {"o": rounded("results", torch.stack(outputs, 1)), "final_state": state[None]}, torch.stack(states, 1)


def _walk_down(x: Chunks, X: Tensor, Yt: Tensor, rounded: Rounding) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Gradients of v and of the initial state; the gradients after all chunks, and M, as stored."""
    gradient, n = x.dstate, x.G.shape[1]
    stored, Ms, dv = [gradient] * n, [gradient] * n, [gradient] * n
    lost = torch.zeros(())
    for c in reversed(range(n)):
        gamma = x.G[:, c].exp()
        stored[c] = rounded("dS", gradient)
        M = Yt[:, c] @ x.do[:, c] + X[:, c].mT @ stored[c]
        scaled = x.scale * (gamma * x.rq[:, c])[..., None] * x.do[:, c]
        # The kernel makes up for this in the last step only, at the first chunk.
        lost = x.q[:, c].mT @ (scaled - rounded("dO", scaled))
        gradient = gamma[:, -1, None, None] * gradient + x.q[:, c].mT @ rounded("dO", scaled)
        gradient -= x.k[:, c].mT @ rounded("gamma M", (gamma * x.rk[:, c] * x.beta[:, c])[..., None] * M)
        dv[c] = rounded("results", x.beta[:, c, :, None] * M)
        Ms[c] = rounded("M", M)
    found = {"dv": torch.stack(dv, 1), "dinitial_state": (gradient + lost)[None]}
    return found, torch.stack(stored, 1), torch.stack(Ms, 1)


def _local(
    x: Chunks, A: Tensor, Gam: Tensor, KK: Tensor, QK: Tensor, S: Tensor, dS: Tensor, M: Tensor, k_end: Tensor,
    rounded: Rounding, refine_given: bool,
) -> dict[str, Tensor]:  # fmt: skip
    """All other gradients."""
    b = x.beta[..., None]
    gamma = x.G.exp()[..., None]
    KS = x.k @ S
    R = x.v - gamma * x.rk[..., None] * KS
    w = -gamma * x.rk[..., None] * b * M
    W = rounded("W", w)
    w_dot_ks = ((w + W) * KS).sum(-1)
    u = A @ rounded("beta R", b * R) + b * R
    U = rounded("U", k_end[..., None] * u)
    # The kernel multiplies what rounding U takes too.
    D = (x.do @ u.mT) * Gam * (x.scale * x.rq)[..., None] * x.rk[..., None, :]
    E = ((M @ rounded("u", u).mT) * Gam * x.rk[..., None] * x.rk[..., None, :]).tril(-1)
    EKK = E * KK
    decayed = (D * QK).tril(-1) - b * EKK
    dq, dk = x.scale * gamma * x.rq[..., None] * (x.do @ S.mT), W @ S.mT + U @ dS.mT
    added, state_dots = (x.k * dk).sum(-1), gamma[..., -1, 0] * (S * dS).sum((-1, -2))
    beside = torch.zeros_like(added)
    if refine_given:
        for c in _borders(x):
            beside[:, c], more, state_dots[:, c] = _put_back(x, c, A, S, dS, W, U, k_end, rounded)
            added[:, c] += more
    dG = decayed.sum(-1) - decayed.sum(-2) + w_dot_ks + (x.q * dq).sum(-1) + beside - added
    dG[..., -1] += state_dots + (added - w_dot_ks / 2).sum(-1)
    first = (M * R).sum(-1) - EKK.sum(-1)
    second = decayed.sum(-2) + (D * QK).diagonal(dim1=-2, dim2=-1) + added - w_dot_ks / 2
    dbeta = (first + torch.where(x.valid, second / x.beta, 0.0)) / 2
    D, F = rounded("D", D), rounded("F", -b * E)
    dq, dk = dq + D @ x.k, dk + D.mT @ x.q + F @ x.k + F.mT @ x.k
    unit_q, unit_k = x.rq[..., None] * x.q, x.rk[..., None] * x.k
    dq, dk = dq - unit_q * (unit_q * dq).sum(-1, True), dk - unit_k * (unit_k * dk).sum(-1, True)
    dgate = torch.where(x.valid, dG.flip(-1).cumsum(-1).flip(-1), 0.0) * x.rate[..., None]
    dg = dgate * x.raw.sigmoid()
    return {
        **{name: rounded("results", y) for name, y in (("dq", dq), ("dk", dk), ("dg", dg))},
        "dbeta": rounded("results", dbeta * x.beta * (1 - x.beta)),
        "dA_log": (dgate * torch.nn.functional.softplus(x.raw)).sum((-1, -2)),
        "ddt_bias": dg.sum((-1, -2)),
    }


def _borders(x: Chunks) -> list[int]:
    """The chunks beside states that are given."""
    last = x.G.shape[1] - 1
    return sorted({c for c, state in ((0, x.state), (last, x.dstate)) if state.any()})


def _put_back(
    x: Chunks, c: int, A: Tensor, S: Tensor, dS: Tensor, W: Tensor, U: Tensor, k_end: Tensor, rounded: Rounding
) -> tuple[Tensor, Tensor, Tensor]:
    """What `chunk_bwd_borders` adds to dG and to K . Z of chunk c, and its <S, dS+>; second parts are exact here."""
    exact_S = x.state if c == 0 else S[:, c]
    exact_dS = x.dstate if c == x.G.shape[1] - 1 else dS[:, c]
    gamma, b, k, q, dO = x.G[:, c].exp()[..., None], x.beta[:, c, :, None], x.k[:, c], x.q[:, c], x.do[:, c]
    s = exact_S - S[:, c]
    dG = ((x.scale * gamma * x.rq[:, c, :, None] * q) @ s * dO).sum(-1) + (W[:, c] * (k @ s)).sum(-1)
    R = b * (x.v[:, c] - gamma * x.rk[:, c, :, None] * (k @ exact_S))
    u = k_end[:, c, :, None] * (A[:, c] @ rounded("beta R", R) + R)
    k_dots = (u * (k @ exact_dS)).sum(-1) - (U[:, c] * (k @ dS[:, c])).sum(-1)
    return dG, k_dots, gamma[:, -1, 0] * (exact_S * exact_dS).sum((-1, -2))


def sum_errors(
    found: dict[str, Tensor], expected: dict[str, Tensor], inputs: dict[str, Tensor], group: int
) -> dict[str, dict[str, float]]:
    """Root mean square, largest, and share above 1 %, of the errors of dA_log and ddt_bias, the sums over all tokens,
    as if each `group` heads were a problem of their own."""
    names, result = ("dA_log", "ddt_bias"), {}
    rows = []
    for i in range(0, len(expected["dA_log"]), group):
        own = slice(i, i + group)
        exact = {name: expected[name][own] for name in names} | {"dg": expected["dg"][..., own]}
        given = {"g": inputs["g"][..., own], "A_log": inputs["A_log"][own], "dt_bias": inputs["dt_bias"][own]}
        rows.append(errors({name: found[name][own] for name in names}, exact, given))
    for name in names:
        x = torch.tensor([row[name] for row in rows])
        share = (x > LIMIT).double().mean().item()
        result[name] = {"rms": x.square().mean().sqrt().item(), "largest": x.max().item(), "above 1 %": share}
    return result


@dataclass
class Options:
    """Errors of one shape by their cause."""

    tokens: int = 700
    """Tokens of the sequence."""
    dims: tuple[int, int] = (128, 128)
    """K and V."""
    heads: int = 16
    """Heads, each with data and decay of its own."""
    states: bool = True
    """Whether a state comes in and the final state has a gradient."""
    common: float = 0.0
    """Size of a component that all tokens of a head have in common in q, k, v, relative to the random one."""
    seed: int = 0
    """Of the data."""
    refine_given: bool = True
    """Whether what rounding the given states takes from the gate's gradient is put back (`chunk_bwd_borders`)."""
    group: int = 0
    """If not 0: also errors of sums over all tokens for each so many heads, of all roundings, each, and the walks'."""
    output: Path | None = None
    """Where the JSON goes, if anywhere."""


def main(options: Options) -> int:
    """Print and write the table; 1 if without roundings it is not the reference."""
    case = Case(
        "roundings", options.tokens, heads=(options.heads, options.heads), dims=options.dims, state_in=options.states,
        state_out=options.states, seed=options.seed,
    )  # fmt: skip
    inputs = make_inputs(case, torch.device("cpu"))
    for name in ("q", "k", "v"):
        shift = options.common * torch.randn(inputs[name].shape[2:], generator=torch.Generator().manual_seed(1))
        inputs[name] = (inputs[name].float() + shift).to(case.dtype)
    expected = oracle(inputs, case, None)
    chunks = chunks_of(case, inputs)
    runs = {"all": set(ROUNDINGS), "none": set()} | {name: {name} for name in ROUNDINGS}
    table, sums = {}, {}
    for name, names in (runs | ({"walks": WALKS} if options.group else {})).items():
        found = emulate(chunks, Rounding(names), options.refine_given)
        if name in runs:
            table[name] = errors(found, expected, inputs)
        if options.group:
            sums[name] = sum_errors(found, expected, inputs, options.group)
    results = list(table["all"])
    print(f"error in %{'':50}" + "".join(f"{name:>15}" for name in results))
    for name, row in table.items():
        print(f"{name:9} {ROUNDINGS.get(name, ''):50}" + "".join(f"{100 * row[result]:15.3f}" for result in results))
    for name, row in sums.items():
        for result, numbers in row.items():
            print(f"{name:9} {result:9}" + "".join(f"  {word} {100 * x:.3f} %" for word, x in numbers.items()))
    if options.output:
        content = {"kind": "roundings", "machine": machine(), "errors": table} | ({"sums": sums} if sums else {})
        write_json(options.output, content)
    return int(max(table["none"].values()) > 1e-9)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
