"""The Triton backend of `chunk_gated_delta_rule`: what it serves, and its registration as torch custom operations.

    tables -> prepare (all chunks at once) -> chain (along each sequence)        `chunk_prepare`, `chunk_fwd`
    backward: the chains again, and what is local to a chunk                      `chunk_bwd`

Two operations, `gdn_cp::chunk_gated_delta_rule_fwd` and `_bwd` (`rule_forward` and `rule_backward`, for those who do
their own differentiation), are opaque to torch.compile and to activation
checkpointing, and carry shapes for tracing. Kept for the backward: the inputs, the cumulative gate, beta as used, the
inverse norms and the inverse of each chunk, and for long batches a few states; nothing of size K * V per chunk.

Dimensions: B batch, T tokens, H query/key heads, HV value heads, K, V head dims, N sequences, NT chunks (bound).
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from gdn_cp.kernels.backends import DeltaRuleCall
from gdn_cp.kernels.bwd_slices import slice_chunks
from gdn_cp.kernels.chunk_bwd import Gradients, chunk_gated_delta_rule_bwd
from gdn_cp.kernels.chunk_fwd import chain_forward
from gdn_cp.kernels.chunk_prepare import Prepared, prepare
from gdn_cp.kernels.configs import cdiv, on_device
from gdn_cp.kernels.piece_plan import chain_plan
from gdn_cp.kernels.sums_triton import LaterSums
from gdn_cp.kernels.tables import CHUNK, chunk_tables, even_rows
from gdn_cp.launch_bare import TRITON
from gdn_cp.launch_recording import Tensors, replayable

MAX_HEAD_DIM = 256

# Whether kernels read and write states [V, K] as they lie. Compiled by Triton 3.7.1, some kernel that does was seen to
# reach foreign memory on an H200, where all with states [K, V] are right; with 3.6.0 both are.
_READS_V_FIRST = TRITON < (3, 7)


def unsupported(call: DeltaRuleCall) -> str | None:
    """Why these kernels cannot serve `call`, or None when they can."""
    if call.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"its dtype is {call.dtype}, these kernels take bfloat16, float16 and float32"
    for name, dtype in (("g", call.gate_dtype), ("beta", call.beta_dtype)):
        if dtype == torch.float64:
            return f"{name} is float64, these kernels compute it in float32"
    for name, dim in (("K", call.K), ("V", call.V)):
        if dim % 16 or not 16 <= dim <= MAX_HEAD_DIM:
            return f"its head dim {name} = {dim} is not a multiple of 16 up to {MAX_HEAD_DIM}"
    if call.device_type == "cuda" and call.capability is not None and call.capability < (8, 0):
        return f"the GPU's compute capability is {call.capability}, these kernels need 8.0 or newer"
    if os.environ.get("TRITON_INTERPRET") == "1" and call.dtype != torch.float32:
        return f"Triton's interpreter multiplies {call.dtype} wrongly, use float32 with it"
    return None


def _or_empty(x: Tensor | None, like: Tensor, *dims: int) -> Tensor:
    """A result of a custom operation, which None cannot be: [0, *dims] stands for it."""
    return like.new_empty((0, *dims), dtype=torch.float32) if x is None else x


def _or_none(x: Tensor | None) -> Tensor | None:
    """x, None if it has no elements."""
    return x if x is not None and x.numel() else None


def _checkpoints(num_chunks: int, length: int, HV: int, K: int, V: int) -> tuple[int, ...]:
    """Shape of the states that a backward in slices of `length` chunks starts from."""
    return (-(-num_chunks // length), HV, K, V) if length else (0,)


def _turns_states(state_v_first: bool, device: torch.device) -> bool:
    """Whether states [V, K] are transposed outside the kernels."""
    return state_v_first and device.type == "cuda" and not _READS_V_FIRST


def _turned(state: Tensor | None) -> Tensor | None:
    """[.., K, V] for [.., V, K] and the other way round, contiguous."""
    return None if state is None else state.mT.contiguous()


def rule_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    output_final_state: bool,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    cu_seqlens: Tensor | None,
    use_qk_l2norm_in_kernel: bool,
    use_gate_in_kernel: bool,
    use_beta_sigmoid_in_kernel: bool,
    state_v_first: bool,
    intra_card: int | None,
    lean: bool = False,
) -> tuple[Tensor, Tensor | None, tuple[Tensor | None, ...]]:
    """o, the final state and, for the backward, (G, bt, rq, rk, Ag, checkpoints, piece states, piece summaries).

    With `lean` the backward takes less memory and a few more launches, see `bwd_slices`.
    """
    (B, T, HV, V), K = v.shape, q.shape[3]
    q, k, v = even_rows(q), even_rows(k), even_rows(v)
    N = B if cu_seqlens is None else cu_seqlens.numel() - 1
    plan = chain_plan(q.device, q.dtype, N, B * T, HV, K, V, intra_card=intra_card)
    tables = chunk_tables(B, T, cu_seqlens, q.device, plan.cut)
    prepared = prepare(
        q,
        k,
        None if g is None else even_rows(g),
        None if beta is None else even_rows(beta),
        tables,
        scale=scale,
        num_v_heads=HV,
        A_log=A_log,
        dt_bias=dt_bias,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        use_gate_in_kernel=use_gate_in_kernel,
        use_beta_sigmoid_in_kernel=use_beta_sigmoid_in_kernel,
    )
    length = slice_chunks(tables.num_chunks, HV, K, V, q.element_size(), lean)
    checkpoints = None
    if length:
        shape = (cdiv(tables.num_chunks, length), HV, K, V)
        checkpoints = torch.empty(shape, dtype=torch.float32, device=q.device)
    o, final, pieces = chain_forward(
        q,
        k,
        v,
        prepared,
        tables,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        state_v_first=state_v_first,
        launch=plan.launch,
        checkpoints=checkpoints,
        slice_chunks=length,
    )
    if pieces is None or not plan.backward_cut:
        pieces = None, None
    p = prepared
    return o, final, (p.G, p.bt, p.rq, p.rk, p.Ag, checkpoints, *pieces)


def _forward_launches(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None, initial_state: Tensor | None,
    A_log: Tensor | None, dt_bias: Tensor | None, cu_seqlens: Tensor | None, scale: float, *settings: Any,
) -> Tensors:  # fmt: skip
    """`rule_forward` as `replayable` takes it: all tensors first."""
    final, *flags = settings
    o, final, kept = rule_forward(
        q, k, v, g, beta, scale, initial_state, final, A_log, dt_bias, cu_seqlens, *flags
    )  # fmt: skip
    return o, final, *kept


def _forward_op(*arguments: Any) -> tuple[Tensor, ...]:
    """`rule_forward` with empty tensors for None. Those of pieces have their rank: their number may be 0 or not where
    shapes are symbols."""
    q, k, v, g, beta, scale, initial_state, output_final_state, A_log, dt_bias, cu_seqlens, *flags, v_first, cut = (
        arguments
    )
    turns = _turns_states(v_first, q.device)
    with on_device(q.device):
        o, final, *kept, starts, sums = replayable(
            _forward_launches,
            (q, k, v, g, beta, _turned(initial_state) if turns else initial_state, A_log, dt_bias, cu_seqlens),
            (scale, output_final_state, *flags, v_first and not turns, cut),
        )
        final = _turned(final) if turns else final
    assert o is not None
    (HV, V), K = v.shape[2:], q.shape[3]
    results = (_or_empty(x, q) for x in (final, *kept))
    return o, *results, _or_empty(starts, q, HV, K, V), _or_empty(sums, q, HV, K, V + K)


_forward = torch.library.custom_op(
    "gdn_cp::chunk_gated_delta_rule_fwd",
    _forward_op,
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor? g, Tensor? beta, float scale, Tensor? initial_state, "
    "bool output_final_state, Tensor? A_log, Tensor? dt_bias, Tensor? cu_seqlens, bool use_qk_l2norm_in_kernel, "
    "bool use_gate_in_kernel, bool use_beta_sigmoid_in_kernel, bool state_v_first, int? intra_card) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@_forward.register_fake
def _(
    q, k, v, g, beta, scale, initial_state, output_final_state, A_log, dt_bias, cu_seqlens, use_qk_l2norm_in_kernel,
    use_gate_in_kernel, use_beta_sigmoid_in_kernel, state_v_first, intra_card,
):  # fmt: skip
    (B, T, H, K), (HV, V) = q.shape, v.shape[2:]
    if cu_seqlens is None:
        N, NT = B, B * ((T + CHUNK - 1) // CHUNK)
    else:
        N = cu_seqlens.shape[0] - 1
        NT = (T + (CHUNK - 1) * N) // CHUNK
    if isinstance(N, torch.SymInt) or isinstance(B * T, torch.SymInt):
        pieces = torch.library.get_ctx().new_dynamic_size()  # the cut is chosen when the numbers are known
    else:
        cut = chain_plan(q.device, q.dtype, N, B * T, HV, K, V, intra_card=intra_card).backward_cut
        pieces = N + NT // cut if cut and NT // cut else 0
    state = ((N, HV, V, K) if state_v_first else (N, HV, K, V)) if output_final_state else (0,)
    norms = (NT, H, CHUNK) if use_qk_l2norm_in_kernel else (0,)

    def float32(*shape):
        return q.new_empty(shape, dtype=torch.float32)

    return (
        v.new_empty((B, T, HV, V)),
        float32(*state),
        float32(NT, HV, CHUNK),
        float32(NT, HV, CHUNK),
        float32(*norms),
        float32(*norms),
        q.new_empty((NT, HV, CHUNK, CHUNK)),
        float32(*_checkpoints(NT, slice_chunks(NT, HV, K, V, q.element_size()), HV, K, V)),
        float32(pieces, HV, K, V),
        float32(pieces, HV, K, V + K),
    )


def rule_backward(
    do: Tensor,
    dht: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    G: Tensor,
    bt: Tensor,
    rq: Tensor | None,
    rk: Tensor | None,
    Ag: Tensor,
    checkpoints: Tensor | None,
    starts: Tensor | None,
    sums: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    cu_seqlens: Tensor | None,
    use_qk_l2norm_in_kernel: bool,
    use_gate_in_kernel: bool,
    use_beta_sigmoid_in_kernel: bool,
    state_v_first: bool,
    need_dh0: bool,
    piece_chunks: int,
    overwrite_q: bool = False,
    shares: int = 1,
    share: int = 0,
    later: LaterSums | None = None,
) -> Gradients:
    """(dq, dk, dv, dg, dbeta, dh0, dA_log, ddt_bias), given what `rule_forward` kept; empty tensors may stand for None.

    With `overwrite_q` dq takes the memory of q, which nobody may need any more. `shares`, `share`, `later`: see
    `chunk_gated_delta_rule_bwd`.
    """
    norm = use_qk_l2norm_in_kernel
    pieces: dict[str, Any] = {}
    starts = _or_none(starts)
    if starts is not None:
        assert sums is not None
        pieces = {"piece_states": (starts, sums), "piece_chunks": piece_chunks}
    return chunk_gated_delta_rule_bwd(
        even_rows(do),
        dht,
        even_rows(q),
        even_rows(k),
        even_rows(v),
        None if g is None else even_rows(g),
        None if beta is None else even_rows(beta),
        Prepared(G, bt, rq if norm else None, rk if norm else None, Ag),
        cu_seqlens,
        scale=scale,
        initial_state=initial_state,
        A_log=A_log,
        dt_bias=dt_bias,
        use_qk_l2norm_in_kernel=norm,
        use_gate_in_kernel=use_gate_in_kernel,
        use_beta_sigmoid_in_kernel=use_beta_sigmoid_in_kernel,
        state_v_first=state_v_first,
        need_dh0=need_dh0,
        overwrite_q=overwrite_q,
        checkpoints=_or_none(checkpoints),
        shares=shares,
        share=share,
        later=later,
        **pieces,
    )


def _backward_launches(*arguments: Any) -> Tensors:
    """`rule_backward` as `replayable` takes it: all tensors first."""
    *tensors, initial_state, A_log, dt_bias, cu_seqlens, scale, norm, gate, sigmoid, v_first, dh0, cut = arguments
    rest: tuple[Any, ...] = (scale, initial_state, A_log, dt_bias, cu_seqlens, norm, gate, sigmoid, v_first, dh0, cut)
    return rule_backward(*tensors, *rest)


def _backward_op(*arguments: Any) -> tuple[Tensor, ...]:
    """`rule_backward` with the forward's `intra_card` in the place of `piece_chunks`: while torch.compile traces
    lengths as symbols nobody knows the pieces, and here they are known."""
    *tensors, scale, initial_state, A_log, dt_bias, cu_seqlens, norm, gate, sigmoid, v_first, dh0, pieces = arguments
    q, v, sums = tensors[2], tensors[4], tensors[14]
    cut = piece_chunks(q, v, cu_seqlens, pieces) if sums.numel() else 0
    with on_device(q.device):
        turns = _turns_states(v_first, q.device)
        if turns:
            tensors[1], initial_state = _turned(tensors[1]), _turned(initial_state)
        settings = (scale, norm, gate, sigmoid, v_first and not turns, dh0, cut)
        given = (initial_state, A_log, dt_bias, cu_seqlens)
        found: Any = replayable(_backward_launches, (*tensors, *given), settings)
    found = Gradients(*found)
    if turns:
        found = found._replace(dh0=_turned(found.dh0))
    *gradients, ddt_bias = (_or_empty(x, q) for x in found)
    return *gradients, ddt_bias.clone()  # the results of a custom operation must not share memory


_backward = torch.library.custom_op(
    "gdn_cp::chunk_gated_delta_rule_bwd",
    _backward_op,
    mutates_args=(),
    schema="(Tensor do, Tensor? dht, Tensor q, Tensor k, Tensor v, Tensor? g, Tensor? beta, Tensor G, Tensor bt, "
    "Tensor rq, Tensor rk, Tensor Ag, Tensor checkpoints, Tensor starts, Tensor sums, float scale, "
    "Tensor? initial_state, Tensor? A_log, Tensor? dt_bias, Tensor? cu_seqlens, bool use_qk_l2norm_in_kernel, "
    "bool use_gate_in_kernel, bool use_beta_sigmoid_in_kernel, bool state_v_first, bool need_dh0, int? intra_card) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@_backward.register_fake
def _(
    do, dht, q, k, v, g, beta, G, bt, rq, rk, Ag, checkpoints, starts, sums, scale, initial_state, A_log, dt_bias,
    cu_seqlens,
    use_qk_l2norm_in_kernel, use_gate_in_kernel, use_beta_sigmoid_in_kernel, state_v_first, need_dh0, intra_card,
):  # fmt: skip
    HV, N = v.shape[2], q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state = (N, HV, v.shape[3], q.shape[3]) if state_v_first else (N, HV, q.shape[3], v.shape[3])

    def like(x):
        return q.new_empty((0,), dtype=torch.float32) if x is None else x.new_empty(x.shape)

    def head(present):
        return q.new_empty((HV,) if present else (0,), dtype=torch.float32)

    dh0 = q.new_empty(state if need_dh0 else (0,), dtype=torch.float32)
    return (
        like(q),
        like(k),
        like(v),
        like(g),
        like(beta),
        dh0,
        head(use_gate_in_kernel),
        head(use_gate_in_kernel and dt_bias is not None),
    )


def piece_chunks(q: Tensor, v: Tensor, cu_seqlens: Tensor | None, intra_card: int | None) -> int:
    """Chunks of a piece in `rule_forward` with these arguments, 0: no pieces. If it kept summaries, `rule_backward` has
    to be told."""
    (B, T, HV, V), K = v.shape, q.shape[3]
    N = B if cu_seqlens is None else cu_seqlens.numel() - 1
    return chain_plan(q.device, q.dtype, N, B * T, HV, K, V, intra_card=intra_card).cut


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, g, beta, scale, initial_state, _, A_log, dt_bias, cu_seqlens, *flags, intra_card = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(q, k, v, g, beta, initial_state, A_log, dt_bias, cu_seqlens, *output[2:])
    ctx.scale, ctx.flags, ctx.intra_card = scale, flags, intra_card


def _autograd(ctx: Any, do: Tensor | None, dht: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    q, k, v, g, beta, initial_state, A_log, dt_bias, cu_seqlens, *kept = ctx.saved_tensors
    if do is None:
        do = torch.zeros_like(v, memory_format=torch.contiguous_format)
    dq, dk, dv, dg, dbeta, dh0, dA_log, ddt_bias = _backward(
        do,
        dht,
        q,
        k,
        v,
        g,
        beta,
        *kept,
        ctx.scale,
        initial_state,
        A_log,
        dt_bias,
        cu_seqlens,
        *ctx.flags,
        initial_state is not None and ctx.needs_input_grad[6],
        ctx.intra_card,
    )

    def gradient(x: Tensor | None, dx: Tensor) -> Tensor | None:
        return None if x is None or dx.numel() != x.numel() else dx.to(x.dtype).view(x.shape)

    return (
        dq, dk, dv, gradient(g, dg), gradient(beta, dbeta), None, gradient(initial_state, dh0), None,
        gradient(A_log, dA_log), gradient(dt_bias, ddt_bias), None, None, None, None, None, None,
    )  # fmt: skip


_forward.register_autograd(_autograd, setup_context=_setup_context)


def chunk_gated_delta_rule_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    output_final_state: bool,
    *,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    intra_card: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`gdn_cp.chunk_gated_delta_rule` by these kernels; arguments as there, already checked. Differentiable."""
    o, final, *_ = _forward(
        q,
        k,
        v,
        g,
        beta,
        scale,
        initial_state,
        output_final_state,
        A_log,
        dt_bias,
        cu_seqlens,
        use_qk_l2norm_in_kernel,
        use_gate_in_kernel,
        use_beta_sigmoid_in_kernel,
        state_v_first,
        intra_card,
    )
    return o, final if output_final_state else None
