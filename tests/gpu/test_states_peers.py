"""States and the halo through peers' memory on GPUs: the bits of the way over NCCL, whatever truncation leaves.

Gates: of a fresh layer, which forget everything within a segment; weak ones, which forget nothing; of both kinds.
"""

from __future__ import annotations

import os
import random
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

pytest.importorskip("triton")

from gdn_cp import GatedDeltaNet, ThdLayout, gated_delta_net_mixer
from gdn_cp.comm.groups import cp_groups
from gdn_cp.comm.peer_vote import VARIABLE, peer_memory
from tests.gpu.test_fused_mixer import batch, layer, replay_equals_eager, results

ROUNDS = 40
LONGEST_SLEEP = 400_000  # cycles, 0.2 ms: many times as long as a barrier
WEAK = -12.0  # of A_log: e^-12 of forgetting for each token


def layouts(world: int) -> dict[str, ThdLayout]:
    unit = 64 * world
    return {
        "padded zigzag": ThdLayout.zigzag(
            [0, unit, unit, 9 * unit, 16 * unit], world, seqlens=[unit - 63, 0, 8 * unit, 6 * unit + 5], device="cuda"
        ),
        "contiguous": ThdLayout.contiguous([0, 300, 311, 11 * unit, 16 * unit], world, device="cuda"),
        # Few heads and long segments: they are cut into pieces.
        "one": ThdLayout.zigzag([0, 64 * unit], world, device="cuda"),
    }


def with_gates(kind: str) -> GatedDeltaNet:
    module = layer()
    heads = {"fresh": 0, "weak": len(module.A_log), "mixed": len(module.A_log) // 2}[kind]
    with torch.no_grad():
        module.A_log[:heads] = WEAK
    return module


def ways(rank: int, world: int) -> dict[str, Any]:
    """A group of all ranks for each way, whose votes are over."""
    made = {}
    for way in ("nccl", "peer"):
        os.environ[VARIABLE] = way
        group = made[way] = dist.new_group(list(range(world)))
        assert isinstance(group, dist.ProcessGroup)
        for a2a_size in (1, 2):
            groups = cp_groups(group, a2a_size)
            for part in (groups.a2a, groups.states):
                if part is not None:
                    memory = peer_memory(part, torch.device("cuda", rank))
                    assert (memory is None) == (way == "nccl")
    return made


def bits_of_both_ways(rank: int, world: int) -> dict[str, bool]:
    groups, found = ways(rank, world), {}
    for gates in ("fresh", "mixed", "weak"):
        module = with_gates(gates)
        for name, layout in layouts(world).items():
            x, dy = (layout.shard(rows, rank) for rows in batch(layout))
            for a2a_size in (1, 2):
                for truncate in (True, False):
                    call = {"layout": layout, "a2a_size": a2a_size, "truncate_states": truncate}
                    expected, got = (results(module, x, dy, group=groups[way], **call) for way in ("nccl", "peer"))
                    case = f"{gates}, {name}, a2a_size {a2a_size}, {'truncated' if truncate else 'whole'}"
                    for part, value in expected.items():
                        found[f"{case}, {part}"] = torch.equal(value, got[part])
    return found


@pytest.mark.multi_gpu
def test_bits_are_those_over_nccl(run_ranks):
    if torch.cuda.device_count() < 4:
        pytest.skip(f"needs 4 NVIDIA GPUs, this machine has {torch.cuda.device_count()}")
    for found in run_ranks(bits_of_both_ways, 4, backend="nccl", timeout=300):
        assert len(found) > 3 * 3 * 2 * 2 * 5
        assert not {name for name, same in found.items() if not same}


def in_flight(rank: int, world: int) -> dict[str, bool]:
    """Graphs, micro-batches in flight, and ranks that lag behind at random."""
    group, module, found = ways(rank, world)["peer"], with_gates("mixed"), {}
    rng = random.Random(100 + rank)
    for name, layout in layouts(world).items():
        x, dy = (layout.shard(rows, rank).nan_to_num(0) for rows in batch(layout))
        for a2a_size in (1, 2):
            call: dict[str, Any] = {"layout": layout, "group": group, "a2a_size": a2a_size}
            case = f"{name}, a2a_size {a2a_size}"
            expected = [results(module, rows, dy, **call) for rows in (x, x.flip(0))]
            wrong = torch.zeros((), dtype=torch.int64, device="cuda")
            for _ in range(ROUNDS):
                outs, leaves = [], [rows.clone().requires_grad_() for rows in (x, x.flip(0))]
                for leaf in leaves:
                    torch.cuda._sleep(rng.randint(0, LONGEST_SLEEP))
                    outs.append(gated_delta_net_mixer(leaf, **module.mixer_arguments(), **call))
                for leaf, out, wanted in zip(leaves, outs, expected, strict=True):
                    torch.cuda._sleep(rng.randint(0, LONGEST_SLEEP))
                    gradient: Tensor = torch.autograd.grad(out, leaf, dy)[0]
                    wrong += (out != wanted["out"]).sum() + (gradient != wanted["input"]).sum()
            found[f"{case}, in flight"] = not int(wrong)
            found[f"{case}, replay"] = replay_equals_eager(module, x, dy, **call)
    return found


@pytest.mark.multi_gpu
def test_graphs_and_micro_batches_in_flight_with_lagging_ranks(run_ranks):
    if torch.cuda.device_count() < 4:
        pytest.skip(f"needs 4 NVIDIA GPUs, this machine has {torch.cuda.device_count()}")
    for found in run_ranks(in_flight, 4, backend="nccl", timeout=300):
        assert len(found) == 3 * 2 * 2
        assert all(found.values()), found
