"""Time intra-card splitting against the same kernels unsplit, and what the law of a segment costs besides its output.

    python scripts/bench_segments.py --output benchmarks/results/segments.json

Results of both cuts are compared with float64 and with each other before anything is timed. The script fails if the
automatic choice is more than 3 % slower than no cut anywhere, or less than twice as fast with 2/4 heads and one
sequence. Times are of CUDA-graph replays.

Dimensions: T tokens, H query/key heads, HV value heads.
"""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
import tyro
from bench_chunk import bench_inputs
from kernel_cases import LIMIT, Case, errors, machine, oracle, relative_error, run_with_gradients, write_json
from kernel_timing import DEVICE, time_eager, time_graph
from torch import Tensor

from gdn_cp.kernels.chunk import chunk_gated_delta_rule
from gdn_cp.kernels.piece_plan import chain_plan
from gdn_cp.kernels.segments import RuleOptions, SegmentRule, TokenInputs, begin_segment_backward

SLOWER = 1.03  # what the automatic choice may cost where it is wrong
FASTER = 2.0  # what it has to bring where 8 programs would walk on 132 multiprocessors
BOTH_ENDS = 3  # the role of a segment in the middle of its chain


@dataclass
class Segments:
    """Intra-card splitting on and off, and segment summaries."""

    output: Path = Path("benchmarks/results/segments.json")
    """Where the JSON goes."""
    heads: tuple[tuple[int, int], ...] = ((2, 4), (4, 8), (8, 16), (16, 32))
    """Pairs of query/key heads and value heads."""
    tokens: tuple[int, ...] = (32768, 131072)
    """Tokens of the batch."""
    sequences: tuple[int, ...] = (1, 4)
    """Equal sequences that the tokens are divided into."""
    pieces: tuple[int, ...] = ()
    """Further fixed cuts to time, chunks to a piece."""
    repeats: int = 6
    """Repetitions of each timing."""
    jobs: int = 16
    """Processes that compile; 0: none."""


@dataclass
class Row:
    """One shape under one cut: chunks to a piece forward and backward (0: none), milliseconds forward, and both."""

    heads: tuple[int, int]
    tokens: int
    sequences: int
    asked: str
    pieces: int
    backward_pieces: int
    forward: float
    both: float


@dataclass
class SummaryRow:
    """Two segments that are continued at both ends: milliseconds of each part, everything else being there."""

    heads: tuple[int, int]
    tokens: int
    prepare: float
    summary: float
    truncated_summary: float
    run: float
    gradient_summary: float
    truncated_gradient_summary: float
    backward: float


def case_of(heads: tuple[int, int], tokens: int, sequences: int) -> Case:
    """Equal sequences; gates as a model has them at initialisation, computed before."""
    lengths = (tokens // sequences,) * sequences
    return Case(f"{heads[0]}/{heads[1]} x {tokens}", tokens, heads=heads, lengths=lengths, beta=False, gate=-0.05)


def chosen_cuts(case: Case) -> tuple[int, int]:
    """Chunks to a piece that the automatic choice takes, forward and backward."""
    assert case.lengths is not None
    plan = chain_plan(DEVICE, case.dtype, len(case.lengths), case.tokens, case.heads[1], *case.dims)
    return plan.cut, plan.backward_cut


def measure(case: Case, intra_card: int | None, repeats: int) -> Row:
    """Time one shape under one cut."""
    inputs = {name: x.requires_grad_() for name, x in bench_inputs(case).items()}
    call = {**inputs, **case.flags(), "cu_seqlens": case.cu_seqlens(DEVICE), "intra_card": intra_card}
    weight = torch.randn_like(inputs["v"])

    def forward() -> Tensor:
        with torch.no_grad():
            return chunk_gated_delta_rule(**call)[0]

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(chunk_gated_delta_rule(**call)[0], list(inputs.values()), weight)

    assert case.lengths is not None
    pieces = chosen_cuts(case) if intra_card is None else (intra_card, intra_card)
    asked = "automatic" if intra_card is None else "off" if intra_card == 0 else "fixed"
    times = (_time(forward, repeats), _time(both, repeats))
    return Row(case.heads, case.tokens, len(case.lengths), asked, *pieces, *times)


def _time(function: Callable[[], object], repeats: int) -> float:
    function()
    found = time_graph(function, repeats)
    return time_eager(function, repeats) if found is None else found


def measure_summaries(heads: tuple[int, int], tokens: int, repeats: int) -> SummaryRow:
    """Time the parts of state passing for two segments of tokens / 2 each, as zigzag gives them to a rank."""
    case = case_of(heads, tokens, 2)
    inputs = TokenInputs(**bench_inputs(case))
    options, cu_seqlens = RuleOptions(use_qk_l2norm_in_kernel=True), case.cu_seqlens(DEVICE)
    assert cu_seqlens is not None
    roles = torch.full((2,), BOTH_ENDS, dtype=torch.int32, device=DEVICE)
    d_output, needed = torch.randn_like(inputs.v), tuple(x is not None for x in inputs.tensors())

    def prepared(truncate: bool = False) -> SegmentRule:
        return SegmentRule(inputs, options, cu_seqlens, roles, (0, 2), truncate=truncate)

    with torch.no_grad():
        rules = prepared(), prepared(True)
        entering = rules[0].summarise()[..., : inputs.v.shape[3]].contiguous()
        rules[0].run(entering)

        def backward(summary: bool, truncate: bool = False) -> object:
            parts = (rules[0].kept(), entering, d_output, needed)
            begun = begin_segment_backward(inputs, options, cu_seqlens, roles, *parts, truncate=truncate)
            return begun.state_gradient() if summary else begun.finish(entering)

        times = [
            _time(function, repeats)
            for function in (
                prepared,
                rules[0].summarise,
                rules[1].summarise,
                partial(rules[0].run, entering),
                partial(backward, True),
                partial(backward, True, True),
                partial(backward, False),
            )
        ]
    return SummaryRow(heads, tokens, *times)


def check(heads: tuple[int, int]) -> dict[str, float]:
    """Largest relative errors of both cuts against float64, and of one against the other, over 4,096 tokens."""
    found: dict[str, float] = {}
    for sequences in (1, 4):
        case = case_of(heads, 4096, sequences)
        inputs, cu_seqlens = bench_inputs(case), case.cu_seqlens(DEVICE)
        expected = oracle(inputs, case, cu_seqlens)
        results = [
            run_with_gradients(partial(chunk_gated_delta_rule, intra_card=cut), inputs, case, cu_seqlens)
            for cut in (0, 8)
        ]
        for result, name in zip(results, ("off", "on"), strict=True):
            for key, error in errors(result, expected, inputs).items():
                found[f"{name} {key}"] = max(found.get(f"{name} {key}", 0.0), error)
        for key, x in results[0].items():
            difference = relative_error(results[1][key], x)
            found[f"on against off {key}"] = max(found.get(f"on against off {key}", 0.0), difference)
    return found


def _compile(heads: tuple[int, int], tokens: int, sequences: int, intra_card: int | None) -> None:
    """Work item: compile what a shape runs."""
    case = case_of(heads, tokens, sequences)
    inputs = bench_inputs(case)
    run_with_gradients(partial(chunk_gated_delta_rule, intra_card=intra_card), inputs, case, case.cu_seqlens(DEVICE))


def _compile_summaries(heads: tuple[int, int], tokens: int) -> None:
    measure_summaries(heads, tokens, 1)


def compile_everything(options: Segments) -> None:
    """Fill the compiler's cache from a pool of processes."""
    work: list[tuple[Callable[..., None], tuple]] = [(_compile_summaries, (heads, 16384)) for heads in options.heads]
    for heads in options.heads:
        for tokens in (4096, *options.tokens):
            work += [(_compile, (heads, tokens, 1, cut)) for cut in (0, None, 8)]
    with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
        for item in [pool.apply_async(function, arguments) for function, arguments in work]:
            item.get()


def judge(rows: list[Row]) -> list[str]:
    """What the automatic choice does worse than it has to, in words."""
    problems = []
    off = {(row.heads, row.tokens, row.sequences): row for row in rows if row.asked == "off"}
    for row in rows:
        if row.asked != "automatic":
            continue
        unsplit = off[row.heads, row.tokens, row.sequences]
        for name in ("forward", "both"):
            ratio = getattr(unsplit, name) / getattr(row, name)
            where = f"{row.heads[0]}/{row.heads[1]} heads, {row.tokens} tokens, {row.sequences} sequences, {name}"
            if ratio < 1 / SLOWER:
                problems.append(f"{where}: {1 / ratio:.2f} times as slow as unsplit")
            if row.heads == (2, 4) and row.sequences == 1 and ratio < FASTER:
                problems.append(f"{where}: only {ratio:.2f} times as fast as unsplit")
    return problems


def print_table(rows: list[Row], summaries: list[SummaryRow]) -> None:
    """Times beside those of no cut, and the parts of state passing."""
    print(
        f"{'heads':>6} {'tokens':>7} {'seqs':>4} {'cut':>9} {'pieces':>9} {'fwd ms':>8} {'both ms':>8}  times as fast"
    )
    unsplit = {(row.heads, row.tokens, row.sequences): row for row in rows if row.asked == "off"}
    for row in rows:
        base = unsplit[row.heads, row.tokens, row.sequences]
        print(
            f"{row.heads[0]:>3}/{row.heads[1]:<2} {row.tokens:>7} {row.sequences:>4} {row.asked:>9} "
            f"{row.pieces:>4}/{row.backward_pieces:<4} "
            f"{row.forward:8.3f} {row.both:8.3f}  {base.forward / row.forward:5.2f} {base.both / row.both:5.2f}"
        )
    print("two segments, continued at both ends, ms:")
    for row in summaries:
        times = {name: value for name, value in asdict(row).items() if isinstance(value, float)}
        parts = "  ".join(f"{name} {value:.3f}" for name, value in times.items())
        print(f"{row.heads[0]:>3}/{row.heads[1]:<2} {row.tokens:>7}  {parts}")


def main(options: Segments) -> int:
    """Check, time, judge; 1 if a result is wrong or the automatic choice is bad."""
    if options.jobs and DEVICE.type == "cuda":
        compile_everything(options)
    accuracy = {f"{heads[0]}/{heads[1]}": check(heads) for heads in options.heads[:2]}
    wrong = {key: found for key, found in accuracy.items() if not max(found.values()) <= LIMIT}
    if wrong:
        print(f"wrong, nothing is timed: {wrong}")
        return 1
    rows, summaries = [], []
    for heads in options.heads:
        for tokens in options.tokens:
            for sequences in options.sequences:
                case = replace(case_of(heads, tokens, sequences), seed=tokens)
                rows += [measure(case, cut, options.repeats) for cut in (0, None, *options.pieces)]
        summaries.append(measure_summaries(heads, 16384, options.repeats))
    problems = judge(rows)
    content = {"kind": "segments", "machine": machine(), "errors": accuracy, "problems": problems}
    rows_as_json = {"rows": [asdict(row) for row in rows], "summaries": [asdict(row) for row in summaries]}
    write_json(options.output, content | rows_as_json)
    print_table(rows, summaries)
    print("\n".join(problems) or "the automatic choice is never worse than allowed")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Segments)))
