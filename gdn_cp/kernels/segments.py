"""What a segment does to the state that passes through it, and how states are composed along a chain of segments.

Over a segment the gated delta rule is affine in the state that enters it, per value head:

    S_out = S_ext + M S_in        S_ext: the rule from a zero state        M = prod_t e^{g_t} (I - beta_t k_t k_t^T)

and so is its gradient, with the same M: dS_in = dS_ext + M^T dS_out, dS_ext being the backward from a zero gradient of
the final state. A summary is (S_ext, M), its size independent of the segment's length.

`SegmentRule` and `SegmentBackward` are the rule and its backward over segments that others continue, each in the two
halves between which states travel. On GPUs Triton does the work (`chunk_segments`). The plain torch way is below it: a
column of the state whose values v are zero is multiplied by M and by nothing else, so the rule runs on values with K
zero columns appended, from the state [0 | I], and ends in [S_ext | M].

Dimensions: T tokens, n segments, H query/key heads, HV value heads, K key dim, V value dim, L segments of a chain,
U chains.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from gdn_cp.kernels.backends import choose_backend
from gdn_cp.kernels.chunk import checked_scale, chunk_gated_delta_rule, describe_call
from gdn_cp.kernels.gate import fused_gdn_gate

if TYPE_CHECKING:
    from gdn_cp.kernels.chunk_segments import TritonSegmentsBackward

TRUNCATION_THRESHOLD = 4.5e-5
"""A state that decays below this part of itself within a segment is lost in bfloat16's rounding (2e-3) many times."""

MOST_COLUMNS = 256
"""Columns of a state that the Triton rule takes: `chunk_triton.MAX_HEAD_DIM`, which cannot be read without Triton."""


@dataclass(frozen=True)
class TokenInputs:
    """What the rule reads of T packed tokens; names, dtypes and meanings as in `gdn_cp.chunk_gated_delta_rule`.

    q, k [1, T, H, K]; v [1, T, HV, V]; g, beta [1, T, HV]; A_log, dt_bias [HV] or None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor | None = None
    beta: Tensor | None = None
    A_log: Tensor | None = None
    dt_bias: Tensor | None = None

    def tensors(self) -> tuple[Tensor | None, ...]:
        """All fields, in the order of their declaration."""
        return tuple(getattr(self, field.name) for field in fields(self))

    def narrow(self, start: int, end: int) -> TokenInputs:
        """The tokens [start, end); views."""
        if start == 0 and end == self.q.shape[1]:
            return self
        rows = (None if x is None else x[:, start:end] for x in (self.q, self.k, self.v, self.g, self.beta))
        return TokenInputs(*rows, self.A_log, self.dt_bias)  # type: ignore[arg-type]


@dataclass(frozen=True)
class RuleOptions:
    """The switches of `gdn_cp.chunk_gated_delta_rule`, with its names and meanings."""

    scale: float | None = None
    use_qk_l2norm_in_kernel: bool = False
    use_gate_in_kernel: bool = False
    use_beta_sigmoid_in_kernel: bool = False
    backend: str | None = None
    intra_card: int | None = None


class SegmentSummary(NamedTuple):
    """The affine law of n segments: S_ext [n, HV, K, V] and M [n, HV, K, K], float32 (float64 for float64 inputs)."""

    ext: Tensor
    transfer: Tensor


class LawRoom(NamedTuple):
    """Where laws are to be written: (S_ext | M) [slots, HV, K, V + K] float32, and int32 [slots, HV], which gets 1 for
    an M that truncation has made zero, else 0; both contiguous."""

    laws: Tensor
    lost: Tensor


def run_rule(
    inputs: TokenInputs,
    options: RuleOptions,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`gdn_cp.chunk_gated_delta_rule` on a bundle of inputs: o [1, T, HV, V] and the final states or None."""
    flags: dict[str, Any] = {field.name: getattr(options, field.name) for field in fields(options)}
    return chunk_gated_delta_rule(
        inputs.q,
        inputs.k,
        inputs.v,
        inputs.g,
        inputs.beta,
        initial_state=initial_state,
        output_final_state=output_final_state,
        A_log=inputs.A_log,
        dt_bias=inputs.dt_bias,
        cu_seqlens=cu_seqlens,
        **flags,
    )


def summarise_segments(
    inputs: TokenInputs, options: RuleOptions, cu_seqlens: Tensor, *, truncate: bool = False
) -> SegmentSummary:
    """Return S_ext and M of every segment.

    Args:
        inputs: the tokens of all segments, one after the other. q is not used.
        options: as for the rule.
        cu_seqlens: int32 or int64 [n+1], the row at which each segment starts and, last, T.
        truncate: set M to zero for each (segment, head) whose decay e^(sum of g) is below `TRUNCATION_THRESHOLD`. It
            changes S_out by no more than e^(sum of g) * |S_in| (2-norm) if 0 <= beta |k|^2 <= 2 for every token, which
            unit keys and beta in (0, 1) guarantee; where that does not hold, leave it off. On a CPU a call whose every
            M is zero does not compute them. (Triton's kernels begin S_ext too where what came before is lost so.)

    Not differentiable: the gradient of the state is passed on by `gdn_cp.kernels.merge`.

    >>> k = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2)  # one token, one head
    >>> tokens = TokenInputs(k, k, v=torch.tensor([3.0]).view(1, 1, 1, 1), beta=torch.tensor([[[0.5]]]))
    >>> ext, transfer = summarise_segments(tokens, RuleOptions(), torch.tensor([0, 1]))
    >>> ext.flatten().tolist(), transfer[0, 0].tolist()
    ([1.5, 0.0], [[0.5, 0.0], [0.0, 1.0]])
    """
    v = inputs.v
    n, HV, K, V = len(cu_seqlens) - 1, v.shape[2], inputs.k.shape[-1], v.shape[-1]
    dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
    with torch.no_grad():
        lost = _decayed_away(inputs, options, cu_seqlens) if truncate else None
        if lost is not None and v.device.type == "cpu" and bool(lost.all()):
            ext = _final_states(inputs, v, None, options, cu_seqlens)
            return SegmentSummary(ext, ext.new_zeros(n, HV, K, K))
        zeros, identity = v.new_zeros(*v.shape[:3], K), torch.eye(K, dtype=dtype, device=v.device)
        if V + K <= MOST_COLUMNS:
            start = torch.cat((identity.new_zeros(K, V), identity), 1)
            final = _final_states(inputs, torch.cat((v, zeros), -1), start, options, cu_seqlens)
            ext, transfer = final.split((V, K), -1)
        else:
            ext = _final_states(inputs, v, None, options, cu_seqlens)
            transfer = _final_states(inputs, zeros, identity, options, cu_seqlens)
        if lost is not None:
            transfer = transfer.masked_fill(lost[..., None, None], 0)
        return SegmentSummary(ext.contiguous(), transfer.contiguous())


def _final_states(
    inputs: TokenInputs, v: Tensor, start: Tensor | None, options: RuleOptions, cu_seqlens: Tensor
) -> Tensor:
    """The states [n, HV, K, width] that the inputs with values v leave, every one from `start` [K, width] (None: 0)."""
    if start is not None:
        start = start.expand(len(cu_seqlens) - 1, v.shape[2], *start.shape).contiguous()
    # k for q: the output is not used, and k is at hand.
    tokens = TokenInputs(inputs.k, inputs.k, v, inputs.g, inputs.beta, inputs.A_log, inputs.dt_bias)
    _, final = run_rule(tokens, options, cu_seqlens, start, True)
    assert final is not None
    return final


def _decayed_away(inputs: TokenInputs, options: RuleOptions, cu_seqlens: Tensor) -> Tensor:
    """bool [n, HV]: the sum of g over the segment is below the logarithm of the threshold."""
    v, g = inputs.v, inputs.g
    if g is None:
        return torch.zeros(len(cu_seqlens) - 1, v.shape[2], dtype=torch.bool, device=v.device)
    if options.use_gate_in_kernel:
        assert inputs.A_log is not None
        g = fused_gdn_gate(g, inputs.A_log, inputs.dt_bias)
    # Differences of running sums need float64: late segments stand on the sums of all before them.
    total = torch.nn.functional.pad(g[0].to(torch.float64).cumsum(0), (0, 0, 1, 0))
    bounds = cu_seqlens.long()
    return total[bounds[1:]] - total[bounds[:-1]] < math.log(TRUNCATION_THRESHOLD)


@dataclass(frozen=True)
class RuleBackward:
    """The backward of the rule over segments, in the two halves between which gradients of states travel.

    Made by `begin_backward`. The graph of the rule lives as long as this object.
    """

    leaves: tuple[Tensor | None, ...]
    outputs: tuple[Tensor, Tensor]
    states: Tensor
    d_output: Tensor

    def state_gradient(self, slots: int = 0, out: Tensor | None = None) -> Tensor:
        """Return dS_ext [n, HV, K, V]: the gradient of each initial state if no final state had a gradient.

        With `slots` > n the result is [slots, HV, K, V], and what is behind the n-th segment holds anything. Only
        Triton's kernels write to a given `out`.
        """
        assert out is None
        (grad,) = torch.autograd.grad(self.outputs[0], self.states, self.d_output, retain_graph=True)
        return with_room(grad, slots)

    def prepare(self) -> None:
        """Nothing that `finish` needs can be made before the gradients of the final states are there."""

    def finish(self, d_leaving: Tensor, sums: None = None) -> tuple[Tensor | None, ...]:
        """Return each input's gradient, None where not needed, given those of the final states; frees the graph. Only
        Triton's kernels leave sums for later."""
        wanted = [x for x in self.leaves if x is not None and x.requires_grad]
        found = iter(torch.autograd.grad(self.outputs, wanted, (self.d_output, d_leaving)))
        return tuple(next(found) if x is not None and x.requires_grad else None for x in self.leaves)


def begin_backward(
    inputs: TokenInputs,
    options: RuleOptions,
    cu_seqlens: Tensor,
    states: Tensor,
    d_output: Tensor,
    needs_grad: tuple[bool, ...],
) -> RuleBackward:
    """Run the rule anew from `states`, recording its graph, for the backward that `RuleBackward` describes.

    Args:
        inputs: as in the forward.
        options: as in the forward.
        cu_seqlens: bounds of the segments.
        states: [n, HV, K, V] the states that enter the segments, as composed in the forward.
        d_output: [1, T, HV, V] gradient of the output.
        needs_grad: for each field of `inputs`, whether `RuleBackward.finish` shall return its gradient.
    """
    with torch.enable_grad():
        leaves = [
            x if x is None else x.detach().requires_grad_(needed)
            for x, needed in zip(inputs.tensors(), needs_grad, strict=True)
        ]
        entering = states.detach().requires_grad_()
        o, final = run_rule(TokenInputs(*leaves), options, cu_seqlens, entering, True)  # type: ignore[arg-type]
    assert final is not None
    return RuleBackward(tuple(leaves), (o, final), entering, d_output)


def with_room(x: Tensor, slots: int) -> Tensor:
    """x [n, ...] contiguous, or if n < slots its copy at the begin of [slots, ...]."""
    if len(x) >= slots:
        return x.contiguous()
    whole = x.new_zeros(slots, *x.shape[1:])
    whole[: len(x)] = x
    return whole


class SegmentRule:
    """The forward over segments of which some begin with, or end in, another rank's: summaries first, then the output.

    Args:
        inputs: the tokens of all segments, one after the other.
        options: as for the rule.
        cu_seqlens: int32 [n+1] bounds of the segments.
        roles: int32 [n] on the same device: 1 if a state enters the segment from elsewhere, plus 2 if its state goes on
            elsewhere (`chunk_pieces.ENTERED`, `LEFT`); 0: a whole sequence.
        needed: the range [a, b) of segments outside which no summary is needed.
        truncate: see `summarise_segments`; Triton's kernels decide for each piece of a segment.
        checked: whether the caller knows that Triton's kernels can serve the inputs, and wants them to.

    Nothing is recorded by autograd. Raises as `gdn_cp.chunk_gated_delta_rule`.
    """

    def __init__(
        self,
        inputs: TokenInputs,
        options: RuleOptions,
        cu_seqlens: Tensor,
        roles: Tensor,
        needed: tuple[int, int],
        *,
        truncate: bool = False,
        checked: bool = False,
    ) -> None:
        self.inputs, self.options, self.cu_seqlens, self.needed = inputs, options, cu_seqlens, needed
        self.truncate = truncate
        self._triton = None
        if checked or _backend(inputs, options, cu_seqlens) == "triton":
            from gdn_cp.kernels.chunk_segments import TritonSegments

            scale = checked_scale(options.scale, inputs.q.shape[-1])
            self._triton = TritonSegments(inputs, options, cu_seqlens, roles, scale, options.intra_card)

    @property
    def kernels(self) -> bool:
        """Whether Triton does the work."""
        return self._triton is not None

    def summarise(self, slots: int = 0, room: LawRoom | None = None) -> Tensor:
        """The laws (S_ext | M) [max(n, slots), HV, K, V + K], contiguous; what nobody needs holds anything. Triton's
        kernels write them to `room`, if there is one."""
        if self._triton is not None:
            return self._triton.summarise(math.log(TRUNCATION_THRESHOLD) if self.truncate else None, slots, room)
        assert room is None
        first, last = self.needed
        n, (HV, V), K = len(self.cu_seqlens) - 1, self.inputs.v.shape[2:], self.inputs.k.shape[-1]
        dtype = torch.float64 if self.inputs.v.dtype == torch.float64 else torch.float32
        laws = self.inputs.v.new_zeros(max(n, slots), HV, K, V + K, dtype=dtype)
        if first == last:
            return laws
        # The rows' numbers are on the device, but for the plain rule the host has to wait for them in any case.
        bounds = self.cu_seqlens[first : last + 1]
        start, end = int(bounds[0]), int(bounds[-1])
        part = self.inputs.narrow(start, end)
        summary = summarise_segments(part, self.options, bounds - start, truncate=self.truncate)
        laws[first:last] = torch.cat(summary, -1)
        return laws

    def run(self, entering: Tensor) -> Tensor:
        """o [1, T, HV, V], given the states [n, HV, K, V] that enter: zero where none does."""
        if self._triton is not None:
            return self._triton.run(entering)
        return run_rule(self.inputs, self.options, self.cu_seqlens, entering)[0]

    def kept(self) -> tuple[tuple[Tensor | None, ...], int]:
        """What `begin_segment_backward` needs besides inputs and entering states: tensors, and the cut; after `run`."""
        if self._triton is None:
            return (), 0
        return self._triton.kept(), self._triton.piece_chunks


def begin_segment_backward(
    inputs: TokenInputs,
    options: RuleOptions,
    cu_seqlens: Tensor,
    roles: Tensor,
    kept: tuple[tuple[Tensor | None, ...], int],
    entering: Tensor,
    d_output: Tensor,
    needs_grad: tuple[bool, ...],
    *,
    truncate: bool = False,
) -> RuleBackward | TritonSegmentsBackward:
    """The backward of what `SegmentRule` did, in two halves: `state_gradient()`, then `finish(gradients of states)`.

    Args as there; `kept` is what it kept, `entering` the states that entered, `d_output` the gradient of its output.
    `finish` returns the gradient of each field of `inputs`, None where `needs_grad` is false.
    """
    tensors, piece_chunks = kept
    if not tensors:
        return begin_backward(inputs, options, cu_seqlens, entering, d_output, needs_grad)
    from gdn_cp.kernels.chunk_segments import TritonSegmentsBackward

    scale = checked_scale(options.scale, inputs.q.shape[-1])
    return TritonSegmentsBackward(
        inputs, options, cu_seqlens, roles, scale, piece_chunks, tensors, entering, d_output, needs_grad,
        math.log(TRUNCATION_THRESHOLD) if truncate else None,
    )  # fmt: skip


def _backend(inputs: TokenInputs, options: RuleOptions, cu_seqlens: Tensor) -> str:
    """Which implementation serves the rule on these inputs, which are checked."""
    flags = {name: getattr(options, name) for name in (
        "use_qk_l2norm_in_kernel", "use_gate_in_kernel", "use_beta_sigmoid_in_kernel")}  # fmt: skip
    x = inputs
    call = describe_call(
        x.q, x.k, x.v, x.g, x.beta, None, False, x.A_log, x.dt_bias, cu_seqlens, flags | {"state_v_first": False}
    )
    return choose_backend(call, options.backend).backend
