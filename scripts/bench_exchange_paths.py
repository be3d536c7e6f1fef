"""The ways to exchange rows that bench_exchange.py compares, each as the same four moves.

Every path sends q, k, v, beta, alpha in and o out, and their gradients back; Megatron's sends z too. What a move gives
is turned into natural rows by `Path` methods that are for checking only and not timed.

Dimensions: P ranks, T rows of the batch, t = T/P local rows, D columns of the projection.
"""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from gdn_cp.comm.all_to_all import cp_to_hp, hp_to_cp
from gdn_cp.comm.layout import ThdLayout
from gdn_cp.comm.peer_vote import peer_memory
from gdn_cp.comm.row_maps import rank_major_rows
from gdn_cp.comm.symmetric import PeerMemory, PeerTransport, natural_rows
from gdn_cp.comm.symmetric_triton import TileShape
from gdn_cp.comm.transport import CollectiveTransport, MixerColumns, RowBuffer


@dataclass(frozen=True)
class Data:
    """What this rank sends: the projection [t, D] and o [T, v/P], and the gradients of what arrives."""

    layout: ThdLayout
    columns: MixerColumns
    x: Tensor
    o: Tensor
    grad_in: Tensor  # [T, conv/P + 2*heads/P], of what came in
    grad_out: Tensor  # [t, v]

    def join(self, qkv: Tensor, beta: Tensor, alpha: Tensor) -> Tensor:
        """Side by side, as they are compared."""
        return torch.cat([qkv, beta, alpha], 1)


class Path(Protocol):
    """One way to exchange."""

    def way_in(self) -> Any:
        """Send the projection."""
        ...

    def way_out(self) -> Any:
        """Send o."""
        ...

    def both_ways(self) -> Any:
        """In and out, and both gradients back."""
        ...

    def results(self) -> dict[str, Tensor]:
        """All four moves once: what came "in" [T, q|k|v|beta|alpha of this rank] and "out" [t, v], the gradient "dx" of
        what was sent, without z, [t, q|k|v|beta|alpha], and "do" [T, v/P]; rows in natural or local order."""
        ...


def without_z(x: Tensor, columns: MixerColumns) -> Tensor:
    """The columns of a projection that travel."""
    return torch.cat([x[:, : columns.conv], x[:, columns.gates :]], 1)


@dataclass(frozen=True)
class TransportPath:
    """The fused mixer's moves, which neither gather nor concatenate: who computes reads and writes where rows stand."""

    data: Data
    transport: CollectiveTransport | PeerTransport

    def way_in(self) -> RowBuffer:
        """See `Path`. z is not copied, which is no exchange."""
        return self.transport.send_in(self.data.x, keep_z=False)[0]

    def way_out(self) -> Tensor:
        """See `Path`."""
        return self.transport.return_out(self.data.o).data

    def both_ways(self) -> None:
        """See `Path`. The gradients' buffers are sent as they are, as whoever computes them would have filled them."""
        self.way_in()
        self.way_out()
        self.out_grad()
        self.in_grad()

    def out_grad(self) -> None:
        """The gradient of o back."""
        self.transport.send_out_grad(self.transport.out_grad_buffer(self.data.grad_out))

    def in_grad(self) -> None:
        """The projection's gradient back."""
        d_projected = torch.empty_like(self.data.x)
        self.transport.return_in_grad(self.transport.in_grad_buffer(d_projected), d_projected)

    def results(self) -> dict[str, Tensor]:
        """See `Path`."""
        c, d = self.data.columns, self.data
        found = {"in": self._read(self.way_in())}
        found["out"] = self.way_out().transpose(0, 1).flatten(1).clone()
        buffer = self.transport.out_grad_buffer(d.grad_out)
        buffer.copy_(d.grad_out.unflatten(1, (buffer.shape[0], -1)).transpose(0, 1))
        found["do"] = self.transport.send_out_grad(buffer).clone()
        d_projected = torch.empty_like(d.x)
        rows = self.transport.in_grad_buffer(d_projected)
        self._write(rows, d.grad_in)
        self.transport.return_in_grad(rows, d_projected)
        return {**found, "dx": without_z(d_projected, c)}

    def _parts(self, buffer: RowBuffer) -> tuple[Tensor, Tensor]:
        c = self.data.columns
        return buffer.data[:, : c.share_conv], buffer.data.narrow(1, buffer.gates, 2 * c.heads // c.ranks)

    def _read(self, buffer: RowBuffer) -> Tensor:
        x = torch.cat(self._parts(buffer), 1)
        return x if buffer.rows is None else x[buffer.rows.long()]

    def _write(self, buffer: RowBuffer, x: Tensor) -> None:
        rows = slice(None) if buffer.rows is None else buffer.rows.long()
        qkv, gates = self._parts(buffer)
        qkv[rows], gates[rows] = x[:, : qkv.shape[1]], x[:, qkv.shape[1] :]


@dataclass(frozen=True)
class PlainPath:
    """`cp_to_hp` and `hp_to_cp`: one all-to-all, and passes that pack and unpack in plain torch."""

    data: Data
    group: Any

    def _in(self, x: Tensor) -> Tensor:
        c = self.data.columns
        parts = x[:, : c.conv], x[:, c.gates : c.gates + c.heads], x[:, c.gates + c.heads :]
        sections = ((c.qk, c.qk, c.v), c.heads, c.heads)
        return self.data.join(*cp_to_hp(parts, self.data.layout, self.group, sections=sections))

    def way_in(self) -> Tensor:
        """See `Path`."""
        return self._in(self.data.x)

    def way_out(self) -> Tensor:
        """See `Path`."""
        return hp_to_cp(self.data.o, self.data.layout, self.group)

    def both_ways(self) -> tuple[Tensor, ...]:
        """See `Path`."""
        x, o = self.data.x.detach().requires_grad_(), self.data.o.detach().requires_grad_()
        came, out = self._in(x), hp_to_cp(o, self.data.layout, self.group)
        return came, out, *torch.autograd.grad([came, out], [x, o], [self.data.grad_in, self.data.grad_out])

    def results(self) -> dict[str, Tensor]:
        """See `Path`."""
        came, out, dx, do = self.both_ways()
        return {"in": came, "out": out, "dx": without_z(dx, self.data.columns), "do": do}


@dataclass(frozen=True)
class MegatronPath:
    """What megatron-core's own layer does between its projections: gathers of columns and rows around an all-to-all.

    z travels too. The layer builds its row permutation on the device in every forward; so does this, with the way in.
    """

    data: Data
    group: Any
    functions: Any

    def _in(self, x: Tensor) -> tuple[Tensor, Tensor]:
        c, f = self.data.columns, self.functions
        sections = (c.qk, c.qk, c.v, c.v, c.heads, c.heads)
        order = f._build_head_perm_for_split_sections(sections, c.ranks, x.device)
        x = f.tensor_a2a_cp2hp(
            x.unsqueeze(1).index_select(-1, order),
            seq_dim=0,
            head_dim=-1,
            cp_group=self.group,
            undo_attention_load_balancing=False,
        )
        layout = self.data.layout
        idx, inverse = f._build_thd_cp_a2a_perm(layout.cu_seqlens_tensor(), c.ranks, layout.t_global)
        return x.index_select(0, idx).squeeze(1), inverse

    def _out(self, o: Tensor, inverse: Tensor) -> Tensor:
        return self.functions.tensor_a2a_hp2cp(
            o.unsqueeze(1).index_select(0, inverse),
            seq_dim=0,
            head_dim=-1,
            cp_group=self.group,
            redo_attention_load_balancing=False,
        ).squeeze(1)

    def way_in(self) -> Tensor:
        """See `Path`."""
        return self._in(self.data.x)[0]

    def way_out(self) -> Tensor:
        """See `Path`."""
        return self._out(self.data.o, self.data.layout.to_rank_major)  # type: ignore[arg-type]

    def both_ways(self) -> tuple[Tensor, ...]:
        """See `Path`."""
        x, o = self.data.x.detach().requires_grad_(), self.data.o.detach().requires_grad_()
        came, inverse = self._in(x)
        out = self._out(o, inverse)
        c = self.data.columns
        gradient = torch.zeros_like(came)
        own = replace(c, qk=c.qk // c.ranks, v=c.v // c.ranks, heads=c.heads // c.ranks, ranks=1)
        gradient[:, : own.conv], gradient[:, own.gates :] = (
            self.data.grad_in[:, : own.conv],
            self.data.grad_in[:, own.conv :],
        )
        grads = torch.autograd.grad([came, out], [x, o], [gradient, self.data.grad_out])
        return without_z(came.detach(), own), out, *grads

    def results(self) -> dict[str, Tensor]:
        """See `Path`."""
        came, out, dx, do = self.both_ways()
        return {"in": came, "out": out, "dx": without_z(dx, self.data.columns), "do": do}


def load_megatron() -> Any:
    """Megatron's functions, or why there are none, in words."""
    try:
        from megatron.core.ssm.gated_delta_net import common  # type: ignore[import-not-found]
    except ImportError:
        try:
            version = importlib.metadata.version("megatron-core")
        except importlib.metadata.PackageNotFoundError:
            return "megatron-core is not installed"
        return f"megatron-core {version} has no exchange for packed batches; 0.19.2 has"
    return common


def build_paths(data: Data, group: Any, device: torch.device) -> tuple[dict[str, Path], PeerMemory | None, dict]:
    """Every path that runs here by name, the peers' memory if there is, and notes on what is missing."""
    rank, notes = group.rank(), {}
    paths: dict[str, Path] = {}
    common = load_megatron()
    if isinstance(common, str):
        notes["megatron"] = common
    else:
        paths["megatron"] = MegatronPath(data, group, common)
    paths["gdn_cp plain"] = PlainPath(data, group)
    rows, padding = rank_major_rows(data.layout), data.layout.local_padding(rank)
    paths["gdn_cp nccl"] = TransportPath(data, CollectiveTransport(data.columns, group, rows, padding))
    memory = peer_memory(group, device, "auto")
    if memory is None:
        notes["gdn_cp peer"] = "the ranks do not share peers' memory, see the log"
    else:
        paths["gdn_cp peer"] = peer_path(data, memory)
    return paths, memory, notes


def peer_path(data: Data, memory: PeerMemory, shape: TileShape | None = None) -> TransportPath:
    """The path through peers' memory, with tiles of another shape if given."""
    rows = natural_rows(data.layout, data.columns.ranks, 0)
    return TransportPath(data, PeerTransport(data.columns, memory, rows, shape))
