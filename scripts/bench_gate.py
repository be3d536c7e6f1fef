"""The decay gate and its gradient against the memory's speed. See bench_kernels.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from kernel_cases import LIMIT, Case, machine, make_inputs, relative_error, write_json
from kernel_timing import DEVICE, copy_time, time_best
from torch import Tensor

from gdn_cp.kernels.gate import fused_gdn_gate, fused_gdn_gate_chunk_cumsum, gdn_gate_reference


@dataclass
class Gate:
    """The decay gate and its gradient."""

    output: Path = Path("benchmarks/results/gate.json")
    """Where the JSON goes."""
    tokens: int = 65536
    """Rows of the gate, a multiple of 64."""
    repeats: int = 20
    """Repetitions of each timing."""


def run_gate(options: Gate) -> int:
    """Check and time the gate, alone and with its chunk sums, forward and backward; 1 if a result is wrong."""
    drawn = make_inputs(Case("gate", options.tokens, heads=(16, 32)), DEVICE)
    inputs = {name: drawn[name] for name in ("g", "A_log", "dt_bias")}
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    exact = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    rows = []
    for name, function in (("gate", fused_gdn_gate), ("gate + chunk sums", fused_gdn_gate_chunk_cumsum)):
        y, y_64 = function(**leaves), gdn_gate_reference(**exact)
        if name != "gate":
            y_64 = y_64.unflatten(1, (-1, 64)).cumsum(2).flatten(1, 2)
        weight = torch.randn_like(y)
        gradients = torch.autograd.grad(y, list(leaves.values()), weight)
        exact_gradients = torch.autograd.grad(y_64, list(exact.values()), weight.double())
        pairs = zip(("y", *leaves), (y, *gradients), (y_64, *exact_gradients), strict=True)
        found = {key: relative_error(x, expected) for key, x, expected in pairs}
        if not max(found.values()) <= LIMIT:
            print(f"{name} is wrong, nothing is timed: {found}")
            return 1

        def both(function: Callable[..., Tensor] = function, weight: Tensor = weight) -> tuple[Tensor, ...]:
            return torch.autograd.grad(function(**leaves), list(leaves.values()), weight)

        def forward(function: Callable[..., Tensor] = function) -> Tensor:
            with torch.no_grad():
                return function(**leaves)

        times = {"forward": time_best(forward, options.repeats), "both": time_best(both, options.repeats)}
        least = inputs["g"].nbytes * 3 + y.nbytes * 2  # g in, out; g, gradient in, dg out
        rows.append({"name": name, **times, "copy": copy_time(least, options.repeats), "errors": found})
    write_json(options.output, {"kind": "gate", "machine": machine(), "rows": rows})
    print(f"gate, {options.tokens} x 32: microseconds in a graph; copy moves the bytes of forward and backward once")
    for row in rows:
        times = {name: row[name] * 1e3 for name in ("forward", "both", "copy")}
        print(f"{row['name']:18} fwd {times['forward']:7.1f}  fwd+bwd {times['both']:7.1f}  copy {times['copy']:7.1f}")
    return 0
