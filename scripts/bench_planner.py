"""Compare the planner's choice with every other over a grid of batches, on the ranks of one context-parallel group.

    torchrun --standalone --nproc-per-node 4 scripts/bench_planner.py --output benchmarks/results/planner-cp4.json

For each batch a layer's forward and backward are timed with every possible `a2a_size`, after the outputs of all of
them have been compared. Fails if on any batch the planner's choice is more than 10 % slower than the best one.

Dimensions: t local rows, P ranks.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import tyro
from bench_ranks import World, batch_lengths, join_world, leave, time_by_turns
from kernel_cases import LIMIT, machine, relative_error, write_json
from torch import Tensor

from gdn_cp import GatedDeltaNet, ThdLayout
from gdn_cp.comm.choice import possible_a2a_sizes
from gdn_cp.comm.peer_vote import peer_memory
from gdn_cp.comm.planner import plan

WORST = 1.10  # the planner's choice over the best one
GRID = (
    *((tokens, count, False) for tokens in (8192, 32768, 65536, 131072) for count in (1, 4, 16)),
    *((tokens, count, True) for tokens in (16384, 65536, 262144) for count in (3, 17)),
    (65536, 64, False),
    (262144, 1, False),
)
"""Tokens, sequences, whether their lengths are mixed: 20 batches."""


@dataclass
class Options:
    """The planner against measurements."""

    output: Path = Path("benchmarks/results/planner.json")
    """Where the JSON goes."""
    machine: str = "h200"
    """The planner's coefficients: a stored kind or a JSON file."""
    grid: tuple[tuple[int, int, bool], ...] = GRID
    """Batches: tokens, sequences, mixed lengths."""
    heads: tuple[int, int] = (16, 32)
    """Query/key heads and value heads."""
    head_dim: int = 128
    """K = V."""
    hidden: int = 2048
    """Width of the layer."""
    repeats: int = 3
    """Rounds of each timing."""
    calls: int = 3
    """Calls in a row in each round."""


@dataclass
class Row:
    """One batch: milliseconds by a2a_size, as measured and as the planner predicts them, and its choice."""

    tokens: int
    sequences: int
    mixed: bool
    chosen: int
    measured_ms: dict[int, float]
    predicted_ms: dict[int, float]
    errors: dict[int, float] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """Time of the choice over that of the best."""
        return self.measured_ms[self.chosen] / min(self.measured_ms.values())


def step(
    layer: GatedDeltaNet, x: Tensor, weight: Tensor, layout: ThdLayout, group: dist.ProcessGroup | None, a2a_size: int
) -> Tensor:
    """Forward and backward of the layer; the output."""
    out = layer(x, layout=layout, group=group, a2a_size=a2a_size)
    torch.autograd.grad(out, [x, *layer.parameters()], weight)
    return out.detach()


def measure(layer: GatedDeltaNet, batch: tuple[int, int, bool], options: Options, world: World) -> Row:
    """Check and time one batch under every a2a_size."""
    tokens, sequences, mixed = batch
    bounds = torch.tensor([0, *batch_lengths(tokens, sequences, world.size, mixed)]).cumsum(0)
    layout = ThdLayout.zigzag(bounds, world.size, device=world.device)
    dims, dtype = layer.dims, layer.in_proj.weight.dtype
    draw = torch.Generator(world.device).manual_seed(world.rank)
    shape = 2, layout.t_local, layer.hidden_size
    x, weight = torch.randn(shape, generator=draw, device=world.device).to(dtype).unbind()
    x.requires_grad_()
    peers = peer_memory(world.group, world.device) is not None
    predicted = plan(
        layout.cu_seqlens,
        world.size,
        dims,
        element_size=x.element_size(),
        hidden_size=layer.hidden_size,
        machine=options.machine,
        peers=peers,
    )
    sizes = possible_a2a_sizes(world.size, dims.num_k_heads, dims.num_v_heads)
    steps = {str(a): partial(step, layer, x, weight, layout, world.group, a) for a in sizes}
    outputs = {int(name): run() for name, run in steps.items()}
    found = world.greatest(relative_error(out, outputs[sizes[-1]]) for out in outputs.values())
    outputs.clear()
    times = time_by_turns(steps, world, options.repeats, options.calls, warm_up=1)
    return Row(
        tokens,
        sequences,
        mixed,
        predicted.a2a_size,
        {int(name): value for name, value in times.items()},
        {p.a2a_size: p.total_us / 1e3 for p in predicted.predictions if p.refusal is None},
        dict(zip(sizes, found, strict=True)),
    )


def describe(row: Row) -> str:
    """A line of the table: measured (and predicted) milliseconds by a2a_size."""
    times = "  ".join(f"{a}: {ms:7.3f} ({row.predicted_ms[a]:6.3f})" for a, ms in sorted(row.measured_ms.items()))
    kind = "mixed" if row.mixed else "equal"
    return f"{row.tokens:>7} {row.sequences:>4} {kind}  {times}  takes {row.chosen}, {row.ratio:.3f} of the best"


def main(options: Options) -> int:
    """Check, time, judge; 1 if a result is wrong or a choice is bad."""
    world = join_world()
    dtype = torch.bfloat16 if world.device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    dims = *options.heads, options.head_dim, options.head_dim
    layer = GatedDeltaNet(options.hidden, *dims, device=world.device, dtype=dtype)
    rows, status = [], 0
    world.say("measured (predicted) milliseconds of the layer's forward and backward by a2a_size")
    for batch in options.grid:
        row = measure(layer, batch, options, world)
        rows.append(row)
        world.say(describe(row))
        if not max(row.errors.values()) <= 2 * LIMIT:
            world.say(f"wrong: outputs differ by {row.errors}")
            status = 1
    worst = max(row.ratio for row in rows)
    world.say(f"the worst choice takes {worst:.3f} of the best one's time, allowed {WORST}")
    if world.rank == 0:
        content = {"kind": "planner", "machine": machine(), "ranks": world.size, "coefficients": options.machine}
        write_json(options.output, {**content, "rows": [asdict(row) | {"ratio": row.ratio} for row in rows]})
    return status or int(worst > WORST)


if __name__ == "__main__":
    found = main(tyro.cli(Options))
    leave(found) if found == 0 else sys.exit(found)
