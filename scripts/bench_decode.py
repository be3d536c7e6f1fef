"""Decode from banks of states against a copy of as many bytes. See bench_kernels.py."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from kernel_cases import LIMIT, Case, machine, make_inputs, relative_error, write_json
from kernel_timing import DEVICE, copy_time, time_best, time_eager
from torch import Tensor

from gdn_cp.kernels.recurrent import fused_recurrent_gated_delta_rule
from gdn_cp.kernels.reference import recurrent_gated_delta_rule_reference

FLAGS: dict[str, Any] = {
    "use_qk_l2norm_in_kernel": True,
    "use_gate_in_kernel": True,
    "use_beta_sigmoid_in_kernel": True,
}


@dataclass
class Decode:
    """One token of many requests, states in a bank."""

    output: Path = Path("benchmarks/results/decode.json")
    """Where the JSON goes."""
    requests: int = 128
    """Requests of the batch."""
    heads: tuple[int, int] = (16, 32)
    """Query/key heads and value heads."""
    dim: int = 128
    """K and V."""
    repeats: int = 20
    """Repetitions of each timing."""
    tune: bool = False
    """Time other tiles too (for K = 128) and print the best for each kind of bank."""


@dataclass(frozen=True)
class Problem:
    """One bank, the tokens of a step, and the step itself, which changes the bank."""

    name: str
    inputs: dict[str, Tensor]
    bank: Tensor
    slots: Tensor
    v_first: bool

    @property
    def state_bytes(self) -> int:
        """Bytes that a step must move: each request's states once in and once out."""
        return 2 * len(self.slots) * self.bank[0].nbytes

    def step(self) -> Tensor:
        """One token of every request."""
        return fused_recurrent_gated_delta_rule(
            **self.inputs,
            **FLAGS,
            initial_state=self.bank,
            state_indices=self.slots,
            state_v_first=self.v_first,
        )[0]

    def errors(self) -> dict[str, float]:
        """Relative errors of output and states against the float64 recurrence."""
        before = self.bank[self.slots.long()].double()
        o = self.step()
        exact = {name: x.double() for name, x in self.inputs.items()}
        o_64, final_64 = recurrent_gated_delta_rule_reference(
            **exact, **FLAGS, initial_state=before, output_final_state=True, state_v_first=self.v_first
        )
        assert final_64 is not None
        return {"o": relative_error(o, o_64), "state": relative_error(self.bank[self.slots.long()], final_64)}


def make_problem(requests: int, heads: tuple[int, int], dim: int, dtype: torch.dtype, v_first: bool) -> Problem:
    """Random tokens and states of K = V = `dim`; the requests' slots are scattered over the bank."""
    case = Case("decode", 1, heads=heads, dims=(dim, dim), batch=requests, v_first=v_first)
    bank = torch.randn(requests, heads[1], dim, dim, device=DEVICE).to(dtype)
    slots = torch.randperm(requests, device=DEVICE).int()
    name = f"{str(dtype)[6:]} {'[V, K]' if v_first else '[K, V]'}"
    return Problem(name, make_inputs(case, DEVICE), bank, slots, v_first)


def tune(problem: Problem, repeats: int) -> list[dict[str, Any]]:
    """Times of other tiles for this bank, the best first; the shipped ones stand in `recurrent_triton.choose_tile`."""
    from gdn_cp.kernels import recurrent_triton as kernel

    shipped = kernel.choose_tile
    dot = problem.bank.dtype == torch.bfloat16 and not problem.v_first
    if problem.v_first:
        tiles = [kernel.Tile(128, BV, warps, False) for BV in (8, 16, 32) for warps in (1, 2)]
    else:
        shapes = [(BV, warps) for BV in (32, 64, 128) for warps in (1, 2, 4, 8) if 4 <= BV * 4 // warps <= 256]
        tiles = [kernel.Tile(128, *shape, dot) for shape in shapes]
    found = []
    for tile in tiles:
        kernel.choose_tile = lambda *_, tile=tile: tile
        try:
            found.append({**tile._asdict(), "ms": time_best(problem.step, repeats)})
        except Exception as error:
            found.append({**tile._asdict(), "ms": float("inf"), "error": str(error)[:100]})
    kernel.choose_tile = shipped
    return sorted(found, key=lambda entry: entry["ms"])


def run_decode(options: Decode) -> int:
    """Check and time decode from each kind of bank against a copy of as many bytes; 1 if a result is wrong."""
    rows: list[dict[str, Any]] = []
    for dtype in (torch.float32, torch.bfloat16):
        for v_first in (False, True):
            problem = make_problem(options.requests, options.heads, options.dim, dtype, v_first)
            found = problem.errors()
            if not max(found.values()) <= LIMIT:
                print(f"decode from {problem.name} is wrong, nothing is timed: {found}")
                return 1
            copy, graph = copy_time(problem.state_bytes, options.repeats), time_best(problem.step, options.repeats)
            row = {"bank": problem.name, "requests": options.requests, "ms": graph, "copy_ms": copy, "errors": found}
            row |= {"eager_ms": time_eager(problem.step, options.repeats), "state_bytes": problem.state_bytes}
            if options.tune:
                row["tiles"] = tune(problem, options.repeats)
            rows.append(row)
    content = {"kind": "decode", "heads": options.heads, "dim": options.dim, "machine": machine(), "rows": rows}
    write_json(options.output, content)
    print_decode_table(rows, options)
    return 0


def print_decode_table(rows: list[dict[str, Any]], options: Decode) -> None:
    """Microseconds; the ratio is to a copy that moves the states' bytes once each way."""
    print(f"decode, {options.requests} requests, H/HV {options.heads}, K = V = {options.dim}: microseconds in a graph")
    print(f"{'bank':18} {'decode':>8} {'copy':>8} {'ratio':>6} {'TB/s':>6} {'eager':>8}  largest error")
    for row in rows:
        speed = row["state_bytes"] / row["ms"] / 1e9
        print(
            f"{row['bank']:18} {row['ms'] * 1e3:8.1f} {row['copy_ms'] * 1e3:8.1f} {row['ms'] / row['copy_ms']:6.3f} "
            f"{speed:6.2f} {row['eager_ms'] * 1e3:8.1f}  {max(row['errors'].values()):.1e}"
        )
        for tile in row.get("tiles", [])[:4]:
            print(f"    {tile['ms'] / row['copy_ms']:6.3f} {tile}")
