"""The launch of `chunk_bwd_fused_kernel`: its descriptors and settings.

Dimensions: B batch, T tokens, H q/k heads, HV value heads, NT chunks.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from gdn_cp.kernels.chunk_bwd_fused_kernel import fused_kernel
from gdn_cp.kernels.chunk_bwd_rows import RowSums, least_beta
from gdn_cp.kernels.configs import multiprocessors
from gdn_cp.kernels.tables import CHUNK
from gdn_cp.launch import describe_gluon, run_kernel

DIM = 128
WARPS = 8  # that multiply; one more fetches
FETCHING_REGISTERS = 24
ROW_LAYOUT = gl.NVMMASharedLayout(0, 32, 2)  # of a chunk's 64 row factors, one after the other


@lru_cache(maxsize=16)
def tile_layout(block: tuple[int, ...], dtype: torch.dtype) -> Any:
    """How a tile of a 16-bit type lies in shared memory."""
    return gl.NVMMASharedLayout.get_default_for([*block], gl.bfloat16 if dtype == torch.bfloat16 else gl.float16)


def _tokens(x: Tensor) -> TensorDescriptor:
    """x [B, T, heads, D] by tiles of 64 rows of one head."""
    shape, block = [x.shape[0] * x.shape[1], x.shape[2] * x.shape[3]], [CHUNK, DIM]
    return describe_gluon(x, shape, [x.stride(1), 1], block, tile_layout((*block,), x.dtype))


def _matrices(x: Tensor) -> TensorDescriptor:
    """x [.., rows, columns], contiguous, by whole matrices."""
    block = list(x.shape[-2:])
    return describe_gluon(x, [x.numel() // block[1], block[1]], [block[1], 1], block, tile_layout((*block,), x.dtype))


def _factors(x: Tensor) -> TensorDescriptor:
    """x [NT, HV, 64] float32 by chunks and heads."""
    return describe_gluon(x, [x.numel() // CHUNK, CHUNK], [CHUNK, 1], [1, CHUNK], ROW_LAYOUT)


def local_gradients(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, h: Tensor, dh: Tensor, M: Tensor, Ag: Tensor,
    factors: tuple[Tensor | None, ...], chunks: Tensor, dq: Tensor, dk: Tensor, sums: RowSums, scale: float, c0: int,
    c1: int,
) -> None:  # fmt: skip
    """dq, dk of chunks c0 .. c1 - 1, and their part of `sums`.

    Args:
        q, k, v, do: [B, T, heads, 128] as `configs.bulk_copy_fits` wants them; dq and dk too.
        h, dh: [c1 - c0 or more, HV, 128, 128] the states before each chunk and gradients of those after it.
        M: [c1 - c0 or more, HV, 64, 128]; only read.
        Ag: [NT, HV, 64, 64].
        factors: G, bt [NT, HV, 64], rq, rk [NT, H, 64] or None.
        chunks: the table of `tables.ChunkTables`.
        sums: of all chunks, state_dots in 64 parts.
    """
    H, HV = q.shape[2], v.shape[2]
    items = (c1 - c0) * H
    G, bt, rq, rk = factors
    assert G is not None
    assert bt is not None
    programs = multiprocessors(q.device)
    run_kernel(fused_kernel, min(items, programs),
        _tokens(q), _tokens(k), _tokens(v), _tokens(do), _matrices(h), _matrices(dh), _matrices(M), _matrices(Ag),
        _tokens(dq), _tokens(dk), _factors(G), _factors(bt), rq, rk, chunks, dq, dk, *sums, scale, c0, items,
        dq.stride(1), dq.stride(2),
        H=H, HV=HV, D=DIM, C=CHUNK, LEAST_BETA=least_beta(q.dtype), PROGRAMS=programs, REGISTERS=FETCHING_REGISTERS,
        num_warps=WARPS,
    )  # fmt: skip
