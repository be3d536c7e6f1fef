"""What the delta-rule tests share: random inputs, the naive oracle, gradients, and the error measure.

Dimensions as in gdn_cp.kernels.reference.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def random_inputs(
    B: int,
    T: int,
    H: int,
    HV: int,
    K: int,
    V: int,
    *,
    N: int | None = None,
    raw: bool = True,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Leaves that require gradients, by argument name: raw gate and beta with A_log and dt_bias, or ready ones."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    exact = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = {"q": normal(B, T, H, K), "k": normal(B, T, H, K), "v": normal(B, T, HV, V)}
    g, beta = normal(B, T, HV), normal(B, T, HV)
    inputs |= {"g": g, "beta": beta} if raw else {"g": -0.3 * g.abs(), "beta": beta.sigmoid()}
    inputs = {name: x.to(dtype) for name, x in inputs.items()}
    if raw:
        inputs |= {"A_log": normal(HV).to(exact), "dt_bias": normal(HV).to(exact)}
    inputs["initial_state"] = normal(B if N is None else N, HV, K, V).to(exact)
    return {name: x.requires_grad_() for name, x in inputs.items()}


def flags(raw: bool, l2norm: bool = True) -> dict[str, bool]:
    """The keyword arguments that go with `random_inputs(raw=raw)`; without the norm long recurrences overflow."""
    return {"use_qk_l2norm_in_kernel": l2norm, "use_gate_in_kernel": raw, "use_beta_sigmoid_in_kernel": raw}


def in_float64(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same numbers as float64 leaves, for the oracle."""
    return {name: x.detach().double().requires_grad_() for name, x in inputs.items()}


def run(
    op: Callable[..., tuple[Tensor, Tensor]], inputs: dict[str, Tensor], seed: int = 1, **kwargs
) -> dict[str, Tensor]:
    """Output, final state and the gradient of every input, for one random gradient of both results."""
    o, state = op(**inputs, **kwargs, output_final_state=True)
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in (o, state)]
    gradients = torch.autograd.grad((o, state), list(inputs.values()), weights)
    return {"o": o.detach(), "state": state.detach()} | {
        f"d{name}": x for name, x in zip(inputs, gradients, strict=True)
    }


def errors(actual: dict[str, Tensor], oracle: dict[str, Tensor]) -> dict[str, float]:
    """Relative Frobenius error of each result.

    The gradients of A_log and dt_bias are sums over tokens that may cancel to any degree, so theirs is relative to what
    is summed: the gradient of the raw gate, of the same size term by term but for the factor softplus / sigmoid.
    """
    result = {}
    for name, expected in oracle.items():
        size = expected.detach().norm()
        if name in ("dA_log", "ddt_bias"):
            size = torch.maximum(size, oracle["dg"].norm())
        difference = (actual[name].detach().double() - expected.double()).norm()
        result[name] = float(difference / size) if size > 0 else float(difference)
    return result


def naive(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, scale: float, bounds: list[int]
) -> tuple[Tensor, Tensor]:
    """The definition with a loop for every index but K and V, of a packed row [T, heads, dim]; g is the log decay."""
    o, finals, r = torch.zeros_like(v), state.clone(), v.shape[1] // q.shape[1]
    for n in range(len(bounds) - 1):
        for head in range(v.shape[1]):
            S = state[n, head]
            for t in range(bounds[n], bounds[n + 1]):
                S = S * g[t, head].exp()
                S = S + beta[t, head] * torch.outer(k[t, head // r], v[t, head] - S.T @ k[t, head // r])
                o[t, head] = scale * (S.T @ q[t, head // r])
            finals[n, head] = S
    return o, finals
