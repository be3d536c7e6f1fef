"""The gated delta rule token by token in one Triton kernel: decode, packets of draft tokens, short prefill.

One program owns one slab of one state: all K rows of BV value columns of one (sequence, value head). It reads the slab
once, keeps it in registers over the tokens of its sequence, and writes it once (or after every token into a circular
bank), so decode costs one read and one write of the states and hardly anything else. The slab is a tile in the order of
the bank, [K, BV] or [BV, K], so that a warp reads whole lines.

Dimensions: N sequences, T tokens, H q/k heads, HV value heads, K key dim (BK rounded up to a power of two), V value
dim, BV value columns of a program.

A packet of tokens gives the bits of the same tokens one at a time: a bank's state is rounded to the bank's dtype after
every token, multiplications and additions are fused only where the source says so, and sums follow the tile's shape, so
that the variant for one token and the loop over tokens compute the same numbers.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportReturnType=false, reportGeneralTypeIssues=false
# triton.jit hides the options of a launch from a type checker, and triton.cdiv may return a constexpr
from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl

from gdn_cp.kernels.configs import launches
from gdn_cp.kernels.gate_triton import gate_of
from gdn_cp.kernels.tables import dense
from gdn_cp.launch import run_kernel

if TYPE_CHECKING:
    from gdn_cp.kernels.compile_report import CompileCase

EPS = tl.constexpr(1e-6)  # under the square root of the L2 norm
EVICT = tl.constexpr("evict_first")  # a state is not read again before all others have been


@triton.jit
def _load_token(q, k, v, g, beta, o_k, o_v, K: tl.constexpr, V: tl.constexpr, HAS_G: tl.constexpr,
                HAS_BETA: tl.constexpr, DOT: tl.constexpr):  # fmt: skip
    """q, k [BK], v [BV], g and beta of one token in float32, and with DOT the raw tile [16, BK] of rows k, q, 0, ..."""
    b_q = tl.load(q + o_k, mask=o_k < K, other=0.0).to(tl.float32)
    b_k = tl.load(k + o_k, mask=o_k < K, other=0.0).to(tl.float32)
    b_v = tl.load(v + o_v, mask=o_v < V, other=0.0).to(tl.float32)
    b_g = tl.zeros((), tl.float32)
    b_beta = tl.full((), 1.0, tl.float32)
    if HAS_G:
        b_g = tl.load(g).to(tl.float32)
    if HAS_BETA:
        b_beta = tl.load(beta).to(tl.float32)
    pair = 0.0
    if DOT:
        rows = tl.arange(0, 16)[:, None]
        pair = tl.load(tl.where(rows == 0, k, q) + o_k[None, :], mask=(rows < 2) & (o_k[None, :] < K), other=0.0)
    return b_q, b_k, b_v, b_g, b_beta, pair


@triton.jit
def _advance(b_q, b_k, b_v, b_g, b_beta, pair, a_log, bias, b_s, scale, V_FIRST: tl.constexpr, HAS_G: tl.constexpr,
             L2NORM: tl.constexpr, GATE: tl.constexpr, SIGMOID: tl.constexpr, DOT: tl.constexpr):  # fmt: skip
    """Output [BV] and next state, in the state's shape and dtype, of one token.

    With S the state, d = exp(g) and dots over the keys:
        u = beta * (v - d * (k . S));   o = scale * (d * (q . S) + (q . k) * u);   S <- d * S + k u^T
    Both dots with S are of the old state, so one pass over the slab serves both. Norms are factors of the results.
    """
    qk = tl.sum(b_q * b_k)
    rq, rk = 1.0, 1.0
    if L2NORM:
        rq, rk = tl.rsqrt(tl.sum(b_q * b_q) + EPS), tl.rsqrt(tl.sum(b_k * b_k) + EPS)
    if SIGMOID:
        b_beta = tl.sigmoid(b_beta)
    decay = 1.0
    if GATE:
        decay = tl.exp(gate_of(b_g + bias, a_log))
    elif HAS_G:
        decay = tl.exp(b_g)
    axis: tl.constexpr = 1 if V_FIRST else 0
    key_column = b_k[None, :] if V_FIRST else b_k[:, None]
    if DOT:  # bfloat16 operands are multiplied exactly and summed in float32
        both = tl.dot(pair, b_s)
        rows = tl.arange(0, 16)[:, None]
        ks = tl.sum(tl.where(rows == 0, both, 0.0), axis=0)
        qs = tl.sum(tl.where(rows == 1, both, 0.0), axis=0)
        old = b_s.to(tl.float32)
    else:
        old = b_s.to(tl.float32)
        ks = tl.sum(key_column * old, axis=axis)
        qs = tl.sum((b_q[None, :] if V_FIRST else b_q[:, None]) * old, axis=axis)
    u = b_beta * (b_v - decay * (rk * ks))
    b_o = scale * (decay * (rq * qs) + (rq * rk * qk) * u)
    u *= rk
    new = tl.fma(
        tl.broadcast_to(key_column, old.shape),
        tl.broadcast_to(u[:, None] if V_FIRST else u[None, :], old.shape),
        decay * old,
    )
    return b_o, new.to(b_s.dtype)


@triton.jit(do_not_specialize=["T", "num_slots", "ring"])
def recurrent_kernel(
    q, k, v, g, beta, A_log, dt_bias, o, initial, final, cu_seqlens, state_indices, cache_seqlens,
    scale, T, num_slots, ring,
    q_batch, q_stride, q_head, k_batch, k_stride, k_head, v_batch, v_stride, v_head,
    g_batch, g_stride, g_head, beta_batch, beta_stride, beta_head,
    initial_slot, initial_head, final_slot, final_ring, final_head,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    V_FIRST: tl.constexpr, HAS_G: tl.constexpr, HAS_BETA: tl.constexpr, HAS_DT_BIAS: tl.constexpr,
    HAS_INITIAL: tl.constexpr, HAS_FINAL: tl.constexpr, IS_BANK: tl.constexpr, IS_RING: tl.constexpr,
    IS_VARLEN: tl.constexpr, HAS_INDICES: tl.constexpr, ONE_TOKEN: tl.constexpr, L2NORM: tl.constexpr,
    GATE: tl.constexpr, SIGMOID: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Run one slab over its sequence's tokens. The grid is N * HV * ceil(V / BV), value blocks fastest.

    IS_BANK: `final` is a state bank that is read and written; a program whose slot lies outside it writes zeros to its
    outputs. IS_RING: the bank is [num_slots, ring, HV, ...]; the state at position p of a sequence is entry p % ring.
    ONE_TOKEN: T is 1 and there is no loop, so that the token and the state are on their way at the same time.
    DOT: the dots with the state run on tensor cores (bfloat16 inputs and a bfloat16 [K, V] bank).
    """
    n_v: tl.constexpr = (V + BV - 1) // BV
    pid = tl.program_id(0).to(tl.int64)
    i_v, i_hv, i_n = pid % n_v, (pid // n_v) % HV, pid // (n_v * HV)
    i_h = i_hv // (HV // H)
    if IS_VARLEN:
        begin, end = tl.load(cu_seqlens + i_n).to(tl.int64), tl.load(cu_seqlens + i_n + 1).to(tl.int64)
        i_b = tl.zeros((), tl.int64)
    else:  # a whole batch row is one sequence
        begin, end = tl.zeros((), tl.int64), tl.zeros((), tl.int64) + T
        i_b = i_n
    o_k, o_v = tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    if V_FIRST:
        o_s = o_v[:, None] * K + o_k[None, :]
        m_s = (o_v[:, None] < V) & (o_k[None, :] < K)
    else:
        o_s = o_k[:, None] * V + o_v[None, :]
        m_s = (o_k[:, None] < K) & (o_v[None, :] < V)
    q += i_b * q_batch + begin * q_stride + i_h * q_head
    k += i_b * k_batch + begin * k_stride + i_h * k_head
    v += i_b * v_batch + begin * v_stride + i_hv * v_head
    o += ((i_b * T + begin) * HV + i_hv) * V
    if HAS_G:
        g += i_b * g_batch + begin * g_stride + i_hv * g_head
    if HAS_BETA:
        beta += i_b * beta_batch + begin * beta_stride + i_hv * beta_head
    a_log, bias = 0.0, 0.0
    if GATE:
        a_log = tl.load(A_log + i_hv).to(tl.float32)
        if HAS_DT_BIAS:
            bias = tl.load(dt_bias + i_hv).to(tl.float32)
    if ONE_TOKEN:
        b_q, b_k, b_v, b_g, b_beta, pair = _load_token(q, k, v, g, beta, o_k, o_v, K, V, HAS_G, HAS_BETA, DOT)

    slot, valid = i_n, i_n >= 0
    if HAS_INDICES:
        slot = tl.load(state_indices + i_n).to(tl.int64)
        valid = (slot >= 0) & (slot < num_slots)
    entry = tl.zeros((), tl.int64)
    if IS_RING:
        entry = tl.load(cache_seqlens + i_n).to(tl.int64)
        valid = valid & (entry >= 0)
        entry = tl.where(valid, entry, 0) % ring
    if IS_BANK:
        final += tl.where(valid, slot, 0) * final_slot + i_hv * final_head
        b_s = tl.load(final + entry * final_ring + o_s, mask=m_s & valid, other=0.0, eviction_policy=EVICT)
    elif HAS_INITIAL:
        b_s = tl.load(initial + i_n * initial_slot + i_hv * initial_head + o_s, mask=m_s, other=0.0).to(tl.float32)
    else:
        b_s = tl.zeros_like(o_s).to(tl.float32)

    if ONE_TOKEN:
        b_o, b_s = _advance(b_q, b_k, b_v, b_g, b_beta, pair, a_log, bias, b_s, scale, V_FIRST, HAS_G, L2NORM, GATE,
                            SIGMOID, DOT)  # fmt: skip
        tl.store(o + o_v, tl.where(valid, b_o, 0.0).to(o.dtype.element_ty), mask=o_v < V)
        if IS_RING:
            tl.store(final + (entry + 1) % ring * final_ring + o_s, b_s, mask=m_s & valid, eviction_policy=EVICT)
    else:
        for _ in range(begin, end):
            b_q, b_k, b_v, b_g, b_beta, pair = _load_token(q, k, v, g, beta, o_k, o_v, K, V, HAS_G, HAS_BETA, DOT)
            b_o, b_s = _advance(b_q, b_k, b_v, b_g, b_beta, pair, a_log, bias, b_s, scale, V_FIRST, HAS_G, L2NORM, GATE,
                                SIGMOID, DOT)  # fmt: skip
            tl.store(o + o_v, tl.where(valid, b_o, 0.0).to(o.dtype.element_ty), mask=o_v < V)
            q += q_stride
            k += k_stride
            v += v_stride
            o += HV * V
            if HAS_G:
                g += g_stride
            if HAS_BETA:
                beta += beta_stride
            if IS_RING:
                entry = (entry + 1) % ring
                tl.store(final + entry * final_ring + o_s, b_s, mask=m_s & valid, eviction_policy=EVICT)

    if IS_BANK:
        if not IS_RING:  # a sequence without tokens leaves its slot alone
            tl.store(final + o_s, b_s, mask=m_s & valid & (begin < end), eviction_policy=EVICT)
    elif HAS_FINAL:
        tl.store(final + i_n * final_slot + i_hv * final_head + o_s, b_s.to(final.dtype.element_ty), mask=m_s)


class Tile(NamedTuple):
    """A program's share: BK x BV elements of a state on `num_warps` warps; `dot`: its sums run on tensor cores."""

    BK: int
    BV: int
    num_warps: int
    dot: bool


def choose_tile(K: int, V: int, state_bytes: int, state_v_first: bool, bfloat16_inputs: bool) -> Tile:
    """The tile for a state whose elements have `state_bytes` bytes; the best for K = V = 128, 128 requests, T = 1.

    A [V, K] bank is read in runs of whole rows, so one warp can own 16 of them. In a [K, V] bank a warp's columns are
    strided, and runs shorter than 256 bytes of a row cost a fifth of the bandwidth: on an H200 the bfloat16 [K, V] bank
    takes 1.11 times a copy with the 128 columns chosen here, 1.23 times with 64. The other three take 1.03 to 1.14
    times a copy (benchmarks/results/decode-h200.json).
    """
    BK, BV = max(triton.next_power_of_2(K), 16), max(triton.next_power_of_2(V), 16)
    if state_v_first:
        return Tile(BK, min(BV, max(16 * 128 // BK, 1)), 1, False)
    if state_bytes == 4 or not bfloat16_inputs:
        return Tile(BK, min(BV, 64 * 128 // BK), max(1, min(4, BK * BV // 2048)), False)
    BV = min(BV, 128 * 128 // BK)
    return Tile(BK, BV, max(1, min(4, BK * BV // 4096)), True)


def unsupported(device: torch.device, dtype: torch.dtype, K: int, V: int) -> str | None:
    """Why the kernel cannot serve a call; None when it can."""
    if dtype == torch.float64:
        return "it computes in float32 and the input is float64"
    if max(K, V) > 256:
        return f"head dims above 256 (K={K}, V={V}) do not fit its registers"
    if device.type != "cuda":
        return f"the tensors are on {device.type}"
    return None


def _strides(x: torch.Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if x is None else x.stride()


def _state_strides(x: torch.Tensor | None, is_ring: bool) -> tuple[int, int, int]:
    """Strides of (slot, entry of the ring, head)."""
    if x is None:
        return 0, 0, 0
    return (x.stride(0), x.stride(1), x.stride(2)) if is_ring else (x.stride(0), 0, x.stride(1))


@launches
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
    tile = choose_tile(K, V, state_bytes, state_v_first, q.dtype == torch.bfloat16 and q.is_cuda and is_bank)
    if N * HV == 0:
        return o
    run_kernel(recurrent_kernel, N * HV * triton.cdiv(V, tile.BV),
        q, k, v, g, beta, dense(A_log), dense(dt_bias), o, initial, final, dense(cu_seqlens), state_indices,
        cache_seqlens, scale, T, num_slots, ring,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *_strides(g), *_strides(beta),
        *_strides(initial)[:2], *_state_strides(final, is_ring),
        H=H, HV=HV, K=K, V=V, BK=tile.BK, BV=tile.BV, V_FIRST=state_v_first,
        HAS_G=g is not None, HAS_BETA=beta is not None, HAS_DT_BIAS=dt_bias is not None,
        HAS_INITIAL=initial is not None, HAS_FINAL=final is not None, IS_BANK=is_bank, IS_RING=is_ring,
        IS_VARLEN=cu_seqlens is not None, HAS_INDICES=state_indices is not None,
        ONE_TOKEN=T == 1 and cu_seqlens is None, L2NORM=l2norm, GATE=A_log is not None, SIGMOID=sigmoid,
        DOT=tile.dot, num_warps=tile.num_warps, num_stages=1, enable_fp_fusion=False,
    )  # fmt: skip
    return o


def compile_cases() -> list[CompileCase]:
    """Qwen3-Next heads: bank of states, circular bank and stateless prefill, in both layouts and dtypes."""
    from gdn_cp.kernels.compile_report import CompileCase

    kinds = [("bank", "fp32"), ("bank", "bf16"), ("ring", "fp32"), ("ring", "bf16"), ("prefill", "fp32")]
    return [_compile_case(CompileCase, kind, dtype, v_first) for kind, dtype in kinds for v_first in (False, True)]


def _compile_case(make: type[CompileCase], kind: str, dtype: str, v_first: bool) -> CompileCase:
    tile = choose_tile(128, 128, 2 if dtype == "bf16" else 4, v_first, kind != "prefill")
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
    constants = {"H": 16, "HV": 32, "K": 128, "V": 128, "BK": tile.BK, "BV": tile.BV, "V_FIRST": v_first}
    flags = {"HAS_G": True, "HAS_BETA": True, "HAS_DT_BIAS": True, "HAS_INITIAL": kind == "prefill", "HAS_FINAL": True}
    flags |= {"IS_BANK": kind != "prefill", "IS_RING": kind == "ring", "IS_VARLEN": kind == "prefill"}
    flags |= {
        "HAS_INDICES": kind != "prefill",
        "ONE_TOKEN": kind == "bank",
        "L2NORM": True,
        "GATE": True,
        "SIGMOID": True,
        "DOT": tile.dot,
    }
    return make(
        name=f"recurrent/{kind}/{dtype}/{'VK' if v_first else 'KV'}",
        kernel=recurrent_kernel,
        signature={
            **{name: pointer for name, pointer in pointers.items() if name not in absent},
            **numbers,
            **{name: "i32" for name in strides if name not in ones},
        },
        constexprs={**dict.fromkeys(absent), **ones, **constants, **flags},
        num_warps=tile.num_warps,
        num_stages=1,
        fp_fusion=False,
        main=kind == "bank",
        divisible=tuple(name for name in strides if name not in ones),
    )
