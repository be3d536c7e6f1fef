"""Time a training step of the proxy with this package's Gated DeltaNet layer against the same with megatron-core's own.

    torchrun --standalone --nproc-per-node 4 scripts/bench_proxy.py --output benchmarks/results/proxy-cp4.json

Both jobs are those of scripts/train_proxy.py (real text, optimizer and all) and live in the same processes. They differ
in the mixer of the GDN layers alone and start from the same weights. Their first step is compared before anything is
timed; then each steps through the same packs, by turns. A step's time is the slowest rank's, from building the pack to
new weights. Losses go on falling meanwhile, for packs come again: they tell whether both learn alike, nothing more.
(flash-linear-attention refuses to run its backward on Hopper with Triton before 3.7.1. The refusal is switched off to
time it, and the note in the output says so.)
"""

from __future__ import annotations

import os

os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # as in train_proxy.py, before anything starts CUDA

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import tyro
from bench_layer import too_large
from bench_layer_compile import compile_ahead
from bench_layer_pair import OURS, THEIRS, TheirClasses, Widths, find_theirs, share_weights
from bench_ranks import World, join_world, leave, local_rank
from kernel_cases import machine, write_json
from kernel_timing import DEVICE, quicken_autotuner
from torch import Tensor

from gdn_cp.comm.choice import possible_a2a_sizes
from gdn_cp.training.config import TrainConfig, check_config
from gdn_cp.training.corpus import read_documents
from gdn_cp.training.data import Corpus, PackStream, StepPlan
from gdn_cp.training.engine import Engine, build_engine
from gdn_cp.training.model import build_model, compute_dtype, hybrid_decoder
from gdn_cp.training.parallel import Ranks, model_parallel
from gdn_cp.training.presets import PRESETS
from gdn_cp.training.step import accumulate_gradients, model_inputs, run_step
from gdn_cp.training.tokenizer import ByteTokenizer

# How far two jobs may be apart in `difference`. In bfloat16 the losses of the proxy's tokens, with either layer on
# plain torch, are off float32's by 2 % (256 tokens, on a CPU), and the kernels' own error of up to 0.6 % adds to that:
# below 2.5 %, and between two jobs below the sum of both. (A convolution in reverse, in one of the three layers, makes
# 46 %.) In float32 the two layers are apart by 1.5e-6 there; the limit is that of two layers in bench_layer.py.
LIMITS = {torch.bfloat16: 5e-2, torch.float32: 2e-4}
AGAIN = f"{OURS} again"
Decoder = Callable[[TrainConfig, Any], Any]


@dataclass
class Options:
    """A step of the proxy: this package's layer against megatron-core's."""

    output: Path = Path("benchmarks/results/proxy.json")
    """Where the JSON goes."""
    preset: Literal["qwen3-next-proxy", "tiny"] = "qwen3-next-proxy"
    """Model and optimizer."""
    cp: int | None = None
    """Context-parallel size, a divisor of the ranks; what it leaves over is data parallelism. Default: all ranks."""
    a2a_size: int | Literal["auto", "largest"] | None = "largest"
    """How this package's layer shares the work, as in train_proxy.py; Megatron's trades heads among all ranks."""
    tokens: int | None = None
    """Tokens of a pack, one for each context-parallel group and step. Default: the preset's."""
    data: Path | None = None
    """Text, as in train_proxy.py. Default: the Python standard library's code."""
    steps: int = 20
    """Steps of a block; every block goes through the same packs."""
    blocks: int = 3
    """Timed blocks of each job, by turns."""
    warm_up: int = 1
    """Blocks of each job before, untimed: kernels are compiled and tuned for every pack."""
    against: Literal["megatron", "gdn_cp"] = "megatron"
    """gdn_cp: this package's layer twice, which shows by how much the times of equal jobs differ."""
    shares: int = 12
    """Processes that compile flash-linear-attention's kernels ahead; 0: everything is compiled as it is met."""


@dataclass
class Job:
    """A training job and how many steps it has made."""

    name: str
    engine: Engine
    steps: int = 0


@dataclass(frozen=True)
class Race:
    """What both jobs share: choices, ranks, and the packs of a block."""

    config: TrainConfig
    world: World
    ranks: Ranks
    stream: PackStream
    plans: tuple[StepPlan, ...]


@dataclass(frozen=True)
class FirstStep:
    """Loss of the step over all ranks, norm of its gradient, and the losses [n] of this rank's n real targets."""

    loss: float
    grad_norm: float
    token_losses: Tensor


@dataclass(frozen=True)
class Block:
    """One timed block of one job: milliseconds of each step on its slowest rank, their median, the last step's loss."""

    block: int
    contender: str
    median_ms: float
    step_ms: list[float]
    last_loss: float


def training_config(options: Options, ranks: int) -> TrainConfig:
    """The preset with the choices of this comparison.

    Raises:
        ValueError: for choices that cannot run on so many ranks, or that time nothing.
    """
    for name, least in (("steps", 1), ("blocks", 1), ("warm_up", 0)):
        if getattr(options, name) < least:
            raise ValueError(f"{name}={getattr(options, name)} must be at least {least}")
    _, preset = PRESETS[options.preset]
    cp = ranks if options.cp is None else options.cp
    steps = options.steps * (options.warm_up + options.blocks)
    data = dataclasses.replace(
        preset.data,
        data=options.data,
        token_budget=preset.data.token_budget if options.tokens is None else options.tokens,
        packs_per_step=max(1, ranks // max(1, cp)),
    )
    config = dataclasses.replace(
        preset,
        data=data,
        parallel=dataclasses.replace(preset.parallel, cp=cp, a2a_size=options.a2a_size),
        run=dataclasses.replace(preset.run, steps=steps),
    )
    check_config(config, ranks)
    return config


def their_decoder(theirs: TheirClasses) -> Decoder:
    """The decoder of `hybrid_decoder` with Megatron's layer for this package's; norms and linear layers stay."""

    def decoder(config: TrainConfig, transformer: Any) -> Any:
        from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
        from megatron.core.transformer.spec_utils import ModuleSpec

        from gdn_cp.megatron import RMSNorm
        from gdn_cp.megatron.specs import linear_attention_pattern

        parts = theirs.parts(in_proj=ColumnParallelLinear, out_norm=RMSNorm, out_proj=RowParallelLinear)
        block = hybrid_decoder(config, transformer)
        for layer, is_gdn in zip(block.layer_specs, linear_attention_pattern(transformer), strict=True):
            if is_gdn:
                layer.submodules.self_attention = ModuleSpec(module=theirs.layer, submodules=parts)
        return block

    return decoder


def build_jobs(config: TrainConfig, ranks: Ranks, decoders: dict[str, Decoder]) -> list[Job]:
    """A job for each decoder, all with the same weights: those of the first, rounded to the dtypes of the last."""
    built = {name: build_model(config, ranks, decoder) for name, decoder in decoders.items()}
    models = [module for module, _ in built.values()]
    names = [{name: tuple(p.shape) for name, p in module.named_parameters()} for module in models]
    assert all(other == names[0] for other in names), "the layers differ in their parameters"
    share_weights(models[-1], models[0])  # Megatron's A_log and dt_bias are bfloat16, this package's float32
    for module in models[1:]:
        share_weights(models[0], module)
    return [
        Job(name, build_engine(module, config.optim, ranks, transformer))
        for name, (module, transformer) in built.items()
    ]


def first_step(job: Job, race: Race) -> FirstStep:
    """Forward and backward over the first packs; no weight changes."""
    outputs: list[Tensor] = []
    hook = job.engine.module.register_forward_hook(lambda *call: outputs.append(call[-1].detach()))
    loss, _ = accumulate_gradients(job.engine, race.stream, race.plans[0], race.ranks)
    hook.remove()
    grad_norm = job.engine.reduce_gradients()
    packs = race.plans[0].packs[race.ranks.dp_rank :: race.ranks.dp_size]
    masks = [model_inputs(race.stream.build(pack), race.ranks)["loss_mask"] for pack in packs]
    token_losses = [losses[0][mask].double() for losses, mask in zip(outputs, masks, strict=True)]
    return FirstStep(float(loss), grad_norm, torch.cat(token_losses))


def difference(found: FirstStep, other: FirstStep, race: Race) -> dict[str, float]:
    """How far two first steps are apart: the same numbers on all ranks.

    token_losses: root mean square of the differences over all targets, over the losses' standard deviation. At the
    start that deviation comes from the logits, so this is the relative error of what the layers compute; the losses of
    the step, being means, differ by no more than it times the deviation. grad_norm: relative.
    """
    a, b = found.token_losses, other.token_losses
    sums = torch.stack([(a - b).square().sum(), b.square().sum(), b.sum(), b.new_tensor(b.numel())])
    dist.all_reduce(sums, group=race.world.group)
    squares, of_losses, losses, count = sums.tolist()
    variance = of_losses / count - (losses / count) ** 2
    return {
        "token_losses": (squares / count / variance) ** 0.5,
        "grad_norm": abs(found.grad_norm - other.grad_norm) / other.grad_norm,
    }


def time_block(job: Job, race: Race) -> tuple[list[float], float]:
    """(milliseconds of each step on its slowest rank, loss of the last): one step for each plan.

    Raises:
        FloatingPointError: where a loss or gradient is not finite, so that the step was cut short.
    """
    seconds, loss = [], 0.0
    race.world.settle()
    for plan in race.plans:
        started = time.perf_counter()
        lr = race.config.optim.lr_at(job.steps + 1, race.config.run.steps)
        result = run_step(job.engine, race.stream, plan, race.ranks, lr)
        if race.world.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
        job.steps, loss = job.steps + 1, result.loss
        if not result.applied:
            raise FloatingPointError(f"{job.name}, step {job.steps}: loss {loss}, gradient norm {result.grad_norm}")
    return race.world.greatest(1e3 * s for s in seconds), loss


def time_jobs(jobs: Sequence[Job], race: Race, options: Options) -> list[Block]:
    """Every block in the order of time; every other round in reverse, so that what changes slowly meets all alike."""
    for job in jobs:
        for _ in range(options.warm_up):
            time_block(job, race)
    found = []
    for turn in range(options.blocks):
        for job in jobs[:: -1 if turn % 2 else 1]:
            times, loss = time_block(job, race)
            found.append(Block(turn + 1, job.name, statistics.median(times), times, loss))
    return found


def print_table(blocks: Sequence[Block], names: Sequence[str], world: World) -> None:
    """A line for each block, and one of their medians."""
    world.say("\nmilliseconds of a step, median of each block; x = how many times faster the first is")
    world.say(f"{'block':8}" + "".join(f"{name:>14}" for name in names) + f"{'x':>8}")
    rounds = {str(turn): [b for b in blocks if b.block == turn] for turn in sorted({b.block for b in blocks})}
    for label, members in (rounds | {"median": list(blocks)}).items():
        medians = [statistics.median(b.median_ms for b in members if b.contender == name) for name in names]
        world.say(f"{label:8}" + "".join(f"{ms:14.3f}" for ms in medians) + f"{medians[-1] / medians[0]:8.3f}")


def compile_for(config: TrainConfig, options: Options) -> None:
    """Fill the compilers' caches before the ranks start."""
    model, cp, a2a_size = config.model, config.parallel.cp, config.parallel.a2a_size
    possible = possible_a2a_sizes(cp, model.gdn_key_heads, model.gdn_value_heads)
    choices = {"largest": possible[-1:], "auto": possible}
    sizes = choices[a2a_size] if isinstance(a2a_size, str) else (a2a_size or cp,)
    heads = (model.gdn_key_heads, model.gdn_value_heads, model.gdn_head_dim, model.gdn_conv)
    compile_ahead(Widths(model.hidden, *heads), cp, sizes, options.shares)


def set_compiler(device: torch.device) -> None:
    """torch.compile, which Megatron's layer calls: without limit on GPUs, not at all on CPUs."""
    import torch._dynamo

    if device.type == "cuda":
        torch._dynamo.config.recompile_limit = 64  # beyond it functions run uncompiled, and lengths differ by pack
    else:
        torch._dynamo.config.disable = True


def compare(race: Race, jobs: Sequence[Job], options: Options, notes: dict[str, str]) -> int:
    """Check, time, write, print; 1 where the first steps differ."""
    config, world = race.config, race.world
    first = {job.name: first_step(job, race) for job in jobs}
    steps = list(first.values())
    apart = difference(steps[0], steps[-1], race)
    wrong = too_large(apart, LIMITS[compute_dtype(config.run.precision, world.device)])
    for name, step in first.items():
        world.say(f"first step of {name}: loss {step.loss:.5f}, gradient norm {step.grad_norm:.5f}")
    world.say(f"apart by {apart}")
    if wrong:
        world.say(f"the first steps differ, nothing is timed: {'; '.join(wrong)}")
        return 1
    blocks = time_jobs(jobs, race, options)
    packs = [{"targets": plan.num_targets, "sequences": len(plan.seqlens)} for plan in race.plans]
    content = {
        "kind": "proxy",
        "machine": machine(),
        "layout": race.ranks.describe(),
        "config": config.to_dict(),
        "notes": notes,
        "first_step": {name: {"loss": step.loss, "grad_norm": step.grad_norm} for name, step in first.items()},
        "apart": apart,
        "packs": packs,
        "blocks": [asdict(block) for block in blocks],
    }
    if world.rank == 0:
        write_json(options.output, content)
    mean = statistics.mean(pack["targets"] for pack in packs)
    world.say(f"{race.ranks.describe()}; {len(packs)} steps a block, {mean:,.0f} targets a step")
    print_table(blocks, [job.name for job in jobs], world)
    for name, note in notes.items():
        world.say(f"note: {name}: {note}")
    return 0


def main(options: Options) -> int:
    """Build both jobs and compare them; 1 where there is nothing to compare with, or the first steps differ.

    Raises:
        ValueError: see `training_config`.
        SystemExit: outside torchrun.
    """
    started = time.monotonic()
    config = training_config(options, int(os.environ.get("WORLD_SIZE", "1")))
    decoders, notes = {OURS: hybrid_decoder, AGAIN: hybrid_decoder}, {}
    if options.against == "megatron":
        theirs = find_theirs()
        if isinstance(theirs, str):
            if local_rank() == 0:
                print(f"nothing to compare with: {theirs}", flush=True)
            return 1
        decoders, notes = {OURS: hybrid_decoder, THEIRS: their_decoder(theirs)}, {THEIRS: theirs.note}
        if options.shares and DEVICE.type == "cuda" and local_rank() == 0:
            compile_for(config, options)
            print(f"{time.monotonic() - started:.0f} s: compiled ahead", flush=True)
    world = join_world()
    set_compiler(world.device)
    quicken_autotuner()
    corpus = Corpus.build(read_documents(config.data.data), ByteTokenizer())
    stream = PackStream(corpus, config.data.token_budget, config.data.pad_multiple, config.run.seed)
    plans = tuple(stream.next_step(config.data.packs_per_step) for _ in range(options.steps))
    with model_parallel(config.parallel, world.device, config.run.timeout_minutes) as ranks:
        jobs = build_jobs(config, ranks, decoders)
        world.say(f"{time.monotonic() - started:.0f} s until both jobs were built")
        code = compare(Race(config, world, ranks, stream, plans), jobs, options, notes)
    world.say(f"{time.monotonic() - started:.0f} s in all")
    return code


if __name__ == "__main__":
    leave(main(tyro.cli(Options)))
