"""How the fused mixer's rows travel: four moves of activations, each of which leaves no pass over memory behind.

    forward    send_in          my rows, all heads   ->  all rows, my heads     q, k, v, beta, alpha
               return_out       all rows, my heads   ->  my rows, all heads     the rule's output o
    backward   send_out_grad    my rows, all heads   ->  all rows, my heads     the gradient of o
               return_in_grad   all rows, my heads   ->  my rows, all heads     gradients of q, k, v, beta, alpha

A transport says where rows stand, so that whoever produces or consumes them anyway (the convolution, the gated norm)
reads and writes them there: through a map of rows (`RowBuffer`), or by blocks of heads (`HeadBuffer`). A transport that
delivers rows in natural order hands out no map and one block.

- `LocalTransport`: one rank. Nothing moves: the projection is its own buffer.
- `CollectiveTransport`: one `all_to_all_single` per move, NCCL or gloo. Its buffers stand rank by rank: block p goes to
  rank p, or came from it.

A transport belongs to one call of the mixer (one layout, one group) and may keep no activation. Every move is a
collective on every rank of the group, in the order above; a forward may be followed by other calls' moves before its
backward comes.

Dimensions: P ranks, T rows of the batch (padded rows included), t = T/P local rows, HV value heads, V value head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

ALIGNMENT = 16
"""Elements to whose multiple a buffer's row is rounded up: 16-byte accesses in any row, as the kernels promise them."""


@dataclass(frozen=True)
class MixerColumns:
    """The columns of a row of the projection, and of one rank's share of what travels of it.

    `qk` is the width of q (and of k), `v` that of v (and of z), `heads` that of beta (and of alpha), all over the
    `ranks` of the exchange, which divide each of them.

        projection   q | k | v | z | beta | alpha           share   q/P | k/P | v/P | beta/P | alpha/P | unused

    >>> columns = MixerColumns(qk=64, v=128, heads=4, ranks=2)
    >>> columns.conv, columns.width, columns.share_conv, columns.share_width
    (256, 392, 128, 144)
    """

    qk: int
    v: int
    heads: int
    ranks: int

    @property
    def conv(self) -> int:
        """Columns of the convolution, q|k|v: where z begins."""
        return 2 * self.qk + self.v

    @property
    def gates(self) -> int:
        """Where beta begins in the projection."""
        return self.conv + self.v

    @property
    def width(self) -> int:
        """Columns of the projection."""
        return self.gates + 2 * self.heads

    @property
    def share_conv(self) -> int:
        """Columns of q|k|v of one rank's heads: where beta begins in a share."""
        return self.conv // self.ranks

    @property
    def share_width(self) -> int:
        """Columns of a share, rounded up to a multiple of `ALIGNMENT`; those behind alpha hold anything."""
        used = (self.conv + 2 * self.heads) // self.ranks
        return -(-used // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True, eq=False)
class RowBuffer:
    """All T rows of this rank's heads, in the transport's order.

    Columns q|k|v begin at 0, beta at `gates`, alpha right behind beta; other columns are nobody's.

    Attributes:
        data: [R, W], R >= T, last stride 1, row stride and address multiples of 16 bytes.
        rows: int32 [T], the row of `data` at which natural row i stands, or -1 - r where row i is padding and stands at
            r: it is read as zeros, whatever stands there, and written as zeros. None: natural order, nothing padded (or
            padding that is zero already).
        gates: column of beta.
        transient: the memory will be used again by the transport, so what the backward needs must be copied out before
            the transport's next move (the convolution does so in its pass).
    """

    data: Tensor
    rows: Tensor | None
    gates: int
    transient: bool = False


@dataclass(frozen=True, eq=False)
class HeadBuffer:
    """All heads of this rank's t rows, in the transport's order.

    Attributes:
        data: [blocks, t, HV/blocks*V], last stride 1, other strides and the address multiples of 16 bytes: block p
            holds heads p*HV/blocks, ...
        transient: as in `RowBuffer`; the gated norm copies out what it reads.
    """

    data: Tensor
    transient: bool = False


class Transport(Protocol):
    """The moves of one call of the mixer. Tensors are given on the mixer's stream, and results ready on it."""

    @property
    def columns(self) -> MixerColumns:
        """What a row holds."""
        ...

    def send_in(self, projected: Tensor, keep_z: bool) -> tuple[RowBuffer, Tensor]:
        """Send q, k, v, beta, alpha of `projected` [t, width] (last stride 1) to the ranks of their heads.

        Returns the buffer of this rank's heads, and z [t, v] of all heads with last stride 1, which does not travel.
        With `keep_z` z shares no memory with a larger tensor that would live on for its sake, at the cost of a copy in
        the same pass; without, it may be a view of `projected`. Padded rows of `projected` may hold anything.
        """
        ...

    def return_out(self, o: Tensor) -> HeadBuffer:
        """Send o [T, v/P] (natural rows, contiguous) back to the ranks of its rows. Its padded rows may hold anything
        finite, and what arrives for them is not read."""
        ...

    def out_grad_buffer(self, like: Tensor) -> Tensor:
        """Memory for the gradient of what `return_out` gave, in the order in which `send_out_grad` takes it:
        [blocks, t, HV/blocks*V] as in `HeadBuffer`, dtype and device of `like`. The norm's backward fills it, padded
        rows with zeros."""
        ...

    def send_out_grad(self, buffer: Tensor) -> Tensor:
        """Send what the norm's backward wrote to the ranks of the heads; returns [T, v/P], natural rows, contiguous,
        good until the next move."""
        ...

    def in_grad_buffer(self, like: Tensor) -> RowBuffer:
        """Memory for the gradient of what `send_in` gave; the convolution's backward fills columns q|k|v, beta and
        alpha of every row. `like` has t rows, the gradient's dtype and device (`LocalTransport` takes d_projected)."""
        ...

    def return_in_grad(self, buffer: RowBuffer, d_projected: Tensor, dz: Tensor | None = None) -> None:
        """Send it back, and write every column of `d_projected`, zeros in padded rows. Those of z are copied in the
        same pass from `dz` [t, v], contiguous; without it they are left alone."""
        ...


@dataclass(frozen=True, eq=False)
class LocalTransport:
    """One rank: the projection itself is the buffer and so is its gradient.

    Attributes:
        columns: with `ranks` 1.
        rows: the identity with padded rows marked, see `RowBuffer.rows`; None where nothing is padded.
    """

    columns: MixerColumns
    rows: Tensor | None

    def send_in(self, projected: Tensor, keep_z: bool) -> tuple[RowBuffer, Tensor]:
        """See `Transport`. The buffer keeps all of `projected` alive anyway, so z stays a view."""
        columns = self.columns
        return RowBuffer(projected, self.rows, columns.gates), projected.narrow(1, columns.conv, columns.v)

    def return_out(self, o: Tensor) -> HeadBuffer:
        """See `Transport`."""
        return HeadBuffer(o.unsqueeze(0))

    def out_grad_buffer(self, like: Tensor) -> Tensor:
        """See `Transport`."""
        return torch.empty(1, like.shape[0], self.columns.v, dtype=like.dtype, device=like.device)

    def send_out_grad(self, buffer: Tensor) -> Tensor:
        """See `Transport`."""
        return buffer[0]

    def in_grad_buffer(self, like: Tensor) -> RowBuffer:
        """See `Transport`: d_projected itself, which is to be given."""
        return RowBuffer(like, self.rows, self.columns.gates)

    def return_in_grad(self, buffer: RowBuffer, d_projected: Tensor, dz: Tensor | None = None) -> None:
        """See `Transport`. The convolution, and the norm z's columns, have written it in place."""
        assert dz is None


@dataclass(frozen=True, eq=False)
class CollectiveTransport:
    """One all-to-all per move. A pack kernel fills what is sent of the projection and of o; the rest is written to and
    read from the buffers by whoever computes it.

    Attributes:
        columns: with `ranks` the group's size.
        group: the ranks that exchange.
        rows: int32 [T], natural row -> rank-major row, padding marked (`RowBuffer.rows`); None where nothing differs.
        padding: bool [t], True on this rank's padded rows, or None.
    """

    columns: MixerColumns
    group: dist.ProcessGroup
    rows: Tensor | None
    padding: Tensor | None

    def send_in(self, projected: Tensor, keep_z: bool) -> tuple[RowBuffer, Tensor]:
        """See `Transport`."""
        from gdn_cp.comm.packing_triton import pack_projection

        columns = self.columns
        z = projected.narrow(1, columns.conv, columns.v)
        if keep_z:
            z = torch.empty(z.shape, dtype=z.dtype, device=z.device)
        sent = pack_projection(projected, columns, z if keep_z else None)
        return RowBuffer(_all_to_all(sent, self.group), self.rows, columns.share_conv), z

    def return_out(self, o: Tensor) -> HeadBuffer:
        """See `Transport`."""
        from gdn_cp.comm.packing_triton import scatter_rows

        sent = o if self.rows is None else scatter_rows(o, self.rows)
        return HeadBuffer(_all_to_all(sent, self.group).unflatten(0, (self.columns.ranks, -1)))

    def out_grad_buffer(self, like: Tensor) -> Tensor:
        """See `Transport`."""
        shape = (self.columns.ranks, like.shape[0], self.columns.v // self.columns.ranks)
        return torch.empty(shape, dtype=like.dtype, device=like.device)

    def send_out_grad(self, buffer: Tensor) -> Tensor:
        """See `Transport`."""
        from gdn_cp.comm.packing_triton import gather_rows

        received = _all_to_all(buffer.flatten(0, 1), self.group)
        return received if self.rows is None else gather_rows(received, self.rows)

    def in_grad_buffer(self, like: Tensor) -> RowBuffer:
        """See `Transport`."""
        shape = (self.columns.ranks * like.shape[0], self.columns.share_width)
        data = torch.empty(shape, dtype=like.dtype, device=like.device)
        return RowBuffer(data, self.rows, self.columns.share_conv)

    def return_in_grad(self, buffer: RowBuffer, d_projected: Tensor, dz: Tensor | None = None) -> None:
        """See `Transport`."""
        from gdn_cp.comm.packing_triton import unpack_projection

        unpack_projection(_all_to_all(buffer.data, self.group), self.columns, d_projected, dz, self.padding)


def _all_to_all(sent: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Rows [P*t, W]: the p-th of P equal blocks goes to rank p, and came from it."""
    assert sent.is_contiguous()  # gloo would read and write past others without a word
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    return received
