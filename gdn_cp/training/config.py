"""Every choice of a training run, as dataclasses that the command line shows flag by flag.

Field names are unique over all groups, so that a flag is a field: --cp 2, --lr 1e-3, --data PATH.
The text under a field is its help on the command line.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from gdn_cp.comm.choice import check_request
from gdn_cp.kernels.chunk import check_intra_card


@dataclass(frozen=True)
class ModelConfig:
    """A hybrid GPT: Gated DeltaNet layers, and full attention as every `attention_every`-th layer."""

    layers: int = 4
    hidden: int = 128
    ffn: int = 256
    """Width of the SwiGLU feed-forward layers."""
    attention_every: int = 4
    """Layer i (from 1) is full attention where i is a multiple of this."""
    attention_heads: int = 4
    attention_groups: int = 4
    """Key/value heads of the full-attention layers."""
    attention_head_dim: int = 32
    attention_gate: bool = True
    """Gate the attention output by a sigmoid, as Qwen3-Next does."""
    gdn_key_heads: int = 4
    """Query/key heads of the GDN layers; a multiple of tp."""
    gdn_value_heads: int = 8
    gdn_head_dim: int = 32
    """Width of a GDN head, keys and values alike."""
    gdn_conv: int = 4
    """Taps of the causal convolution."""
    vocab: int = 320
    """Rows of the embedding; the tokenizer uses the first of them."""
    tie_embeddings: bool = False
    rope_fraction: float = 0.25
    """Part of an attention head's width that is rotated."""
    rope_theta: float = 1e7
    norm_eps: float = 1e-6
    init_std: float = 0.02


@dataclass(frozen=True)
class DataConfig:
    """Text, tokens and packs."""

    data: Path | None = None
    """A text file, a JSONL file of {"text": ...}, or a folder of them. Default: the Python standard library's code."""
    tokenizer: Literal["bytes", "bpe"] = "bytes"
    """Bytes, or a byte-pair encoding of at most `vocab` tokens trained on the data."""
    token_budget: int = 2048
    """Tokens of a pack, padding included. A longer document is cut into pieces of this size."""
    pad_multiple: int = 8
    """Each sequence is padded to a multiple of this; itself a multiple of 2 * cp."""
    packs_per_step: int = 1
    """Packs of one optimizer step over all ranks; a multiple of the data-parallel size."""


@dataclass(frozen=True)
class ParallelConfig:
    """How the ranks of torchrun share the work; what tp * cp leaves over is data parallelism."""

    tp: int = 1
    """Tensor-parallel size."""
    cp: int = 1
    """Context-parallel size."""
    a2a_size: int | Literal["auto", "largest"] | None = "auto"
    """Ranks of a context-parallel group that trade heads for tokens in the GDN layers, a divisor of cp; between them
    states are passed. auto: the planner chooses for each pack; largest: as many as the heads allow; None: all cp
    ranks."""
    intra_card: int | None = None
    """Chunks of 64 tokens to a piece into which one GPU cuts a sequence to work on several at once. 0: never cut.
    Default: cut where the GPU would be idle."""
    truncate_states: bool | None = None
    """Let states that are passed between ranks end where they have decayed below 4.5e-5 of themselves. Default: in
    16-bit dtypes."""
    sequence_parallel: bool = False
    """Split norms and residuals by sequence over the tensor-parallel ranks."""


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with a linear warm-up and a cosine to `min_lr`."""

    lr: float = 3e-3
    min_lr: float = 3e-4
    warmup_steps: int = 10
    decay_steps: int | None = None
    """Step at which the cosine ends. Default: the last step."""
    weight_decay: float = 0.1
    """For matrices; vectors are not decayed."""
    beta1: float = 0.9
    beta2: float = 0.95
    adam_eps: float = 1e-8
    clip_grad: float = 1.0
    """Largest gradient norm; 0 does not clip."""

    def lr_at(self, step: int, last_step: int) -> float:
        """Learning rate of optimizer step `step`, counted from 1."""
        if step <= self.warmup_steps:
            return self.lr * step / self.warmup_steps
        end = max(self.decay_steps or last_step, self.warmup_steps + 1)
        progress = min(1.0, (step - self.warmup_steps) / (end - self.warmup_steps))
        return self.min_lr + 0.5 * (self.lr - self.min_lr) * (1.0 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class RunConfig:
    """Length, place, precision, checkpoints and failures of the run."""

    steps: int = 100
    seed: int = 1234
    out: Path = Path("runs/proxy")
    """Folder of the run: logs, plot, checkpoints, weights."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 on GPUs, fp32 on CPUs."""
    gdn_backend: str | None = None
    """Implementation of the delta rule: triton, reference or recurrent. Default: the best that serves the call."""
    checkpoint_every: int = 50
    """Steps between checkpoints; 0 writes none but at the end, -1 none at all."""
    keep_checkpoints: int = 2
    resume: str | None = None
    """"auto" continues the newest complete checkpoint of --out, if there is one; a path continues that one."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """A loss or gradient norm that is not finite: save the batch and stop, or leave the step out."""
    timeout_minutes: float = 10.0
    """A collective that waits longer than this ends the job."""
    watchdog_seconds: float = 600.0
    """A rank that stays longer than this in one phase of a step says where it stands, and ends the job; 0: never."""
    check_ranks: bool = False
    """Compare every pack among the ranks that share it, before the model sees it."""
    progress: bool = True
    """Show a progress bar where there is a terminal."""


@dataclass(frozen=True)
class TrainConfig:
    """A whole run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def to_dict(self) -> dict[str, Any]:
        """The choices as plain JSON values."""
        return json.loads(json.dumps(dataclasses.asdict(self), default=str))


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def check_config(config: TrainConfig, world_size: int) -> int:
    """Raise ValueError for choices that cannot run on `world_size` ranks; returns the data-parallel size."""
    model, data, parallel, optim, run = config.model, config.data, config.parallel, config.optim, config.run
    tp, cp = parallel.tp, parallel.cp
    _require(tp >= 1 and cp >= 1, f"tp={tp} and cp={cp} must be at least 1")
    _require(
        world_size % (tp * cp) == 0,
        f"{world_size} ranks cannot be shared by tp={tp} x cp={cp}; start a multiple of {tp * cp} ranks",
    )
    dp = world_size // (tp * cp)
    _require(
        data.packs_per_step >= 1 and data.packs_per_step % dp == 0,
        f"packs_per_step={data.packs_per_step} must be a positive multiple of the {dp} data-parallel ranks",
    )
    granule = math.lcm(2 * cp, cp * tp if parallel.sequence_parallel else 1)
    _require(
        data.pad_multiple >= 1 and data.pad_multiple % granule == 0,
        f"pad_multiple={data.pad_multiple} must be a multiple of {granule} for cp={cp}, tp={tp}; use {granule}",
    )
    _check_a2a_size(model, parallel)
    check_intra_card(parallel.intra_card)
    _check_heads(model, tp, cp)
    _require(optim.warmup_steps >= 0, f"warmup_steps={optim.warmup_steps} must not be negative")
    _require(run.steps >= 1, f"steps={run.steps} must be at least 1")
    _require(run.keep_checkpoints >= 1, f"keep_checkpoints={run.keep_checkpoints} must be at least 1")
    _require(run.timeout_minutes > 0, f"timeout_minutes={run.timeout_minutes} must be positive")
    _require(
        0 <= run.watchdog_seconds < math.inf,
        f"watchdog_seconds={run.watchdog_seconds} must be a number of seconds, or 0 for no watchdog",
    )
    return dp


def _check_a2a_size(model: ModelConfig, parallel: ParallelConfig) -> None:
    tp, cp, a2a_size = parallel.tp, parallel.cp, parallel.a2a_size
    check_request(a2a_size, cp)
    # A word finds a size that divides the heads; 1 always does.
    share, size = ("tp", tp) if isinstance(a2a_size, str) else ("tp * a2a_size", tp * (a2a_size or cp))
    for name, heads in (("gdn_key_heads", model.gdn_key_heads), ("gdn_value_heads", model.gdn_value_heads)):
        remedy = "" if isinstance(a2a_size, str) else '; a2a_size "largest" takes any number that tp divides'
        _require(heads % size == 0, f"{name}={heads} must be a multiple of {share} = {size}{remedy}")


def _check_heads(model: ModelConfig, tp: int, cp: int) -> None:
    _require(
        model.gdn_value_heads % model.gdn_key_heads == 0,
        f"gdn_value_heads={model.gdn_value_heads} must be a multiple of gdn_key_heads={model.gdn_key_heads}",
    )
    for name, heads in (("attention_heads", model.attention_heads), ("attention_groups", model.attention_groups)):
        _require(heads % tp == 0, f"{name}={heads} must be a multiple of tp = {tp}")
    queries, groups = model.attention_heads // tp, model.attention_groups // tp
    _require(
        model.layers < model.attention_every or (queries % cp == 0 and (groups % cp == 0 or cp % groups == 0)),
        f"attention_heads={model.attention_heads}, attention_groups={model.attention_groups}: a tensor-parallel rank's "
        f"{queries} and {groups} do not fall over cp={cp} ranks; heads must be a multiple of tp * cp, groups a "
        "multiple or a divisor",
    )
    _require(model.vocab % tp == 0, f"vocab={model.vocab} must be a multiple of tp = {tp}")
    _require(
        model.attention_every >= 1 and model.layers >= 1,
        f"layers={model.layers} and attention_every={model.attention_every} must be at least 1",
    )
