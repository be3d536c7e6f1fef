"""Check the chunked delta rule against float64 over many shapes, beside flash-linear-attention on the same inputs.

    python scripts/check_kernels.py --output benchmarks/results/check.json

Every result and gradient is compared with the chunked reference in float64 on the GPU, on several draws of random data.
Each draw must stay within 1 %, and a second run must give the same bits. What is compared with the other implementation
is the root mean square of a result's errors over the draws, the same draws for both: of a sum over all tokens, such as
dA_log of a few heads, one draw gives little more than one random number. The last case has a million tokens, more than
2^31 elements: there, windows are compared with the reference run on them alone, which strong gates make exact. Exit
code 1 if anything is wrong.

A pool of processes compiles and checks cases side by side; cases of one shape of kernel share a process.
"""

from __future__ import annotations

import functools
import math
import multiprocessing
import random
import sys
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import tyro
from kernel_cases import (
    LIMIT,
    Case,
    Contender,
    errors,
    first_configuration_only,
    load_fla,
    machine,
    make_inputs,
    oracle,
    ours,
    relative_error,
    run_with_gradients,
    write_json,
)
from torch import Tensor

from gdn_cp.kernels.reference import chunk_gated_delta_rule_reference

STRONG = -30 / 64  # log decay per token that makes a chunk decay by e^-30


def mixed_lengths(total: int, count: int, seed: int = 0) -> tuple[int, ...]:
    """`count` lengths >= 0 that sum to `total`, of very different sizes."""
    rng = random.Random(seed)
    cuts = sorted(rng.randint(0, total) for _ in range(count - 1))
    return tuple(b - a for a, b in zip([0, *cuts], [*cuts, total], strict=True))


def all_cases() -> list[Case]:
    """The campaign: lengths, packing, gates, head ratios, head dims, states, dtypes."""
    few = (1, 63, 64, 65, 1000)
    states: dict[str, Any] = {"state_in": True, "state_out": True}
    ones, many = (1,) * 600, tuple(1 + i * 37 % 40 for i in range(2048))
    mixed = mixed_lengths(3000, 16)
    cases = [Case(f"one sequence of {T}", T) for T in (*few, 4096)]
    cases += [Case(f"states, one sequence of {T}", T, **states) for T in (1, 64, 700)]
    cases += [Case("states stored [V, K]", 700, v_first=True, **states)]
    cases += [Case("600 sequences of one token", 600, lengths=ones)]
    cases += [Case("600 sequences of one token, states", 600, lengths=ones, **states)]
    cases += [Case("2048 sequences", sum(many), lengths=many), Case("16 mixed sequences", 3000, lengths=mixed)]
    cases += [Case("empty sequences between", 500, lengths=(0, 100, 0, 0, 399, 1, 0), **states)]
    cases += [Case("16 mixed sequences, states [V, K]", 3000, lengths=mixed, v_first=True, **states)]
    cases += [Case("batch of 4", 300, batch=4), Case("batch of 3, states", 129, batch=3, **states)]
    gates = {"g = 0": 0.0, "decay e^-30 a chunk": STRONG, "weak decay": -1e-3}
    cases += [Case(name, 1000, gate=gate, **states) for name, gate in gates.items()]
    # Little but the last token of a sequence has a gradient then: 64 sequences, so that a norm is of more than a few.
    cases += [Case("decay e^-20 a token", 3000, lengths=mixed_lengths(3000, 64), gate=-20.0, **states)]
    cases += [Case("decay e^-30 a chunk, packed", 3000, lengths=mixed, gate=STRONG)]
    cases += [Case("no gate", 500, gate="none"), Case("no gate, no beta", 500, gate="none", beta=False)]
    cases += [Case("no beta", 500, beta=False), Case("scale 1", 500, scale=1.0)]
    cases += [Case("norm outside", 700, l2norm=False), Case("norm outside, log decay", 700, l2norm=False, gate=-0.1)]
    for heads in ((2, 2), (1, 3), (2, 8), (1, 8), (16, 32)):
        cases += [Case(f"heads {heads[0]}/{heads[1]}", 900, heads=heads)]
        cases += [Case(f"heads {heads[0]}/{heads[1]}, packed", 1000, heads=heads, lengths=mixed_lengths(1000, 7))]
    for dims in ((64, 128), (128, 64), (16, 16), (32, 64), (96, 192), (256, 128), (128, 256), (64, 64)):
        cases += [Case(f"K={dims[0]} V={dims[1]}", 500, dims=dims, **states)]
    cases += [Case(f"{str(dtype)[6:]}", 700, dtype=dtype, **states) for dtype in (torch.float16, torch.float32)]
    return [replace(case, seed=3 * index) for index, case in enumerate(cases)]


@dataclass(frozen=True)
class Outcome:
    """One case: our errors, the other's, whether repetitions gave the same bits; `error` ends a traceback.

    `ours` and `fla` are root mean squares over the draws, `largest` our largest errors in one draw.
    """

    name: str
    dtype: str
    ours: dict[str, float] = field(default_factory=dict)
    largest: dict[str, float] = field(default_factory=dict)
    fla: dict[str, float] = field(default_factory=dict)
    draws: int = 1
    repeats: bool = False
    error: str = ""
    fla_error: str = ""
    seconds: float = 0.0

    def problems(self) -> list[str]:
        """What is wrong, in words; every draw must keep the limit, float16 and float32 too, which are far better."""
        if self.error:
            return [self.error]
        found = [
            f"{name} {error:.1e} in the worst of {self.draws}, {self.ours[name]:.1e} in all"
            for name, error in self.largest.items()
            if not error <= LIMIT
        ]
        return found if self.repeats else [*found, "bits differ when repeated"]

    def worse_than_fla(self) -> list[str]:
        """Names of results with a larger error than flash-linear-attention's."""
        return [name for name, error in self.fla.items() if self.ours.get(name, math.inf) > error]


def check_case(case: Case, device: torch.device, fla: Contender | str, draws: int) -> Outcome:
    """Run one case on one device, on `draws` inputs of its shape."""
    started = time.monotonic()
    outcome = Outcome(case.name, str(case.dtype)[6:], draws=draws)
    if case.dtype == torch.float32:
        fla = "not compared in float32"
    mine, theirs, same = [], [], []
    for draw in range(draws):
        drawn = replace(case, seed=case.seed + 1000 * draw)
        try:
            inputs, cu_seqlens = make_inputs(drawn, device), drawn.cu_seqlens(device)
            results = run_with_gradients(ours().call, inputs, drawn, cu_seqlens)
            again = run_with_gradients(ours().call, inputs, drawn, cu_seqlens)
            same.append(all(torch.equal(x, again[name]) for name, x in results.items()))
            expected = oracle(inputs, drawn, cu_seqlens)
            mine.append(errors(results, expected, inputs))
        except Exception:
            return replace(outcome, error=traceback.format_exc()[-600:])
        if isinstance(fla, Contender):
            try:
                theirs.append(errors(run_with_gradients(fla.call, inputs, drawn, cu_seqlens), expected, inputs))
            except Exception as error:
                fla = f"{type(error).__name__}: {str(error)[:200]}"
    outcome = replace(outcome, ours=root_mean_square(mine), largest=largest(mine), repeats=all(same))
    other = {"fla_error": fla} if isinstance(fla, str) else {"fla": root_mean_square(theirs)}
    return replace(outcome, **other, seconds=time.monotonic() - started)


def root_mean_square(draws: list[dict[str, float]]) -> dict[str, float]:
    """Root mean square of each result's error over draws."""
    return {name: math.sqrt(sum(found[name] ** 2 for found in draws) / len(draws)) for name in draws[0]}


def largest(draws: list[dict[str, float]]) -> dict[str, float]:
    """The largest error of each result over draws; NaN, which is not in order, counts as the largest."""
    return {
        name: max((found[name] for found in draws), key=lambda error: (math.isnan(error), error)) for name in draws[0]
    }


def check_group(cases: list[Case], device_name: str, with_fla: bool, draws: int) -> list[Outcome]:
    """The work item of a process: cases whose kernels are compiled alike."""
    fla: Contender | str = "not asked for"
    if with_fla:
        first_configuration_only()
        fla = load_fla()
    return [check_case(case, torch.device(device_name), fla, draws) for case in cases]


def group_cases(cases: list[Case]) -> list[list[Case]]:
    """Cases by the constants that their kernels are compiled for, the slowest groups first."""

    def key(case: Case) -> tuple:
        kernel = (case.heads, case.dims, str(case.dtype), case.lengths is None)
        return (*kernel, case.state_in, str(case.gate), case.l2norm)

    groups = [list(group) for _, group in groupby(sorted(cases, key=key), key)]
    return sorted(groups, key=lambda group: (-group[0].dims[0] * group[0].dims[1], -len(group)))


def check_million_tokens(device: torch.device, tokens: int = 2**20, heads: tuple[int, int] = (16, 32)) -> Outcome:
    """A batch whose offsets pass 2^31: windows at the start, around element 2^31 of v, and at the end.

    With a decay of at least e^-0.02 a token nothing of what lies `margin` tokens away is left (e^-80 or less), so the
    reference may start and end that far outside a window.
    """
    margin, width = 4096, 512
    case = Case("a million tokens", tokens, heads=heads, gate=-0.06, seed=5)
    try:
        inputs = make_inputs(case, device)
        inputs["g"] = (inputs["g"] - 0.02).contiguous()
        results = run_with_gradients(ours().call, inputs, case, None)
        found: dict[str, float] = {}
        for start in (0, min(2**31 // (heads[1] * 128), tokens // 2) - width // 2, tokens - width):
            first, last = max(0, start - margin), min(tokens, start + width + margin)
            window = replace(case, tokens=last - first)
            expected = oracle_of_window(inputs, window, first, last, results["o"].shape)
            for name, x in results.items():
                rows = slice(start - first, start - first + width)
                error = relative_error(x[:, start : start + width], expected[name][:, rows])
                found[name] = max(found.get(name, 0.0), error)
        return Outcome(case.name, "bfloat16", found, found, repeats=True)
    except Exception:
        return Outcome(case.name, "bfloat16", error=traceback.format_exc()[-600:])


def oracle_of_window(
    inputs: dict[str, Tensor], window: Case, first: int, last: int, o_shape: torch.Size
) -> dict[str, Tensor]:
    """The float64 reference on rows first..last alone, for the same loss as on the whole batch."""
    device = inputs["q"].device
    generator = torch.Generator(device).manual_seed(window.seed + 1)
    weight = torch.randn(o_shape, device=device, generator=generator, dtype=window.dtype)[:, first:last].double()
    leaves = {name: x[:, first:last].double().requires_grad_() for name, x in inputs.items()}
    o, _ = chunk_gated_delta_rule_reference(**leaves, **window.flags())
    gradients = torch.autograd.grad(o, list(leaves.values()), weight)
    return {"o": o.detach(), **{f"d{name}": x for name, x in zip(leaves, gradients, strict=True)}}


@dataclass
class Options:
    """Correctness campaign of the chunked delta rule."""

    output: Path = Path("benchmarks/results/check.json")
    """Where the JSON goes."""
    device: str = "cuda"
    """cuda, or cpu to try the script without a GPU (the reference then checks itself)."""
    only: str = ""
    """Only cases whose name contains this."""
    draws: int = 8
    """Random inputs of each case, run through the same compiled kernels."""
    jobs: int = 14
    """Processes."""
    fla: bool = True
    """Compare with flash-linear-attention's error."""
    million: bool = True
    """Also the batch of a million tokens (takes about 100 GB)."""


def print_table(outcomes: list[Outcome]) -> None:
    """One line a case: our worst result, its error over all draws and in the worst of them, the other's worst."""
    print(f"{'case':36} {'dtype':9} {'ours':>8} {'worst':>14} {'a draw':>8} {'fla':>8}  sec")
    for outcome in outcomes:
        worst = max(outcome.ours, key=lambda name: outcome.ours[name], default="-")
        fla = f"{max(outcome.fla.values()):.1e}" if outcome.fla else "-"
        remark = "; ".join(outcome.problems()) or (
            f"larger than fla: {', '.join(outcome.worse_than_fla())}" if outcome.worse_than_fla() else ""
        )
        print(
            f"{outcome.name:36} {outcome.dtype:9} {outcome.ours.get(worst, math.nan):8.1e} {worst:>14} "
            f"{outcome.largest.get(worst, math.nan):8.1e} {fla:>8} {outcome.seconds:4.0f}  {remark}"
        )


def main(options: Options) -> int:
    """Run the campaign; 1 if a case is wrong."""
    cases = [case for case in all_cases() if options.only in case.name]
    groups = group_cases(cases)
    outcomes: list[Outcome] = []
    check = functools.partial(
        check_group, device_name=options.device, with_fla=options.fla, draws=max(1, options.draws)
    )
    if options.jobs > 1:
        with ProcessPoolExecutor(options.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
            for future in [pool.submit(check, group) for group in groups]:
                outcomes += future.result()
    else:
        for group in groups:
            outcomes += check(group)
    if options.million and options.device == "cuda":
        outcomes.append(check_million_tokens(torch.device("cuda")))
    print_table(outcomes)
    content: dict[str, Any] = {"kind": "check", "limit": LIMIT, "machine": machine()}
    content["cases"] = [{**vars(outcome), "problems": outcome.problems()} for outcome in outcomes]
    write_json(options.output, content)
    wrong = [outcome.name for outcome in outcomes if outcome.problems()]
    compared = [outcome for outcome in outcomes if outcome.fla]
    larger = [f"{outcome.name}: {name}" for outcome in compared for name in outcome.worse_than_fla()]
    results = sum(len(outcome.fla) for outcome in compared)
    print(
        f"{len(outcomes)} cases, {len(wrong)} wrong; error larger than fla's in {len(larger)} of {results} results of "
        f"{len(compared)} cases"
    )
    return int(bool(wrong) or not outcomes)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
