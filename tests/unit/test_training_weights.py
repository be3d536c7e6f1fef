"""Weights drawn whole and cut for tensor parallelism come together again, whatever the number of ranks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gdn_cp.training.config import ModelConfig
from gdn_cp.training.weights import cut, initialize, join, sections_of

MODEL = ModelConfig(layers=2)


def test_cut_takes_a_share_of_every_section():
    whole = torch.arange(6)
    assert cut(whole, 0, (4, 2), 2, 0).tolist() == [0, 1, 4]
    assert cut(whole, 0, (4, 2), 2, 1).tolist() == [2, 3, 5]
    assert cut(whole, 0, None, 2, 1).tolist() == [3, 4, 5]


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize(("dim", "sections"), [(0, None), (0, (8, 4, 12)), (1, None)])
def test_join_is_the_inverse_of_cut(size, dim, sections):
    whole = torch.randn(24, 8)
    assert torch.equal(join([cut(whole, dim, sections, size, rank) for rank in range(size)], dim, sections), whole)


@pytest.mark.parametrize(
    ("name", "total"),
    [
        ("decoder.layers.0.self_attention.in_proj.weight", 2 * 128 + 2 * 256 + 2 * 8),
        ("decoder.layers.0.self_attention.conv1d.weight", 2 * 128 + 256),
        ("decoder.layers.0.mlp.linear_fc1.weight", 512),
        ("decoder.layers.0.mlp.linear_fc2.weight", None),
        ("decoder.layers.1.self_attention.linear_qkv.weight", None),
    ],
)
def test_joined_projections_have_sections(name, total):
    sections = sections_of(name, MODEL)
    assert (sections is None) if total is None else (sections is not None and sum(sections) == total)


class Tiny(nn.Module):
    """Parameters of each kind, named as Megatron names them."""

    def __init__(self) -> None:
        super().__init__()
        self.linear_fc2 = nn.Linear(50, 40, bias=False)
        self.embedding = nn.Embedding(60, 40)
        self.A_log = nn.Parameter(torch.zeros(8))
        self.dt_bias = nn.Parameter(torch.zeros(8))
        self.norm = nn.Parameter(torch.ones(40))


def test_weights_depend_on_seed_and_name_alone():
    first, again, other = Tiny(), Tiny(), Tiny()
    torch.manual_seed(1)
    initialize(first, MODEL, 7, None)
    torch.manual_seed(2)
    initialize(again, MODEL, 7, None)
    initialize(other, MODEL, 8, None)
    for (_, a), (_, b) in zip(first.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first.embedding.weight, other.embedding.weight)


def test_scales_of_fresh_weights():
    tiny = Tiny()
    initialize(tiny, MODEL, 7, None)
    # 2,000 and 2,400 normal values: their standard deviation is known to about 1.6 %.
    assert abs(tiny.embedding.weight.std().item() / 0.02 - 1) < 0.08
    assert abs(tiny.linear_fc2.weight.std().item() / (0.02 / 2) - 1) < 0.08
    assert bool(((tiny.A_log >= 0) & (tiny.A_log <= torch.tensor(16.0).log())).all())
    assert tiny.A_log.std() > 0
    assert bool((tiny.dt_bias == 1).all())
    assert bool((tiny.norm == 1).all())
