"""Is this machine fit to train with gdn_cp? Versions, which kernels run and why, and a self-test of their numbers.

    python -m gdn_cp.doctor

The self-test runs forward, backward and decode on random data of two packed sequences and compares each result with the
token recurrence in float64. It takes about a second, after the kernels have been compiled once.

Exit code: 0 all is well; 1 a result is wrong; 2 results are right but this GPU runs the slow plain-torch path.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gdn_cp.kernels.backends import Choice, DeltaRuleCall, choose_backend
from gdn_cp.kernels.chunk import chunk_gated_delta_rule
from gdn_cp.kernels.recurrent import fused_recurrent_gated_delta_rule
from gdn_cp.kernels.reference import recurrent_gated_delta_rule_reference

PACKAGES = ("gdn_cp", "torch", "triton", "megatron-core", "transformer-engine", "transformers", "numpy")
OK, WRONG, SLOW = 0, 1, 2
# Inputs are rounded before the oracle sees them, so what is left is the rounding inside: a few times 2^-8 for bfloat16
# operands of the tensor cores, a few hundred float32 sums in the other case.
LIMITS = {torch.bfloat16: 1e-2, torch.float32: 1e-4}

SEQUENCES = (0, 70, 150)  # one full chunk and a tail, twice
H, HV, HEAD_DIM = 2, 4, 64
FLAGS: dict[str, Any] = {
    "use_qk_l2norm_in_kernel": True,
    "use_gate_in_kernel": True,
    "use_beta_sigmoid_in_kernel": True,
}


@dataclass(frozen=True)
class Check:
    """One tensor of the self-test: its relative Frobenius error against float64, and what is allowed."""

    name: str
    error: float
    limit: float

    @property
    def passed(self) -> bool:
        """False for NaN too."""
        return self.error <= self.limit


def package_versions() -> dict[str, str]:
    """Installed versions of what this package works with, "not installed" where one is missing."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def device_facts(device: torch.device) -> dict[str, str]:
    """Name, capability, memory, driver and assembler of a GPU; kind and threads of a CPU."""
    if device.type != "cuda":
        return {"device": f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"}
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": properties.name,
        "compute capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": str(properties.multi_processor_count),
        "memory": f"{properties.total_memory / 2**30:.0f} GiB",
        "CUDA of torch": str(torch.version.cuda),
        "driver": _first_line(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]),
        "ptxas": _ptxas_version(),
    }


def _first_line(command: list[str], pattern: str = ".*") -> str:
    try:
        text = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    match = re.search(pattern, text)
    return match.group(0).strip() if match else "unknown"


def _ptxas_version() -> str:
    try:
        from triton import knobs
    except ImportError:
        return "unknown"
    return _first_line([knobs.nvidia.ptxas.path, "--version"], r"V\d+\.\d+\.\d+")


def usual_choice(device: torch.device, backend: str | None = None) -> Choice:
    """The backend of a training call with Qwen3-Next's heads (H=16, HV=32, K=V=128, packed, raw gates)."""
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    call = DeltaRuleCall(
        device_type=device.type,
        capability=torch.cuda.get_device_capability(device) if on_gpu else None,
        dtype=dtype,
        gate_dtype=dtype,
        beta_dtype=dtype,
        B=1,
        T=8192,
        H=16,
        HV=32,
        K=128,
        V=128,
        N=4,
        varlen=True,
        requires_grad=True,
        **FLAGS,
    )
    return choose_backend(call, backend)


def self_test(device: torch.device, dtype: torch.dtype, backend: str | None = None, seed: int = 0) -> list[Check]:
    """Compare forward, every gradient and decode with the float64 recurrence on fresh random data.

    Args:
        device: where to run; the oracle runs there too.
        dtype: of q, k, v, g and beta, bfloat16 or float32.
        backend: as for `gdn_cp.chunk_gated_delta_rule`.
        seed: of the random data.
    """
    inputs = _random_inputs(device, dtype, seed)
    cu_seqlens = torch.tensor(SEQUENCES, dtype=torch.int32, device=device)
    exact = {name: x.double() for name, x in inputs.items()}
    results, expected = (
        _forward_and_backward(function, tensors, cu_seqlens, seed)
        for function, tensors in (
            (lambda **kwargs: chunk_gated_delta_rule(**kwargs, backend=backend), inputs),
            (recurrent_gated_delta_rule_reference, exact),
        )
    )
    checks = [Check(name, _relative_error(x, expected[name]), LIMITS[dtype]) for name, x in results.items()]
    return [*checks, *_check_decode(inputs, exact, LIMITS[dtype])]


def _random_inputs(device: torch.device, dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    T, N = SEQUENCES[-1], len(SEQUENCES) - 1

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    halves = {
        "q": normal(1, T, H, HEAD_DIM),
        "k": normal(1, T, H, HEAD_DIM),
        "v": normal(1, T, HV, HEAD_DIM),
        "g": normal(1, T, HV) - 2,
        "beta": normal(1, T, HV),
    }
    floats = {"A_log": normal(HV) * 0.5, "dt_bias": normal(HV), "initial_state": normal(N, HV, HEAD_DIM, HEAD_DIM) / 8}
    return {**{n: x.to(device, dtype) for n, x in halves.items()}, **{n: x.to(device) for n, x in floats.items()}}


def _forward_and_backward(function, inputs: dict[str, Tensor], cu_seqlens: Tensor, seed: int) -> dict[str, Tensor]:
    """o, the final state and the gradient of every input for a random linear loss."""
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    o, final = function(**leaves, **FLAGS, output_final_state=True, cu_seqlens=cu_seqlens)
    generator = torch.Generator().manual_seed(seed + 1)
    weights = [torch.randn(x.shape, generator=generator).to(o.device) for x in (o, final)]
    # bfloat16 has room for the weights of o only after rounding: both sides get the rounded ones.
    weights[0] = weights[0].bfloat16()
    torch.autograd.backward([o, final], [weights[0].to(o.dtype), weights[1].to(final.dtype)])
    return {"o": o, "final_state": final, **{f"d{name}": x.grad for name, x in leaves.items() if x.grad is not None}}


def _check_decode(inputs: dict[str, Tensor], exact: dict[str, Tensor], limit: float) -> list[Check]:
    """One token of two requests from a bank of states."""

    def requests(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {n: x if x.dim() == 1 else x[0, :2].unsqueeze(1) for n, x in tensors.items() if n != "initial_state"}

    bank = inputs["initial_state"].clone()
    slots = torch.tensor([1, 0], dtype=torch.int32, device=bank.device)
    with torch.no_grad():
        o, _ = fused_recurrent_gated_delta_rule(**requests(inputs), **FLAGS, initial_state=bank, state_indices=slots)
        o_64, final_64 = recurrent_gated_delta_rule_reference(
            **requests(exact), **FLAGS, initial_state=exact["initial_state"].flip(0), output_final_state=True
        )
    assert final_64 is not None
    errors = {"decode o": _relative_error(o, o_64), "decode state": _relative_error(bank, final_64.flip(0))}
    return [Check(name, error, limit) for name, error in errors.items()]


def _relative_error(x: Tensor, expected: Tensor) -> float:
    return ((x.double() - expected).norm() / expected.norm()).item()


def main(arguments: list[str] | None = None) -> int:
    """Print the report; the exit code of the module docstring."""
    parser = argparse.ArgumentParser(prog="python -m gdn_cp.doctor", description="Versions, kernels and a self-test.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", default=None, help="triton, reference, recurrent or auto")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    for name, value in {**package_versions(), **device_facts(device)}.items():
        print(f"{name:>20}  {value}")
    choice = usual_choice(device, options.backend)
    print(f"{'delta rule runs on':>20}  {choice.backend}: {choice.reason}")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    started = time.monotonic()
    checks = self_test(device, dtype, options.backend)
    print(f"\nself-test in {dtype} against float64, {time.monotonic() - started:.1f} s with compilation")
    for check in checks:
        print(f"{check.name:>20}  {check.error:.1e}  {'ok' if check.passed else f'WRONG, above {check.limit:.0e}'}")
    if not all(check.passed for check in checks):
        print("\nResults are wrong on this machine: do not train. Please report the lines above.")
        return WRONG
    if device.type == "cuda" and choice.backend != "triton":
        print("\nResults are right, but the fast kernels do not run here: see the reason above.")
        return SLOW
    print("\nAll is well.")
    return OK


if __name__ == "__main__":
    sys.exit(main())
