"""The public operation `chunk_gated_delta_rule`: what it accepts, and the hand-over to the backend that computes it.

Dimensions: B batch, T tokens, H query/key heads, HV value heads (HV a multiple of H), K key head dim, V value head dim,
N sequences (N = B without cu_seqlens).
"""

import math
from typing import Any

import torch
from torch import Tensor

from gdn_cp.kernels import reference
from gdn_cp.kernels.backends import DeltaRuleCall, choose_backend
from gdn_cp.kernels.bounds import check_cu_seqlens
from gdn_cp.kernels.gate import check_gate_arguments

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def chunk_gated_delta_rule(
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
    backend: str | None = None,
    intra_card: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Gated delta rule over whole sequences, in chunks.

    Per value head, with state S [K, V]:

        S_t = e^{g_t} S_{t-1} + beta_t k_t (v_t - e^{g_t} S_{t-1}^T k_t)^T        o_t = scale * S_t^T q_t

    Value head j reads query/key head j // (HV / H). Differentiable once in every floating-point tensor argument.

    Args:
        q: [B, T, H, K] queries, bfloat16, float16, float32 or float64. float64 is computed in float64 throughout,
            anything else with float32 states and sums.
        k: [B, T, H, K] keys, q's dtype.
        v: [B, T, HV, V] values, q's dtype; HV a multiple of H.
        g: [B, T, HV] log decay in nats, finite and <= 0; None for no decay. With `use_gate_in_kernel` the raw gate.
        beta: [B, T, HV] step size, in (0, 1) as a rule; None for ones. With `use_beta_sigmoid_in_kernel` its logit.
        scale: factor of the queries; None for K**-0.5.
        initial_state: [N, HV, K, V] float32 state before the first token of each sequence; None for zeros.
        output_final_state: also return the state after the last token.
        use_qk_l2norm_in_kernel: take x * rsqrt(sum(x^2) + 1e-6) of each query and key.
        use_gate_in_kernel: take g := -exp(A_log) * softplus(g + dt_bias), in float32.
        A_log: [HV] for the gate.
        dt_bias: [HV] for the gate; None for 0.
        use_beta_sigmoid_in_kernel: take beta := sigmoid(beta), in float32.
        state_v_first: states are [N, HV, V, K] instead.
        cu_seqlens: int32 or int64 [N + 1] on q's device, the row at which each packed sequence starts and, last, T. B
            must be 1. Its content is checked when it is on the CPU; on a GPU only the plain torch backends read it.
        backend: "triton", "reference", "recurrent" or "auto"; None for the environment variable GDN_CP_BACKEND.
        intra_card: chunks of 64 tokens to a piece, into which Triton's kernels cut sequences to work on several pieces
            of one at once; 0 never cuts. None: what the environment variable GDN_CP_PIECE_CHUNKS says, else cut where
            few sequences and heads would leave multiprocessors idle. With a fixed number, results have the same bits
            whatever the number of heads on a card.

    Returns:
        o [B, T, HV, V] in v's dtype, and the final state [N, HV, K, V] in float32, or None.

    Raises:
        ValueError: naming the argument, its value and the remedy. TypeError: for an argument of a wrong type.

    Source: Gated Delta Networks (arXiv 2412.06464); the names are flash-linear-attention's.
    """
    flags: dict[str, Any] = {
        "use_qk_l2norm_in_kernel": use_qk_l2norm_in_kernel,
        "use_gate_in_kernel": use_gate_in_kernel,
        "use_beta_sigmoid_in_kernel": use_beta_sigmoid_in_kernel,
        "state_v_first": state_v_first,
    }
    call = describe_call(q, k, v, g, beta, initial_state, output_final_state, A_log, dt_bias, cu_seqlens, flags)
    choice = choose_backend(call, backend).backend
    if choice == "triton":
        flags["intra_card"] = check_intra_card(intra_card)
    else:
        check_intra_card(intra_card)
    return _IMPLEMENTATIONS[choice](
        q,
        k,
        v,
        g,
        beta,
        checked_scale(scale, q.shape[-1]),
        initial_state,
        output_final_state,
        A_log=A_log,
        dt_bias=dt_bias,
        cu_seqlens=cu_seqlens,
        **flags,
    )


def _run_triton(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    from gdn_cp.kernels import chunk_triton

    return chunk_triton.chunk_gated_delta_rule_triton(*args, **kwargs)


_IMPLEMENTATIONS = {
    "triton": _run_triton,
    "reference": reference.chunk_gated_delta_rule_reference,
    "recurrent": reference.recurrent_gated_delta_rule_reference,
}


def describe_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    cu_seqlens: Tensor | None,
    flags: dict[str, bool],
) -> DeltaRuleCall:
    """Check all arguments of a call but `scale`, `backend` and `intra_card`, and say what backends need to know of it.

    `flags` are the switches by name, all four. Raises as `chunk_gated_delta_rule`.
    """
    _check_inputs(q, k, v, g, beta)
    _check_flags(
        output_final_state=output_final_state,
        use_qk_l2norm_in_kernel=flags["use_qk_l2norm_in_kernel"],
        state_v_first=flags["state_v_first"],
    )
    _check_gate(g, beta, flags["use_gate_in_kernel"], A_log, dt_bias, flags["use_beta_sigmoid_in_kernel"])
    _check_sequences(q, cu_seqlens)
    _check_state(q, v, initial_state, flags["state_v_first"], cu_seqlens)
    tensors = (q, k, v, g, beta, initial_state, A_log, dt_bias)
    needs_grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    (B, T, H, K), (HV, V) = q.shape, v.shape[2:]
    return DeltaRuleCall(
        device_type=q.device.type,
        capability=torch.cuda.get_device_capability(q.device) if q.is_cuda else None,
        dtype=q.dtype,
        gate_dtype=None if g is None else g.dtype,
        beta_dtype=None if beta is None else beta.dtype,
        B=B,
        T=T,
        H=H,
        HV=HV,
        K=K,
        V=V,
        N=B if cu_seqlens is None else len(cu_seqlens) - 1,
        varlen=cu_seqlens is not None,
        has_initial_state=initial_state is not None,
        output_final_state=output_final_state,
        requires_grad=needs_grad,
        **flags,
    )


def _check_inputs(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None) -> None:
    for name, x in (("q", q), ("k", k), ("v", v), ("g", g), ("beta", beta)):
        if not isinstance(x, Tensor) and not (x is None and name in ("g", "beta")):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if q.dim() != 4:
        raise ValueError(f"q must be [B, T, H, K], got {list(q.shape)}")
    if k.shape != q.shape:
        raise ValueError(f"k must have q's shape {list(q.shape)}, got {list(k.shape)}")
    if v.dim() != 4 or v.shape[:2] != q.shape[:2]:
        raise ValueError(f"v must be [{q.shape[0]}, {q.shape[1]}, HV, V] as q is {list(q.shape)}, got {list(v.shape)}")
    H, HV = q.shape[2], v.shape[2]
    if min(H, q.shape[3], v.shape[3]) < 1:
        raise ValueError(f"heads and head dims must be at least 1, got q {list(q.shape)} and v {list(v.shape)}")
    if HV < H or HV % H:
        raise ValueError(
            f"v has {HV} heads (HV) and q has {H} (H): HV must be a multiple of H, each query/key head serving HV / H "
            "value heads; pass unrepeated q and k"
        )
    for name, x in (("g", g), ("beta", beta)):
        if x is not None and x.shape != v.shape[:3]:
            raise ValueError(f"{name} must be {list(v.shape[:3])} ([B, T, HV]), got {list(x.shape)}")
    for name, x in (("q", q), ("k", k), ("v", v), ("g", g), ("beta", beta)):
        if x is None:
            continue
        if x.dtype not in _DTYPES:
            raise ValueError(f"{name} has dtype {x.dtype}: use bfloat16, float16, float32 or float64")
        if name in ("k", "v") and x.dtype != q.dtype:
            raise ValueError(f"{name} has dtype {x.dtype} but q has {q.dtype}: cast them to one dtype")
        _check_device(name, x, q)


def _check_flags(**flags: bool) -> None:
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise TypeError(f"{name} must be True or False, got {flag!r}")


def _check_device(name: str, x: Tensor, q: Tensor) -> None:
    if x.device != q.device:
        raise ValueError(f"{name} is on {x.device} but q is on {q.device}: move {name} with .to({str(q.device)!r})")


def _check_gate(
    g: Tensor | None,
    beta: Tensor | None,
    use_gate: bool,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    use_sigmoid: bool,
) -> None:
    _check_flags(use_gate_in_kernel=use_gate, use_beta_sigmoid_in_kernel=use_sigmoid)
    if use_sigmoid and beta is None:
        raise ValueError("use_beta_sigmoid_in_kernel=True but beta is None: pass the raw beta [B, T, HV]")
    if not use_gate:
        for name, x in (("A_log", A_log), ("dt_bias", dt_bias)):
            if x is not None:
                raise ValueError(
                    f"{name} is given but use_gate_in_kernel=False, so it would be ignored: pass use_gate_in_kernel="
                    f"True if g is the raw gate, or leave {name} out"
                )
        return
    if g is None:
        raise ValueError("use_gate_in_kernel=True but g is None: pass the raw gate [B, T, HV]")
    if A_log is None:
        raise ValueError(f"use_gate_in_kernel=True but A_log is None: pass the parameter A_log [{g.shape[-1]}]")
    check_gate_arguments(g, A_log, dt_bias)


def _check_sequences(q: Tensor, cu_seqlens: Tensor | None) -> None:
    if cu_seqlens is None:
        return
    B, T = q.shape[:2]
    if B != 1:
        raise ValueError(
            f"q has batch size {B} but cu_seqlens packs sequences in one row: reshape every input to [1, {B * T}, ...]"
        )
    check_cu_seqlens(cu_seqlens, T, q.device, "q")


def _check_state(q: Tensor, v: Tensor, state: Tensor | None, v_first: bool, cu_seqlens: Tensor | None) -> None:
    if state is None:
        return
    if not isinstance(state, Tensor):
        raise TypeError(f"initial_state must be a torch.Tensor, got {type(state).__name__}")
    N, K, V = q.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1, q.shape[-1], v.shape[-1]
    expected = [N, v.shape[2], V, K] if v_first else [N, v.shape[2], K, V]
    if list(state.shape) != expected:
        names = "[N, HV, V, K] with state_v_first" if v_first else "[N, HV, K, V]"
        raise ValueError(f"initial_state must be {expected} ({names}), got {list(state.shape)}")
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    if state.dtype != dtype:
        raise ValueError(f"initial_state must be {dtype} when q is {q.dtype}, got {state.dtype}: cast it")
    _check_device("initial_state", state, q)


def checked_scale(scale: float | None, K: int) -> float:
    """`scale`, or K**-0.5 for None; TypeError or ValueError for what is no finite number."""
    if scale is None:
        return K**-0.5
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale must be a float or None, got {type(scale).__name__}")
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")
    return float(scale)


def check_intra_card(intra_card: int | None) -> int | None:
    """`intra_card` if it is None or a number of chunks that is not negative; else TypeError or ValueError."""
    if intra_card is None:
        return None
    if isinstance(intra_card, bool) or not isinstance(intra_card, int):
        raise TypeError(f"intra_card must be a number of chunks or None, got {intra_card!r}")
    if intra_card < 0:
        raise ValueError(f"intra_card must be a number of chunks, 0 for no cut, or None to choose, got {intra_card}")
    return intra_card
