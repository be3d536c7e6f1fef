"""What rounding given states took from the gate's gradient: the kernel that puts it back, and the operation with it.

Dimensions: T tokens, H q/k heads, HV value heads, K, V head dims, N sequences, C = 64 rows of a chunk.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gdn_cp.kernels.chunk_bwd import start_backward
from gdn_cp.kernels.chunk_bwd_borders import GivenStates
from gdn_cp.kernels.chunk_bwd_rows import row_sums
from gdn_cp.kernels.chunk_prepare import prepare
from gdn_cp.kernels.chunk_triton import chunk_gated_delta_rule_triton
from gdn_cp.kernels.reference import recurrent_gated_delta_rule_reference
from gdn_cp.kernels.tables import CHUNK, chunk_tables

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTHS = (0, 150, 64, 1, 70)
T, H, HV, K, V = sum(LENGTHS), 1, 2, 32, 48
# A sum of K or C V products, of which each factor is one again: some 500 roundings of float32 if they never cancel.
TOLERANCE = 500 * 2.0**-24


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def _chunks() -> list[tuple[int, int, int, bool, bool]]:
    """(sequence, first row, rows, whether it is the first of its sequence, whether the last) of each chunk."""
    found, start = [], 0
    for n, length in enumerate(LENGTHS):
        for at in range(0, length, CHUNK):
            found.append((n, start + at, min(CHUNK, length - at), at == 0, at + CHUNK >= length))
        start += length
    return found


@pytest.mark.parametrize(
    ("first", "last", "v_first", "norm", "piece_chunks", "bounds"),
    [
        (True, True, False, True, 0, (0, 7)),
        (True, False, True, True, 1, (0, 7)),
        (False, True, True, False, 0, (0, 7)),
        (True, True, False, True, 2, (1, 4)),
    ],
    ids=["both", "initial states, as [V, K], sequences cut", "final states, no norms", "both, cut, a slice of chunks"],
)
def test_sums_become_those_of_the_states_as_given(first, last, v_first, norm, piece_chunks, bounds):
    """Stored states, W and U are rounded to 8 bits: the sums must change by what that took, in the chunks beside given
    states of the slice, and nowhere else."""
    c0, c1 = bounds
    cu_seqlens = torch.tensor((0, *LENGTHS), device=DEVICE).cumsum(0)
    q, k = (_random(1, T, H, K, seed=s) * K**-0.5 for s in (0, 1))
    v, do = (_random(1, T, HV, V, seed=s) for s in (2, 3))
    g, beta = (-_random(1, T, HV, seed=4).abs() / CHUNK), _random(1, T, HV, seed=5).sigmoid()
    tables = chunk_tables(1, T, cu_seqlens, q.device, piece_chunks)
    prepared = prepare(q, k, g, beta, tables, scale=0.7, num_v_heads=HV, use_qk_l2norm_in_kernel=norm)
    h0, dht = (_random(len(LENGTHS), HV, K, V, seed=s) for s in (6, 7))
    run = start_backward(do, q, k, v, prepared, cu_seqlens, scale=0.7, checkpoints=None, piece_chunks=piece_chunks)
    inner, d_inner = (_random(c1 - c0, HV, K, V, seed=s) for s in (8, 9))
    chunks = _chunks()
    assert len(chunks) == 7
    for c, (n, _, _, begins, ends) in enumerate(chunks):
        if c0 <= c < c1:
            inner[c - c0] = h0[n] if begins and first else inner[c - c0].bfloat16()
            d_inner[c - c0] = dht[n] if ends and last else d_inner[c - c0].bfloat16()
    W, U = (_random(c1 - c0, HV, CHUNK, V, seed=s).bfloat16() for s in (10, 11))
    run.h, run.dh, run.M = inner.bfloat16().float(), d_inner.bfloat16().float(), W.float()
    rows = row_sums(len(tables.chunks), HV, q.device, True, True, 1)
    for sums in (rows.dG, rows.k_dots, rows.state_dots):
        assert sums is not None
        sums.fill_(3.0)

    def given(states: Tensor, wanted: bool) -> Tensor | None:
        return (states.mT if v_first else states).contiguous() if wanted else None

    run.put_back(c0, c1, U.float(), rows, GivenStates(given(h0, first), given(dht, last), v_first))

    expected = [torch.full(x.shape, 3.0, dtype=torch.float64) for x in (rows.dG, rows.k_dots, rows.state_dots)]  # type: ignore[union-attr]
    for c, (_, row, count, begins, ends) in enumerate(chunks):
        if not (c0 <= c < c1 and ((begins and first) or (ends and last))):
            continue
        for hv in range(HV):
            hk, tokens, own = hv // (HV // H), slice(row, row + count), slice(0, count)
            S, dS = inner[c - c0, hv].double().cpu(), d_inner[c - c0, hv].double().cpu()
            s, dS_stored = S - S.bfloat16().double(), dS.bfloat16().double()
            G, b = prepared.G[c, hv].double().cpu(), prepared.bt[c, hv, own].double().cpu()
            Q, key = (x[0, tokens, hk].double().cpu() for x in (q, k))
            v_hv, do_hv = (x[0, tokens, hv].double().cpu() for x in (v, do))
            q_norm, k_norm = ((x.square().sum(-1) + 1e-6).rsqrt() if norm else torch.ones(count) for x in (Q, key))
            W_own, U_own = (x[c - c0, hv, own].double().cpu() for x in (W, U))
            A = prepared.Ag[c, hv, own, own].double().cpu() + torch.eye(count)
            R = b[:, None] * (v_hv - (G[own].exp() * k_norm)[:, None] * (key @ S))
            u = ((G[-1] - G[own]).exp() * k_norm)[:, None] * (A @ R)
            q_part = (0.7 * G[own].exp() * q_norm) * (Q @ s * do_hv).sum(-1)
            expected[0][c, hv, own] += q_part + (W_own * (key @ s)).sum(-1)
            expected[1][c, hv, own] += (u * (key @ dS)).sum(-1) - (U_own * (key @ dS_stored)).sum(-1)
            expected[2][c, hv] = G[-1].exp() * (S * dS).sum()
    for got, want in zip((rows.dG, rows.k_dots, rows.state_dots), expected, strict=True):
        assert got is not None
        assert want.ne(3.0).any() or got is rows.dG  # of a gradient that is given nothing is lost for dG
        assert (got.double().cpu() - want).norm() < TOLERANCE * want.norm()
        assert got.cpu()[want == 3.0].eq(3.0).all()


def _gate_gradient(beta: float, state: bool, function: Any, dtype: torch.dtype | None) -> Tensor:
    """Of one chunk of orthogonal keys in float16, states in float32, with a gradient of the final state."""
    rows, dim, columns = 50, 64, 32
    q, v, do = (_random(1, rows, 1, d, seed=s).half() for s, d in ((0, dim), (1, columns), (2, columns)))
    k = torch.eye(rows, dim, dtype=torch.float16, device=DEVICE)[None, :, None]
    h0, dht = (_random(1, 1, dim, columns, seed=s) for s in (3, 4))
    g = torch.linspace(-0.3, 0.0, rows, device=DEVICE)[None, :, None]
    leaf = g.to(dtype or g.dtype).requires_grad_()
    initial = h0.to(dtype or h0.dtype) if state else None
    b = torch.full_like(leaf, beta).detach()
    o, final = function(*(x.to(dtype or x.dtype) for x in (q, k, v)), leaf, b, 1.0, initial, True)
    return torch.autograd.grad((o, final), leaf, (do.to(o.dtype), dht.to(final.dtype)))[0].double()


@pytest.mark.parametrize(("beta", "state"), [(0.0, True), (1 / 3, False)], ids=["both states", "final state and U"])
def test_gate_gradient_of_one_chunk_loses_nothing_by_rounding_given_states(beta, state):
    """With beta = 0 all of it is products of q and dO, as given, with the initial state, and of that with the final
    state's gradient. With orthogonal keys and no initial state U = beta V, and all of it is products of U. The largest
    rounding is of second parts: 2^-12.3 of 2^-12.3 of a state."""
    got = _gate_gradient(beta, state, chunk_gated_delta_rule_triton, None)
    expected = _gate_gradient(beta, state, recurrent_gated_delta_rule_reference, torch.float64)
    assert (got - expected).norm() < TOLERANCE * expected.norm()
