"""The mixer as one autograd function over Triton kernels and a transport, with no pass over memory but theirs.

    forward    send_in -> convolution -> chunked delta rule -> return_out -> gated norm
    backward   gated norm -> send_out_grad -> convolution anew -> delta rule -> convolution -> return_in_grad

Activations are read and written where the transport's buffers have them: the convolution through a map of rows, the
norm by blocks of heads; d_projected is allocated once and written by whoever has its columns. Kept for the backward,
per local token at Qwen3-Next's widths in bfloat16: the rows before the convolution (16.1 KiB), z (8), the output (8),
the inverse of each chunk (4) and some small vectors. q, k and v after the convolution are computed anew.

`gdn_cp.gated_delta_net` runs the same stages one by one, with autograd between them: the oracle, and what runs wherever
this cannot: without Triton, in float64, under torch.compile.

Dimensions: t local rows, T rows of the batch, H, HV query/key and value heads of all ranks, K, V their dims, P ranks
that trade heads for tokens; a share is what one of them holds.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from gdn_cp.comm.groups import CpGroups
from gdn_cp.comm.layout import ThdLayout
from gdn_cp.comm.peer_vote import peer_memory
from gdn_cp.comm.row_maps import group_rows, rank_major_rows
from gdn_cp.comm.symmetric import PeerTransport, natural_rows
from gdn_cp.comm.transport import CollectiveTransport, LocalTransport, MixerColumns, RowBuffer, Transport
from gdn_cp.fused_share import RULE, Share, differentiate_share, run_share
from gdn_cp.fused_states import FusedStates, fused_states
from gdn_cp.kernels import conv1d_triton, norm_triton
from gdn_cp.kernels.backends import ENVIRONMENT_VARIABLE, Choice, DeltaRuleCall, choose_backend, wants_kernels
from gdn_cp.kernels.configs import on_device
from gdn_cp.kernels.conv1d_triton import (
    Channels,
    Halo,
    SectionGradients,
    convolve_rows_backward,
)
from gdn_cp.kernels.norm_triton import gate_heads, gate_heads_backward
from gdn_cp.kernels.piece_plan import chain_plan
from gdn_cp.kernels.segments import RuleOptions, TokenInputs
from gdn_cp.kernels.sums_triton import ColumnSums, LaterSums, SharedSums
from gdn_cp.ownership import all_of_a_storage, counts_of_last_use, is_last_use

if TYPE_CHECKING:
    from gdn_cp.gated_delta_net import GdnDims


class MixerParameters(NamedTuple):
    """The parameters of `gdn_cp.gated_delta_net_mixer`, of all heads of this tensor-parallel rank.

    conv1d_weight [conv_dim, 1, W], conv1d_bias [conv_dim] or None, A_log and dt_bias [HV] float32, out_norm_weight [V].
    """

    conv1d_weight: Tensor
    conv1d_bias: Tensor | None
    A_log: Tensor
    dt_bias: Tensor
    out_norm_weight: Tensor


@dataclass(frozen=True, eq=False)
class FusedCall:
    """What a call of the fused mixer needs besides tensors that have gradients.

    Attributes:
        heads: of one share. shares, share: how many there are, and which is this rank's.
        cu_seqlens: int32 [N+1], None for one sequence.
        padding: bool [t], True on this rank's padded rows, or None.
        transport: moves the rows.
        eps: of the gated norm.
        keep: whether a backward may follow.
        states: how states and the halo pass to and from other ranks, where sequences are continued there.
        intra_card: chunks of a piece; None: chosen.
    """

    heads: GdnDims
    shares: int
    share: int
    cu_seqlens: Tensor | None
    padding: Tensor | None
    transport: Transport
    eps: float
    keep: bool
    states: FusedStates | None = None
    intra_card: int | None = None

    def with_rule(self, rule: RuleOptions, truncate: bool) -> FusedCall:
        """This call with the switches of `rule`, its states truncated or not."""
        assert self.states is not None
        passing = replace(self.states.rule, options=replace(rule, backend="triton"), truncate=truncate)
        return replace(self, states=replace(self.states, rule=passing), intra_card=rule.intra_card)

    @cached_property
    def own(self) -> Share:
        """This rank's share."""
        return Share(self.heads, self.shares, self.share)


class _FusedMixer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: FusedCall, projected: Tensor, *tensors: Tensor | None) -> Tensor:
        with on_device(projected.device):
            return _forward(ctx, call, projected, MixerParameters(*tensors))  # type: ignore[arg-type]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        last_use = is_last_use(grad_outputs)
        with on_device(grad_outputs[0].device):
            return None, *_backward(ctx, grad_outputs[0], last_use)


def _forward(ctx: Any, call: FusedCall, projected: Tensor, parameters: MixerParameters) -> Tensor:
    dim = call.heads.head_v_dim
    buffer, z = call.transport.send_in(projected, call.keep)
    num_rows = projected.shape[0] * call.shares
    copy = call.keep and buffer.transient
    halo = None
    if call.states is None:
        o, gates, kept, of_rule = run_share(
            call.own, buffer.data, buffer.rows, parameters.conv1d_weight, parameters.conv1d_bias, parameters.A_log,
            parameters.dt_bias, call.cu_seqlens, num_rows=num_rows, gate_column=buffer.gates, keep=copy,
            intra_card=call.intra_card,
        )  # fmt: skip
        ctx.piece_chunks = 0 if of_rule[-1] is None else _piece_chunks(call, num_rows, buffer.data)
    else:
        o, gates, kept, of_rule, halo, ctx.piece_chunks = _run_segments(call, buffer, num_rows, parameters, copy)
    x, x_rows = (buffer.data, buffer.rows) if kept is None else (kept, None)
    del buffer
    returned = call.transport.return_out(o[0].flatten(1))
    del o
    out, kept = gate_heads(
        by_head(returned.data, dim),
        by_head(z, dim),
        parameters.out_norm_weight,
        call.eps,
        padding=call.padding,
        keep=call.keep and returned.transient,
    )
    if call.keep:
        o = returned.data if kept is None else kept.unsqueeze(0)
        ctx.call, ctx.x_rows, ctx.halo_at = call, x_rows, None if halo is None else halo.at
        ctx.save_for_backward(x, gates, z, o, None if halo is None else halo.rows, *parameters, *of_rule)
    return out


def _run_segments(
    call: FusedCall, buffer: RowBuffer, num_rows: int, parameters: MixerParameters, copy: bool
) -> tuple[Tensor, Tensor, Tensor | None, Sequence[Tensor | None], Halo | None, int]:
    """As `run_share`, where states and the halo pass between ranks; also the halo to keep, and a piece's chunks."""
    assert call.states is not None
    halo = call.states.fetch_halo(buffer)
    kept_halo = call.states.room_for_halo(buffer) if call.keep and halo is not None and halo.transient else None
    qkv, gates, kept = call.own.convolve(
        buffer.data, buffer.rows, parameters.conv1d_weight, parameters.conv1d_bias, call.cu_seqlens, num_rows,
        gates=call.own.gates(buffer.gates), keep=copy, halo=halo,
        kept_halo=None if kept_halo is None else kept_halo.rows,
    )  # fmt: skip
    assert gates is not None
    o, of_rule, piece_chunks = call.states.rule.forward(_token_inputs(call, qkv, gates, parameters))
    return o, gates, kept, of_rule, halo if kept_halo is None else kept_halo, piece_chunks


def _token_inputs(call: FusedCall, qkv: Tensor, gates: Tensor, parameters: MixerParameters) -> TokenInputs:
    A_log, dt_bias = call.own.own_heads(parameters.A_log), call.own.own_heads(parameters.dt_bias)
    return TokenInputs(*call.own.by_heads(qkv, gates), A_log, dt_bias)


def _piece_chunks(call: FusedCall, num_rows: int, like: Tensor) -> int:
    """Chunks of a piece in `run_share`, if it kept pieces' states."""
    heads, sequences = call.heads, 1 if call.cu_seqlens is None else call.cu_seqlens.numel() - 1
    dims = heads.num_v_heads, heads.head_k_dim, heads.head_v_dim
    return chain_plan(like.device, like.dtype, sequences, num_rows, *dims, intra_card=call.intra_card).cut


def _backward(ctx: Any, d_out: Tensor, last_use: bool = False) -> tuple[Tensor | None, ...]:
    """Each stage lets go of what no later one reads; at the rule, which needs most, little else is left.

    `last_use`: whether nobody else reads d_out, whose memory is let go of then although autograd holds the tensor.
    """
    call: FusedCall = ctx.call
    columns, in_place = call.transport.columns, isinstance(call.transport, LocalTransport)
    x, gates, z, o, halo_rows, *rest = ctx.saved_tensors
    halo = None if halo_rows is None else Halo(halo_rows, ctx.halo_at)
    parameters, of_rule = MixerParameters(*rest[:5]), rest[5:]
    del rest
    ctx.maybe_clear_saved_tensors()  # from here on only these names hold them, unless the graph is kept
    room = None
    if in_place:
        x, z = x.detach(), z.detach()  # nobody else has these two: see `all_of_a_storage`
        room = _place_of_z(x, z, d_out)
    d_projected = z.new_empty(len(z), columns.width) if in_place else None
    dz = z.new_empty(z.shape) if d_projected is None else d_projected.narrow(1, columns.conv, columns.v)
    later = LaterSums()  # gradients of parameters, all at the end
    d_o, d_norm = _norm_backward(call, d_out, o, z, parameters, dz, later, room)
    del o, z, room
    if last_use:
        d_out.untyped_storage().resize_(0)

    # q, k, v computed anew may lie where their gradients will: the convolution's backward no longer reads them.
    scratch = None
    if d_projected is not None and columns.width % 8 == 0:
        scratch = d_projected.narrow(1, 0, columns.conv)
    gradients, dA_log, d_dt_bias = _rule_backward(ctx, x, halo, gates, d_o, parameters, of_rule, scratch, later)
    del d_o, gates, of_rule, scratch

    buffer = call.transport.in_grad_buffer(dz if d_projected is None else d_projected)
    wanted = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
    d_halo = None if call.states is None else call.states.halo_gradient(buffer)
    d_weight, d_bias = convolve_rows_backward(
        x, gradients, parameters.conv1d_weight.flatten(1), parameters.conv1d_bias, call.cu_seqlens,
        call.own.channels, buffer.data, parameters=wanted, rows=ctx.x_rows, dx_rows=buffer.rows,
        gates=call.own.gates(buffer.gates),
        halo=halo, d_halo=d_halo, later=later,
    )  # fmt: skip
    later.launch()
    if call.states is not None and d_halo is not None:
        call.states.return_halo_gradient(d_halo, buffer)
    del x, gradients, halo, halo_rows, d_halo
    if d_projected is None:
        d_projected = dz.new_empty(len(dz), columns.width)
        call.transport.return_in_grad(buffer, d_projected, dz)
    else:
        call.transport.return_in_grad(buffer, d_projected)
    if not wanted:
        return d_projected, None, None, dA_log, d_dt_bias, d_norm
    d_bias = None if parameters.conv1d_bias is None else d_bias
    return d_projected, d_weight.view(parameters.conv1d_weight.shape), d_bias, dA_log, d_dt_bias, d_norm


def _place_of_z(x: Tensor, z: Tensor, d_out: Tensor) -> Tensor | None:
    """z [t, v] as the memory for the gradient of o, which has its shape; None where z has to stay as it is.

    The projection x lives until the convolution's backward has read its other columns, but z is done with by the norm's
    backward, each element of whose results depends on z's at the same place and so is written after that was read.
    """
    fits = z.dtype == d_out.dtype and z.stride(0) % 8 == 0  # the rule copies rows of 16 bytes in bulk
    return z if fits and all_of_a_storage(x, z) else None


def _norm_backward(
    call: FusedCall, d_out: Tensor, o: Tensor, z: Tensor, parameters: MixerParameters, dz: Tensor, later: LaterSums,
    room: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Fill dz; return the gradient of the rule's output, back with the ranks of its heads, and of the norm's weight.

    `room` [t, v]: where the former goes on one rank; None: anywhere.
    """
    dim = call.heads.head_v_dim
    d_out = d_out if d_out.stride(1) == 1 else d_out.contiguous()
    d_o = call.transport.out_grad_buffer(d_out) if room is None else room.unsqueeze(0)
    d_norm = gate_heads_backward(
        by_head(d_out, dim),
        by_head(o, dim),
        by_head(z, dim),
        parameters.out_norm_weight,
        call.eps,
        dx=by_head(d_o, dim),
        dz=by_head(dz, dim),
        padding=call.padding,
        later=later,
    )
    return call.transport.send_out_grad(d_o), d_norm


def _rule_backward(
    ctx: Any, x: Tensor, halo: Halo | None, gates: Tensor, d_o: Tensor, parameters: MixerParameters,
    of_rule: list[Any], scratch: Tensor | None, later: LaterSums,
) -> tuple[SectionGradients, Tensor, Tensor]:  # fmt: skip
    """The convolution anew, into `scratch` if given, and the rule's gradients (of A_log and dt_bias of all heads)."""
    call: FusedCall = ctx.call
    if call.states is None:
        dq, dk, dv, d_alpha, d_beta, partial, total = differentiate_share(
            call.own, x, ctx.x_rows, gates, d_o, scratch, parameters.conv1d_weight, parameters.conv1d_bias,
            parameters.A_log, parameters.dt_bias, call.cu_seqlens, tuple(of_rule), piece_chunks=ctx.piece_chunks,
        )  # fmt: skip
        if partial is not None:
            later.add(ColumnSums(partial, total, call.shares, call.share))
        dA_log, d_dt_bias = total.unbind()
    else:
        qkv, _, _ = call.own.convolve(
            x, ctx.x_rows, parameters.conv1d_weight, parameters.conv1d_bias, call.cu_seqlens, len(gates), y=scratch,
            halo=halo,
        )  # fmt: skip
        inputs, d_o = _token_inputs(call, qkv, gates, parameters), by_head(d_o, call.heads.head_v_dim)[None]
        sums = SharedSums(later, call.shares, call.share)
        found: Any = call.states.rule.backward(inputs, of_rule, ctx.piece_chunks, d_o, (True,) * 7, sums)
        dq, dk, dv, d_alpha, d_beta, dA_log, d_dt_bias = found
    by_row = (gradient.view(len(gates), math.prod(gradient.shape[2:])) for gradient in (dq, dk, dv, d_beta, d_alpha))
    return SectionGradients(*by_row), dA_log, d_dt_bias


def by_head(x: Tensor, dim: int) -> Tensor:
    """x [..., heads * dim] as [..., heads, dim], a view."""
    return x.view(*x.shape[:-1], x.shape[-1] // dim, dim)


def fused_mixer(projected: Tensor, parameters: MixerParameters, call: FusedCall) -> Tensor:
    """`gdn_cp.gated_delta_net_mixer` for checked arguments: [t, width] -> [t, HV*V]; differentiable once."""
    if projected.stride(1) != 1:
        projected = projected.contiguous()
    if call.keep:
        counts_of_last_use()
    return _FusedMixer.apply(call, projected, *parameters)


def fused_call(
    projected: Tensor, parameters: MixerParameters, dims: GdnDims, *, layout: ThdLayout | None,
    group: dist.ProcessGroup | None, eps: float, groups: CpGroups | None = None, intra_card: int | None = None,
) -> FusedCall:  # fmt: skip
    """Describe a call in which all ranks of `group` trade heads for tokens; None: one rank.

    With `groups` its neighbours trade heads for tokens, and states pass between those.
    """
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (projected, *parameters))
    if groups is not None:
        assert layout is not None
        return _call_with_states(dims, layout, groups, eps, keep)
    shares, share = (1, 0) if group is None else (group.size(), group.rank())
    return FusedCall(
        heads=dims.per_rank(shares),
        shares=shares,
        share=share,
        cu_seqlens=None if layout is None else layout.cu_seqlens_tensor(),
        padding=None if layout is None else layout.local_padding(share),
        transport=transport_for(dims, layout, group),
        eps=eps,
        keep=keep,
        intra_card=intra_card,
    )


def _call_with_states(dims: GdnDims, layout: ThdLayout, groups: CpGroups, eps: float, keep: bool) -> FusedCall:
    a2a_size, index = groups.a2a_size, groups.group_index
    heads, padding = dims.per_rank(a2a_size), layout.local_padding(groups.full.rank())
    qk, _, v, *_ = dims.sections
    columns, rows = MixerColumns(qk, v, dims.num_v_heads, a2a_size), group_rows(layout, a2a_size, index)
    transport: Transport = LocalTransport(columns, rows)
    # The ranks of a group vote at its first call; all ask for their groups in this order, so none wait crosswise.
    if groups.a2a is not None:
        transport = _between_ranks(columns, layout, groups.a2a, index, rows, padding)
    assert groups.states is not None
    memory = peer_memory(groups.states, layout.device)
    channels = Channels(qk // a2a_size, v // a2a_size, a2a_size, groups.head_index)
    options = RuleOptions(backend="triton", **RULE)
    return FusedCall(
        heads=heads,
        shares=a2a_size,
        share=groups.head_index,
        cu_seqlens=layout.segments(a2a_size, index).cu_seqlens_tensor,
        padding=padding,
        transport=transport,
        eps=eps,
        keep=keep,
        states=fused_states(
            layout,
            groups,
            channels,
            (heads.num_v_heads, heads.head_k_dim, heads.head_v_dim),
            dims.conv_kernel,
            options,
            memory,
        ),
    )


def transport_for(dims: GdnDims, layout: ThdLayout | None, group: dist.ProcessGroup | None) -> Transport:
    """The transport of a call: none needed on one rank, else peers' memory where the ranks share it, or collectives.

    The first call for a group of GPUs is a vote of its ranks, see `gdn_cp.comm.peer_vote`.
    """
    qk, _, v, *_ = dims.sections
    ranks = 1 if group is None else group.size()
    columns = MixerColumns(qk, v, dims.num_v_heads, ranks)
    rows = None if layout is None else rank_major_rows(layout)
    if ranks == 1:
        return LocalTransport(columns, rows)
    assert layout is not None
    assert group is not None
    return _between_ranks(columns, layout, group, 0, rows, layout.local_padding(group.rank()))


def _between_ranks(
    columns: MixerColumns, layout: ThdLayout, group: dist.ProcessGroup, group_index: int, rows: Tensor | None,
    padding: Tensor | None,
) -> Transport:  # fmt: skip
    """Peers' memory where the ranks of the group share it, else its collectives; `rows` and `padding` are for these."""
    memory = peer_memory(group, layout.device)
    if memory is not None:
        return PeerTransport(columns, memory, natural_rows(layout, columns.ranks, group_index))
    return CollectiveTransport(columns, group, rows, padding)


def refusal(
    projected: Tensor, parameters: MixerParameters, heads: GdnDims, layout: ThdLayout | None, backend: str | None
) -> str | None:
    """Why the fused mixer cannot serve a call with `heads` of a share; None when it can.

    Raises ValueError for a `backend` that is unknown, or asked for by name and cannot serve the call.
    """
    rows, sequences = (projected.shape[0], 0) if layout is None else (layout.t_global, layout.num_sequences)
    variables = os.environ.get(ENVIRONMENT_VARIABLE), os.environ.get("TRITON_INTERPRET")
    choice = _rule_choice(
        projected.device, projected.dtype, projected.requires_grad, heads, rows, sequences, backend, variables
    )
    if choice.backend != "triton":
        return f"the delta rule runs on {choice.backend}: {choice.reason}"
    if not wants_kernels(projected):
        return "the convolution and the norm do not run in Triton here"
    weight = parameters.out_norm_weight
    return conv1d_triton.unsupported(
        projected, parameters.conv1d_weight, parameters.conv1d_bias
    ) or norm_triton.unsupported(weight, projected, weight)


@lru_cache(maxsize=256)
def _rule_choice(
    device: torch.device, dtype: torch.dtype, requires_grad: bool, heads: GdnDims, rows: int, sequences: int,
    backend: str | None, variables: tuple[str | None, ...],
) -> Choice:  # fmt: skip
    """What runs the delta rule inside the mixer, for `sequences` packed ones (0: one that is not packed).

    `variables`: what the choice reads of the environment.
    """
    call = DeltaRuleCall(
        device_type=device.type,
        capability=torch.cuda.get_device_capability(device) if device.type == "cuda" else None,
        dtype=dtype,
        gate_dtype=dtype,
        beta_dtype=dtype,
        B=1,
        T=rows,
        H=heads.num_k_heads,
        HV=heads.num_v_heads,
        K=heads.head_k_dim,
        V=heads.head_v_dim,
        N=max(sequences, 1),
        varlen=sequences > 0,
        requires_grad=requires_grad,
        **RULE,
    )
    return choose_backend(call, backend)
