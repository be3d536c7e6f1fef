"""Time this package's Gated DeltaNet layer against megatron-core's own, on the same ranks in the same run.

    torchrun --standalone --nproc-per-node 4 scripts/bench_layer.py --output benchmarks/results/layer-cp4.json

All ranks are one context-parallel group. Both layers get the same weights and the same packed batches. First both are
compared with this package's plain layer in float64 on a small batch, and with each other on each case; what is wrong is
not timed. Then forward and backward are timed by turns, and what they keep and need in memory is measured. With
`--breakdown` each kernel's share is printed. (flash-linear-attention refuses to run its backward on Hopper with Triton
before 3.7.1. The refusal is switched off to time it, and the note in the output says so.)

Dimensions: t local rows, T rows of the batch, h hidden size, P ranks.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from bench_layer_compile import compile_ahead
from bench_layer_pair import (
    OURS,
    THEIRS,
    OtherPath,
    Runner,
    Widths,
    build_ours,
    build_theirs,
    describe_to_ours,
    describe_to_theirs,
    layer_config,
    other_path,
    share_weights,
    start_megatron,
)
from bench_ranks import (
    World,
    batch_lengths,
    capture,
    join_world,
    kernel_times,
    leave,
    local_rank,
    print_kernels,
    time_by_turns,
)
from kernel_cases import machine, relative_error, write_json
from kernel_timing import DEVICE, measure_memory, quicken_autotuner
from torch import Tensor, nn

from gdn_cp import GatedDeltaNet, ThdLayout

# A layer rounds to bfloat16 (2^-9) some ten times between input and output, and the delta rule's own error is up to
# 0.6 %; against float64 that is below 1.5 %, and between two layers below the sum of both.
LIMITS = {torch.bfloat16: 1.5e-2, torch.float32: 1e-4}
CASES = {  # tokens, sequences, whether their lengths are mixed
    "16k-one": (16384, 1, False),
    "16k-four": (16384, 4, False),
    "16k-17mixed": (16384, 17, True),
    "32k-one": (32768, 1, False),
    "64k-one": (65536, 1, False),
    "64k-four": (65536, 4, False),
    "64k-17mixed": (65536, 17, True),
    "64k-64short": (65536, 64, False),
    "256k-one": (262144, 1, False),
    "tiny-3mixed": (256, 3, True),
}


@dataclass
class Options:
    """Layer forward and backward: this package against megatron-core."""

    output: Path = Path("benchmarks/results/layer.json")
    """Where the JSON goes."""
    cases: tuple[str, ...] = tuple(name for name in CASES if not name.startswith("tiny"))
    """Which batches; see CASES."""
    a2a_sizes: tuple[int, ...] = ()
    """Rows of this package: ranks that trade heads for tokens. Default: every divisor of the ranks, from all to 1."""
    widths: Widths = field(default_factory=Widths)
    """Sizes of the layer."""
    theirs: bool = True
    """Compare with megatron-core's layer."""
    graphs: tuple[str, ...] = ("16k-one", "16k-four", "16k-17mixed")
    """Cases of which this package's layer is also replayed as a CUDA graph."""
    one_thread: tuple[str, ...] = ("16k-one", "16k-four", "16k-17mixed")
    """Cases that are also timed with the backward on the forward's thread, as the training job of this package runs
    it: autograd's own thread finds its core's caches cold."""
    breakdown: tuple[str, ...] = ()
    """Cases of which every kernel is listed."""
    check_tokens: int = 2048
    """Tokens of the batch that is compared with float64."""
    repeats: int = 7
    """Rounds of each timing."""
    calls: int = 16
    """Calls in a row in each round."""
    shares: int = 12
    """Processes that compile flash-linear-attention's kernels ahead; 0: everything is compiled as it is met."""


@dataclass
class Row:
    """One case and layer. Milliseconds of forward and backward; KiB per local token; errors relative to megatron's."""

    case: str
    tokens: int
    sequences: int
    contender: str
    eager_ms: float | None = None
    one_thread_ms: float | None = None
    graph_ms: float | None = None
    kept_kib_per_token: float | None = None
    peak_kib_per_token: float | None = None
    errors: dict[str, float] = field(default_factory=dict)
    note: str = ""
    kernels: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Layers:
    """Both layers with equal weights (theirs may be missing) and the rows of ours that are asked for."""

    ours: nn.Module
    theirs: nn.Module | None
    a2a_sizes: tuple[int, ...]
    other: OtherPath | None

    def runners(self, layout: ThdLayout) -> dict[str, Runner]:
        """Every contender by name, for one batch; megatron's first."""
        found = {} if self.theirs is None else {THEIRS: Runner(self.theirs, describe_to_theirs(layout))}
        found |= {f"{OURS} a2a={a}": Runner(self.ours, describe_to_ours(layout, a)) for a in self.a2a_sizes}
        if self.other is not None:
            params = describe_to_ours(layout, layout.cp_size, self.other.group)
            found[f"{OURS} {self.other.name}"] = Runner(self.ours, params)
        return found


def local_inputs(layout: ThdLayout, widths: Widths, world: World, seed: int) -> tuple[Tensor, Tensor]:
    """This rank's random input [t, 1, h], which asks for its gradient, and weights of the loss, of the same shape."""
    dtype = torch.bfloat16 if world.device.type == "cuda" else torch.float32
    generator = torch.Generator(world.device).manual_seed(seed * world.size + world.rank)
    shape = (2, layout.t_local, 1, widths.hidden)
    x, weight = torch.randn(shape, device=world.device, generator=generator, dtype=torch.float32).to(dtype)
    return x.clone().requires_grad_(), weight.clone()


def forward_backward(runner: Runner, x: Tensor, weight: Tensor) -> dict[str, Tensor]:
    """Output and input gradient of one call; the parameters' gradients are computed too."""
    out = runner.run(x)
    gradients = torch.autograd.grad(out, runner.leaves(x), weight)
    return {"out": out.detach(), "dx": gradients[0]}


def check_against_float64(layers: Layers, widths: Widths, tokens: int, world: World) -> dict[str, dict[str, float]]:
    """Largest relative error over the ranks of each contender's output and input gradient, on a mixed batch.

    The oracle is the plain layer without context parallelism, in float64, which every rank runs on the whole batch.
    """
    lengths = batch_lengths(tokens, 5, world.size, mixed=True)
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    layout = ThdLayout.zigzag(bounds, world.size, device=world.device)
    x, weight = local_inputs(layout, widths, world, seed=1)
    heads = (widths.key_heads, widths.value_heads, widths.head_dim, widths.head_dim, widths.conv)
    oracle = GatedDeltaNet(widths.hidden, *heads, norm_eps=1e-6, device=world.device, dtype=torch.float64).double()
    share_weights(layers.ours, oracle)

    def gather(part: Tensor) -> Tensor:
        parts = [torch.empty_like(part) for _ in range(world.size)]
        torch.distributed.all_gather(parts, part.detach(), group=world.group)
        return layout.unshard([p[:, 0] for p in parts]).double()

    whole = gather(x).requires_grad_()
    out = oracle(whole, layout=ThdLayout.zigzag(bounds, 1, device=world.device))
    (dx,) = torch.autograd.grad(out, whole, gather(weight))
    expected = {"out": layout.shard(out.detach(), world.rank), "dx": layout.shard(dx, world.rank)}
    return {
        name: _errors(forward_backward(runner, x, weight), expected, world)
        for name, runner in layers.runners(layout).items()
    }


def _errors(results: dict[str, Tensor], expected: dict[str, Tensor], world: World) -> dict[str, float]:
    found = [relative_error(results[name].reshape_as(expected[name]), expected[name]) for name in expected]
    return dict(zip(expected, world.greatest(found), strict=True))


def too_large(errors: dict[str, float], limit: float) -> list[str]:
    """What is above the limit (or not a number), in words."""
    return [f"{name} errs by {error:.1e}, allowed {limit:.1e}" for name, error in errors.items() if not error <= limit]


def measure_case(name: str, layers: Layers, options: Options, world: World) -> tuple[list[Row], dict[str, Callable]]:
    """Check, time and weigh one batch; also the steps of what could be timed, for graphs and breakdowns."""
    tokens, sequences, mixed = CASES[name]
    lengths = batch_lengths(tokens, sequences, world.size, mixed)
    layout = ThdLayout.zigzag(torch.tensor([0, *lengths]).cumsum(0), world.size, device=world.device)
    x, weight = local_inputs(layout, options.widths, world, seed=2)
    runners = layers.runners(layout)
    rows, results = {}, {}
    for contender, runner in runners.items():
        rows[contender] = row = Row(name, tokens, sequences, contender)
        try:
            results[contender] = forward_backward(runner, x, weight)
        except Exception as error:
            row.note = f"{type(error).__name__}: {str(error)[:200]}"
        if not world.all_agree(not row.note):
            row.note = row.note or "failed on another rank"
            results.pop(contender, None)
    reference = results[next(iter(results))] if results else {}
    for contender, result in results.items():
        rows[contender].errors = errors = _errors(result, reference, world)
        rows[contender].note = "; ".join(too_large(errors, 2 * LIMITS[x.dtype]))
    results.clear()
    steps = {
        contender: partial(forward_backward, runner, x, weight)
        for contender, runner in runners.items()
        if not rows[contender].note
    }
    if name in options.one_thread:
        with torch.autograd.set_multithreading_enabled(False):
            for contender, milliseconds in time_by_turns(steps, world, options.repeats, options.calls).items():
                rows[contender].one_thread_ms = milliseconds
    for contender, milliseconds in time_by_turns(steps, world, options.repeats, options.calls).items():
        rows[contender].eager_ms = milliseconds
        rows[contender].kept_kib_per_token, rows[contender].peak_kib_per_token = _memory(
            runners[contender], x, weight, world
        )
    return list(rows.values()), steps


def _memory(runner: Runner, x: Tensor, weight: Tensor, world: World) -> tuple[float | None, float | None]:
    """KiB per local token that are kept for the backward, and at the peak; the largest over the ranks."""
    found = measure_memory(partial(runner.run, x), lambda out: torch.autograd.grad(out, runner.leaves(x), weight))
    if found is None:
        return None, None
    kept, peak = world.greatest(size / 1024 / x.shape[0] for size in found)
    return kept, peak


def replay_graphs(rows: list[Row], steps: dict[str, Callable], options: Options, world: World) -> None:
    """Time this package's rows of one case as CUDA graphs."""
    for row in rows:
        if row.contender in steps and row.contender != THEIRS:
            replay = capture(steps[row.contender], world)
            if isinstance(replay, str):
                row.note = f"no graph: {replay}"
                continue
            row.graph_ms = time_by_turns({"graph": replay}, world, options.repeats, options.calls)["graph"]


def list_kernels(rows: list[Row], steps: dict[str, Callable], world: World) -> None:
    """Print each contender's kernels on rank 0 and keep them in its row."""
    for row in rows:
        if row.contender in steps:
            kernels = kernel_times(steps[row.contender], world)
            print_kernels(world, f"{row.case}, {row.contender}", kernels)
            row.kernels = [asdict(kernel) for kernel in kernels]


def print_header(world: World) -> None:
    """What the columns of `print_rows` are."""
    world.say("\nmilliseconds of forward and backward; KiB per local token kept after the forward, and at the peak;")
    world.say("x = times faster than megatron's layer, and the share of its peak; one: with one thread")
    heads = f"{'eager':>8} {'x':>5} {'one':>8} {'x':>5} {'graph':>8} {'kept':>6} {'peak':>6} {'of theirs':>9}"
    world.say(f"{'case':12} {'layer':13} {heads}")


def print_rows(rows: list[Row], world: World) -> None:
    """A line for each row."""
    theirs = {row.case: row for row in rows if row.contender == THEIRS}
    for row in rows:
        other = theirs.get(row.case)
        faster = _ratio(other and other.eager_ms, row.eager_ms)
        share = _ratio(row.peak_kib_per_token, other and other.peak_kib_per_token)
        one = _ratio(other and other.one_thread_ms, row.one_thread_ms)
        cells = [_cell(row.eager_ms, "8.3f"), _cell(faster, "5.2f"), _cell(row.one_thread_ms, "8.3f")]
        cells += [_cell(one, "5.2f"), _cell(row.graph_ms, "8.3f")]
        cells += [_cell(row.kept_kib_per_token, "6.1f"), _cell(row.peak_kib_per_token, "6.1f"), _cell(share, "9.2f")]
        world.say(f"{row.case:12} {row.contender:13} {' '.join(cells)} {row.note}".rstrip())


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a and b else None


def _cell(value: float | None, form: str) -> str:
    return "-".rjust(int(form.split(".")[0])) if value is None else format(value, form)


def build_layers(options: Options, world: World) -> tuple[Layers, dict[str, str]]:
    """Both layers, and notes on what is missing or was done to make it run."""
    config = layer_config(options.widths, world.size, world.device)
    ours = build_ours(config, world.device)
    theirs, notes = None, {}
    if options.theirs:
        theirs, note = build_theirs(config, world.device)
        notes = {THEIRS: note} if note else {}
        if theirs is not None:
            share_weights(theirs, ours)
    for parameter in ours.parameters():  # the same on every rank
        torch.distributed.broadcast(parameter.data, 0, group=world.group)
    if theirs is not None:
        share_weights(ours, theirs)
    other = other_path(world.size, world.device)
    return Layers(ours, theirs, options.a2a_sizes or divisors(world.size), other), notes


def divisors(ranks: int) -> tuple[int, ...]:
    """Every a2a_size, the largest first."""
    return tuple(a for a in range(ranks, 0, -1) if ranks % a == 0)


def pass_check(layers: Layers, options: Options, world: World, content: dict[str, Any]) -> bool:
    """Keep the errors against float64 and notes on those that are too large; False if one is this package's."""
    content["errors"] = accuracy = check_against_float64(layers, options.widths, options.check_tokens, world)
    limit = LIMITS[torch.bfloat16 if world.device.type == "cuda" else torch.float32]
    wrong = {name: "; ".join(too_large(errors, limit)) for name, errors in accuracy.items()}
    content["notes"].update({name: words for name, words in wrong.items() if words})
    world.say(f"errors against float64: {accuracy}")
    return not any(words and name.startswith(OURS) for name, words in wrong.items())


def main(options: Options) -> int:
    """Check, time, write, print; 1 if a result of this package is wrong."""
    started = time.monotonic()
    if options.theirs and options.shares and DEVICE.type == "cuda" and local_rank() == 0:
        ranks = int(os.environ.get("WORLD_SIZE", "1"))
        compile_ahead(options.widths, ranks, options.a2a_sizes or divisors(ranks), options.shares)
        print(f"{time.monotonic() - started:.0f} s: compiled ahead", flush=True)
    world = join_world()
    start_megatron(world.size, world.device)
    quicken_autotuner()
    layers, notes = build_layers(options, world)
    content: dict[str, Any] = {"kind": "layer", "machine": machine(), "ranks": world.size, "notes": notes}
    good = pass_check(layers, options, world, content)
    world.say(f"{time.monotonic() - started:.0f} s until checked")
    if not good:
        world.say(f"our own results are wrong, nothing is timed: {notes}")
        return 1
    rows: list[Row] = []
    print_header(world)
    for name in options.cases:
        found, steps = measure_case(name, layers, options, world)
        if name in options.breakdown:
            list_kernels(found, steps, world)
        if name in options.graphs:
            replay_graphs(found, steps, options, world)
        rows += found
        print_rows(found, world)
        content["peer_memory_bytes"] = 0 if layers.other is None else layers.other.peer_bytes
        if world.rank == 0:
            write_json(options.output, {**content, "rows": [asdict(row) for row in rows]})
    world.say(
        f"peers' memory, once for all layers and not in kept or peak: {content['peer_memory_bytes'] / 2**20:.0f} MiB"
    )
    for name, note in notes.items():
        world.say(f"note: {name}: {note}")
    print_header(world)
    print_rows(rows, world)
    world.say(f"{time.monotonic() - started:.0f} s in all")
    return 0


if __name__ == "__main__":
    leave(main(tyro.cli(Options)))
