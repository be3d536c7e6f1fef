"""The README's snippets run, at sizes for a CPU; its commands are those of the Makefile and of the package."""

from __future__ import annotations

import re
from pathlib import Path

import torch
import torch.distributed as dist

from tests.unit.test_docs import start_megatron

ROOT = Path(__file__).resolve().parents[2]
SMALLER = {"4096, 16384": "64, 256", "2048": "32", "num_k_heads=16": "num_k_heads=2", "num_v_heads=32": "num_v_heads=4"}


def _run_snippets(rank: int, world_size: int) -> tuple[tuple[tuple[int, ...], ...], int]:
    megatron, plain, operation = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)
    for large, small in SMALLER.items():
        megatron, plain = megatron.replace(large, small), plain.replace(large, small)
    start_megatron(world_size)
    group = dist.group.WORLD
    names = {"cp_group": group, "group": group, "config": _config()}
    exec(megatron, names)
    assert len(names["spec"].layer_specs) == 4
    torch.manual_seed(0)
    names["x"] = torch.randn(256, 32)
    exec(plain, names)
    names |= {name: torch.randn(1, 70, heads, 16) for name, heads in (("q", 2), ("k", 2), ("v", 4))}
    names |= {"g": -torch.rand(1, 70, 4), "beta": torch.rand(1, 70, 4), "cu_seqlens": torch.tensor([0, 30, 70])}
    exec(operation, names)
    return tuple(tuple(names[name].shape) for name in ("y", "o", "final_state")), names["packed"].layout.t_local


def _config():
    from megatron.core.transformer.transformer_config import TransformerConfig

    return TransformerConfig(
        num_layers=4,
        hidden_size=32,
        num_attention_heads=4,
        normalization="RMSNorm",
        activation_func=torch.nn.functional.silu,
        attention_dropout=0.0,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        linear_conv_kernel_dim=4,
        use_cpu_initialization=True,
    )


def test_the_snippets_run(run_ranks):
    shapes = ((128, 32), (1, 70, 4, 16), (2, 4, 16, 16))
    assert run_ranks(_run_snippets, 2) == [(shapes, 128)] * 2


def test_the_commands_exist():
    text = (ROOT / "README.md").read_text()
    targets = set(re.findall(r"^make ([\w-]+)", text, re.M))
    makefile = (ROOT / "Makefile").read_text()
    assert targets == {"train", "test"}
    assert all(re.search(rf"^{target}:", makefile, re.M) for target in targets)
    for linked in re.findall(r"\]\(([\w./]+)\)", text):
        assert (ROOT / linked).exists(), linked
    assert (ROOT / re.search(r"`(benchmarks/[\w./-]+)`", text).group(1)).exists()
