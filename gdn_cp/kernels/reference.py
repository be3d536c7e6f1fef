"""The gated delta rule in plain torch: the token recurrence, which defines it, and the chunked form, which trains.

The recurrence is the oracle of every test. The chunked form is the implementation for CPUs and the deterministic
fall-back for GPUs; autograd gives the backward of both.

Per value head, with state S [K, V], decay g <= 0 (log) and step size beta:

    S_t = e^{g_t} S_{t-1} + beta_t k_t (v_t - e^{g_t} S_{t-1}^T k_t)^T        o_t = scale * S_t^T q_t

Dimensions: B batch, T tokens, H query/key heads, r value heads per key head, HV = H*r value heads, K key dim, V value
dim, N sequences, C rows of a chunk, M chunks of all sequences together.
"""

from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from gdn_cp.kernels.activations import sigmoid
from gdn_cp.kernels.bounds import read_bounds
from gdn_cp.kernels.gate import gdn_gate_reference

# Rows of padding below which a smaller chunk is not worth it: up to here a sequence is cut alike in every batch.
_PADDING_THAT_MATTERS = 1 << 15


def l2norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """Unit length along the last dimension, x * rsqrt(sum(x^2) + eps), in float32 (float64 for float64), in x's dtype.

    eps stands inside the root, so a zero row gives zero and has a finite gradient.
    """
    y = x.to(_compute_dtype(x))
    return (y * torch.rsqrt(y.square().sum(-1, keepdim=True) + eps)).to(x.dtype)


def recurrent_gated_delta_rule_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    *,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The recurrence of the module docstring, token by token; arguments and results as `gdn_cp.chunk_gated_delta_rule`.

    Computes in float64 for float64 input, else in float32. Reads cu_seqlens on the host.
    """
    out_dtype = v.dtype
    with torch.autocast(q.device.type, enabled=False):
        gate = (A_log, dt_bias) if use_gate_in_kernel else None
        tokens = _prepare(q, k, v, g, beta, scale, use_qk_l2norm_in_kernel, gate, use_beta_sigmoid_in_kernel)
        state = _start_state(tokens, initial_state, state_v_first, cu_seqlens)
        if cu_seqlens is None:
            o, final = _recur(tokens, state)
        else:
            runs = [
                _recur(_Tokens(*(x[:, start:end] for x in tokens)), state[n : n + 1])
                for n, (start, end) in enumerate(pairwise(read_bounds(cu_seqlens, q.shape[1])))
            ]
            o, final = torch.cat([run[0] for run in runs], 1), torch.cat([run[1] for run in runs])
        return o.flatten(2, 3).to(out_dtype), _end_state(final, state_v_first) if output_final_state else None


def chunk_gated_delta_rule_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    *,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor | None]:
    """The same function by chunks of `chunk_size` tokens; arguments and results as `gdn_cp.chunk_gated_delta_rule`.

    What needs no state is done for all chunks of all sequences in one batch; the recurrence over chunks advances all
    sequences in lockstep, two products a step. Deterministic, and on a CPU the outputs, states and gradients of a head
    have the same bits whatever heads are beside it. Reads cu_seqlens on the host.
    """
    out_dtype, (B, T) = v.dtype, v.shape[:2]
    with torch.autocast(q.device.type, enabled=False):
        gate = (A_log, dt_bias) if use_gate_in_kernel else None
        tokens = _prepare(q, k, v, g, beta, scale, use_qk_l2norm_in_kernel, gate, use_beta_sigmoid_in_kernel)
        state = _start_state(tokens, initial_state, state_v_first, cu_seqlens)
        bounds = tuple(n * T for n in range(B + 1)) if cu_seqlens is None else read_bounds(cu_seqlens, T)
        table = _chunk_table(bounds, chunk_size, q.device)
        rows = (_pick_rows(x.flatten(0, 1), table.rows, table.places, table.is_padding) for x in tokens)
        q, k, *rest = (x.unflatten(0, (-1, table.chunk_size)) for x in rows)
        chunks = (q.movedim(1, 2), k.movedim(1, 2), *(x.movedim(1, 3) for x in rest))
        # Contiguous whatever H is: the strides decide which kernel a product runs, hence its last bits.
        chunks = _Tokens(*(x.contiguous() for x in chunks))
        o, final = _chunked(chunks, _pick_rows(state, table.order, table.order_inverse), table.active)
        o = _pick_rows(o.movedim(3, 1).flatten(0, 1), table.places, table.rows, None, table.is_padding).unflatten(
            0, (B, T)
        )
        final = _pick_rows(final, table.order_inverse, table.order)
        return o.flatten(2, 3).to(out_dtype), _end_state(final, state_v_first) if output_final_state else None


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


class _Tokens(NamedTuple):
    """What the recurrence reads, in the dtype of the computation; scale, gate, sigmoid and norm are applied already."""

    q: Tensor  # [B, T, H, K]
    k: Tensor  # [B, T, H, K]
    v: Tensor  # [B, T, H, r, V]
    g: Tensor  # [B, T, H, r]
    beta: Tensor  # [B, T, H, r]


def _prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    scale: float | None,
    use_l2norm: bool,
    gate: tuple[Tensor | None, Tensor | None] | None,
    use_sigmoid: bool,
) -> _Tokens:
    dtype, H = _compute_dtype(v), q.shape[2]
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if use_l2norm:
        q, k = l2norm(q), l2norm(k)
    q = q * (q.shape[-1] ** -0.5 if scale is None else scale)
    if g is None:
        g = v.new_zeros(v.shape[:3])
    elif gate is not None:
        A_log, dt_bias = gate
        assert A_log is not None
        g = gdn_gate_reference(g, A_log, dt_bias)
    if beta is None:
        beta = v.new_ones(v.shape[:3])
    elif use_sigmoid:
        beta = sigmoid(beta.to(dtype))
    grouped = (H, v.shape[2] // H)
    return _Tokens(q, k, *(x.to(dtype).unflatten(2, grouped) for x in (v, g, beta)))


def _start_state(tokens: _Tokens, state: Tensor | None, v_first: bool, cu_seqlens: Tensor | None) -> Tensor:
    """[N, H, r, K, V] in the dtype of the computation."""
    (B, _, H, r, V), K = tokens.v.shape, tokens.q.shape[-1]
    if state is None:
        return tokens.v.new_zeros(B if cu_seqlens is None else len(cu_seqlens) - 1, H, r, K, V)
    return (state.transpose(-1, -2) if v_first else state).to(tokens.v.dtype).unflatten(1, (H, r))


def _end_state(state: Tensor, v_first: bool) -> Tensor:
    state = state.flatten(1, 2)
    return state.transpose(-1, -2).contiguous() if v_first else state


def _recur(tokens: _Tokens, state: Tensor) -> tuple[Tensor, Tensor]:
    """One pass over the tokens of B sequences of equal length; `state` is [B, H, r, K, V]."""
    outputs = []
    for q_t, k_t, v_t, g_t, beta_t in zip(*(x.unbind(1) for x in tokens), strict=True):
        state = state * g_t.exp()[..., None, None]
        error = v_t - torch.einsum("bhk,bhrkv->bhrv", k_t, state)
        state = state + torch.einsum("bhk,bhrv->bhrkv", k_t, beta_t[..., None] * error)
        outputs.append(torch.einsum("bhk,bhrkv->bhrv", q_t, state))
    return torch.stack(outputs, 1) if outputs else tokens.v, state


def _chunked(chunks: _Tokens, state: Tensor, active: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The chunked delta rule over chunks in lockstep order.

    With G the running sum of g in a chunk, Gam_ij = e^(G_i - G_j) for i >= j, L = stricttril(diag(beta) K K^T * Gam):

        [Y | W] = (I + L)^-1 diag(beta) [V | e^G K]      U = Y - W S      S+ = e^(G_C) S + K^T (e^(G_C - G) U)
        O = e^G (Q S) + (Q K^T * Gam) U

    Args:
        chunks: q, k [M, H, C, K]; v [M, H, r, C, V]; g, beta [M, H, r, C]. Rows of padding are zero.
        state: [N, H, r, K, V], the sequence with most chunks first.
        active: number of sequences that have a chunk at each step; chunks are ordered by step, then by sequence.

    Returns:
        o [M, H, r, C, V] and the states after the last chunk of each sequence, in the order of `state`.
    """
    q, k, v, g, beta = chunks
    C, V = v.shape[-2:]
    # A long run of strong gates makes |G| large and the differences that matter small: float64 keeps their digits.
    G = _running_sum(g.to(torch.float64))
    future = torch.ones(C, C, dtype=torch.bool, device=g.device).triu(1)
    # Masked before exp: the exponents of the future are positive and may overflow.
    gam = (G[..., :, None] - G[..., None, :]).to(g.dtype).masked_fill(future, -torch.inf).exp()
    gamma, rho = G.to(g.dtype).exp(), (G[..., -1:] - G).to(g.dtype).exp()
    L = torch.einsum("mhik,mhjk->mhij", k, k)[:, :, None] * gam * beta[..., None]
    right = torch.cat((beta[..., None] * v, (beta * gamma)[..., None] * k[:, :, None]), -1)
    # Unit-triangular: only what lies strictly below the diagonal of L is read.
    Y, W = torch.linalg.solve_triangular(L, right, upper=False, unitriangular=True).split((V, k.shape[-1]), -1)

    # Empty first pieces, so that a call without tokens needs no case of its own.
    starts, updates, finals = [state[:0]], [Y[:0]], []
    steps = zip(*(x.split(active) for x in (Y, W, k, rho, gamma[..., -1])), strict=True)
    for Y_s, W_s, k_s, rho_s, lam_s in steps:
        finals.append(state[len(Y_s) :])
        state = state[: len(Y_s)]
        U = Y_s - W_s @ state
        starts.append(state)
        updates.append(U)
        state = lam_s[..., None, None] * state + torch.einsum("nhck,nhrcv->nhrkv", k_s, rho_s[..., None] * U)
    final = torch.cat([state, *reversed(finals)])
    S, U = torch.cat(starts), torch.cat(updates)
    P = torch.einsum("mhik,mhjk->mhij", q, k)[:, :, None] * gam
    return gamma[..., None] * torch.einsum("mhck,mhrkv->mhrcv", q, S) + P @ U, final


def _running_sum(x: Tensor) -> Tensor:
    """Cumulative sum along the last dimension, by doubling: torch's has no deterministic form on CUDA."""
    step = 1
    while step < x.shape[-1]:
        x = x + torch.nn.functional.pad(x[..., :-step], (step, 0))
        step *= 2
    return x


class _ChunkTable(NamedTuple):
    """Where the chunks of a packed batch lie, ordered by their index in the sequence, then longest sequence first."""

    rows: Tensor | None  # int64 [M*C]: token row of each row of a chunk, 0 for padding; None when that is the identity
    places: Tensor | None  # int64 [T]: row among the chunks' rows of each token, the inverse of `rows`
    is_padding: Tensor | None  # bool [M*C]; None when no row is padding
    order: Tensor | None  # int64 [N]: sequences from most to fewest chunks; None when that is the identity
    order_inverse: Tensor | None  # int64 [N]
    active: tuple[int, ...]  # sequences that have a chunk of each index
    chunk_size: int


@lru_cache(maxsize=32)
def _chunk_table(bounds: tuple[int, ...], chunk_size: int, device: torch.device) -> _ChunkTable:
    """Table of the sequences [bounds[n], bounds[n+1]). For lengths 70, 0, 130 and chunks of 64 the order is

    chunk 0 of sequence 2, chunk 0 of sequence 0, chunk 1 of 2, chunk 1 of 0, chunk 2 of 2: active = (2, 2, 1).
    The chunk is made smaller for a batch of many tiny sequences, most of whose chunks would be padding.
    """
    ends, starts = torch.tensor(bounds[1:]), torch.tensor(bounds[:-1])
    counts = (ends - starts + chunk_size - 1) // chunk_size
    if chunk_size > 16 and counts.sum() * chunk_size > max(4 * bounds[-1], _PADDING_THAT_MATTERS):
        return _chunk_table(bounds, chunk_size // 2, device)
    order = torch.argsort(counts, descending=True, stable=True)
    order_inverse = torch.argsort(order)
    sequence = torch.repeat_interleave(counts)
    step = torch.arange(len(sequence)) - (counts.cumsum(0) - counts)[sequence]
    by_step = torch.argsort(step * len(counts) + order_inverse[sequence])
    sequence, step = sequence[by_step], step[by_step]
    rows = (starts[sequence] + step * chunk_size)[:, None] + torch.arange(chunk_size)
    is_padding = (rows >= ends[sequence][:, None]).flatten()
    rows = rows.flatten().masked_fill(is_padding, 0)
    places = torch.argsort(rows.masked_fill(is_padding, bounds[-1]), stable=True)[: bounds[-1]]
    same_rows, same_order = (
        torch.equal(x, torch.arange(size)) for x, size in ((rows, bounds[-1]), (order, len(order)))
    )
    return _ChunkTable(
        None if same_rows else rows.to(device),
        None if same_rows else places.to(device),
        is_padding.to(device) if is_padding.any() else None,
        None if same_order else order.to(device),
        None if same_order else order_inverse.to(device),
        tuple(torch.bincount(step).tolist()),
        chunk_size,
    )


def _pick_rows(
    x: Tensor,
    index: Tensor | None,
    inverse: Tensor | None,
    zero: Tensor | None = None,
    zero_backward: Tensor | None = None,
) -> Tensor:
    """x[index], with the rows of the result where `zero` is True set to 0; index None means all rows as they are.

    `inverse` and `zero_backward` describe the inverse map, which is the gradient: again a gather, no atomic addition.
    """
    if index is None:
        return x
    return _PickRows.apply(x, index, inverse, zero, zero_backward)


class _PickRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, index, inverse, zero, zero_backward):
        ctx.save_for_backward(index, inverse, zero, zero_backward)
        y = x.index_select(0, index)
        return y if zero is None else y.masked_fill_(zero.view(-1, *[1] * (x.dim() - 1)), 0)

    @staticmethod
    def backward(ctx, *grad_outputs):
        index, inverse, zero, zero_backward = ctx.saved_tensors
        return _PickRows.apply(grad_outputs[0], inverse, index, zero_backward, zero), None, None, None, None
