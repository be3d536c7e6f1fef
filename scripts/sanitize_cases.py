"""The kernels on a few tiny problems, for compute-sanitizer: see sanitize_kernels.sh.

Each kind of kernel runs at least once: forward and backward of the delta rule over packed sequences with tails and an
empty one, with raw gates, with given states and without (the backward has kernels for each); decode from both kinds of
bank; the gate alone; the packed convolution.
"""

from __future__ import annotations

import sys

import torch
from bench_decode import make_problem
from kernel_cases import LIMIT, Case, errors, make_inputs, oracle, ours, run_with_gradients

from gdn_cp.kernels.conv1d import causal_conv1d
from gdn_cp.kernels.gate import fused_gdn_gate_chunk_cumsum

LENGTHS = (70, 0, 1, 64)


def main() -> int:
    """Run everything once and compare with float64; 1 if a result is wrong."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found: dict[str, float] = {}
    for states in (True, False):
        name = "given states" if states else "packed"
        case = Case(name, sum(LENGTHS), heads=(1, 2), lengths=LENGTHS, state_in=states, state_out=states)
        inputs, cu_seqlens = make_inputs(case, device), case.cu_seqlens(device)
        results = run_with_gradients(ours().call, inputs, case, cu_seqlens)
        expected = oracle(inputs, case, cu_seqlens)
        found |= {f"{name} {x}": error for x, error in errors(results, expected, inputs).items()}
    for dtype in (torch.float32, torch.bfloat16):
        for v_first in (False, True):
            problem = make_problem(2, (1, 2), 128, dtype, v_first)
            found |= {f"{problem.name} {name}": error for name, error in problem.errors().items()}
    gate = [inputs[name].requires_grad_() for name in ("g", "A_log", "dt_bias")]
    fused_gdn_gate_chunk_cumsum(*gate, cu_seqlens=cu_seqlens).sum().backward()
    x = torch.randn(sum(LENGTHS), 64, device=device, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(64, 4, device=device, dtype=torch.bfloat16, requires_grad=True)
    causal_conv1d(x, weight, cu_seqlens=cu_seqlens).sum().backward()
    wrong = {name: error for name, error in found.items() if not error <= LIMIT}
    print(f"{len(found)} results, wrong: {wrong or 'none'}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
