"""The backward of the chunked delta rule: which kernels run, on which buffers, and how much memory they may take.

    prepare_products -> chains (S and dS of every chunk, M) -> local gradients (everything else) -> sums over chunks

The states and their gradients of all chunks are by far the largest buffers: 4 K V bytes for each chunk and value head,
in a 16-bit type. So a long batch is worked on in slices of consecutive chunks, last slice first, which share one set of
buffers: the gradient of the state is carried from slice to slice, and the state at the start of each slice was kept by
the forward (`checkpoints`).

Dimensions: B batch, T tokens, H q/k heads, HV value heads, K, V head dims, N sequences, C = 64, NT chunks (bound).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from gdn_cp.kernels.chunk_bwd_chains import chains_kernel
from gdn_cp.kernels.chunk_bwd_local import (
    dk_kernel,
    dq_kernel,
    gate_gradients_kernel,
    scores_kernel,
)
from gdn_cp.kernels.chunk_prepare import Prepared, prepare_products
from gdn_cp.kernels.configs import capability, dot_precision
from gdn_cp.kernels.gate_triton import sum_partials
from gdn_cp.kernels.tables import CHUNK, chunk_tables

# Buffers of one slice: small beside the activations of the batches that are cut, large enough to fill the card.
SLICE_BYTES = 512 * 2**20


class BackwardLaunch(NamedTuple):
    """For each kernel (columns of the state per step, warps, pipeline stages, limit of registers or none); and whether
    the bulk copy engine is used."""

    chains: tuple[int, ...]
    scores: tuple[int, ...]
    dq: tuple[int, ...]
    dk: tuple[int, ...]
    tma: bool = False


class Gradients(NamedTuple):
    """Gradients of the operation's inputs, each None where the input is None or its gradient was not asked for."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dg: Tensor | None
    dbeta: Tensor | None
    dh0: Tensor | None
    dA_log: Tensor | None  # noqa: N815
    ddt_bias: Tensor | None


def backward_config(device: torch.device, dtype: torch.dtype, K: int, V: int, walks: int) -> BackwardLaunch:
    """Launch settings for head dims K and V; measured on sm_90 for K = V = 128, reasoned for others.

    A step of the chains is shorter with fewer columns of the state per program, which costs multiprocessors: `walks`,
    the number of (piece, value head) pairs, says how many are free.
    """
    if dtype == torch.float32:
        return BackwardLaunch((16, 8, 1), (16, 8, 1), (16, 8, 1), (16, 8, 1))
    block_v = max(16, min(64, triton.next_power_of_2(V)))
    half = min(32, block_v)
    if capability(device) < 90:
        return BackwardLaunch((half, 4, 2), (half, 4, 1), (half, 4, 2), (half, 4, 2))
    if K > 128:
        return BackwardLaunch((half, 8, 1), (half, 8, 1), (half, 8, 1), (half, 8, 1), True)
    columns = block_v
    while columns > 16 and walks * 2 * triton.cdiv(V, columns // 2) <= multiprocessors(device):
        columns //= 2
    return BackwardLaunch((columns, 4, 3), (half, 4, 3), (block_v, 8, 3, 128), (block_v, 8, 3), True)


def slice_chunks(num_chunks: int, HV: int, K: int, V: int, element_size: int = 2) -> int:
    """Chunks of a slice when num_chunks are too many for one set of buffers of SLICE_BYTES, else 0 (no slices)."""
    per_chunk = HV * (2 * K * V + CHUNK * (max(K, 2 * CHUNK) + V)) * element_size
    fitting = max(SLICE_BYTES // per_chunk, 16)
    if num_chunks <= fitting:
        return 0
    return triton.cdiv(num_chunks, triton.cdiv(num_chunks, fitting))


def chunk_gated_delta_rule_bwd(
    do: Tensor,
    dht: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    prepared: Prepared,
    cu_seqlens: Tensor | None,
    *,
    scale: float,
    initial_state: Tensor | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    use_qk_l2norm_in_kernel: bool,
    use_gate_in_kernel: bool,
    use_beta_sigmoid_in_kernel: bool,
    state_v_first: bool,
    need_dh0: bool,
    checkpoints: Tensor | None = None,
) -> Gradients:
    """Gradients of `chunk_gated_delta_rule` from those of its output and final state.

    Args:
        do: [B, T, HV, V] gradient of o, last dimension contiguous.
        dht: [N, HV, K, V] float32 gradient of the final state (as `state_v_first` says), or None.
        q, k, v, g, beta, initial_state, A_log, dt_bias, cu_seqlens, flags: as the public operation's; q, k, v with a
            contiguous last dimension and evenly spaced rows.
        prepared: what the forward kept: G, bt, rq, rk, Ag.
        checkpoints: [ceil(NT / L), HV, K, V] float32, states before chunks 0, L, 2L, .. with L = slice_chunks(NT, ...);
            None: everything in one slice.

    Returns:
        Gradients: dq, dk, dv, dg, dbeta in the dtypes of the inputs; dh0, dA_log, ddt_bias float32.
    """
    (B, T, H, K), (HV, V) = q.shape, v.shape[2:]
    tables = chunk_tables(B, T, cu_seqlens, q.device)
    NT = tables.num_chunks
    do = do if B == 1 or do.stride(0) == T * do.stride(1) else do.contiguous()
    out = _allocate(q, k, v, g, beta, NT, tables.num_sequences, use_gate_in_kernel, dt_bias, state_v_first, need_dh0)
    length = NT if checkpoints is None else slice_chunks(NT, HV, K, V, q.element_size())
    size = max(min(length, NT), 1)
    h, dh = (torch.empty(size, HV, K, V, dtype=q.dtype, device=q.device) for _ in range(2))
    carries = torch.empty(2, HV, K, V, dtype=torch.float32, device=q.device) if size < NT else None
    launch = backward_config(q.device, q.dtype, K, V, tables.num_pieces * HV)
    views = _Views(launch.tma and _tma_fits(q, k, v, do))
    shared = {
        "H": H, "HV": HV, "K": K, "V": V, "BK": max(16, triton.next_power_of_2(K)), "C": CHUNK, "TMA": views.tma,
        "PRECISION": dot_precision(q.dtype),
    }  # fmt: skip
    factors = (prepared.G, prepared.bt, prepared.rq, prepared.rk)
    initial_state = None if initial_state is None else initial_state.contiguous()
    dht = None if dht is None else dht.contiguous()
    starts = range(0, NT, size) if NT else range(1)
    for index in reversed(range(len(starts))):
        c0 = starts[index]
        c1 = min(c0 + size, NT)
        X, Yt = prepare_products(q, k, prepared, tables, scale=scale, first_chunk=c0, num_chunks=c1 - c0)
        assert Yt is not None
        bv, options = _options(launch.chains)
        chains_kernel[(tables.num_pieces * HV * triton.cdiv(V, bv) * 2,)](
            views.tokens(q, K), views.tokens(k, K), views.tokens(v, bv), views.tokens(do, bv), *factors,
            views.matrices(X, CHUNK), views.matrices(Yt, CHUNK), tables.pieces, initial_state,
            None if checkpoints is None else checkpoints[index], dht,
            *((None, None) if carries is None else (carries[index % 2], carries[(index + 1) % 2])),
            views.matrices(h, bv), views.matrices(dh, bv), out.dv, out.dh0, scale, c0, c1, NT, *_strides(q, k, v, do),
            V_FIRST=state_v_first, **options, **shared,
        )  # fmt: skip
        if c1 == c0:
            continue
        del X, Yt  # their memory serves for what follows
        U = torch.empty(c1 - c0, HV, CHUNK, V, dtype=q.dtype, device=q.device)
        D, F = (torch.empty(c1 - c0, HV, CHUNK, CHUNK, dtype=q.dtype, device=q.device) for _ in range(2))
        dG = None if g is None else torch.empty(c1 - c0, HV, CHUNK, dtype=torch.float32, device=q.device)
        bv, options = _options(launch.scores)
        scores_kernel[((c1 - c0) * HV,)](
            q, k, views.tokens(v, bv), views.tokens(do, bv), *factors, prepared.Ag, views.matrices(h, bv),
            views.tokens(out.dv, bv), tables.chunks, out.dv, views.matrices(U, bv), D, F, dG, out.dbeta, scale, c0,
            *_strides(q, k, v, do), SIGMOID=use_beta_sigmoid_in_kernel, **options, **shared,
        )  # fmt: skip
        bv, options = _options(launch.dq)
        dq_kernel[((c1 - c0) * H,)](
            q, k, views.tokens(do, bv), prepared.G, prepared.rq, views.matrices(h, bv), tables.chunks, D, dG, out.dq,
            scale, c0, *_strides(q, k, do), **options, **shared,
        )  # fmt: skip
        bv, options = _options(launch.dk)
        dk_kernel[((c1 - c0) * H,)](
            q, k, prepared.G, prepared.rk, views.matrices(h, bv), views.matrices(dh, bv), tables.chunks,
            views.tokens(out.dv, bv), views.matrices(U, bv), D, F, dG, out.dk, c0, *_strides(q, k), **options, **shared,
        )  # fmt: skip
        if g is not None:
            gate_gradients_kernel[((c1 - c0) * HV,)](
                dG, g, A_log, dt_bias, tables.chunks, out.dg, out.dA_log, out.ddt_bias, c0, g.stride(1), g.stride(2),
                HV=HV, C=CHUNK, GATE=use_gate_in_kernel, num_warps=1,
            )  # fmt: skip
    dA_log, ddt_bias = (None if x is None else sum_partials(x) for x in (out.dA_log, out.ddt_bias))
    return out._replace(dA_log=dA_log, ddt_bias=ddt_bias if dt_bias is not None else None)


def _tma_fits(*tensors: Tensor) -> bool:
    """Whether the bulk copy engine can read these: packed heads, head dims that need no padding, 16-byte alignment."""
    for x in tensors:
        dim = x.shape[3]
        packed = not dim & (dim - 1) and x.stride(2) == dim and not x.stride(1) % 8 and not x.data_ptr() % 16
        if not packed or x.numel() == 0 or x.dtype == torch.float32:
            return False
    return True


def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device; 1 where only Triton's interpreter can run."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _options(launch: tuple[int, ...]) -> tuple[int, dict[str, int]]:
    """Columns per step, and the keyword arguments of a launch."""
    block_v, warps, stages, *limit = launch
    options = {"BV": block_v, "STAGES": stages, "num_warps": warps, "num_stages": stages}
    return block_v, options | ({"maxnreg": limit[0]} if limit else {})


class _Views:
    """What a kernel is given of a tensor: a descriptor for the bulk copy engine, or the tensor itself."""

    def __init__(self, tma: bool) -> None:
        self.tma = tma

    def tokens(self, x: Tensor, width: int) -> Tensor | TensorDescriptor:
        """x [B, T, heads, D], read in tiles of 64 rows and `width` columns."""
        if not self.tma:
            return x
        shape = [x.shape[0] * x.shape[1], x.shape[2] * x.shape[3]]
        return TensorDescriptor(x, shape, [x.stride(1), 1], [CHUNK, width])

    def matrices(self, x: Tensor, width: int) -> Tensor | TensorDescriptor:
        """x [.., R, D] contiguous, read or written in tiles of R rows and `width` columns."""
        if not self.tma:
            return x
        rows, columns = x.shape[-2:]
        return TensorDescriptor(x, [x.numel() // columns, columns], [columns, 1], [rows, width])


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in (x.stride(1), x.stride(2))]


def _allocate(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None, NT: int, N: int, gate: bool,
    dt_bias: Tensor | None, state_v_first: bool, need_dh0: bool,
) -> Gradients:  # fmt: skip
    """Empty gradients; those of A_log and dt_bias are still one part for each chunk, [NT, HV]."""
    HV, V = v.shape[2:]
    K = q.shape[3]

    def like(x: Tensor | None) -> Tensor | None:
        return None if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)

    def float32(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=q.device)

    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    dh0 = float32(N, HV, *((V, K) if state_v_first else (K, V))) if need_dh0 else None
    parts = [float32(NT, HV) if gate else None for _ in range(2)]
    return Gradients(dq, dk, dv, like(g), like(beta), dh0, *parts)
