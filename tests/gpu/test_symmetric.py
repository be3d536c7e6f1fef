"""The exchange through peers' memory on GPUs: the plain exchange's bits, however much some ranks lag behind."""

from __future__ import annotations

import os
import random
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

pytest.importorskip("triton")

from gdn_cp.comm.all_to_all import cp_to_hp, hp_to_cp
from gdn_cp.comm.layout import ThdLayout, _build_head_perm_for_split_sections
from gdn_cp.comm.peer_vote import VARIABLE, peer_memory
from gdn_cp.comm.symmetric import PeerTransport, natural_rows
from gdn_cp.comm.transport import MixerColumns

REPETITIONS = 1000
LONGEST_SLEEP = 400_000  # cycles, 0.2 ms: several times as long as a move


class Batch:
    """One layout, this rank's transport, and integers to send whose every place is known on every rank.

    The expected results need no communication, which would hold fast ranks back and so hide races.
    """

    def __init__(self, layout: ThdLayout, columns: MixerColumns, memory: Any, seed: int) -> None:
        P, self.rank = columns.ranks, memory.rank
        self.layout, self.columns = layout, columns
        self.transport = PeerTransport(columns, memory, natural_rows(layout, P, 0))
        generator = torch.Generator("cuda").manual_seed(seed)

        def numbers(width: int) -> Tensor:
            return torch.randint(
                1, 2**14, (layout.t_global, width), generator=generator, device="cuda", dtype=torch.int16
            )

        self.x, self.o = numbers(columns.width), numbers(columns.v)
        self.local_x, self.local_o = layout.shard(self.x, self.rank), layout.shard(self.o, self.rank)
        self.sections = (columns.qk, columns.qk, columns.v, columns.heads, columns.heads)
        self.x_hp = self._share(self._sent(self._zero(self.x)), self.sections)
        self.o_hp = self._share(self._zero(self.o), (columns.v,))
        padding = layout.local_padding(self.rank)
        self.real = torch.ones(layout.t_local, 1, dtype=torch.int16, device="cuda")
        if padding is not None:
            self.real.masked_fill_(padding[:, None], 0)
        everyone = layout.global_padding()
        self.real_hp = torch.ones(layout.t_global, 1, dtype=torch.int16, device="cuda")
        if everyone is not None:
            self.real_hp.masked_fill_(everyone[:, None], 0)

    def _zero(self, x: Tensor) -> Tensor:
        padding = self.layout.global_padding()
        return x if padding is None else x.masked_fill(padding[:, None], 0)

    def _sent(self, x: Tensor) -> Tensor:
        return torch.cat([x[:, : self.columns.conv], x[:, self.columns.gates :]], 1)

    def _share(self, x: Tensor, sections: tuple[int, ...]) -> Tensor:
        order = _build_head_perm_for_split_sections(sections, self.columns.ranks, "cuda")
        return x[:, order.chunk(self.columns.ranks)[self.rank]]

    def moves(self, step: Any, doubt: Any) -> Tensor:
        """All four moves of numbers that `step` (a number or a tensor) is added to; how many elements are wrong.

        `doubt()` comes before and after each move.
        """
        c, wrong = self.columns, torch.zeros((), dtype=torch.int64, device="cuda")
        doubt()
        buffer, z = self.transport.send_in(self.local_x + step, keep_z=True)
        doubt()
        used = buffer.data[:, : self.x_hp.shape[1]]
        wrong += (used != self.x_hp + step * self.real_hp).sum()
        wrong += (z != self.local_x[:, c.conv : c.gates] + step).sum()
        sent = (self.o_hp + step).contiguous()
        doubt()
        out = self.transport.return_out(sent)
        doubt()
        wrong += (out.data[0] != (self.local_o + step) * self.real).sum()
        grad = self.transport.out_grad_buffer(self.local_o)
        grad[0] = self.local_o + step
        doubt()
        arrived = self.transport.send_out_grad(grad)
        doubt()
        wrong += (arrived != self.o_hp + step * self.real_hp).sum()
        d_projected = torch.full_like(self.local_x, -1)
        buffer = self.transport.in_grad_buffer(d_projected)
        doubt()
        buffer.data[:, : self.x_hp.shape[1]] = self.x_hp + step
        dz = torch.full_like(self.local_o, -2)
        self.transport.return_in_grad(buffer, d_projected, dz)
        doubt()
        wrong += (self._sent(d_projected) != (self._sent(self.local_x) + step) * self.real).sum()
        return wrong + (d_projected[:, c.conv : c.gates] != -2).sum()


def batches(world: int, memory: Any) -> list[Batch]:
    """Layouts of growing size, so that memory grows on the way; random lengths, with and without padding."""
    columns = MixerColumns(qk=256, v=512, heads=8, ranks=world)
    rng, unit, made = random.Random(1), 2 * world, []
    for index, sequences in enumerate((1, 2, 5, 9, 17, 33)):
        lengths = [unit * rng.randint(0, 16) for _ in range(sequences)] + [unit]
        bounds = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
        real = [rng.randint(0, n) for n in lengths] if index % 2 else None
        kind = ThdLayout.contiguous if index % 3 == 2 else ThdLayout.zigzag
        made.append(Batch(kind(bounds, world, seqlens=real, device="cuda"), columns, memory, index))
    return made


def doubtful(rank: int) -> Any:
    """Sleep on the device now and then, each rank at other times."""
    rng = random.Random(100 + rank)
    return lambda: torch.cuda._sleep(rng.randint(0, LONGEST_SLEEP)) if rng.random() < 0.3 else None


def many_moves(rank: int, world: int, repetitions: int) -> dict[str, int]:
    group = dist.group.WORLD
    assert group is not None
    memory = peer_memory(group, torch.device("cuda", rank), "peer")
    made, doubt = batches(world, memory), doubtful(rank)
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    order = random.Random(7)
    for step in range(repetitions):
        batch = made[min(step // 3, order.randrange(len(made)))]  # small ones first
        wrong += batch.moves(step % 97, doubt)
    plain = 0
    for batch in made:
        parts = (batch.local_x[:, : batch.columns.conv], batch.local_x[:, batch.columns.gates :])
        padding = batch.layout.local_padding(rank)
        parts = [p if padding is None else p.masked_fill(padding[:, None], 0) for p in parts]
        shares = cp_to_hp(
            [p.int() for p in parts], batch.layout, group, sections=(batch.sections[:3], batch.sections[3:])
        )
        plain += int((torch.cat(shares, 1) != batch.x_hp).sum())
        plain += int((hp_to_cp(batch.o_hp.int(), batch.layout, group) != batch.local_o * batch.real).sum())
    return {"wrong": int(wrong), "expectation differs from the plain exchange": plain}


@pytest.mark.multi_gpu
@pytest.mark.parametrize("world", [2, 4])
def test_a_thousand_rounds_of_moves_with_lagging_ranks_are_right_to_the_bit(run_ranks, world):
    if torch.cuda.device_count() < world:
        pytest.skip(f"needs {world} NVIDIA GPUs, this machine has {torch.cuda.device_count()}")
    for found in run_ranks(many_moves, world, REPETITIONS, backend="nccl", timeout=240):
        assert found == {"wrong": 0, "expectation differs from the plain exchange": 0}


def graphs_and_eager(rank: int, world: int, repetitions: int) -> int:
    group = dist.group.WORLD
    assert group is not None
    memory = peer_memory(group, torch.device("cuda", rank), "peer")
    batch = batches(world, memory)[-1]
    step = torch.zeros((), dtype=torch.int16, device="cuda")
    wrong = batch.moves(step, lambda: None)  # compiles, and allocates
    graphs = []
    for moves in (1, 2):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            total = sum((batch.moves(step, lambda: None) for _ in range(moves)), torch.zeros_like(wrong))
            # one move more: an odd number, after which the next replay meets the slot that was last in use
            batch.transport.send_in(batch.local_x + step, keep_z=False)
        graphs.append((graph, total))
    order, doubt = random.Random(3), doubtful(rank)
    for number in range(repetitions):
        step.fill_(number % 89)
        doubt()
        choice = order.randrange(3)
        if choice == 2:
            wrong += batch.moves(step, doubt)
        else:
            graphs[choice][0].replay()
            wrong += graphs[choice][1]
    return int(wrong)


@pytest.mark.multi_gpu
def test_graph_replays_and_eager_moves_in_any_order_are_right(run_ranks):
    assert run_ranks(graphs_and_eager, 2, 200, backend="nccl", timeout=240) == [0, 0]


def votes(rank: int, world: int) -> dict[str, Any]:
    device = torch.device("cuda", rank)
    group = dist.new_group(list(range(world)))
    assert isinstance(group, dist.ProcessGroup)
    found: dict[str, Any] = {"nccl": peer_memory(group, device, "nccl") is None}
    found["kept"] = peer_memory(group, device, "peer") is None
    torn = dist.new_group(list(range(world)))
    assert isinstance(torn, dist.ProcessGroup)
    try:
        peer_memory(torn, device, "peer" if rank else "auto")
    except ValueError as error:
        found["torn"] = str(error)
    automatic = dist.new_group(list(range(world)))
    assert isinstance(automatic, dist.ProcessGroup)
    found["auto"] = type(peer_memory(automatic, device, "auto")).__name__
    return found


@pytest.mark.multi_gpu
def test_the_vote_is_the_same_on_all_ranks(run_ranks):
    for found in run_ranks(votes, 2, backend="nccl"):
        assert found == {
            "nccl": True,
            "kept": True,
            "torn": "GDN_CP_EXCHANGE: the ranks request ['auto', 'peer']; set the same on all of them",
            "auto": "PeerMemory",
        }


def mixers_of_both_paths(rank: int, world: int) -> dict[str, Any]:
    from tests.gpu.test_fused_mixer import batch, layer, replay_equals_eager, results

    module, unit, found = layer(), 2 * world, {}
    for padded in (False, True):
        bounds = [unit * n for n in (0, 8, 8, 40, 128)]
        lengths = [unit * 8, 0, unit * 31, unit * 87] if padded else None
        layout = ThdLayout.zigzag(bounds, world, seqlens=lengths, device="cuda")
        x, dy = (layout.shard(rows, rank) for rows in batch(layout))
        made: dict[str, dict[str, Tensor]] = {}
        for path in ("nccl", "peer"):
            group = dist.new_group(list(range(world)))
            assert isinstance(group, dist.ProcessGroup)
            os.environ[VARIABLE] = path
            call = {"layout": layout, "group": group}
            made[path] = results(module, x, dy, **call)
            again = results(module, x, dy, **call)
            found[f"{path} repeats"] = all(torch.equal(again[name], value) for name, value in made[path].items())
        found["replay"] = replay_equals_eager(module, x.nan_to_num(0), dy.nan_to_num(0), **call)
        for name, value in made["nccl"].items():
            found[f"{name} {'padded' if padded else 'whole'}"] = torch.equal(value, made["peer"][name])
    return found


@pytest.mark.multi_gpu
def test_the_mixer_gives_the_same_bits_over_both_paths(run_ranks):
    for found in run_ranks(mixers_of_both_paths, 2, backend="nccl", timeout=240):
        assert all(found.values()), found
