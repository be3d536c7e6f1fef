"""What the kernel scripts share: random problems, the float64 oracle, errors, and the implementations to compare with.

Dimensions: B batch, T tokens, N sequences, H query/key heads, HV value heads, K key head dim, V value head dim.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gdn_cp.kernels.chunk import chunk_gated_delta_rule
from gdn_cp.kernels.reference import chunk_gated_delta_rule_reference

Results = dict[str, Tensor]
Operation = Callable[..., tuple[Tensor, Tensor | None]]
LIMIT = 1e-2  # relative error that no bfloat16 result may pass


@dataclass(frozen=True)
class Case:
    """One problem. `lengths` are the packed sequences, or None for `batch` rows of `tokens`.

    gate: "raw" (computed in the kernel from A_log and dt_bias, at initialisation's values), "none", or the log decay
    per token as a number, on average: 0.0 is g = 0, -0.47 makes a chunk of 64 tokens decay by e^-30.
    """

    name: str
    tokens: int
    heads: tuple[int, int] = (2, 4)
    dims: tuple[int, int] = (128, 128)
    lengths: tuple[int, ...] | None = None
    batch: int = 1
    gate: str | float = "raw"
    beta: bool = True
    l2norm: bool = True
    state_in: bool = False
    state_out: bool = False
    v_first: bool = False
    scale: float | None = None
    dtype: torch.dtype = torch.bfloat16
    seed: int = 0

    def flags(self) -> dict[str, Any]:
        """Keyword arguments of the operation that are no tensors."""
        return {
            "scale": self.scale,
            "output_final_state": self.state_out,
            "use_qk_l2norm_in_kernel": self.l2norm,
            "use_gate_in_kernel": self.gate == "raw",
            "use_beta_sigmoid_in_kernel": self.beta,
            "state_v_first": self.v_first,
        }

    def cu_seqlens(self, device: torch.device) -> Tensor | None:
        """Bounds of the packed sequences, int32 as training frameworks pass them."""
        if self.lengths is None:
            return None
        bounds = torch.tensor((0, *self.lengths)).cumsum(0)
        assert bounds[-1] == self.tokens, f"{self.name}: lengths sum to {bounds[-1]}, not {self.tokens}"
        return bounds.to(device, torch.int32)


def make_inputs(case: Case, device: torch.device) -> dict[str, Tensor]:
    """Fresh random tensors by the operation's names, rounded to the case's dtype, so that the oracle sees the same.

    Gates start as in Mamba2 and Qwen3-Next: exp(A_log) uniform in (0, 16), softplus(dt_bias) log-uniform in
    (1e-3, 0.1).
    """
    (H, HV), (K, V), B, T = case.heads, case.dims, case.batch, case.tokens
    generator = torch.Generator(device).manual_seed(case.seed)

    def normal(*shape: int, dtype: torch.dtype = case.dtype) -> Tensor:
        return torch.randn(*shape, device=device, generator=generator, dtype=torch.float32).to(dtype)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, device=device, generator=generator)

    x = {"q": normal(B, T, H, K), "k": normal(B, T, H, K), "v": normal(B, T, HV, V)}
    if not case.l2norm:  # keys of unit length keep the recurrence bounded
        x["k"] = torch.nn.functional.normalize(x["k"].float(), dim=-1).to(case.dtype)
    if case.gate == "raw":
        x["g"] = normal(B, T, HV)
        x["A_log"] = (uniform(HV) * 16 + 1e-3).log()
        x["dt_bias"] = (1e-3 * 100 ** uniform(HV)).expm1().log()
    elif isinstance(case.gate, float):
        x["g"] = 2 * case.gate * uniform(B, T, HV)
    if case.beta:
        x["beta"] = normal(B, T, HV)
    if case.state_in:
        N = B if case.lengths is None else len(case.lengths)
        x["initial_state"] = normal(N, HV, *((V, K) if case.v_first else (K, V)), dtype=torch.float32)
    return x


def run_with_gradients(
    function: Operation,
    inputs: dict[str, Tensor],
    case: Case,
    cu_seqlens: Tensor | None,
) -> Results:
    """o, final state, and the gradient of every input for a fixed random linear loss."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    o, final = function(**leaves, **case.flags(), cu_seqlens=cu_seqlens)
    outputs = {"o": o} if final is None else {"o": o, "final_state": final}
    weights = [x.to(outputs[name].dtype) for name, x in loss_weights(outputs, case).items()]
    gradients = torch.autograd.grad(list(outputs.values()), list(leaves.values()), weights, allow_unused=True)
    found = {f"d{name}": x for name, x in zip(leaves, gradients, strict=True) if x is not None}
    return {**{name: x.detach() for name, x in outputs.items()}, **found}


def loss_weights(outputs: dict[str, Tensor], case: Case) -> dict[str, Tensor]:
    """The random linear loss: the gradient of each output, "o" in the case's dtype, "final_state" in float32."""
    generator = torch.Generator(outputs["o"].device).manual_seed(case.seed + 1)
    return {
        name: torch.randn(
            x.shape, device=x.device, generator=generator, dtype=case.dtype if name == "o" else torch.float32
        )
        for name, x in outputs.items()
    }


def oracle(inputs: dict[str, Tensor], case: Case, cu_seqlens: Tensor | None) -> Results:
    """The chunked reference in float64 on the same device."""
    exact = {name: x.double() for name, x in inputs.items()}
    return run_with_gradients(chunk_gated_delta_rule_reference, exact, case, cu_seqlens)


def relative_error(x: Tensor, expected: Tensor, least_size: float = 0.0) -> float:
    """Frobenius norm of the difference over that of the expected tensor; the norm itself where that is zero."""
    difference = (x.double() - expected.double()).norm().item()
    size = max(expected.double().norm().item(), least_size)
    return difference / size if size else difference


def errors(results: Results, expected: Results, inputs: dict[str, Tensor]) -> dict[str, float]:
    """Relative error of every tensor that both have.

    dA_log and ddt_bias are sums over all tokens of terms with independent rounding errors. The terms may cancel and
    the errors do not, so those two are measured against the root of the sum of the terms' squares where that is more.
    """
    least = term_sizes(inputs, expected)
    return {
        name: relative_error(x, expected[name], least.get(name, 0.0)) for name, x in results.items() if name in expected
    }


def term_sizes(inputs: dict[str, Tensor], expected: Results) -> dict[str, float]:
    """Root of the sum of squares of what dA_log and ddt_bias are sums of.

    With g = -exp(A_log) softplus(x), x = alpha + dt_bias, a term of ddt_bias is the gradient of alpha, and a term of
    dA_log is that times softplus(x) / sigmoid(x).
    """
    if "A_log" not in inputs or "dg" not in expected:
        return {}
    x = inputs["g"].double() + inputs["dt_bias"].double()
    terms = expected["dg"].double()
    scaled = terms * torch.nn.functional.softplus(x) / x.sigmoid()
    return {"ddt_bias": terms.norm().item(), "dA_log": scaled.norm().item()}


@dataclass(frozen=True)
class Contender:
    """An implementation to compare with. `forward_only` ones have no gradient; `note` says what was done to run it."""

    name: str
    version: str
    call: Operation
    note: str = ""
    forward_only: bool = False


def ours() -> Contender:
    """This package's operation, on the backend that it chooses."""
    import gdn_cp

    return Contender("gdn_cp", gdn_cp.__version__, chunk_gated_delta_rule)


def load_fla() -> Contender | str:
    """flash-linear-attention's Triton kernels, or why they cannot run.

    Before Triton 3.7.1 they refuse to run their backward on Hopper, because a tuned configuration may give wrong
    numbers. The refusal is switched off here, for timing and for comparing errors only.
    """
    os.environ["FLA_FLASH_QLA"] = "0"  # it would hand the call to another package
    os.environ["FLA_CACHE_RESULTS"] = "0"
    try:
        from fla.ops.common import chunk_o  # pyright: ignore[reportMissingImports]
        from fla.ops.gated_delta_rule import chunk  # pyright: ignore[reportMissingImports]
    except Exception as error:
        return f"flash-linear-attention cannot be imported: {error!r}"
    note = ""
    if not chunk_o.TRITON_ABOVE_3_7_1:
        chunk_o.TRITON_ABOVE_3_7_1 = True
        note = "its refusal of this Triton version on Hopper was switched off"

    def run(**kwargs: Any) -> tuple[Tensor, Tensor | None]:
        if "g" not in kwargs or "beta" not in kwargs:
            raise ValueError("flash-linear-attention's chunked operation needs g and beta")
        return chunk.chunk_gated_delta_rule(**kwargs)

    return Contender("fla", importlib.metadata.version("flash-linear-attention"), run, note)


def load_flash_qla() -> Contender | str:
    """FlashQLA's TileLang kernels, or why they cannot run."""
    try:
        from flash_qla import chunk_gated_delta_rule as call  # pyright: ignore[reportMissingImports]
    except Exception as error:
        return f"FlashQLA cannot be imported: {error!r}"

    def run(**kwargs: Any) -> tuple[Tensor, Tensor | None]:
        for flag in ("use_gate_in_kernel", "use_beta_sigmoid_in_kernel"):
            if kwargs.pop(flag):
                raise ValueError(f"FlashQLA has no {flag}")
        if kwargs["cu_seqlens"] is not None:
            kwargs["cu_seqlens"] = kwargs["cu_seqlens"].long()
        return call(**kwargs)

    return Contender("flash_qla", importlib.metadata.version("flash-qla"), run)


def load_flash_infer() -> Contender | str:
    """FlashInfer's prefill (forward only; it takes the decay itself, not its logarithm), or why it cannot run."""
    try:
        from flashinfer import gdn_prefill  # pyright: ignore[reportMissingImports]
    except Exception as error:
        return f"FlashInfer cannot be imported: {error!r}"

    def run(
        q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, cu_seqlens: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        bounds = torch.tensor([0, q.shape[1]], device=q.device) if cu_seqlens is None else cu_seqlens
        o = gdn_prefill.chunk_gated_delta_rule(
            q[0],
            k[0],
            v[0],
            g[0].float().exp(),
            beta[0].float(),
            kwargs["scale"],
            cu_seqlens=bounds,
            use_qk_l2norm_in_kernel=kwargs["use_qk_l2norm_in_kernel"],
        )
        return (o[0] if isinstance(o, tuple) else o).unsqueeze(0), None

    return Contender("flashinfer", importlib.metadata.version("flashinfer-python"), run, forward_only=True)


def first_configuration_only() -> None:
    """Make Triton's autotuners take their first configuration untimed: enough to compare numbers, and far quicker."""
    from triton.runtime.autotuner import Autotuner

    Autotuner.prune_configs = lambda self, kwargs: self.configs[:1]
    Autotuner._bench = lambda self, *args, config, **meta: [0.0, 0.0, 0.0]


def machine(command: list[str] | None = None) -> dict[str, str]:
    """Device, versions, command and commit, as every result file carries them."""
    from gdn_cp.doctor import device_facts, package_versions

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        **device_facts(device),
        **package_versions(),
        "host": platform.platform(),
        "command": " ".join(command or [Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": commit(),
    }


@functools.cache
def commit() -> str:
    """The commit that is measured: GDN_CP_COMMIT where the machine has no repository, else git's answer."""
    named = os.environ.get("GDN_CP_COMMIT")
    if named:
        return named
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a result file, creating its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
