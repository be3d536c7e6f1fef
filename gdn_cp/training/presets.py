"""Ready-made runs: `tiny` for a laptop's CPU, `qwen3-next-proxy` for GPUs."""

from __future__ import annotations

from pathlib import Path

from gdn_cp.training.config import DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig

TINY = TrainConfig(
    model=ModelConfig(),
    data=DataConfig(token_budget=2048, pad_multiple=8, packs_per_step=2),
    optim=OptimConfig(lr=3e-3, min_lr=3e-4, warmup_steps=10),
    run=RunConfig(steps=64, checkpoint_every=16, out=Path("runs/tiny")),
)

# The widths of Qwen3-Next (80B-A3B), four of its 48 layers, and a dense feed-forward layer of 5,120 in place of the 512
# experts (10 active ones of width 512, which is 5,120, and one shared). Vocabulary 32,768 instead of 151,936, so that
# the output layer weighs as much beside 4 layers as the full one beside 48 (about a fifth of the arithmetic).
QWEN3_NEXT_PROXY = TrainConfig(
    model=ModelConfig(
        layers=4,
        hidden=2048,
        ffn=5120,
        attention_every=4,
        attention_heads=16,
        attention_groups=2,
        attention_head_dim=256,
        gdn_key_heads=16,
        gdn_value_heads=32,
        gdn_head_dim=128,
        vocab=32768,
    ),
    data=DataConfig(token_budget=16384, pad_multiple=64, packs_per_step=1),
    optim=OptimConfig(lr=1e-3, min_lr=1e-4, warmup_steps=20),
    run=RunConfig(steps=200, checkpoint_every=100, out=Path("runs/qwen3-next-proxy")),
)

# Command-line name: (description, run).
PRESETS: dict[str, tuple[str, TrainConfig]] = {
    "tiny": ("1.0M parameters, 3 GDN and 1 attention layers: minutes on 2 CPU cores.", TINY),
    "qwen3-next-proxy": ("Qwen3-Next widths, 4 layers, dense feed-forward: GPUs.", QWEN3_NEXT_PROXY),
}
