"""Segments of one long sequence in bfloat16 on one GPU: their number does not add to the error against float64.

The ranks are imitated on one GPU: the segments are summarised, composed and run as they are across ranks. Tolerance:
1.2 times the unsplit rule's own error. The gradients of A_log and dt_bias are sums of few numbers to a head, whose
errors are random; their terms have passed through up to five products with operands rounded by 2^-9, and cancel while
their errors do not, so these are measured against the root of the sum of squared terms. Since dg is a running sum over
the 64 rows of a chunk, so are its errors, which adds up to sqrt(64) times as much.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gdn_cp.kernels.reference import chunk_gated_delta_rule_reference
from gdn_cp.kernels.segments import RuleOptions, TokenInputs, run_rule
from tests.segment_chains import run_in_segments

pytestmark = pytest.mark.gpu
TOKENS, H, HV, K, V = 8192, 2, 4, 128, 128
RATIO, GATE = 1.2, 5 * 2.0**-9 * 64**0.5
RAW = RuleOptions(use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True, use_beta_sigmoid_in_kernel=True)
PLAIN = RuleOptions(use_qk_l2norm_in_kernel=True)
Results = dict[str, Tensor]


def make_inputs(forgetful: bool) -> tuple[TokenInputs, RuleOptions, Tensor]:
    """Gates as at initialisation, or none at all: then every state lives until the end."""
    draw = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", generator=draw)

    tokens = [normal(1, TOKENS, heads, dim).bfloat16() for heads, dim in ((H, K), (H, K), (HV, V), (HV, V))]
    q, k, v, d_output = tokens
    g, beta = (normal(1, TOKENS, HV).bfloat16() for _ in range(2))
    if not forgetful:
        return TokenInputs(q, k, v, None, beta.float().sigmoid().bfloat16()), PLAIN, d_output
    A_log = (16 * torch.rand(HV, device="cuda", generator=draw) + 1e-3).log()
    dt_bias = (1e-3 * 100 ** torch.rand(HV, device="cuda", generator=draw)).expm1().log()
    return TokenInputs(q, k, v, g, beta, A_log, dt_bias), RAW, d_output


def named(o: Tensor, gradients: tuple[Tensor | None, ...]) -> Results:
    fields = vars(TokenInputs(o, o, o))
    return {"o": o} | {name: x for name, x in zip(fields, gradients, strict=True) if x is not None}


def unsplit(inputs: TokenInputs, options: RuleOptions, d_output: Tensor, exact: bool) -> Results:
    """The rule over the whole sequence, in float64 by the plain torch reference or by the kernels."""
    leaves = [
        x if x is None else (x.double() if exact else x.detach().clone()).requires_grad_() for x in inputs.tensors()
    ]
    if exact:
        flags = {name: on for name, on in vars(options).items() if name.startswith("use_")}
        q, k, v, g, beta, A_log, dt_bias = leaves
        o, _ = chunk_gated_delta_rule_reference(q, k, v, g, beta, A_log=A_log, dt_bias=dt_bias, **flags)
    else:
        o, _ = run_rule(TokenInputs(*leaves), options, None)
    found = iter(torch.autograd.grad(o, [x for x in leaves if x is not None], d_output.to(o.dtype)))
    return named(o.detach(), tuple(x if x is None else next(found) for x in leaves))


def sizes(exact: Results, inputs: TokenInputs) -> dict[str, float]:
    """What errors are measured against."""
    found = {name: float(x.norm()) for name, x in exact.items()}
    if inputs.A_log is not None and inputs.g is not None and inputs.dt_bias is not None:
        raw = inputs.g.double() + inputs.dt_bias.double()
        terms = exact["g"]
        found["dt_bias"] = float(terms.norm())
        found["A_log"] = float((terms * torch.nn.functional.softplus(raw) / raw.sigmoid()).norm())
    return found


@pytest.mark.parametrize("forgetful", [True, False], ids=["gates", "g = 0"])
def test_error_does_not_grow_with_the_number_of_segments(forgetful):
    inputs, options, d_output = make_inputs(forgetful)
    exact = unsplit(inputs, options, d_output, True)
    size = sizes(exact, inputs)

    def errors(results: Results) -> dict[str, float]:
        return {name: float((x.double() - exact[name]).norm()) / size[name] for name, x in results.items()}

    whole = errors(unsplit(inputs, replace(options, intra_card=0), d_output, False))
    limits = {name: GATE if name in ("A_log", "dt_bias") else RATIO * error for name, error in whole.items()}
    worst, report = 0.0, {"unsplit": whole}
    for segments in (1, 2, 4, 8, 16, 32, 64):
        for pieces in (0, 2) if segments <= 8 else (0,):
            length = TOKENS // segments
            found = errors(
                named(*run_in_segments(inputs, replace(options, intra_card=pieces), ((length,) * segments,), d_output))
            )
            report[f"{segments} segments, pieces of {pieces} chunks"] = found
            worst = max(worst, *(found[name] / limit for name, limit in limits.items()))
    assert worst <= 1, "\n".join(
        f"{name}: " + " ".join(f"{key} {error:.2e}" for key, error in found.items()) for name, found in report.items()
    )


@pytest.mark.parametrize("pieces", [0, 4])
def test_segments_can_be_captured_in_a_graph(pieces):
    """Nothing waits for the device: a replay gives the bits of a plain run."""
    inputs, options, d_output = make_inputs(True)
    options, chains = replace(options, intra_card=pieces), ((2048, 4096), (2048,))
    o, gradients = run_in_segments(inputs, options, chains, d_output)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        captured_o, captured = run_in_segments(inputs, options, chains, d_output)
    graph.replay()
    assert torch.equal(o, captured_o)
    assert all(torch.equal(x, y) for x, y in zip(gradients, captured, strict=True) if x is not None and y is not None)
