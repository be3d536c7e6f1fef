"""Time the exchange of the mixer's rows against the wire and against megatron-core's functions, in one process group.

    torchrun --standalone --nproc-per-node 4 scripts/bench_exchange.py --output benchmarks/results/exchange-cp4.json

Paths: this package's (through peers' memory, through NCCL, and the plain functions) and Megatron's; and what the wire
gives: NCCL's all_to_all_single of the same bytes alone, and a copy of the bytes that leave a rank into the next rank's
memory. Everything that arrives is compared bit by bit with a permutation of the whole batch before it is timed.

GB/s count the bytes that leave a rank, (P-1)/P of what it sends, and not what stays.

Dimensions: P ranks, T rows of the batch, t = T/P local rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import tyro
from bench_exchange_paths import Data, TransportPath, build_paths, peer_path, without_z
from bench_ranks import World, batch_lengths, capture, join_world, leave, time_by_turns
from kernel_cases import machine, write_json
from torch import Tensor

from gdn_cp.comm.layout import ThdLayout, _build_head_perm_for_split_sections
from gdn_cp.comm.symmetric import PeerMemory
from gdn_cp.comm.symmetric_triton import TileShape
from gdn_cp.comm.transport import MixerColumns

SHAPES = tuple(
    TileShape(rows, columns, warps, programs)
    for rows, columns, warps in ((16, 128, 4), (32, 128, 4), (64, 128, 8), (32, 256, 8), (16, 512, 8))
    for programs in (132, 264, 528)
)


@dataclass
class Options:
    """The exchange against the wire and against megatron-core's."""

    output: Path = Path("benchmarks/results/exchange.json")
    """Where the JSON goes."""
    tokens: tuple[int, ...] = (65536, 16384)
    """Tokens of the batches."""
    sequences: int = 17
    """Sequences of mixed lengths in each."""
    heads: tuple[int, int] = (16, 32)
    """Query/key heads and value heads; Qwen3-Next's."""
    head_dim: int = 128
    """Width of every head."""
    repeats: int = 9
    """Rounds of each timing."""
    calls: int = 5
    """Calls in a row in each round."""
    tune: bool = False
    """Also time the kernel with tiles of many shapes."""


@dataclass
class Row:
    """One path on one batch: milliseconds, and GB/s of what leaves a rank."""

    path: str
    tokens: int
    in_ms: float | None = None
    out_ms: float | None = None
    both_ms: float | None = None
    both_graph_ms: float | None = None
    in_gb_per_s: float | None = None
    out_gb_per_s: float | None = None
    note: str = ""
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Sent:
    """Bytes that leave a rank, in and out."""

    way_in: int
    way_out: int


def make_data(options: Options, tokens: int, world: World) -> tuple[Data, dict[str, Tensor]]:
    """This rank's tensors, cut out of batches that every rank draws alike, and what must arrive."""
    (H, HV), D, P = options.heads, options.head_dim, world.size
    columns = MixerColumns(qk=H * D, v=HV * D, heads=HV, ranks=P)
    lengths = batch_lengths(tokens, options.sequences, P, mixed=True)
    layout = ThdLayout.zigzag(torch.tensor([0, *lengths]).cumsum(0), P, device=world.device)
    generator = torch.Generator(world.device).manual_seed(3)

    def draw(width: int) -> Tensor:
        return torch.randn(tokens, width, generator=generator, device=world.device, dtype=torch.bfloat16)

    def share(x: Tensor, sections: tuple[int, ...]) -> Tensor:
        order = _build_head_perm_for_split_sections(sections, P, world.device)
        return x[:, order.chunk(P)[world.rank]]

    def local(x: Tensor) -> Tensor:
        return layout.shard(x, world.rank)

    sections = (columns.qk, columns.qk, columns.v, columns.heads, columns.heads)
    x, o = draw(columns.width), draw(columns.v)
    expected = {"in": share(without_z(x, columns), sections), "out": local(o)}
    mine = local(x), share(o, (columns.v,))
    del x, o
    grad_in, grad_out = draw(sum(sections)), draw(columns.v)
    expected |= {"dx": local(grad_in), "do": share(grad_out, (columns.v,))}
    return Data(layout, columns, *mine, share(grad_in, sections), local(grad_out)), expected


def bytes_sent(data: Data) -> Sent:
    """What leaves a rank of q, k, v, beta, alpha, and of o."""
    c, t, size = data.columns, data.layout.t_local, data.x.element_size()
    return Sent(t * (c.conv + 2 * c.heads) * size * (c.ranks - 1) // c.ranks, t * c.v * size * (c.ranks - 1) // c.ranks)


def different(results: dict[str, Tensor], expected: dict[str, Tensor], world: World) -> list[str]:
    """Names of what is not, bit for bit on every rank, what it must be."""
    wrong = world.greatest(float(not torch.equal(results[name], expected[name])) for name in expected)
    return [name for name, bad in zip(expected, wrong, strict=True) if bad]


def wire_steps(data: Data, world: World, memory: PeerMemory | None) -> dict[str, dict[str, Callable[[], Any]]]:
    """NCCL alone, and a copy into the next rank's memory, of the bytes of each way."""
    c, found = data.columns, {}
    used = c.share_conv + 2 * c.heads // c.ranks
    steps = {}
    for way, width in (("in", used), ("out", c.v // c.ranks)):
        sent = torch.zeros(data.layout.t_global, width, dtype=data.x.dtype, device=world.device)
        received = torch.empty_like(sent)
        steps[way] = lambda r=received, s=sent: dist.all_to_all_single(r, s, group=world.group)
    found["wire: nccl alone"] = steps
    if memory is not None:
        sizes = asdict(bytes_sent(data))
        steps = {}
        for way in ("in", "out"):
            source = torch.zeros(sizes[f"way_{way}"], dtype=torch.uint8, device=world.device)
            target = memory.bytes_of((world.rank + 1) % world.size, source.numel())
            steps[way] = lambda t=target, s=source: t.copy_(s)
        found["wire: copy to a peer"] = steps
    return found


def measure(options: Options, tokens: int, world: World, notes: dict[str, str]) -> list[Row]:
    """Check and time everything on one batch."""
    data, expected = make_data(options, tokens, world)
    paths, memory, missing = build_paths(data, world.group, world.device)
    notes.update(missing)
    rows = {name: Row(name, tokens) for name in paths}
    for name, path in list(paths.items()):
        wrong = different(path.results(), expected, world)
        if wrong:
            rows[name].note = f"wrong: {', '.join(wrong)}"
            del paths[name]
    expected.clear()
    wire = wire_steps(data, world, memory)
    rows |= {name: Row(name, tokens) for name in wire}
    ways = {
        "in_ms": {name: path.way_in for name, path in paths.items()} | {n: s["in"] for n, s in wire.items()},
        "out_ms": {name: path.way_out for name, path in paths.items()} | {n: s["out"] for n, s in wire.items()},
        "both_ms": {name: path.both_ways for name, path in paths.items()},
    }
    sent = bytes_sent(data)
    for column, steps in ways.items():
        for name, milliseconds in time_by_turns(steps, world, options.repeats, options.calls).items():
            setattr(rows[name], column, milliseconds)
    backward = {"out_grad_ms": "out_grad", "in_grad_ms": "in_grad"}
    for key, method in backward.items():
        steps = {name: getattr(path, method) for name, path in paths.items() if isinstance(path, TransportPath)}
        for name, milliseconds in time_by_turns(steps, world, options.repeats, options.calls).items():
            rows[name].extra[key] = milliseconds
    for row in rows.values():
        row.in_gb_per_s = sent.way_in / row.in_ms / 1e6 if row.in_ms else None
        row.out_gb_per_s = sent.way_out / row.out_ms / 1e6 if row.out_ms else None
    for name in ("gdn_cp nccl", "gdn_cp peer"):
        if name in paths and world.device.type == "cuda":
            replay = capture(paths[name].both_ways, world)
            if isinstance(replay, str):
                rows[name].note = f"no graph: {replay}"
            else:
                times = time_by_turns({name: replay}, world, options.repeats, options.calls)
                rows[name].both_graph_ms = times[name]
    if options.tune and memory is not None and "gdn_cp peer" in paths:
        rows["gdn_cp peer"].extra["shapes"] = tune(data, memory, options, world)
    return list(rows.values())


def tune(data: Data, memory: PeerMemory, options: Options, world: World) -> list[dict[str, Any]]:
    """Milliseconds of each move with tiles of each shape."""
    found = []
    for shape in SHAPES:
        path = peer_path(data, memory, shape)
        steps = {"in": path.way_in, "out": path.way_out, "both": path.both_ways}
        times = time_by_turns(steps, world, 3, options.calls)
        found.append({**asdict(shape), **times})
        world.say(f"{shape}: " + ", ".join(f"{name} {value:.3f}" for name, value in times.items()))
    return found


def print_table(rows: list[Row], world: World) -> None:
    """A line for each row."""
    world.say("\nmilliseconds and GB/s that leave a rank; both: in and out with both gradients, x = of megatron's time")
    world.say(
        f"{'path':22} {'tokens':>7} {'in':>7} {'GB/s':>5} {'out':>7} {'GB/s':>5} {'both':>7} {'x':>5} {'graph':>7}"
    )
    theirs = {row.tokens: row.both_ms for row in rows if row.path == "megatron"}
    for row in rows:
        other = theirs.get(row.tokens)
        faster = other / row.both_ms if other and row.both_ms else None
        cells = [_cell(row.in_ms, 7, 3), _cell(row.in_gb_per_s, 5, 0), _cell(row.out_ms, 7, 3)]
        cells += [_cell(row.out_gb_per_s, 5, 0), _cell(row.both_ms, 7, 3), _cell(faster, 5, 2)]
        cells += [_cell(row.both_graph_ms, 7, 3)]
        remarks = [row.note] + [f"{key} {value:.3f}" for key, value in row.extra.items() if isinstance(value, float)]
        world.say(f"{row.path:22} {row.tokens:7d} {' '.join(cells)} {' '.join(remarks)}".rstrip())


def _cell(value: float | None, width: int, digits: int) -> str:
    return "-".rjust(width) if value is None else f"{value:{width}.{digits}f}"


def main(options: Options) -> int:
    """Check, time, write, print; 1 if anything of this package arrives wrong."""
    world = join_world()
    notes: dict[str, str] = {}
    rows: list[Row] = []
    for tokens in options.tokens:
        rows += measure(options, tokens, world, notes)
        if world.rank == 0:
            content = {"kind": "exchange", "machine": machine(), "ranks": world.size, "notes": notes}
            write_json(options.output, {**content, "rows": [asdict(row) for row in rows]})
    for name, note in notes.items():
        world.say(f"note: {name}: {note}")
    print_table(rows, world)
    wrong = any(row.note.startswith("wrong") and row.path.startswith("gdn_cp") for row in rows)
    return int(wrong)


if __name__ == "__main__":
    leave(main(tyro.cli(Options)))
