"""The exchange through peers' memory with all ranks in one process: indices bit by bit, and the rule of reuse.

Kernels run in Triton's interpreter on addresses of host memory. On GPUs: tests/gpu/test_symmetric.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from gdn_cp.comm.layout import ThdLayout, _build_head_perm_for_split_sections
from gdn_cp.comm.symmetric import PeerMemory, PeerTransport, Slot, natural_rows
from gdn_cp.comm.symmetric_triton import TileShape
from gdn_cp.comm.transport import MixerColumns, RowBuffer
from gdn_cp.fused_states import fused_states
from gdn_cp.kernels.conv1d_triton import Channels
from gdn_cp.kernels.segments import RuleOptions
from tests.host_peers import HostArena, HostMemory

ROOT = Path(__file__).parents[2]
SMALL = TileShape(rows=16, columns=16, num_warps=1, programs=3)  # several tiles, and more of them than programs
LARGE = TileShape(rows=32, columns=128, num_warps=1, programs=5)


def layouts(cp_size: int) -> list[ThdLayout]:
    step = 2 * cp_size
    bounds = [0, step, step, 4 * step, 6 * step]
    return [
        ThdLayout.zigzag(bounds, cp_size, seqlens=[step - 1, 0, 2 * step + 1, 2 * step]),
        ThdLayout.batched(2, 2 * step, cp_size),
        ThdLayout.contiguous([0, 3, 2 * step], cp_size, seqlens=[2, 2 * step - 4]),
    ]


def transports(layout: ThdLayout, columns: MixerColumns, dtype: torch.dtype) -> list[PeerTransport]:
    P = layout.cp_size
    memory = HostMemory(P, layout.t_global * (columns.share_width + 128) * dtype.itemsize)
    rows = natural_rows(layout, P, 0)
    shape = LARGE if columns.qk > 100 else SMALL
    return [PeerTransport(columns, HostArena(memory, rank), rows, shape) for rank in range(P)]


def shares(x: Tensor, sections: tuple[int, ...], ranks: int) -> list[Tensor]:
    """Each rank's columns of every section of x [T, D]."""
    return list(x[:, _build_head_perm_for_split_sections(sections, ranks)].chunk(ranks, 1))


def zero_padding(x: Tensor, layout: ThdLayout) -> Tensor:
    padding = layout.global_padding()
    return x if padding is None else x.masked_fill(padding[:, None], 0)


def sent(x: Tensor, c: MixerColumns) -> tuple[Tensor, tuple[int, ...]]:
    """q, k, v, beta, alpha of a projection, side by side, and their widths."""
    return torch.cat([x[:, : c.conv], x[:, c.gates :]], 1), (c.qk, c.qk, c.v, c.heads, c.heads)


CASES = [
    (2, MixerColumns(qk=32, v=64, heads=4, ranks=2), torch.float32),
    (4, MixerColumns(qk=32, v=32, heads=4, ranks=4), torch.bfloat16),  # a gate of one column
    (2, MixerColumns(qk=512, v=512, heads=32, ranks=2), torch.float16),  # sections wide enough for wide tiles
    (3, MixerColumns(qk=24, v=42, heads=6, ranks=3), torch.float32),  # nothing divisible by a vector
]


@pytest.mark.parametrize(("P", "columns", "dtype"), CASES)
def test_way_in_and_its_gradient_equal_a_permutation(P, columns, dtype):
    for layout in layouts(P)[: 3 if dtype == torch.bfloat16 else 1]:
        made, keep_z = transports(layout, columns, dtype), P != 3
        x = torch.randn(layout.t_global, columns.width).to(dtype)
        padding = layout.global_padding()
        dirty = x if padding is None else x.masked_fill(padding[:, None], torch.nan)
        results = [made[r].send_in(layout.shard(dirty, r), keep_z) for r in range(P)]
        expected = shares(*sent(zero_padding(x, layout), columns), P)
        z = dirty[:, columns.conv : columns.gates]
        for rank, (buffer, kept) in enumerate(results):
            used = buffer.data[:, : expected[rank].shape[1]]
            assert torch.equal(used, expected[rank])
            assert buffer.rows is None
            assert buffer.gates == columns.share_conv
            assert buffer.transient
            assert torch.equal(kept.nan_to_num(7), layout.shard(z, rank).nan_to_num(7))
            assert (kept.untyped_storage().nbytes() == kept.numel() * dtype.itemsize) == keep_z

        gradient = torch.randn(layout.t_global, columns.width).to(dtype)
        grads = [torch.full((layout.t_local, columns.width), 5, dtype=dtype) for _ in range(P)]
        buffers = [made[r].in_grad_buffer(grads[r]) for r in range(P)]
        for rank, part in enumerate(shares(*sent(gradient, columns), P)):
            buffers[rank].data[:, : part.shape[1]] = part
        for rank in range(P):
            made[rank].return_in_grad(buffers[rank], grads[rank])
            whole = layout.shard(zero_padding(gradient, layout), rank)
            assert torch.equal(sent(grads[rank], columns)[0], sent(whole, columns)[0])
            assert (grads[rank][:, columns.conv : columns.gates] == 5).all()
        for rank in range(P):
            whole = torch.full_like(grads[rank], 5)
            dz = torch.randn(layout.t_local, columns.v).to(dtype)
            made[rank].return_in_grad(buffers[rank], whole, dz)
            assert torch.equal(whole[:, columns.conv : columns.gates], dz)
            whole[:, columns.conv : columns.gates] = 5
            assert torch.equal(whole, grads[rank])


@pytest.mark.parametrize(("P", "columns", "dtype"), CASES)
def test_way_out_and_its_gradient_equal_a_permutation(P, columns, dtype):
    for layout in layouts(P)[: 3 if dtype == torch.bfloat16 else 1]:
        made = transports(layout, columns, dtype)
        o = torch.randn(layout.t_global, columns.v).to(dtype)
        parts = shares(o, (columns.v,), P)
        results = [made[r].return_out(parts[r].contiguous()) for r in range(P)]
        for rank, buffer in enumerate(results):
            assert torch.equal(buffer.data[0], layout.shard(zero_padding(o, layout), rank))
            assert buffer.transient
        gradients = []
        for rank in range(P):
            buffer = made[rank].out_grad_buffer(o[: layout.t_local])
            buffer[0] = layout.shard(o, rank)
            gradients.append(made[rank].send_out_grad(buffer))
        for gradient, part in zip(gradients, shares(zero_padding(o, layout), (columns.v,), P), strict=True):
            assert torch.equal(gradient, part)


def test_rows_of_groups_follow_their_segments():
    layout = ThdLayout.zigzag([0, 16, 24], 4, seqlens=[16, 5])
    x = torch.arange(24)
    for group in (0, 1):
        rows = natural_rows(layout, 2, group)
        assert natural_rows(layout, 2, group) is rows
        table = layout.segments(2, group)
        held = torch.cat([layout.local_rows(2 * group + i) for i in (0, 1)])  # rank by rank
        places = torch.where(rows < 0, -1 - rows, rows).long()
        in_segments = torch.empty_like(held)
        in_segments[places] = held
        expected = [x[s + b : s + b + n] for s, b, n in segments(layout, table)]
        assert torch.equal(in_segments, torch.cat(expected))
        padding = torch.tensor([r >= 21 for r in held.tolist()])
        assert torch.equal(rows < 0, padding)


def segments(layout: ThdLayout, table: Any) -> list[tuple[int, int, int]]:
    """(start of the sequence, start in it, rows) of each segment."""
    lengths = [b - a for a, b in zip(table.cu_seqlens, table.cu_seqlens[1:], strict=False)]
    return [
        (layout.cu_seqlens[s], start, n) for s, start, n in zip(table.sequence_ids, table.starts, lengths, strict=True)
    ]


class StandIn:
    """Rank 0 of a group."""

    def __init__(self, ranks: int) -> None:
        self.rank, self.size = (lambda: 0), (lambda: ranks)


class RecordedMemory(PeerMemory):
    """The real choice of slots and barriers, with host memory behind it; what would run on the stream is listed."""

    def __init__(self, memory: HostMemory) -> None:
        super().__init__(StandIn(len(memory.local)), torch.device("cpu"))  # type: ignore[arg-type]
        self.memory, self.trace = memory, []

    def _grow(self, num_bytes: int) -> None:
        self._capacity, self._slots = self.memory.local.shape[2], self.memory.slots(0)

    def settle(self) -> None:
        self.trace.append(("barrier", -1))

    def acquire(self, num_bytes: int) -> Slot:
        slot = super().acquire(num_bytes)
        self.trace.append(("use", self._last))
        return slot


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What torch.cuda says of the current stream."""
    state = SimpleNamespace(capturing=False, waited=[], name="main", capture=None)
    made: dict[str, Any] = {}

    def current(device: object = None) -> Any:
        one = SimpleNamespace(name=state.name, cuda_stream=state.name)
        one.wait_stream = lambda other: state.waited.append((one.name, other.name))
        return made.setdefault(state.name, one)

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    monkeypatch.setattr(torch.cuda, "current_stream", current)
    monkeypatch.setattr("gdn_cp.comm.symmetric.raw_stream", lambda device: state.name)
    monkeypatch.setattr("gdn_cp.comm.symmetric.capture_number", lambda stream: state.capture)
    return state


def one_layer(stream_program: list[tuple[str, int]], transport: PeerTransport, backward: bool = True) -> None:
    """The mixer's moves; after each, a kernel that reads what it gave."""
    x = torch.zeros(2, transport.columns.width)

    def read() -> None:
        use = [slot for kind, slot in stream_program if kind == "use"][-1]
        stream_program.append(("read", use))

    transport.send_in(x, False)
    read()
    transport.return_out(torch.zeros(4, transport.columns.v // 2))
    read()
    if backward:
        transport.send_out_grad(transport.out_grad_buffer(x))
        read()
        transport.return_in_grad(transport.in_grad_buffer(x), x)
        read()


def first_race(program: list[tuple[str, int]], ranks: int = 2) -> str:
    """Run the same program on every rank's stream in every order that barriers allow; what goes wrong, or "".

    "use" s writes slot s on all ranks, "read" s reads slot s on this rank: no rank may use a slot that another rank has
    still to read from its last use. A barrier opens when all ranks are at their k-th.
    """
    seen, todo = set(), [(0,) * ranks]
    barriers = [sum(kind == "barrier" for kind, _ in program[:i]) for i in range(len(program) + 1)]
    while todo:
        state = todo.pop()
        if state in seen:
            continue
        seen.add(state)
        for rank, at in enumerate(state):
            if at == len(program):
                continue
            kind, slot = program[at]
            if kind == "barrier" and any(
                barriers[other] < barriers[at] or (barriers[other] == barriers[at] and program[other][0] != "barrier")
                for other in state
                if other < len(program)
            ):
                continue
            if kind == "use":
                for behind in state:
                    if any(k == "read" and s == slot for k, s in program[behind:at]):
                        return f"step {at} writes slot {slot}, which a rank at step {behind} has still to read"
            todo.append((*state[:rank], at + 1, *state[rank + 1 :]))
    return ""


def recorded(ranks: int = 2) -> tuple[RecordedMemory, PeerTransport]:
    columns = MixerColumns(qk=16, v=16, heads=2, ranks=ranks)
    memory = RecordedMemory(HostMemory(ranks, 4 * (columns.share_width + 32) * 4))
    return memory, PeerTransport(columns, memory, torch.arange(4, dtype=torch.int32), SMALL)


@pytest.mark.usefixtures("stream")
def test_two_slots_are_safe_for_any_order_of_layers_and_one_is_not():
    memory, transport = recorded()
    for backward in (False, True, True, False):  # forwards in flight, recomputation, evaluation between
        one_layer(memory.trace, transport, backward)
    assert sum(kind == "barrier" for kind, _ in memory.trace) == sum(kind == "use" for kind, _ in memory.trace)
    assert first_race(memory.trace) == ""
    one_slot = [(kind, min(slot, 0)) for kind, slot in memory.trace]
    assert "has still to read" in first_race(one_slot)


@pytest.mark.usefixtures("stream")
def test_moves_of_states_and_the_halo_keep_the_rule_of_reuse():
    memory = RecordedMemory(HostMemory(2, 2**16))
    layout, dims = ThdLayout.zigzag([0, 64], 2), (1, 16, 16)
    groups: Any = SimpleNamespace(a2a_size=1, group_index=0, states=object())
    states = fused_states(layout, groups, Channels(16, 16), dims, 4, RuleOptions(), memory)
    assert states is not None
    exchange, buffer = states.rule.exchange, RowBuffer(torch.zeros(32, 64), None, 48)

    def read() -> None:
        memory.trace.append(("read", [slot for kind, slot in memory.trace if kind == "use"][-1]))

    for backward in (False, True, True, False, True):
        assert states.fetch_halo(buffer) is not None
        read()
        room = exchange.law_room(16, 16)
        assert room is not None
        room.lost.fill_(1)
        _, maps = exchange.forward(room.laws, 16, True)
        read()
        if backward:
            d_ext = exchange.gradient_room(16, 16)
            assert d_ext is not None
            exchange.backward(d_ext, maps, True, lambda: None)
            read()
            gradient = states.halo_gradient(buffer)
            assert gradient is not None
            states.return_halo_gradient(gradient, buffer)
            read()
    assert sum(kind == "barrier" for kind, _ in memory.trace) == 5 * 2 + 3 * 2
    assert first_race(memory.trace) == ""
    assert "has still to read" in first_race([(kind, min(slot, 0)) for kind, slot in memory.trace])


@pytest.mark.parametrize("known", [True, False], ids=["captures are numbered", "nobody numbers captures"])
def test_replays_in_any_order_are_safe(known: bool, stream: SimpleNamespace):
    memory, transport = recorded()
    one_layer(memory.trace, transport)  # warm-up
    graphs = []
    for backward in (False, True):
        memory.trace.clear()
        stream.capturing, stream.capture = True, len(graphs) if known else None
        one_layer(memory.trace, transport, backward)
        transport.send_in(torch.zeros(2, transport.columns.width), False)  # an odd number of moves
        graphs.append([*memory.trace, ("read", memory._last)])
        moves = sum(kind == "use" for kind, _ in memory.trace)
        assert sum(kind == "barrier" for kind, _ in memory.trace) == moves + (1 if known else moves)
    stream.capturing, stream.capture = False, None
    memory.trace.clear()
    one_layer(memory.trace, transport)
    eager = list(memory.trace)
    for order in ([0, 0, 1, 1], [1, 0, 1]):
        program = [step for index in order for step in graphs[index]] + eager + graphs[0] + eager
        assert first_race(program) == ""


def test_nothing_is_allocated_in_a_capture_and_streams_wait_for_each_other(stream: SimpleNamespace):
    memory, transport = recorded()
    stream.capturing = True
    with pytest.raises(RuntimeError, match="run the layer once"):
        transport.send_in(torch.zeros(2, transport.columns.width), False)
    stream.capturing = False
    transport.send_in(torch.zeros(2, transport.columns.width), False)
    stream.name = "side"
    transport.send_in(torch.zeros(2, transport.columns.width), False)
    assert stream.waited == [("side", "main")]
    assert memory._last == 0


ACCESSES = """
import re
from gdn_cp.comm.symmetric_triton import compile_cases
from gdn_cp.kernels.compile_report import compile_kernel
for case in compile_cases():
    access = "ld" if case.constexprs["PULL"] else "st"  # tables are loaded by words of 4 and 8 bytes
    found = set(re.findall(access + r"\\.global\\.\\S+", compile_kernel(case, 90).asm["ptx"]))
    print(case.name, *sorted(found - {"ld.global.b32", "ld.global.b64"}))
"""


def test_every_access_to_peers_is_sixteen_bytes_in_the_compiled_kernels(tmp_path: Path):
    script = tmp_path / "accesses.py"
    script.write_text(ACCESSES)
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        env={**environment, "PYTHONPATH": str(ROOT)},
    )
    lines = ["push_in st.global.v4.b32", "push_out st.global.v4.b32", "pull_grad ld.global.v4.b32"]
    assert done.stdout.splitlines() == [f"peer.{line}" for line in lines], done.stderr
