"""State passing: the convolution and the delta rule over sequences that are cut across the ranks of a state group.

Each rank runs its own segments once, from the state that enters each. What enters follows from the other segments'
summaries (see `gdn_cp.kernels.segments`), which travel instead of tokens:

    halo -> convolution              summaries -> composers -> states that enter -> delta rule
                                     backward: gradients of states -> composers -> gradients of states that leave

Dimensions: T rows of this rank (of its a2a group, after the all-to-all), H query/key heads and HV value heads of this
rank, K, V head dims, W taps, n segments.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from gdn_cp.comm.groups import CpGroups
from gdn_cp.comm.halo import HaloRoutes, halo_routes, return_halo, send_halo
from gdn_cp.comm.layout import SegmentTable, ThdLayout
from gdn_cp.comm.states import StateRoutes, state_routes
from gdn_cp.kernels.conv1d import causal_conv1d
from gdn_cp.kernels.segments import (
    RuleOptions,
    SegmentRule,
    TokenInputs,
    begin_segment_backward,
    run_rule,
)
from gdn_cp.state_exchange import Maps, StateExchange, state_exchange

if TYPE_CHECKING:
    from gdn_cp.comm.symmetric import Arena
    from gdn_cp.kernels.sums_triton import SharedSums


def convolve_segments(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layout: ThdLayout,
    groups: CpGroups,
    *,
    activation: str | None = "silu",
) -> Tensor:
    """`gdn_cp.kernels.conv1d.causal_conv1d` along whole sequences of which this rank holds segments.

    Only the first W-1 rows of a segment read another's tokens: all rows are convolved as if sequences began at the
    segments, then these few anew, with the halo before them. Differentiable once.

    Args:
        x: [T, D], rows in the order of `layout.segments(groups.a2a_size, groups.group_index)`.
        weight: [D, W] or [D, 1, W].
        bias: [D] or None.
        layout: the batch's layout.
        groups: this rank's groups; every rank of the state group calls.
        activation: as for `causal_conv1d`.

    Returns:
        [T, D] in the order and dtype of x. Each rank's gradients of weight and bias are its rows' part.
    """
    routes = halo_routes(layout, groups.a2a_size, groups.group_index, weight.shape[-1])
    bounds = layout.segments(groups.a2a_size, groups.group_index).cu_seqlens_tensor
    if not routes.travels:
        return causal_conv1d(x, weight, bias, cu_seqlens=bounds, activation=activation)
    assert groups.states is not None
    return _ConvolveSegments.apply(x, weight, bias, routes, groups.states, bounds, activation)


class _ConvolveSegments(torch.autograd.Function):
    """The convolution of all rows and that of the edges, each with its own graph, which the backward runs.

    Both exchanges of the halo go on beside the convolution of all rows. Only rows at edges and those that were sent
    get a second addend in the gradient, so no further pass is made over all rows.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, routes: HaloRoutes, group: dist.ProcessGroup,
        bounds: Tensor, activation: str | None,
    ) -> Tensor:  # fmt: skip
        edges = routes.edges
        halo = send_halo(x.detach().index_select(0, routes.send_rows), routes, group)
        needed = ctx.needs_input_grad[:3]
        with torch.enable_grad():
            leaves: list[Any] = [
                t if t is None else t.detach().requires_grad_(n) for t, n in zip((x, weight, bias), needed, strict=True)
            ]
            y = causal_conv1d(leaves[0], *leaves[1:], cu_seqlens=bounds, activation=activation)
            rows = torch.cat([halo.wait(), x.detach().index_select(0, edges.rows)]).index_select(0, edges.order)
            rows.requires_grad_(needed[0])
            anew = causal_conv1d(rows, *leaves[1:], cu_seqlens=edges.cu_seqlens, activation=activation)
        ctx.routes, ctx.group, ctx.leaves, ctx.rows, ctx.results = routes, group, leaves, rows, (y, anew)
        return y.detach().index_copy_(0, edges.rows, anew.detach().index_select(0, edges.results))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        routes: HaloRoutes = ctx.routes
        edges, (y, anew), (x, *parameters) = routes.edges, ctx.results, ctx.leaves
        d_edges = grads[0].index_select(0, edges.rows)
        d_anew = torch.zeros_like(anew).index_copy_(0, edges.results, d_edges)
        d_rows, *d_parameters = _gradients(anew, (ctx.rows, *parameters), d_anew)
        arriving = None
        if d_rows is not None:
            by_kind = torch.empty_like(d_rows).index_copy_(0, edges.order, d_rows)
            d_halo, d_edges = by_kind.split((len(by_kind) - len(edges.rows), len(edges.rows)))
            arriving = return_halo(d_halo, routes, ctx.group)
        dx, *d_inner = _gradients(y, (x, *parameters), grads[0].index_fill(0, edges.rows, 0))
        if arriving is not None:
            assert dx is not None
            for at, more in ((edges.rows, d_edges), (routes.owners, arriving.wait())):
                dx.index_copy_(0, at, dx.index_select(0, at) + more)
        sums = (a if b is None else b if a is None else a + b for a, b in zip(d_inner, d_parameters, strict=True))
        return dx, *sums, None, None, None, None


def _gradients(output: Tensor, inputs: tuple[Tensor | None, ...], grad: Tensor) -> list[Tensor | None]:
    """The gradient of each input, None for those that need none."""
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    found = iter(torch.autograd.grad(output, wanted, grad))
    return [next(found) if t is not None and t.requires_grad else None for t in inputs]


def state_passing_delta_rule(
    inputs: TokenInputs,
    options: RuleOptions,
    layout: ThdLayout,
    groups: CpGroups,
    *,
    truncate: bool = False,
) -> Tensor:
    """`gdn_cp.chunk_gated_delta_rule` along whole sequences of which this rank holds segments, from zero states.

    Args:
        inputs: this rank's tokens and heads, rows in the order of `layout.segments(a2a_size, group_index)`. The ranks
            of the state group hold the same heads.
        options: switches of the rule, equal on all ranks.
        layout: the batch's layout.
        groups: this rank's groups; every rank of the state group calls.
        truncate: let states end in segments over which they decay below a bound; see `summarise_segments`.

    Returns:
        o [1, T, HV, V] in v's dtype. Differentiable once in every tensor of `inputs`.

    Two all-to-alls of states forward and two backward over `groups.states`, in float32 (float64 for float64), none
    if no sequence crosses ranks. Kept for the backward: the inputs, the states that enter this rank's segments, the M
    of the chains that this rank composes, and what Triton's rule keeps; the plain torch rule is run anew.
    """
    heads = inputs.v.shape[2], inputs.k.shape[3], inputs.v.shape[3]
    call = passing_call(options, layout, groups, heads, truncate=truncate)
    if call is None:
        table = layout.segments(groups.a2a_size, groups.group_index)
        return run_rule(inputs, options, table.cu_seqlens_tensor)[0]
    return _StatePassing.apply(call, *inputs.tensors())


Saved = tuple[Tensor | None, ...]


@dataclass(frozen=True, eq=False)
class PassingCall:
    """What one call of state passing needs besides its tensors. `passing_call` makes it.

    `checked`: whether it is known that Triton's kernels can serve the call.
    """

    options: RuleOptions
    table: SegmentTable
    routes: StateRoutes
    exchange: StateExchange
    truncate: bool
    checked: bool = False

    def forward(self, inputs: TokenInputs) -> tuple[Tensor, Saved, int]:
        """o [1, T, HV, V], and what `backward` has to be given: tensors, and the chunks of a piece. Records nothing."""
        bounds, routes = self.table.cu_seqlens_tensor, self.routes
        rule = SegmentRule(
            inputs, self.options, bounds, routes.roles, routes.summarised, truncate=self.truncate, checked=self.checked
        )
        K, V = inputs.k.shape[3], inputs.v.shape[3]
        laws = rule.summarise(self.exchange.slots, self.exchange.law_room(K, V))
        entering, maps = self.exchange.forward(laws, V, rule.kernels)
        del laws
        o = rule.run(entering)
        kept, piece_chunks = rule.kept()
        return o, (entering, *maps, *kept), piece_chunks

    def backward(
        self, inputs: TokenInputs, saved: list[Tensor | None], piece_chunks: int, d_output: Tensor,
        needed: tuple[bool, ...], sums: SharedSums | None = None,
    ) -> Saved:  # fmt: skip
        """The gradient of each field of the inputs, None where not needed; with `sums`, for calls that are checked,
        those of A_log and dt_bias as `TritonSegmentsBackward.finish` says.

        `saved`, what `forward` gave, is emptied: the M, the largest of it, go before the rule's backward has its peak.
        """
        entering, matrices, lost, *kept = saved
        saved.clear()
        assert entering is not None
        assert matrices is not None
        bounds, roles = self.table.cu_seqlens_tensor, self.routes.roles
        pending = begin_segment_backward(
            inputs, self.options, bounds, roles, (tuple(kept), piece_chunks), entering, d_output, needed,
            truncate=self.truncate,
        )  # fmt: skip
        room = self.exchange.gradient_room(*entering.shape[2:])
        d_ext = pending.state_gradient(self.exchange.slots, room)
        maps = Maps(matrices, lost)
        leaving = self.exchange.backward(d_ext, maps, kernels=bool(kept), meanwhile=pending.prepare)
        del d_ext, maps, matrices
        return pending.finish(leaving, sums)  # type: ignore[arg-type]


def passing_call(
    options: RuleOptions, layout: ThdLayout, groups: CpGroups, heads: tuple[int, int, int], *, truncate: bool = False,
    checked: bool = False, memory: Arena | None = None,
) -> PassingCall | None:  # fmt: skip
    """Describe a call on ranks that hold `heads` (value heads, K, V) each; None where no sequence crosses ranks.

    `memory`: what the ranks of the state group share, of a call that is `checked`.
    """
    table = layout.segments(groups.a2a_size, groups.group_index)
    routes = state_routes(layout, groups.a2a_size, groups.group_index, heads[0])
    if not routes.travels:
        return None
    exchange = state_exchange(layout, groups, *heads, routes, memory if checked else None)
    return PassingCall(options, table, routes, exchange, truncate, checked)


class _StatePassing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: PassingCall, *tensors: Tensor | None) -> Tensor:
        o, saved, ctx.piece_chunks = call.forward(TokenInputs(*tensors))  # type: ignore[arg-type]
        ctx.call = call
        ctx.save_for_backward(*tensors, *saved)
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        needed = ctx.needs_input_grad[1:]
        saved = [*ctx.saved_tensors]
        tensors, of_rule = saved[: len(needed)], saved[len(needed) :]
        return None, *ctx.call.backward(TokenInputs(*tensors), of_rule, ctx.piece_chunks, grads[0], needed)
