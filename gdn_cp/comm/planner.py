"""The planner: which `a2a_size` should be fastest for a batch, from a small model of bytes, links and kernels.

For each a2a_size that divides cp_size and the heads it predicts, for one layer's forward and backward on the rank that
has most to do,

    exchange   4 moves of tokens in groups of a2a_size neighbours: bytes / bandwidth + latency
    states     the collectives of states and of the halo, small kernels and the steps of the longest chain; 0 where
               nothing is cut
    rule       the larger of all chunks of all heads at full occupancy, and the longest segment chunk by chunk, each
               with its share more where summaries are taken
    rows       the convolution and the gated norm: bytes of this rank's rows / bandwidth of memory
    matrices   the layer's projections before and after: operations / speed of matrix products
    host       what the host needs to launch all that, during which the device may have finished: a floor

and takes the smallest of max(exchange + states + rule + rows + matrices, host), the larger a2a_size of equals. The
answer depends on the arguments alone, so ranks that are given the same batch decide alike without any
communication.

Dimensions: P = cp_size ranks, a = a2a_size, G = P/a groups, T tokens of the batch, H, HV heads of a rank before the
exchange, K, V head dims, W convolution taps, N sequences.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np

from gdn_cp.comm.cuts import Cut, Runs, check_cut, cut_batch
from gdn_cp.comm.lengths import IntVector, read_cu_seqlens, read_size
from gdn_cp.comm.state_gather import GATHER_BYTES
from gdn_cp.comm.state_peers import PEER_BYTES

CHUNK = 64  # tokens that the rule takes at a time
STATE_BYTES = 4  # states travel and are kept in float32
_CUTS = {"zigzag": Cut.ZIGZAG, "contiguous": Cut.FLAT, "batched": Cut.EACH}


class HeadDims(Protocol):
    """Head counts and widths of one tensor-parallel rank, as `gdn_cp.GdnDims` has them."""

    @property
    def num_k_heads(self) -> int:
        """Query and key heads H."""
        ...

    @property
    def num_v_heads(self) -> int:
        """Value heads HV."""
        ...

    @property
    def head_k_dim(self) -> int:
        """K."""
        ...

    @property
    def head_v_dim(self) -> int:
        """V."""
        ...

    @property
    def conv_kernel(self) -> int:
        """W."""
        ...


@dataclass(frozen=True)
class Machine:
    """The model's coefficients for one kind of machine; stored as JSON in `gdn_cp/comm/machines`.

    Attributes:
        description: what machine, and where the numbers come from.
        ranks_per_node: neighbouring ranks that the fast link joins.
        link_gb_per_s: bytes that a rank sends per second to its node's ranks, all together, in GB/s (1e9).
        network_gb_per_s: the same to ranks of other nodes.
        link_latency_us: what a collective in a node takes without any bytes.
        network_latency_us: the same across nodes.
        peer_gb_per_s: as `link_gb_per_s`, for tokens that move through peers' memory (`gdn_cp.comm.symmetric`).
        peer_latency_us: what such a move takes without any bytes.
        chunk_head_us: the rule's time for a chunk of one value head with K = V = 128 where the device is full, forward
            and backward together.
        chain_chunk_us: the same for a chunk of one segment that has to wait for the chunk before.
        summary_share: what summaries add to both, as a share of them.
        merge_step_us: one step of composing a chain, forward and backward together.
        state_launch_us: what the small kernels of states take whatever their size, without latencies.
        memory_gb_per_s: what the convolution and the norm read and write per second.
        matmul_tflops: operations of matrix products per second, in 1e12.
        host_us: what the host takes to launch a layer's forward and backward on one rank.
        host_exchange_us: what it takes more for an exchange of tokens.
        host_state_us: what it takes more for states and halo.
        host_composed_us: what it takes besides where chains are composed, not gathered.
    """

    description: str
    ranks_per_node: int
    link_gb_per_s: float
    network_gb_per_s: float
    link_latency_us: float
    network_latency_us: float
    peer_gb_per_s: float
    peer_latency_us: float
    chunk_head_us: float
    chain_chunk_us: float
    summary_share: float
    merge_step_us: float
    state_launch_us: float
    memory_gb_per_s: float
    matmul_tflops: float
    host_us: float
    host_exchange_us: float
    host_state_us: float
    host_composed_us: float

    @classmethod
    def named(cls, name: str) -> Machine:
        """Return a stored kind ("default", "h200", ...) or the one in a JSON file; ValueError for neither."""
        return _load_machine(name)


def machine_names() -> list[str]:
    """The stored kinds of machines."""
    return sorted(path.stem for path in _MACHINES.glob("*.json"))


@dataclass(frozen=True)
class Prediction:
    """What one a2a_size costs a layer, forward and backward together, on the rank that has most to do.

    Bytes are what the rank sends: `exchange_bytes` of tokens, `state_bytes` of states, `halo_bytes` of rows;
    `kept_bytes` of states and M it holds from forward to backward. Times are microseconds. `refusal` says why the size
    cannot be taken (then the numbers are zero), else it is None.
    """

    a2a_size: int
    exchange_bytes: int = 0
    state_bytes: int = 0
    halo_bytes: int = 0
    kept_bytes: int = 0
    exchange_us: float = 0.0
    state_us: float = 0.0
    rule_us: float = 0.0
    rows_us: float = 0.0
    matrices_us: float = 0.0
    host_us: float = 0.0
    refusal: str | None = None

    @property
    def total_us(self) -> float:
        """All that the device does, one after the other, or the host if it takes longer."""
        on_device = self.exchange_us + self.state_us + self.rule_us + self.rows_us + self.matrices_us
        return max(on_device, self.host_us)


@dataclass(frozen=True)
class Plan:
    """The choice, why in words, and the predictions for every divisor of cp_size, smallest first."""

    a2a_size: int
    reason: str
    predictions: tuple[Prediction, ...]


def plan(
    cu_seqlens: IntVector,
    cp_size: int,
    dims: HeadDims,
    *,
    kind: str = "zigzag",
    element_size: int = 2,
    hidden_size: int | None = None,
    machine: str | Machine = "default",
    peers: bool = False,
) -> Plan:
    """Choose `a2a_size` for a batch.

    Args:
        cu_seqlens: N+1 boundaries of the padded sequences (host values; `layout.cu_seqlens` of a `ThdLayout`).
        cp_size: ranks P of the context-parallel group.
        dims: the heads of one tensor-parallel rank, before the exchange.
        kind: how the batch is cut: "zigzag", "contiguous" (the flat buffer), or "batched" (each sequence contiguously).
        element_size: bytes of an activation, 2 for bfloat16.
        hidden_size: of the layer, whose projections give the host time; None: HV*V / 2, as in Qwen3-Next.
        machine: the name of a stored kind, a JSON file, or a `Machine`. Give every rank the same.
        peers: whether tokens and states move through peers' memory, if one node holds the ranks.

    Raises ValueError for boundaries that cannot be cut (as `ThdLayout` does), an unknown kind or machine.

    >>> from gdn_cp import GdnDims
    >>> plan([0, 262144], 4, GdnDims(16, 32, 128, 128)).a2a_size  # one long sequence: states are few bytes
    1
    >>> plan(range(0, 65537, 1024), 4, GdnDims(16, 32, 128, 128)).a2a_size  # 64 short ones: states are many
    4
    """
    if kind not in _CUTS:
        raise ValueError(f"kind: got {kind!r}; choose one of {', '.join(map(repr, _CUTS))}")
    cu, ranks = read_cu_seqlens(cu_seqlens), read_size(cp_size, "cp_size")
    check_cut(_CUTS[kind], cu, ranks)
    coefficients = machine if isinstance(machine, Machine) else Machine.named(machine)
    peers = peers and ranks <= coefficients.ranks_per_node
    hidden = dims.num_v_heads * dims.head_v_dim // 2 if hidden_size is None else read_size(hidden_size, "hidden_size")
    model = _Model(cu, ranks, dims, _CUTS[kind], element_size, hidden, coefficients, peers)
    predictions = tuple(model.predict(a) for a in range(1, ranks + 1) if ranks % a == 0)
    best = min((p for p in predictions if p.refusal is None), key=lambda p: (p.total_us, -p.a2a_size))
    return Plan(best.a2a_size, _reason(best, predictions), predictions)


_MACHINES = Path(__file__).with_name("machines")


@lru_cache(maxsize=16)
def _load_machine(name: str) -> Machine:
    path = _MACHINES / f"{name}.json"
    if not path.is_file():
        path = Path(name)
    if path.suffix != ".json" or not path.is_file():
        raise ValueError(f"machine: got {name!r}; choose one of {machine_names()} or the path of a JSON file")
    values = json.loads(path.read_text(encoding="utf-8"))
    names = [field.name for field in fields(Machine)]
    if sorted(values) != sorted(names):
        raise ValueError(f"machine: {path} has the keys {sorted(values)}; it must have {sorted(names)}")
    return Machine(**values)


@dataclass(frozen=True)
class _Geometry:
    """What the groups of one a2a_size own, as arrays with one entry per group; `longest` is over all."""

    segments: np.ndarray
    chunks: np.ndarray  # chunks of all segments
    summarised: np.ndarray  # of those that someone needs a summary of, or a gradient
    leaving: np.ndarray  # segments whose final state someone needs
    entering: np.ndarray  # segments that a state enters
    both: np.ndarray  # segments that are neither the first nor the last of their chain
    longest: int  # chunks of the longest segment
    steps: int  # steps of the longest chain
    halo_rows: np.ndarray  # rows that enter, at most, for one tap


@dataclass(frozen=True)
class _Model:
    cu: np.ndarray
    ranks: int
    dims: HeadDims
    cut: Cut
    element_size: int
    hidden_size: int
    machine: Machine
    peers: bool

    def predict(self, a2a_size: int) -> Prediction:
        d = self.dims
        if d.num_k_heads % a2a_size or d.num_v_heads % a2a_size:
            return Prediction(a2a_size, refusal=f"{d.num_k_heads}/{d.num_v_heads} heads do not divide by {a2a_size}")
        groups = self.ranks // a2a_size
        at = _geometry(cut_batch(self.cut, self.cu, groups))
        heads = d.num_v_heads // a2a_size
        exchange = self._exchange_bytes(a2a_size)
        gathered = self._gathers(at, groups, heads)
        state, kept = (self._gathered_bytes if gathered else self._composed_bytes)(at, groups, heads)
        halo_columns = (2 * d.num_k_heads * d.head_k_dim + d.num_v_heads * d.head_v_dim) // a2a_size
        halo = int(2 * (d.conv_kernel - 1) * halo_columns * self.element_size * at.halo_rows.max(initial=0))
        return Prediction(
            a2a_size,
            exchange_bytes=exchange,
            state_bytes=state,
            halo_bytes=halo,
            kept_bytes=kept,
            exchange_us=self._exchange_us(exchange, a2a_size),
            state_us=self._state_us(at, state + halo, gathered),
            rule_us=self._rule_us(at, heads),
            rows_us=self._rows_us(),
            matrices_us=self._matrices_us(),
            host_us=self._host_us(at, a2a_size, gathered),
        )

    def _exchange_us(self, sent: int, a2a_size: int) -> float:
        if a2a_size == 1:
            return 0.0
        if self.peers:
            return sent / (self.machine.peer_gb_per_s * 1e3) + 4 * self.machine.peer_latency_us
        return self._wire_us(sent, a2a_size, collectives=4)

    def _rows_us(self) -> float:
        """The convolution runs forward twice and backward once, the gated norm once each."""
        d = self.dims
        values = d.num_v_heads * d.head_v_dim
        columns = 7 * (2 * d.num_k_heads * d.head_k_dim + values) + 8 * values
        return int(self.cu[-1]) // self.ranks * columns * self.element_size / (self.machine.memory_gb_per_s * 1e3)

    def _matrices_us(self) -> float:
        """To q, k, v, z, beta and alpha, and from the values back; the backward takes twice the forward."""
        d = self.dims
        columns = 2 * d.num_k_heads * d.head_k_dim + 3 * d.num_v_heads * d.head_v_dim + 2 * d.num_v_heads
        operations = 6 * (int(self.cu[-1]) // self.ranks) * columns * self.hidden_size
        return operations / (self.machine.matmul_tflops * 1e6)

    def _host_us(self, at: _Geometry, a2a_size: int, gathered: bool) -> float:
        m = self.machine
        states = m.host_state_us + (not gathered) * m.host_composed_us
        return m.host_us + (a2a_size > 1) * m.host_exchange_us + (at.steps > 0) * states

    def _exchange_bytes(self, a: int) -> int:
        """What a rank sends in the two all-to-alls of tokens, and again in the backward. z stays where it is."""
        d = self.dims
        to_heads = 2 * d.num_k_heads * d.head_k_dim + d.num_v_heads * (d.head_v_dim + 2)
        back = d.num_v_heads * d.head_v_dim
        tokens = int(self.cu[-1]) // self.ranks
        return 2 * tokens * (to_heads + back) * self.element_size * (a - 1) // a

    def _matrices(self, heads: int) -> tuple[int, int]:
        """Bytes of a segment's states and of its M."""
        K, V = self.dims.head_k_dim, self.dims.head_v_dim
        return heads * STATE_BYTES * K * V, heads * STATE_BYTES * K * K

    def _gathers(self, at: _Geometry, groups: int, heads: int) -> bool:
        """As `gdn_cp.state_exchange` decides: whether nobody composes for others. Through peers' memory is taken for a
        gather, in which everything travels, since nobody knows what truncation will leave."""
        limit = max(GATHER_BYTES, PEER_BYTES) if self.peers else GATHER_BYTES
        return groups * int(at.segments.max(initial=0)) * sum(self._matrices(heads)) <= limit

    def _gathered_bytes(self, at: _Geometry, groups: int, heads: int) -> tuple[int, int]:
        """(sent, kept): all laws forward, all gradients of states backward, to every other rank. At most M of all."""
        state, transfer = self._matrices(heads)
        slots = int(at.segments.max(initial=0))
        sent, kept = slots * (2 * state + transfer) * (groups - 1), slots * state + int(at.both.sum()) * transfer
        return (sent, kept) if at.steps else (0, 0)

    def _composed_bytes(self, at: _Geometry, groups: int, heads: int) -> tuple[int, int]:
        """(sent, kept): see docs/state_passing.md for the formulas."""
        state, transfer = self._matrices(heads)
        as_member = (at.leaving + at.entering) * state + at.both * transfer
        # As a composer a rank has its share of all chains, and sends a state forward and a gradient back for each step.
        as_composer = 2 * int(at.entering.sum()) * state // groups
        sent = (int(as_member.max(initial=0)) + as_composer) * (groups - 1) // groups
        kept = int(at.segments.max(initial=0)) * state + int(at.both.sum()) * transfer // groups
        return sent, kept if at.steps else 0

    def _state_us(self, at: _Geometry, sent: int, gathered: bool) -> float:
        if not at.steps:
            return 0.0
        if self.peers and gathered:
            wire = sent / (self.machine.peer_gb_per_s * 1e3) + 4 * self.machine.peer_latency_us
        else:
            wire = self._wire_us(sent, self.ranks, collectives=4 if gathered else 6)  # 2 of the halo
        return wire + self.machine.state_launch_us + at.steps * self.machine.merge_step_us

    def _wire_us(self, sent: int, span: int, *, collectives: int) -> float:
        """Time of collectives among ranks that lie within `span` neighbours."""
        inside = span <= self.machine.ranks_per_node
        speed = self.machine.link_gb_per_s if inside else self.machine.network_gb_per_s
        latency = self.machine.link_latency_us if inside else self.machine.network_latency_us
        return sent / (speed * 1e3) + collectives * latency

    def _rule_us(self, at: _Geometry, heads: int) -> float:
        size = self.dims.head_k_dim * self.dims.head_v_dim / 128**2
        share = self.machine.summary_share
        work = (at.chunks + share * at.summarised).max(initial=0) * heads * size * self.machine.chunk_head_us
        chain = at.longest * (1 + (share if at.steps else 0.0)) * self.machine.chain_chunk_us
        return float(max(work, chain))


def _geometry(runs: Runs) -> _Geometry:
    parts = runs.offsets.size - 1
    part = np.repeat(np.arange(parts), np.diff(runs.offsets))
    # Empty segments take no part in a chain.
    some = runs.length > 0
    part, sequence, length, order = part[some], runs.sequence[some], runs.length[some], runs.order[some]
    by_place = np.lexsort((order, sequence))
    part, sequence, length = part[by_place], sequence[by_place], length[by_place]
    same = sequence[1:] == sequence[:-1]
    entering, leaving = np.concatenate([[False], same]), np.concatenate([same, [False]])
    if not length.size:
        entering = leaving = np.zeros(0, dtype=bool)
    chunks = -(-length // CHUNK)

    def per_part(values: np.ndarray) -> np.ndarray:
        return np.bincount(part, weights=values, minlength=parts).astype(np.int64)

    return _Geometry(
        segments=np.diff(runs.offsets),
        chunks=per_part(chunks),
        summarised=per_part(chunks * (entering | leaving)),
        leaving=per_part(leaving),
        entering=per_part(entering),
        both=per_part(entering & leaving),
        longest=int(chunks.max(initial=0)),
        steps=int(np.bincount(sequence, weights=entering).max(initial=0)) if sequence.size else 0,
        halo_rows=per_part(leaving),
    )


def _reason(best: Prediction, predictions: tuple[Prediction, ...]) -> str:
    words = {True: "all-to-all only", False: "all-to-all and states"}[best.a2a_size == predictions[-1].a2a_size]
    if best.a2a_size == 1 < len(predictions):
        words = "states only"
    possible = [p for p in predictions if p.refusal is None and p is not best]
    refused = [f"a2a_size {p.a2a_size} is impossible: {p.refusal}" for p in predictions if p.refusal is not None]
    if not possible:
        return "; ".join([f"{words}: the only possible size", *refused])
    second = min(possible, key=lambda p: (p.total_us, -p.a2a_size))
    names = ("exchange", "state", "rule") if second.total_us > second.host_us else ("host",)
    parts = {name: (getattr(best, f"{name}_us"), getattr(second, f"{name}_us")) for name in names}
    gain = max(parts, key=lambda name: parts[name][1] - parts[name][0])
    mine, other = parts[gain]
    text = (
        f"{words}: {best.total_us:.0f} us, next best a2a_size {second.a2a_size} with {second.total_us:.0f} us, "
        f"most is gained on {gain} ({mine:.0f} against {other:.0f} us)"
    )
    return "; ".join([text, *refused])
