"""Forward of the Triton delta rule against the float64 recurrence; under Triton's interpreter where there is no GPU.

float32 inputs, whose products are float32: errors come from rounding sums of K and of 64 terms.
"""

import gc
import weakref

import pytest
import torch
from torch import Tensor

from gdn_cp.kernels import chunk_prepare, chunk_triton
from gdn_cp.kernels import tables as tables_module
from gdn_cp.kernels.backends import DeltaRuleCall
from gdn_cp.kernels.chunk_fwd import chain_forward
from gdn_cp.kernels.chunk_prepare import prepare, prepare_leading_products, prepare_products
from gdn_cp.kernels.piece_plan import PIECES_VARIABLE
from gdn_cp.kernels.reference import recurrent_gated_delta_rule_reference
from gdn_cp.kernels.tables import chunk_tables
from gdn_cp.launch import thread

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def tolerance(K: int) -> float:
    """Relative error of a chain of products over K and 64 terms in float32, each term rounded once."""
    return (K + 64) * torch.finfo(torch.float32).eps


def relative_error(x: Tensor, reference: Tensor) -> float:
    return ((x.double() - reference).norm() / reference.norm().clamp(min=1e-30)).item()


def make_inputs(
    B, T, H, HV, K, V, *, N, v_first=False, gate=False, g_none=False, beta_none=False, state=True, norm=True
):
    def random(*shape):
        return torch.randn(*shape, device=DEVICE)

    k = random(B, T, H, K)
    inputs = {
        "q": random(B, T, H, K),
        "k": k if norm else k / k.norm(dim=-1, keepdim=True),
        "v": random(B, T, HV, V),
        "g": None if g_none else random(B, T, HV) if gate else -random(B, T, HV).abs(),
        "beta": None if beta_none else random(B, T, HV) if gate else random(B, T, HV).sigmoid(),
        "scale": K**-0.5,
        "initial_state": random(N, HV, V, K) if v_first else random(N, HV, K, V),
        "output_final_state": True,
        "use_qk_l2norm_in_kernel": norm,
        "use_gate_in_kernel": gate,
        "use_beta_sigmoid_in_kernel": gate,
        "A_log": random(HV) if gate else None,
        "dt_bias": random(HV) if gate else None,
        "state_v_first": v_first,
    }
    if not state:
        inputs["initial_state"] = None
    return inputs


def in_float64(inputs):
    return {name: x.double() if isinstance(x, Tensor) else x for name, x in inputs.items()}


def check(inputs, cu_seqlens=None):
    cu = None if cu_seqlens is None else torch.tensor(cu_seqlens, device=DEVICE)
    o, final = chunk_triton.chunk_gated_delta_rule_triton(**inputs, cu_seqlens=cu)
    expected, expected_final = recurrent_gated_delta_rule_reference(**in_float64(inputs), cu_seqlens=cu)
    assert o.dtype == torch.float32
    assert relative_error(o, expected) < tolerance(inputs["q"].shape[-1])
    assert relative_error(final, expected_final) < tolerance(inputs["q"].shape[-1])


@pytest.mark.parametrize(
    ("shape", "cu", "options"),
    [
        ((1, 64, 1, 1, 16, 16), None, {}),
        ((2, 70, 1, 2, 32, 16), None, {"gate": True}),
        ((1, 150, 1, 3, 16, 32), [0, 65, 65, 66, 150], {"v_first": True}),
        ((1, 66, 1, 1, 48, 96), None, {"norm": False, "g_none": True}),
        ((1, 30, 2, 2, 16, 16), None, {"beta_none": True, "state": False}),
        ((1, 1, 1, 1, 16, 16), [0, 0, 1, 1], {}),
    ],
)
def test_forward_equals_the_recurrence(shape, cu, options):
    N = shape[0] if cu is None else len(cu) - 1
    check(make_inputs(*shape, N=N, **options), cu)


def test_strong_decay_neither_overflows_nor_loses_accuracy():
    inputs = make_inputs(1, 130, 1, 1, 16, 16, N=1)
    inputs["g"] = inputs["g"] * 10  # about e^-500 per chunk
    check(inputs)


def test_pieces_give_what_whole_sequences_give(monkeypatch):
    cu = [0, 64, 64, 300, 400]
    inputs = make_inputs(1, 400, 1, 1, 16, 32, N=4)
    for pieces in ("1", "2"):
        monkeypatch.setenv(PIECES_VARIABLE, pieces)
        check(inputs, cu)


def test_sections_of_a_projection_are_read_in_place():
    B, T, H, HV, K, V = 2, 40, 1, 2, 16, 16
    widths = (H * K, H * K, HV * V, HV, HV)
    projected = torch.randn(B, T, sum(widths), device=DEVICE)
    q, k, v, g, beta = projected.split(widths, -1)
    sections = (q.unflatten(-1, (H, K)), k.unflatten(-1, (H, K)), v.unflatten(-1, (HV, V)), -g.abs(), beta.sigmoid())
    sections = (*sections[:3], projected[..., -2 * HV : -HV], projected[..., -HV:])
    flags = {"use_qk_l2norm_in_kernel": True, "use_gate_in_kernel": True, "use_beta_sigmoid_in_kernel": True}
    flags |= {"A_log": torch.zeros(HV, device=DEVICE)}
    in_place, _ = chunk_triton.chunk_gated_delta_rule_triton(*sections, 0.25, None, False, **flags)
    copied, _ = chunk_triton.chunk_gated_delta_rule_triton(
        *(x.contiguous() for x in sections), 0.25, None, False, **flags
    )
    assert not sections[0].is_contiguous()
    assert torch.equal(in_place, copied)


def test_prepared_matrices_of_a_short_chunk():
    T, K, C = 50, 16, 64
    inputs = make_inputs(1, T, 1, 1, K, 16, N=1)
    tables = chunk_tables(1, T, None, DEVICE)
    q, k, g, beta = (inputs[name] for name in ("q", "k", "g", "beta"))
    prepared = prepare(q, k, g, beta, tables, scale=0.5, num_v_heads=1, use_qk_l2norm_in_kernel=True)
    kn = torch.nn.functional.normalize(k[0, :, 0].double(), dim=-1)
    qn = torch.nn.functional.normalize(q[0, :, 0].double(), dim=-1)
    G = g[0, :, 0].double().cumsum(0)
    decay = (G[:, None] - G[None, :]).exp().tril()
    strict = (beta[0, :, 0, None] * (kn @ kn.T) * decay).tril(-1)
    A = torch.linalg.inv(torch.eye(T, device=DEVICE) + strict)
    P = 0.5 * (qn @ kn.T) * decay
    X = k[0, :, 0].double().T @ ((G[-1] - G).exp()[:, None] / k[0, :, 0].double().norm(dim=-1)[:, None] * A)
    assert relative_error(prepared.Ag[0, 0, :T, :T] + torch.eye(T, device=DEVICE), A) < tolerance(K)
    assert relative_error(prepared.Yt[0, 0, :T, :T].T, P @ A) < tolerance(K)
    assert relative_error(prepared.X[0, 0, :, :T], X) < tolerance(K)
    # Tail rows are neutral: no step size, no rows of A, the last cumulative gate.
    assert not prepared.bt[0, 0, T:].any()
    assert not prepared.Ag[0, 0, T:].any()
    assert not prepared.X[0, 0, :, T:].any()
    assert torch.equal(prepared.G[0, 0, T:], prepared.G[0, 0, T - 1].expand(C - T))
    again = prepare_products(q, k, prepared, tables, scale=0.5)
    assert torch.equal(again[0], prepared.X)
    assert torch.equal(again[1], prepared.Yt)


def test_leading_products_are_those_of_all_chunks_until_a_head_forgets(monkeypatch):
    """Of sequences that a state enters; heads that forget never, slowly and at once, in programs of several chunks."""
    lengths, H, HV, K = (0, 70, 320, 190), 1, 3, 16
    cu = torch.tensor([0, *lengths], device=DEVICE, dtype=torch.int32).cumsum(0, dtype=torch.int32)
    T = int(cu[-1])
    inputs = make_inputs(1, T, H, HV, K, 16, N=1)
    tables = chunk_tables(1, T, cu, DEVICE)
    g = torch.tensor([0.0, -0.08, -1.0], device=DEVICE).expand(1, T, HV).contiguous()
    q, k = inputs["q"], inputs["k"]
    prepared = prepare(q, k, g, inputs["beta"], tables, scale=0.5, num_v_heads=HV, use_qk_l2norm_in_kernel=True)
    roles = torch.tensor([1, 0, 3, 1], device=DEVICE, dtype=torch.int32)
    monkeypatch.setattr(chunk_prepare, "LEADING_SLOTS", 2)
    leading = prepare_leading_products(q, k, prepared, tables, roles, -10.0, scale=0.5)
    taken = 0
    for c, (sequence, _, _, index) in enumerate(tables.chunks.tolist()):
        if sequence < 0 or not roles[sequence] & 1:
            continue
        for head, most in enumerate((5, 2, 1)):  # 64 rows of -0.08 are -5.1
            if index < most:
                assert torch.equal(leading[0][c, head], prepared.X[c, head])
                assert torch.equal(leading[1][c, head], prepared.Yt[c, head])
                taken += 1
    assert taken == (5 + 2 + 1) + (3 + 2 + 1)


def test_tables_of_packed_sequences():
    cu = torch.tensor([0, 100, 100, 170], device=DEVICE, dtype=torch.int32)
    tables = chunk_tables(1, 170, cu, DEVICE, piece_chunks=1)
    assert tables.chunks.tolist()[:4] == [[0, 0, 64, 0], [0, 64, 36, 1], [2, 100, 64, 0], [2, 164, 6, 1]]
    assert tables.pieces.tolist()[:5] == [
        [0, 0, 1, 0, 64, 1, 0, 1],
        [0, 1, 1, 64, 100, 0, 1, 0],
        [1, 2, 0, 100, 100, 1, 1, 0],
        [2, 2, 1, 100, 164, 1, 0, 1],
        [2, 3, 1, 164, 170, 0, 1, 0],
    ]
    assert all(entry[0] == -1 for entry in [*tables.chunks.tolist()[4:], *tables.pieces.tolist()[5:]])
    assert chunk_tables(1, 170, cu, DEVICE, piece_chunks=1) is tables
    cu[1:3] = 30  # in place: the cached tables are stale
    changed = chunk_tables(1, 170, cu, DEVICE, piece_chunks=1)
    assert changed.chunks.tolist()[:4] == [[0, 0, 30, 0], [2, 30, 64, 0], [2, 94, 64, 1], [2, 158, 12, 2]]


@pytest.mark.parametrize("bounds", [None, [0, 100, 100, 170]])
def test_tables_are_looked_up_for_who_records(bounds, monkeypatch):
    """By what gives the same tables for other boundaries too."""
    finds = []

    class Recorder:
        def look_up(self, find, of):
            finds.append(find)
            with monkeypatch.context() as patch:
                patch.setattr(thread, "recorder", None)
                return find(of)

    cu = None if bounds is None else torch.tensor(bounds, device=DEVICE)
    batch, other = (2, None) if cu is None else (1, cu // 2)
    with monkeypatch.context() as patch:
        patch.setattr(thread, "recorder", Recorder())
        tables = chunk_tables(batch, 170, cu, DEVICE, piece_chunks=1)
    for (chunks, pieces), of in (((tables.chunks, tables.pieces), cu), (finds[0](other), other)):
        wanted = chunk_tables(batch, 170, of, DEVICE, piece_chunks=1)
        assert torch.equal(chunks, wanted.chunks)
        assert torch.equal(pieces, wanted.pieces)
        assert tables.num_sequences == wanted.num_sequences


@pytest.mark.parametrize("cu", [[0, 90, 500], [-70, 90, 170], [100, 0, 170, 20, 170]])
@pytest.mark.parametrize("piece_chunks", [0, 1])
def test_tables_of_wrong_boundaries_stay_inside_the_batch(cu, piece_chunks, monkeypatch):
    sizes = []

    def guarded(*shape, **options):  # a margin of entries that no one may touch
        sizes.append(shape[0])
        return torch.full((shape[0] + 100, *shape[1:]), -7, **options)[: shape[0]]

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", guarded)
        tables = chunk_tables(1, 170, torch.tensor(cu, device=DEVICE), DEVICE, piece_chunks)
    for table, size in zip((tables.chunks, tables.pieces), sizes, strict=True):
        whole = table.as_strided((size + 100, table.shape[1]), table.stride())
        assert (whole[size:] == -7).all()
        assert (whole[:size] != -7).any(1).all()
    sequence, row, count = tables.chunks[:, :3].unbind(1)
    used = sequence >= 0
    assert ((row >= 0) & (count > 0) & (row + count <= 170))[used].all()


def test_tables_that_a_graph_captured_outlive_the_cache(monkeypatch):
    first = chunk_tables(1, 71, None, DEVICE)
    with monkeypatch.context() as patch:
        patch.setattr(tables_module, "_is_capturing", lambda device: True)
        assert chunk_tables(1, 71, None, DEVICE) is first
    alive = weakref.ref(first)
    del first
    for seqlen in range(100, 120):
        chunk_tables(1, seqlen, None, DEVICE)
    gc.collect()
    assert alive() is not None
    assert chunk_tables(1, 71, None, DEVICE) is not alive()  # out of the cache, yet not freed


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float64}, "float64"),
        ({"gate_dtype": torch.float64}, "g is float64"),
        ({"K": 24}, "K = 24"),
        ({"V": 320}, "V = 320"),
        ({"device_type": "cuda", "capability": (7, 5)}, "compute capability"),
    ],
)
def test_unsupported_names_the_reason(change, reason):
    fields = {"device_type": "cpu", "capability": None, "dtype": torch.float32, "gate_dtype": None, "beta_dtype": None}
    fields |= {"B": 1, "T": 64, "H": 1, "HV": 1, "K": 64, "V": 64, "N": 1}
    assert chunk_triton.unsupported(DeltaRuleCall(**fields)) is None
    assert reason in chunk_triton.unsupported(DeltaRuleCall(**(fields | change)))


def test_operation_has_a_correct_schema_and_fake():
    inputs = make_inputs(1, 20, 1, 1, 16, 16, N=1)
    names = ("q", "k", "v", "g", "beta", "scale", "initial_state", "output_final_state", "A_log", "dt_bias")
    arguments = (*(inputs[name] for name in names), None, True, False, False, False, None)
    outcome = torch.library.opcheck(
        torch.ops.gdn_cp.chunk_gated_delta_rule_fwd.default, arguments, test_utils=("test_schema", "test_faketensor")
    )
    assert set(outcome.values()) == {"SUCCESS"}


def test_chain_without_final_state():
    inputs = make_inputs(1, 20, 1, 1, 16, 16, N=1)
    tables = chunk_tables(1, 20, None, DEVICE)
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    prepared = prepare(q, k, inputs["g"], inputs["beta"], tables, scale=1.0, num_v_heads=1)
    options = {"scale": 1.0, "initial_state": None, "state_v_first": False}
    o, final, pieces = chain_forward(q, k, v, prepared, tables, output_final_state=False, **options)
    with_final, state, _ = chain_forward(q, k, v, prepared, tables, output_final_state=True, **options)
    assert final is None
    assert pieces is None
    assert state.shape == (1, 1, 16, 16)
    assert torch.equal(o, with_final)
