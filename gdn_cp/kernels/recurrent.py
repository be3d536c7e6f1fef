"""The public operation `fused_recurrent_gated_delta_rule`: decode and short prefill, with states kept by a server.

Dimensions: B batch, T tokens, H query/key heads, HV value heads (HV = H * r), K key head dim, V value head dim,
N sequences (N = B without cu_seqlens), S entries of a circular buffer of states.
"""

from __future__ import annotations

import os
from itertools import pairwise

import torch
from torch import Tensor

from gdn_cp.kernels import chunk, reference
from gdn_cp.kernels.backends import wants_kernels


def fused_recurrent_gated_delta_rule(
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
    state_indices: Tensor | None = None,
    cache_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Gated delta rule token by token, for inference: one token of many requests, draft packets, short prompts.

    The arguments up to `cu_seqlens` mean what they mean in `gdn_cp.chunk_gated_delta_rule`. States are kept in one of
    three ways.

    - Neither `state_indices` nor `cache_seqlens`: `initial_state` [N, HV, K, V] float32 is read (None: zeros), and the
      final state is returned in a new float32 tensor.
    - `state_indices` [N]: `initial_state` is a bank [num_slots, HV, K, V], float32 or bfloat16, updated in place.
      Sequence n starts from slot state_indices[n] and leaves its last state there. With `cache_seqlens` None.
    - `cache_seqlens` [N]: the bank is [num_requests, S, HV, K, V], a circular buffer for each request, for speculative
      decoding. Sequence n starts from entry cache_seqlens[n] % S of request state_indices[n] (of request n without
      state_indices) and writes the state after its token t = 0, 1, ... to entry (cache_seqlens[n] + 1 + t) % S. To
      take rejected tokens back, continue with a smaller cache_seqlens: S - 1 of the last states are there.

    For example with S = 4, cache_seqlens = 6 and a packet of three tokens the state is read from entry 2 and written to
    entries 3, 0 and 1. If only the first token is accepted, the next call has cache_seqlens = 7 and reads entry 3.

    In a bank the state is rounded to the bank's dtype after every token, so a packet gives the same bits as its tokens
    one at a time. An index outside the bank (or a negative cache_seqlens) gives zeros in that sequence's output rows
    and touches no state: padding a batch needs no second code path. Two sequences of one call must not share a slot.

    Runs in a CUDA graph: nothing is read on the host. Forward only.

    Args:
        state_indices: int32 or int64 [N].
        cache_seqlens: int32 or int64 [N], tokens of each request so far.
        backend: "triton", "reference" (plain torch) or None: Triton on a GPU where it can serve the call and the
            environment variable GDN_CP_BACKEND does not ask for plain torch, else torch.

    Returns:
        o [B, T, HV, V] in v's dtype; and with `output_final_state` the final state [N, HV, K, V] float32, or the bank
        itself, else None.

    Raises:
        ValueError: naming the argument, its value and the remedy; also when a gradient would be needed.
        TypeError: for an argument of a wrong type.
    """
    chunk._check_inputs(q, k, v, g, beta)
    chunk._check_flags(
        output_final_state=output_final_state,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        state_v_first=state_v_first,
    )
    chunk._check_gate(g, beta, use_gate_in_kernel, A_log, dt_bias, use_beta_sigmoid_in_kernel)
    chunk._check_sequences(q, cu_seqlens)
    _check_no_gradient(q=q, k=k, v=v, g=g, beta=beta, initial_state=initial_state, A_log=A_log, dt_bias=dt_bias)
    is_bank = state_indices is not None or cache_seqlens is not None
    if is_bank:
        _check_bank(q, v, initial_state, state_v_first, cu_seqlens, state_indices, cache_seqlens)
    else:
        chunk._check_state(q, v, initial_state, state_v_first, cu_seqlens)
        if initial_state is not None:
            initial_state = initial_state.contiguous()
    final = initial_state if is_bank else None
    if output_final_state and not is_bank:
        N, K, V = q.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1, q.shape[-1], v.shape[-1]
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        final = q.new_empty((N, v.shape[2], V, K) if state_v_first else (N, v.shape[2], K, V), dtype=dtype)
    arguments = (
        q,
        k,
        v,
        g,
        beta,
        A_log,
        dt_bias,
        None if is_bank else initial_state,
        final,
        cu_seqlens,
        state_indices,
        cache_seqlens,
        chunk.checked_scale(scale, q.shape[-1]),
        use_qk_l2norm_in_kernel,
        use_beta_sigmoid_in_kernel,
        state_v_first,
        is_bank,
        _use_triton(q, v, backend),
    )
    # An operator costs tens of microseconds of dispatch, as much as the kernel: only a compiler needs it.
    o = recurrent_op(*arguments) if torch.compiler.is_compiling() else _run(*arguments)
    return o, final if output_final_state else None


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    initial: Tensor | None,
    final: Tensor | None,
    cu_seqlens: Tensor | None,
    state_indices: Tensor | None,
    cache_seqlens: Tensor | None,
    scale: float,
    l2norm: bool,
    sigmoid: bool,
    state_v_first: bool,
    is_bank: bool,
    use_triton: bool,
) -> Tensor:
    """o, with `final` filled (or, as a bank, updated). A gate is asked for by A_log."""
    if use_triton:
        from gdn_cp.kernels import recurrent_triton

        implementation = recurrent_triton.launch
    else:
        implementation = recurrent_in_torch
    return implementation(
        q, k, v, g, beta, A_log, dt_bias, initial, final, cu_seqlens, state_indices, cache_seqlens, scale, l2norm,
        sigmoid, state_v_first, is_bank,
    )  # fmt: skip


recurrent_op = torch.library.custom_op("gdn_cp::fused_recurrent_gated_delta_rule", _run, mutates_args=("final",))


@recurrent_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: object) -> Tensor:
    return v.new_empty(v.shape)


def recurrent_in_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    initial: Tensor | None,
    final: Tensor | None,
    cu_seqlens: Tensor | None,
    state_indices: Tensor | None,
    cache_seqlens: Tensor | None,
    scale: float,
    l2norm: bool,
    sigmoid: bool,
    state_v_first: bool,
    is_bank: bool,
) -> Tensor:
    """The kernel's function in plain torch, all sequences in lockstep, arguments as `_run`; indices go to the host."""
    (B, T), (HV, V) = q.shape[:2], v.shape[2:]
    gate = None if A_log is None else (A_log, dt_bias)
    tokens = reference._prepare(q, k, v, g, beta, scale, l2norm, gate, sigmoid)
    rows = reference._Tokens(*(x.flatten(0, 1) for x in tokens))
    bounds = [n * T for n in range(B + 1)] if cu_seqlens is None else cu_seqlens.tolist()
    bank = _Bank(final, state_indices, cache_seqlens, len(bounds) - 1) if is_bank else None
    state = initial if bank is None else bank.read()
    # One memory layout, however the state came, or a matrix product may sum in another order than for the next token.
    state = reference._start_state(tokens, state, state_v_first, cu_seqlens).contiguous()
    o = rows.v.new_zeros(B * T, *rows.v.shape[1:])
    lengths = [end - start for start, end in pairwise(bounds)]
    for t in range(max(lengths, default=0)):
        active = [n for n, length in enumerate(lengths) if length > t and (bank is None or bank.valid[n])]
        at = torch.tensor([bounds[n] + t for n in active], dtype=torch.long, device=q.device)
        who = torch.tensor(active, dtype=torch.long, device=q.device)
        one = reference._Tokens(*(x[at].unsqueeze(1) for x in rows))
        o_t, new = reference._recur(one, state[who])
        o[at] = o_t.squeeze(1)
        if bank is not None:
            new = new.to(bank.tensor.dtype).to(state.dtype)
            bank.write(active, t, reference._end_state(new, state_v_first))
        state = state.index_copy(0, who, new)
    if final is not None and not is_bank:
        final.copy_(reference._end_state(state, state_v_first))
    return o.view(B, T, HV, V).to(v.dtype)


class _Bank:
    """A bank of states, read and written by the rules of `fused_recurrent_gated_delta_rule`.

    `valid[n]` says whether sequence n has a slot; it reads as zeros if not.
    """

    def __init__(
        self, tensor: Tensor | None, state_indices: Tensor | None, cache_seqlens: Tensor | None, sequences: int
    ) -> None:
        assert tensor is not None
        self.tensor = tensor
        self.slots = list(range(sequences)) if state_indices is None else state_indices.tolist()
        self.positions = None if cache_seqlens is None else cache_seqlens.tolist()
        self.valid = [0 <= slot < tensor.shape[0] for slot in self.slots]
        if self.positions is not None:
            self.valid = [ok and p >= 0 for ok, p in zip(self.valid, self.positions, strict=True)]

    def _place(self, n: int, steps: int) -> Tensor:
        slot = self.tensor[self.slots[n]]
        return slot if self.positions is None else slot[(self.positions[n] + steps) % self.tensor.shape[1]]

    def read(self) -> Tensor:
        """[N, HV, K, V] (or [N, HV, V, K]) states before the first token."""
        empty = self.tensor.new_zeros(self.tensor.shape[-3:])
        return torch.stack([self._place(n, 0) if ok else empty for n, ok in enumerate(self.valid)])

    def write(self, sequences: list[int], t: int, states: Tensor) -> None:
        """Store the states after token t of the given sequences."""
        for n, state in zip(sequences, states, strict=True):
            self._place(n, 1 + t).copy_(state)


def _use_triton(q: Tensor, v: Tensor, backend: str | None) -> bool:
    """Whether the Triton kernel runs; raises ValueError if it was asked for by name and cannot."""
    if backend not in (None, "triton", "reference"):
        raise ValueError(f"unknown backend {backend!r}: choose 'triton', 'reference' or None for an automatic choice")
    if backend == "reference" or (backend is None and not wants_kernels(q)):
        return False
    try:
        from gdn_cp.kernels import recurrent_triton
    except ImportError as error:
        refusal: str | None = f"it cannot be imported ({error})"
    else:
        refusal = recurrent_triton.unsupported(q.device, q.dtype, q.shape[-1], v.shape[-1])
        if q.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
            refusal = recurrent_triton.unsupported(torch.device("cuda"), q.dtype, q.shape[-1], v.shape[-1])
    if refusal is not None and backend == "triton":
        raise ValueError(f"backend 'triton' cannot serve this call: {refusal}. Leave backend out to fall back to torch")
    return refusal is None


def _check_no_gradient(**tensors: Tensor | None) -> None:
    if not torch.is_grad_enabled():
        return
    for name, x in tensors.items():
        if isinstance(x, Tensor) and x.requires_grad:
            raise ValueError(
                f"{name} requires a gradient, which fused_recurrent_gated_delta_rule does not have: use "
                "chunk_gated_delta_rule to train, or call this under torch.no_grad()"
            )


def _check_bank(
    q: Tensor,
    v: Tensor,
    bank: Tensor | None,
    v_first: bool,
    cu_seqlens: Tensor | None,
    state_indices: Tensor | None,
    cache_seqlens: Tensor | None,
) -> None:
    names = "state_indices" if state_indices is not None else "cache_seqlens"
    if bank is None:
        raise ValueError(f"{names} is given but initial_state is None: pass the bank of states that it points into")
    if not isinstance(bank, Tensor):
        raise TypeError(f"initial_state must be a torch.Tensor, got {type(bank).__name__}")
    N = q.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    for name, x in (("state_indices", state_indices), ("cache_seqlens", cache_seqlens)):
        if x is None:
            continue
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        if x.dtype not in (torch.int32, torch.int64) or tuple(x.shape) != (N,) or not x.is_contiguous():
            raise ValueError(
                f"{name} must be a contiguous int32 or int64 vector of {N} elements, one for each sequence, got "
                f"{x.dtype} {list(x.shape)}"
            )
        chunk._check_device(name, x, q)
    HV, K, V = v.shape[2], q.shape[-1], v.shape[-1]
    inner = [HV, V, K] if v_first else [HV, K, V]
    outer = ["num_slots"] if cache_seqlens is None else ["num_requests", "S"]
    if bank.dim() != len(outer) + 3 or list(bank.shape[-3:]) != inner or 0 in bank.shape:
        wanted = ", ".join(outer + [str(x) for x in inner])
        raise ValueError(f"initial_state, the bank of {names}, must be [{wanted}], not empty, got {list(bank.shape)}")
    if state_indices is None and bank.shape[0] != N:
        raise ValueError(
            f"initial_state holds {bank.shape[0]} requests and there are {N} sequences: pass state_indices to say "
            "which request each sequence is"
        )
    allowed = (torch.float64,) if q.dtype == torch.float64 else (torch.float32, torch.bfloat16)
    if bank.dtype not in allowed:
        raise ValueError(
            f"initial_state, as a bank, must be {' or '.join(map(str, allowed))} when q is {q.dtype}, got {bank.dtype}"
        )
    if bank.stride(-1) != 1 or bank.stride(-2) != bank.shape[-1]:
        raise ValueError(
            "initial_state is updated in place and each head's matrix must be contiguous, got strides "
            f"{bank.stride()}: make the bank contiguous"
        )
    chunk._check_device("initial_state", bank, q)
