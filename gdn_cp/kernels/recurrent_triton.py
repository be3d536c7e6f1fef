"""The gated delta rule token by token in one Triton kernel: decode, packets of draft tokens, short prefill.

One program owns one slab of one state: all K rows of BV value columns of one (sequence, value head). It reads the slab
once, keeps it in float32 registers over the tokens of its sequence, and writes it once (or after every token into a
circular bank), so decode costs one read and one write of the states and hardly anything else.

Dimensions: N sequences, T tokens, H q/k heads, HV value heads, K key dim, V value dim, BV value columns of a program,
BK = KO*KI the key dim rounded up to a power of two.

The slab is a [KO, BV, KI] tile whose key index is ko*KI + ki. In a [K, V] bank KI = 1, and neighbouring threads read
neighbouring value columns. In a [V, K] bank KI keys fill one 128-byte line, so that a warp reads whole lines of
several rows and a sum over the keys needs few exchanges between threads. With K = 8 and KI = 4 the tile of value
columns 0 and 1 is

    ko=0: v0 [k0 k1 k2 k3]   v1 [k0 k1 k2 k3]
    ko=1: v0 [k4 k5 k6 k7]   v1 [k4 k5 k6 k7]

A packet of tokens and the same tokens one at a time run through the same instructions of the same binary (the token
count is a run-time number, the loop is never unrolled), and a bank's state is rounded to the bank's dtype after every
token: hence they agree bit for bit.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportAssignmentType=false, reportReturnType=false
# triton.jit hides the options of a launch from a type checker, and triton.cdiv may return a constexpr
from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from gdn_cp.kernels.gate_triton import gate_of

if TYPE_CHECKING:
    from gdn_cp.kernels.compile_report import CompileCase

LINE_BYTES = 128  # a warp reads whole lines of this size
EPS = tl.constexpr(1e-6)  # under the square root of the L2 norm


@triton.jit
def _load_token(q, k, v, g, beta, row, q_stride, k_stride, v_stride, g_stride, beta_stride,
                q_head, k_head, v_head, g_head, beta_head, i_h, i_hv, o_k, o_v, inside,
                K: tl.constexpr, V: tl.constexpr, HAS_G: tl.constexpr, HAS_BETA: tl.constexpr):  # fmt: skip
    """q, k [KO, KI], v [BV], g and beta of one token in float32; zeros where `inside` is false."""
    m_k = (o_k < K) & inside
    b_q = tl.load(q + row * q_stride + i_h * q_head + o_k, mask=m_k, other=0.0).to(tl.float32)
    b_k = tl.load(k + row * k_stride + i_h * k_head + o_k, mask=m_k, other=0.0).to(tl.float32)
    b_v = tl.load(v + row * v_stride + i_hv * v_head + o_v, mask=(o_v < V) & inside, other=0.0).to(tl.float32)
    b_g = tl.zeros((), tl.float32)
    b_beta = tl.full((), 1.0, tl.float32)
    if HAS_G:
        b_g = tl.load(g + row * g_stride + i_hv * g_head, mask=inside, other=0.0).to(tl.float32)
    if HAS_BETA:
        b_beta = tl.load(beta + row * beta_stride + i_hv * beta_head, mask=inside, other=0.0).to(tl.float32)
    return b_q, b_k, b_v, b_g, b_beta


@triton.jit(do_not_specialize=["T", "num_slots", "ring"])
def recurrent_kernel(
    q, k, v, g, beta, A_log, dt_bias, o, initial, final, cu_seqlens, state_indices, cache_seqlens,
    scale, T, num_slots, ring,
    q_batch, q_stride, q_head, k_batch, k_stride, k_head, v_batch, v_stride, v_head,
    g_batch, g_stride, g_head, beta_batch, beta_stride, beta_head,
    initial_slot, initial_head, final_slot, final_ring, final_head,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    KO: tl.constexpr, KI: tl.constexpr, BV: tl.constexpr, STATE_V_FIRST: tl.constexpr,
    HAS_G: tl.constexpr, HAS_BETA: tl.constexpr, HAS_DT_BIAS: tl.constexpr, HAS_INITIAL: tl.constexpr,
    HAS_FINAL: tl.constexpr, IS_BANK: tl.constexpr, IS_RING: tl.constexpr, IS_VARLEN: tl.constexpr,
    HAS_INDICES: tl.constexpr, L2NORM: tl.constexpr, GATE: tl.constexpr, SIGMOID: tl.constexpr,
):  # fmt: skip
    """Run one slab over its sequence's tokens. The grid is N * HV * ceil(V / BV), value blocks fastest.

    Per token, with S the slab, d = exp(g) and dots over the keys:
        u = beta * (v - d * (k . S));   o = scale * (d * (q . S) + (q . k) * u);   S <- d * S + k u^T
    Both dots with S are of the old state, so one pass over the slab serves both.

    IS_BANK: `final` is a state bank that is read and written; a program whose slot lies outside it writes zeros to its
    outputs. IS_RING: the bank is [num_slots, ring, HV, ...]; the state at position p of a sequence is entry p % ring.
    """
    n_v: tl.constexpr = (V + BV - 1) // BV
    pid = tl.program_id(0).to(tl.int64)
    i_v, i_hv, i_n = pid % n_v, (pid // n_v) % HV, pid // (n_v * HV)
    i_h = i_hv // (HV // H)
    if IS_VARLEN:
        begin, end = tl.load(cu_seqlens + i_n).to(tl.int64), tl.load(cu_seqlens + i_n + 1).to(tl.int64)
    else:
        # A whole batch row is one sequence; strides of the batch dimension are folded into the base pointers.
        begin, end = tl.zeros((), tl.int64), tl.zeros((), tl.int64) + T
        q += i_n * q_batch
        k += i_n * k_batch
        v += i_n * v_batch
        o += i_n * T * HV * V
        if HAS_G:
            g += i_n * g_batch
        if HAS_BETA:
            beta += i_n * beta_batch

    o_v = i_v * BV + tl.arange(0, BV)
    o_k = tl.arange(0, KO)[:, None] * KI + tl.arange(0, KI)[None, :]
    k_step: tl.constexpr = 1 if STATE_V_FIRST else V
    v_step: tl.constexpr = K if STATE_V_FIRST else 1
    o_s = o_k[:, None, :] * k_step + o_v[None, :, None] * v_step
    m_s = (o_k[:, None, :] < K) & (o_v[None, :, None] < V)
    o += i_hv * V + o_v

    slot, valid = i_n, i_n >= 0
    if HAS_INDICES:
        slot = tl.load(state_indices + i_n).to(tl.int64)
        valid = (slot >= 0) & (slot < num_slots)
    position = tl.zeros((), tl.int64)
    if IS_RING:
        position = tl.load(cache_seqlens + i_n).to(tl.int64)
        valid = valid & (position >= 0)
    slot = tl.where(valid, slot, 0)
    first = tl.where(valid, position, 0)

    # The first token's operands are on their way before the state's: neither waits for the other.
    b_q, b_k, b_v, b_g, b_beta = _load_token(
        q, k, v, g, beta, begin, q_stride, k_stride, v_stride, g_stride, beta_stride,
        q_head, k_head, v_head, g_head, beta_head, i_h, i_hv, o_k, o_v, valid & (begin < end),
        K, V, HAS_G, HAS_BETA)  # fmt: skip
    if IS_BANK:
        final += slot * final_slot + i_hv * final_head
        b_s = tl.load(final + (first % ring) * final_ring + o_s, mask=m_s & valid, other=0.0).to(tl.float32)
    elif HAS_INITIAL:
        b_s = tl.load(initial + i_n * initial_slot + i_hv * initial_head + o_s, mask=m_s, other=0.0).to(tl.float32)
    else:
        b_s = tl.zeros([KO, BV, KI], tl.float32)

    for t in range(begin, end):
        q_t, k_t, v_t, g_t, beta_t = b_q, b_k, b_v, b_g, b_beta
        b_q, b_k, b_v, b_g, b_beta = _load_token(
            q, k, v, g, beta, t + 1, q_stride, k_stride, v_stride, g_stride, beta_stride,
            q_head, k_head, v_head, g_head, beta_head, i_h, i_hv, o_k, o_v, valid & (t + 1 < end),
            K, V, HAS_G, HAS_BETA)  # fmt: skip
        if L2NORM:
            q_t *= tl.rsqrt(tl.sum(q_t * q_t) + EPS)
            k_t *= tl.rsqrt(tl.sum(k_t * k_t) + EPS)
        if SIGMOID:
            beta_t = tl.sigmoid(beta_t)
        decay = 1.0
        if GATE:
            bias = 0.0
            if HAS_DT_BIAS:
                bias = tl.load(dt_bias + i_hv).to(tl.float32)
            decay = tl.exp(gate_of(g_t + bias, tl.load(A_log + i_hv).to(tl.float32)))
        elif HAS_G:
            decay = tl.exp(g_t)
        ks = tl.sum(tl.sum(k_t[:, None, :] * b_s, axis=0), axis=1)
        qs = tl.sum(tl.sum(q_t[:, None, :] * b_s, axis=0), axis=1)
        u = beta_t * (v_t - decay * ks)
        b_o = scale * (decay * qs + tl.sum(q_t * k_t) * u)
        b_s = decay * b_s + k_t[:, None, :] * u[None, :, None]
        tl.store(o + t * HV * V, tl.where(valid, b_o, 0.0).to(o.dtype.element_ty), mask=o_v < V)
        if IS_BANK:
            rounded = b_s.to(final.dtype.element_ty)
            if IS_RING:
                entry = (first + 1 + t - begin) % ring
                tl.store(final + entry * final_ring + o_s, rounded, mask=m_s & valid)
            b_s = rounded.to(tl.float32)

    if IS_BANK:
        if not IS_RING:  # a sequence without tokens leaves its slot alone
            tl.store(final + o_s, b_s.to(final.dtype.element_ty), mask=m_s & valid & (begin < end))
    elif HAS_FINAL:
        tl.store(final + i_n * final_slot + i_hv * final_head + o_s, b_s.to(final.dtype.element_ty), mask=m_s)


def unsupported(device: torch.device, dtype: torch.dtype, K: int, V: int) -> str | None:
    """Why the kernel cannot serve a call; None when it can."""
    if dtype == torch.float64:
        return "it computes in float32 and the input is float64"
    if max(K, V) > 256:
        return f"head dims above 256 (K={K}, V={V}) do not fit its registers"
    if device.type != "cuda":
        return f"the tensors are on {device.type}"
    return None


def tile_shape(K: int, V: int, state_bytes: int, state_v_first: bool) -> tuple[int, int, int, int]:
    """(KO, KI, BV, num_warps) of a program; `state_bytes` is the size of a state's element."""
    BK = max(triton.next_power_of_2(K), 16)
    KI = min(BK, LINE_BYTES // state_bytes) if state_v_first else 1
    BV = min(max(triton.next_power_of_2(V), 16), 64 * 128 // BK)
    return BK // KI, KI, BV, 4


def _strides(x: torch.Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if x is None else x.stride()


def _state_strides(x: torch.Tensor | None, is_ring: bool) -> tuple[int, int, int]:
    """Strides of (slot, entry of the ring, head)."""
    if x is None:
        return 0, 0, 0
    return (x.stride(0), x.stride(1), x.stride(2)) if is_ring else (x.stride(0), 0, x.stride(1))


def launch(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor | None, beta: torch.Tensor | None,
    A_log: torch.Tensor | None, dt_bias: torch.Tensor | None, initial: torch.Tensor | None,
    final: torch.Tensor | None, cu_seqlens: torch.Tensor | None, state_indices: torch.Tensor | None,
    cache_seqlens: torch.Tensor | None, scale: float, l2norm: bool, sigmoid: bool, state_v_first: bool, is_bank: bool,
) -> torch.Tensor:  # fmt: skip
    """Launch the kernel on checked arguments (see `gdn_cp.kernels.recurrent`): returns o, fills or updates `final`."""
    (B, T, H, K), (HV, V) = q.shape, v.shape[2:]
    N = B if cu_seqlens is None else cu_seqlens.numel() - 1
    o = torch.empty(B, T, HV, V, dtype=v.dtype, device=v.device)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    is_ring = cache_seqlens is not None
    num_slots = final.shape[0] if is_bank and final is not None else N
    ring = final.shape[1] if is_ring and final is not None else 1
    state = final if final is not None else initial
    state_bytes = 4 if state is None else state.element_size()
    KO, KI, BV, num_warps = tile_shape(K, V, state_bytes, state_v_first)
    if N * HV == 0:
        return o
    recurrent_kernel[(N * HV * triton.cdiv(V, BV),)](
        q, k, v, g, beta, A_log, dt_bias, o, initial, final, cu_seqlens, state_indices, cache_seqlens,
        scale, T, num_slots, ring,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *_strides(g), *_strides(beta),
        *_strides(initial)[:2], *_state_strides(final, is_ring),
        H=H, HV=HV, K=K, V=V, KO=KO, KI=KI, BV=BV, STATE_V_FIRST=state_v_first,
        HAS_G=g is not None, HAS_BETA=beta is not None, HAS_DT_BIAS=dt_bias is not None,
        HAS_INITIAL=initial is not None, HAS_FINAL=final is not None, IS_BANK=is_bank, IS_RING=is_ring,
        IS_VARLEN=cu_seqlens is not None, HAS_INDICES=state_indices is not None,
        L2NORM=l2norm, GATE=A_log is not None, SIGMOID=sigmoid,
        num_warps=num_warps, num_stages=1, enable_fp_fusion=False,
    )  # fmt: skip
    return o


def compile_cases() -> list[CompileCase]:
    """Qwen3-Next heads: bank of states, circular bank and stateless prefill, in both layouts and dtypes."""
    from gdn_cp.kernels.compile_report import CompileCase

    cases = []
    for dtype, size in (("fp32", 4), ("bf16", 2)):
        for v_first in (False, True):
            for kind in ("bank", "ring", "prefill"):
                cases.append(_compile_case(CompileCase, dtype, size, v_first, kind))
    return cases


def _compile_case(make: type[CompileCase], dtype: str, state_bytes: int, v_first: bool, kind: str) -> CompileCase:
    KO, KI, BV, num_warps = tile_shape(128, 128, state_bytes, v_first)
    pointers = {"q": "*bf16", "k": "*bf16", "v": "*bf16", "g": "*bf16", "beta": "*bf16", "A_log": "*fp32"}
    pointers |= {"dt_bias": "*fp32", "o": "*bf16", "initial": "*fp32", "final": f"*{dtype}", "cu_seqlens": "*i32"}
    pointers |= {"state_indices": "*i32", "cache_seqlens": "*i32"}
    absent = {
        "bank": ["initial", "cu_seqlens", "cache_seqlens"],
        "ring": ["initial", "cu_seqlens"],
        "prefill": ["state_indices", "cache_seqlens"],
    }[kind]
    strides = [f"{x}_{y}" for x in ("q", "k", "v", "g", "beta") for y in ("batch", "stride", "head")]
    strides += ["initial_slot", "initial_head", "final_slot", "final_ring", "final_head"]
    ones = {"g_head": 1, "beta_head": 1}
    numbers = {"scale": "fp32", "T": "i32", "num_slots": "i32", "ring": "i32"}
    constants = {"H": 16, "HV": 32, "K": 128, "V": 128, "KO": KO, "KI": KI, "BV": BV, "STATE_V_FIRST": v_first}
    flags = {"HAS_G": True, "HAS_BETA": True, "HAS_DT_BIAS": True, "HAS_INITIAL": kind == "prefill", "HAS_FINAL": True}
    flags |= {"IS_BANK": kind != "prefill", "IS_RING": kind == "ring", "IS_VARLEN": kind == "prefill"}
    flags |= {"HAS_INDICES": kind != "prefill", "L2NORM": True, "GATE": True, "SIGMOID": True}
    return make(
        name=f"recurrent/{kind}/{dtype}/{'VK' if v_first else 'KV'}",
        kernel=recurrent_kernel,
        signature={
            **{name: kind for name, kind in pointers.items() if name not in absent},
            **numbers,
            **{name: "i32" for name in strides if name not in ones},
        },
        constexprs={**dict.fromkeys(absent), **ones, **constants, **flags},
        num_warps=num_warps,
        num_stages=1,
        fp_fusion=False,
        main=(kind, dtype, v_first) in {("bank", "fp32", False), ("bank", "bf16", True), ("ring", "bf16", True)},
        divisible=tuple(name for name in strides if name not in ones),
    )
