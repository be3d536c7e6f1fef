"""Measure the planner's coefficients on this machine and write them as `gdn_cp/comm/machines/NAME.json`.

    torchrun --standalone --nproc-per-node 4 scripts/measure_machine.py --name h200
    torchrun --standalone --nproc-per-node 1 scripts/measure_machine.py --name h200    # the links stay as they are

What is not measured here (the network between nodes, the ranks of a node where not all take part, peers' memory,
bandwidth of memory, small kernels) is taken from the file to be replaced, or from `default`. Each coefficient is
defined in `gdn_cp.comm.planner.Machine`.

Dimensions: H query/key heads, HV value heads, P ranks.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import tyro
from bench_planner import step
from bench_ranks import World, join_world, leave, time_by_turns
from bench_segments import BOTH_ENDS, case_of
from kernel_cases import machine
from torch import Tensor

from gdn_cp import GatedDeltaNet, ThdLayout
from gdn_cp.comm import planner
from gdn_cp.comm.planner import CHUNK, Machine, machine_names
from gdn_cp.kernels.merge import merge_chains
from gdn_cp.kernels.segments import (
    RuleOptions,
    SegmentRule,
    TokenInputs,
    begin_segment_backward,
    run_rule,
)

DIM = 128
STORED = Path(planner.__file__).with_name("machines")


@dataclass
class Options:
    """Measure a machine."""

    name: str
    """Kind of machine; names the file."""
    folder: Path = STORED
    """Where the file goes."""
    tokens: int = 16384
    """Tokens of the rule's measurements."""
    full_heads: tuple[int, int] = (16, 32)
    """Heads that fill the device."""
    few_heads: tuple[int, int] = (2, 4)
    """Heads of which a walk cannot be spread over the device but by cutting."""
    dim: int = DIM
    """Head dims K = V; the coefficients are those of 128."""
    exchange_bytes: int = 2**28
    """What a rank sends in the large all-to-all."""
    repeats: int = 5
    """Rounds of each timing."""


def rule_milliseconds(heads: tuple[int, int], options: Options, world: World) -> tuple[float, float]:
    """Forward and backward of one whole sequence, and of two segments with their laws, without any exchange."""
    dtype = torch.bfloat16 if world.device.type == "cuda" else torch.float32
    case = replace(case_of(heads, options.tokens, 2), dims=(options.dim, options.dim), dtype=dtype)
    draw = torch.Generator(world.device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, device=world.device).to(dtype)

    (H, HV), T, D = heads, options.tokens, options.dim
    g, beta = -0.05 * normal(1, T, HV).abs(), normal(1, T, HV).sigmoid()
    inputs = TokenInputs(normal(1, T, H, D), normal(1, T, H, D), normal(1, T, HV, D), g, beta)
    rule, bounds = RuleOptions(use_qk_l2norm_in_kernel=True), case.cu_seqlens(world.device)
    assert bounds is not None
    roles = torch.full((2,), BOTH_ENDS, dtype=torch.int32, device=world.device)
    d_output, needed = torch.randn_like(inputs.v), tuple(x is not None for x in inputs.tensors())

    def whole() -> object:
        leaves = [x if x is None else x.detach().requires_grad_() for x in inputs.tensors()]
        o, _ = run_rule(TokenInputs(*leaves), rule, None)  # type: ignore[arg-type]
        return torch.autograd.grad(o, [x for x in leaves if x is not None], d_output)

    def segments() -> object:
        forward = SegmentRule(inputs, rule, bounds, roles, (0, 2))
        entering = forward.summarise()[..., :D].contiguous()
        forward.run(entering)
        back = begin_segment_backward(
            inputs, rule, bounds, roles, forward.kept(), entering, d_output, needed
        )  # fmt: skip
        return back.finish(back.state_gradient())

    times = time_by_turns({"whole": whole, "segments": segments}, world, options.repeats, calls=2)
    return times["whole"], times["segments"]


def exchange_milliseconds(sent_bytes: int, world: World, repeats: int) -> float:
    """One all-to-all in which each rank sends `sent_bytes` to the others."""
    peers = max(world.size - 1, 1)
    elements = max(1, sent_bytes // 4 // peers) * world.size
    sent = torch.empty(elements, device=world.device).fill_(1.0)
    received = torch.empty_like(sent)
    step = partial(dist.all_to_all_single, received, sent, group=world.group)
    return time_by_turns({"exchange": step}, world, repeats, calls=4)["exchange"]


def merge_milliseconds(options: Options, world: World) -> float:
    """One step of composing a chain, of the states of 8 heads."""
    steps, units = 9, 8
    shape = (steps * units, options.dim, options.dim)
    ext, maps, out = (torch.zeros(shape, device=world.device) for _ in range(3))
    table = torch.arange(steps * units, dtype=torch.int32, device=world.device)
    chains = torch.stack([table[::steps], torch.full_like(table[::steps], steps)], 1)
    links = torch.stack([table, table, table, torch.full_like(table, -1)], 1)
    step = partial(merge_chains, ext, maps, chains, links, out, steps=steps, kernels=world.device.type == "cuda")
    return time_by_turns({"merge": step}, world, options.repeats, calls=4)["merge"] / steps


def matmul_tflops(options: Options, world: World) -> float:
    """Speed of a projection of as many rows as a layer has."""
    dtype = torch.bfloat16 if world.device.type == "cuda" else torch.float32
    width = options.full_heads[1] * options.dim
    x, weight = (torch.randn(rows, width, device=world.device).to(dtype) for rows in (options.tokens, 2 * width))
    step = partial(torch.nn.functional.linear, x, weight)
    milliseconds = time_by_turns({"linear": step}, world, options.repeats, calls=4)["linear"]
    return 4 * options.tokens * width**2 / (1e9 * milliseconds)


def host_milliseconds(options: Options, world: World) -> dict[str, float]:
    """Forward and backward of a layer on few rows, with which the device is done before the host: on one rank, with
    an exchange of tokens by collectives, and with states."""
    dtype = torch.bfloat16 if world.device.type == "cuda" else torch.float32
    layer = GatedDeltaNet(8, *options.full_heads, options.dim, options.dim, device=world.device, dtype=dtype)
    rows = 8 * CHUNK
    x, weight = torch.randn(2, rows, layer.hidden_size, device=world.device).to(dtype).unbind()
    x.requires_grad_()
    alone, whole = (ThdLayout.zigzag([0, rows * ranks], ranks, device=world.device) for ranks in (1, world.size))
    steps = {"alone": partial(step, layer, x, weight, alone, None, 1)}
    if options.full_heads[0] % world.size == 0:
        steps["exchange"] = partial(step, layer, x, weight, whole, world.group, world.size)
    steps["states"] = partial(step, layer, x, weight, whole, world.group, 1)
    return time_by_turns(steps, world, options.repeats, calls=4, warm_up=1)


def measure(options: Options, before: Machine, world: World) -> Machine:
    """All coefficients; what cannot be measured here is as `before`."""
    size = (options.dim / DIM) ** 2
    chunks = options.tokens / CHUNK
    full, with_laws = rule_milliseconds(options.full_heads, options, world)
    few, _ = rule_milliseconds(options.few_heads, options, world)
    found = replace(
        before,
        description=f"{machine().get('device', world.device)}, measured on {world.size} rank(s)",
        chunk_head_us=1e3 * full / chunks / options.full_heads[1] / size,
        chain_chunk_us=1e3 * few / chunks / size,
        summary_share=max(0.0, with_laws / full - 1),
        merge_step_us=2 * 1e3 * merge_milliseconds(options, world),
        matmul_tflops=matmul_tflops(options, world),
    )
    if world.size == 1:
        return found
    latency = 1e3 * exchange_milliseconds(1024, world, options.repeats)
    large = 1e3 * exchange_milliseconds(options.exchange_bytes, world, options.repeats)
    host = host_milliseconds(options, world)
    return replace(
        found,
        link_gb_per_s=options.exchange_bytes / max(large - latency, 1e-3) / 1e3,
        link_latency_us=latency,
        host_us=1e3 * host["alone"],
        host_exchange_us=1e3 * max(0.0, host.get("exchange", 0.0) - host["alone"]),
        host_state_us=1e3 * max(0.0, host["states"] - host["alone"]),
    )


def main(options: Options) -> int:
    """Measure, write, print."""
    world = join_world()
    known = options.name if options.name in machine_names() else "default"
    found = measure(options, Machine.named(known), world)
    rounded = {key: round(value, 3) if isinstance(value, float) else value for key, value in asdict(found).items()}
    if world.rank == 0:
        options.folder.mkdir(parents=True, exist_ok=True)
        (options.folder / f"{options.name}.json").write_text(json.dumps(rounded, indent=2) + "\n", encoding="utf-8")
    for key, value in rounded.items():
        world.say(f"{key:20} {value}")
    return 0


if __name__ == "__main__":
    status = main(tyro.cli(Options))
    leave(status) if status == 0 else sys.exit(status)
