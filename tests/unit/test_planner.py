"""The planner: its geometry against the layout, its bytes against what travels, its choices and its command."""

from __future__ import annotations

import doctest
import json
from dataclasses import replace
from itertools import accumulate
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gdn_cp import GdnDims
from gdn_cp import plan as plan_command
from gdn_cp.comm import planner
from gdn_cp.comm.halo import halo_routes
from gdn_cp.comm.layout import ThdLayout
from gdn_cp.comm.planner import Machine, Prediction, plan
from gdn_cp.comm.state_gather import state_gather
from gdn_cp.comm.states import state_routes
from tests.state_cases import build, divisors, packs

DIMS = GdnDims(16, 32, 128, 128)


def test_docstring_examples():
    assert doctest.testmod(planner).failed == 0


@pytest.mark.parametrize("gathered", [True, False])
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_bytes_are_at_least_what_travels_and_not_much_more(data, gathered):
    world, kind = data.draw(st.sampled_from([2, 4, 8])), data.draw(st.sampled_from(["zigzag", "contiguous", "batched"]))
    dims = GdnDims(8, 16, 8, 4)
    cu = data.draw(packs(world, kind))
    layout = build(kind, cu, world)
    with mock.patch.object(planner, "GATHER_BYTES", 2**40 if gathered else 0):
        predictions = plan(cu, world, dims, kind=kind).predictions
    for prediction in predictions:
        a2a_size = prediction.a2a_size
        heads, groups = 16 // a2a_size, world // a2a_size
        found = [(gathered_states if gathered else composed_states)(layout, a2a_size, g, heads) for g in range(groups)]
        sent, kept = (max(column) for column in zip(*found, strict=True))
        if gathered:
            assert prediction.state_bytes == sent
            assert prediction.kept_bytes >= kept  # M of all chains, where a rank keeps those that touch it
        else:
            # The model takes even shares of the composing; a rank's share differs by less than two chains' states.
            slack = 8 * 8 * 4 * 4 * groups + 4 * 8 * 8 * heads
            assert abs(prediction.state_bytes - sent) <= slack + prediction.state_bytes / 2
            assert abs(prediction.kept_bytes - kept) <= slack
        assert (prediction.state_bytes > 0) == (sent > 0) == (prediction.state_us > 0)
        # A halo counts at its full width, which short sequences do not have; it goes out and its gradient back.
        rows = [sum(halo_routes(layout, a2a_size, g, 4).send_counts) for g in range(groups)]
        assert prediction.halo_bytes >= 2 * max(rows) * (2 * 8 * 8 + 16 * 4) // a2a_size
        tokens = 2 * (2 * 8 * 8 + 2 * 16 * 4 + 2 * 16) * cu[-1] // world * 2 * (a2a_size - 1) // a2a_size
        assert prediction.exchange_bytes == tokens


def composed_states(layout: ThdLayout, a2a_size: int, g: int, heads: int) -> tuple[int, int]:
    """Bytes of states [8, 4] and M [8, 8] in float32 that a rank sends to others, and keeps, through composers."""
    routes = state_routes(layout, a2a_size, g, heads)
    away = [c for c in range(layout.cp_size // a2a_size) if c != g]
    members = {name: getattr(routes, name) for name in ("leaving", "entering", "transfer")}
    out = {name: sum(route.to_composers[c] for c in away) for name, route in members.items()}
    back = {name: sum(route.from_members[c] for c in away) for name, route in members.items()}
    states = out["leaving"] + out["entering"] + back["entering"] + back["leaving"]
    kept = 4 * routes.segments * heads + 8 * sum(routes.transfer.from_members)
    return 4 * 8 * (4 * states + 8 * out["transfer"]), 4 * 8 * kept if routes.travels else 0


def gathered_states(layout: ThdLayout, a2a_size: int, g: int, heads: int) -> tuple[int, int]:
    """The same where all ranks gather all laws."""
    if not state_routes(layout, a2a_size, g, heads).travels:
        return 0, 0
    made = state_gather(layout, a2a_size, g, heads)
    laws = made.slots * heads * 4 * 8 * ((4 + 8) + 4)  # forward (S_ext | M), backward dS_ext
    return (made.members - 1) * laws, 4 * 8 * (4 * made.segments * heads + 8 * made.kept)


def test_long_sequences_take_states_and_many_short_ones_the_exchange():
    for machine in planner.machine_names():
        for tokens in (65536, 262144):
            assert plan([0, tokens], 4, DIMS, machine=machine).a2a_size == 1
        assert plan([0, *accumulate([1024] * 64)], 4, DIMS, machine=machine).a2a_size == 4


def test_few_tokens_take_what_the_host_launches_soonest():
    """Where the device is done before the host, nothing but the host's time counts."""
    machine = replace(Machine.named("h200"), host_us=1e4, host_exchange_us=1.0, host_state_us=500.0)
    made = plan([0, 32768], 4, DIMS, machine=machine)
    assert [p.total_us for p in made.predictions] == [10500.0, 10501.0, 10001.0]
    assert made.a2a_size == 4
    assert "most is gained on host" in made.reason


def test_projections_give_the_host_time():
    """The same tokens in a layer of more columns: the device has work, and what the host launches last may win."""
    machine = replace(Machine.named("h200"), host_us=1e4, host_exchange_us=1.0, host_state_us=500.0)
    plans = [plan([0, 32768], 4, DIMS, machine=machine, hidden_size=hidden) for hidden in (2048, 16384)]
    assert [made.a2a_size for made in plans] == [4, 1]
    operations = 6 * 8192 * 2048 * (2 * 16 * 128 + 2 * 32 * 128 + 2 * 32 + 32 * 128)
    for prediction in plans[0].predictions:
        assert prediction.matrices_us == pytest.approx(operations / (machine.matmul_tflops * 1e6))
    assert plan([0, 32768], 4, DIMS, machine=machine) == plans[0]


def test_peers_memory_moves_the_tokens_and_states_of_one_node():
    machine = replace(Machine.named("h200"), link_gb_per_s=100.0, peer_gb_per_s=400.0, peer_latency_us=2.0)
    collective, peers = (plan([0, 65536], 8, DIMS, machine=machine, peers=on).predictions for on in (False, True))
    for before, after in zip(collective[1:], peers[1:], strict=True):
        assert after.exchange_us == pytest.approx(after.exchange_bytes / 400e3 + 8)
        assert after.exchange_us < before.exchange_us
    wire = [(p.state_bytes + p.halo_bytes) / (speed * 1e3) for p, speed in ((collective[1], 100), (peers[1], 400))]
    latencies = 4 * (machine.link_latency_us - 2)
    saved = collective[1].state_us - peers[1].state_us
    assert saved == pytest.approx(wire[0] - wire[1] + latencies)
    # Laws of eight ranks, 64 MiB, are composed by others where they travel in collectives.
    assert peers[0].kept_bytes > collective[0].kept_bytes
    far = replace(machine, ranks_per_node=4)
    assert plan([0, 65536], 8, DIMS, machine=far, peers=True) == plan([0, 65536], 8, DIMS, machine=far)


def test_several_nodes_take_the_exchange_inside_a_node():
    # 32 ranks on 4 nodes, and so many sequences that one rank alone would send many states: only states between nodes.
    chosen = plan([0, *accumulate([32768] * 32)], 32, replace(DIMS, num_k_heads=32), machine="h200")
    assert 1 < chosen.a2a_size <= 8


def test_only_sizes_that_divide_the_heads():
    odd = plan([0, 4096], 4, GdnDims(3, 6, 64, 64))
    assert odd.a2a_size == 1
    assert [p.a2a_size for p in odd.predictions if p.refusal is None] == [1]
    assert "3/6 heads do not divide by 2" in odd.reason
    assert [p.a2a_size for p in plan([0, 4096], 8, DIMS).predictions] == divisors(8)


def test_one_rank_and_empty_batches_have_a_plan():
    alone = plan([0, 100], 1, DIMS)
    assert (alone.a2a_size, alone.predictions[0].exchange_bytes, alone.predictions[0].state_bytes) == (1, 0, 0)
    assert "the only possible size" in alone.reason
    assert plan([0, 0, 0], 4, DIMS).a2a_size == 1
    # No sequence is cut: nothing to pass, so nothing to exchange either.
    whole = plan([0, 4096, 8192], 2, DIMS, kind="contiguous")
    assert (whole.a2a_size, whole.predictions[0].state_us) == (1, 0.0)


def test_same_arguments_same_plan():
    assert plan([0, 8192, 65536], 8, DIMS) == plan((0, 8192, 65536), 8, replace(DIMS))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cu_seqlens": [0, 30]}, r"sequence 0 has length 30, not divisible by 2\*cp_size = 8"),
        ({"cu_seqlens": [0, 30], "kind": "contiguous"}, "30 tokens, not divisible by cp_size = 4"),
        ({"hidden_size": 0}, "hidden_size: got 0; it must be at least 1"),
        ({"kind": "spiral"}, "kind: got 'spiral'; choose one of 'zigzag', 'contiguous', 'batched'"),
        (
            {"machine": "abacus"},
            "machine: got 'abacus'; choose one of .*'default', 'h200'.* or the path of a JSON file",
        ),
    ],
)
def test_refusals(change, message):
    arguments = {"cu_seqlens": [0, 64], "cp_size": 4, "dims": DIMS} | change
    with pytest.raises(ValueError, match=message):
        plan(**arguments)


def test_machine_of_a_file(tmp_path):
    slow = replace(Machine.named("default"), description="slow network", link_gb_per_s=1.0)
    path = tmp_path / "slow.json"
    path.write_text(json.dumps(slow.__dict__))
    assert Machine.named(str(path)) == slow
    # At 1 GB/s the exchange of 1024 tokens a rank costs more than the states of four sequences.
    lengths = [0, *accumulate([1024] * 4)]
    assert plan(lengths, 4, DIMS, machine=str(path)).a2a_size == plan(lengths, 4, DIMS, machine=slow).a2a_size
    path = tmp_path / "short.json"
    path.write_text('{"description": "no numbers"}')
    with pytest.raises(ValueError, match="has the keys"):
        Machine.named(str(path))


def test_command_prints_every_choice_and_why(capsys):
    assert plan_command.main(["--cu-seqlens", "0,65536", "--cp", "8", "--heads", "16/32"]) == 0
    out = capsys.readouterr().out
    assert "65536 tokens, 1 sequences, cp 8, zigzag" in out
    assert "a2a_size 1: states only" in out
    for a2a_size in (2, 4, 8):
        assert f" {a2a_size} " in out


def test_command_without_rich(capsys, monkeypatch):
    monkeypatch.setattr(plan_command, "find_spec", lambda name: None)
    arguments = ["--lengths", "4096,4096", "--cp", "2", "--heads", "3/6", "--head-dims", "64", "--machine", "h200"]
    assert plan_command.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[0] == "a2a_size"
    assert lines[2].split()[:2] == ["1", "<-"]
    assert lines[3].split() == ["2", *["-"] * 11]
    assert "3/6 heads do not divide by 2" in lines[-1]


def test_command_in_json(capsys):
    assert plan_command.main(["--cu-seqlens", "0,65536", "--cp", "4", "--heads", "16/32", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    made = plan([0, 65536], 4, DIMS)
    assert printed["a2a_size"] == made.a2a_size
    assert [Prediction(**p) for p in printed["predictions"]] == list(made.predictions)


def test_command_refuses_with_the_reason(capsys):
    assert plan_command.main(["--lengths", "30", "--cp", "4", "--heads", "16/32"]) == 2
    assert "not divisible by 2*cp_size = 8" in capsys.readouterr().err
