"""The chunked delta rule against other implementations: forward, forward and backward, memory. See bench_kernels.py.

Dimensions: H query/key heads, HV value heads.
"""

from __future__ import annotations

import math
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from check_kernels import mixed_lengths
from kernel_cases import (
    LIMIT,
    Case,
    Contender,
    errors,
    load_fla,
    load_flash_infer,
    load_flash_qla,
    machine,
    make_inputs,
    oracle,
    ours,
    run_with_gradients,
    write_json,
)
from kernel_timing import DEVICE, compile_share_only, measure_memory, quicken_autotuner, time_eager, time_graph
from torch import Tensor

HEADS = ((16, 32), (8, 16), (4, 8), (2, 4))  # Qwen3-Next's heads, and a rank's under TP or CP of 2, 4, 8
LENGTHS = (8192, 32768, 65536)
TUNING_TOKENS = 16384  # what the others' autotuners see; their choice does not depend on the length
SHARES = 4  # processes that compile another's configurations for one head count
LOADERS: dict[str, Callable[[], Contender | str]] = {
    "gdn_cp": ours,
    "fla": load_fla,
    "flash_qla": load_flash_qla,
    "flashinfer": load_flash_infer,
}


@dataclass
class Chunk:
    """The chunked delta rule: forward, forward and backward, memory."""

    output: Path = Path("benchmarks/results/chunk.json")
    """Where the JSON goes."""
    others: tuple[str, ...] = ("fla", "flash_qla", "flashinfer")
    """Implementations to compare with, where they can be imported."""
    heads: tuple[tuple[int, int], ...] = HEADS
    """Pairs of query/key heads and value heads."""
    qla_heads: tuple[tuple[int, int], ...] = HEADS[:2]
    """Heads that FlashQLA is timed on: it compiles for a minute per head count."""
    tokens: tuple[int, ...] = LENGTHS
    """Tokens of the batch."""
    repeats: int = 10
    """Repetitions of each timing."""
    jobs: int = 16
    """Processes that compile; 0: none, everything is compiled as it is met."""


@dataclass
class Row:
    """One measured shape and implementation; milliseconds, bytes per token, bytes."""

    contender: str
    heads: tuple[int, int]
    tokens: int
    sequences: int
    forward_eager: float | None = None
    forward_graph: float | None = None
    both_eager: float | None = None
    both_graph: float | None = None
    kept_bytes_per_token: float | None = None
    peak_bytes: int | None = None
    error: str = ""
    extra: dict[str, Any] = field(default_factory=dict)


def bench_case(heads: tuple[int, int], tokens: int, packed: bool) -> Case:
    """Log decays and step sizes come computed, which is what all contenders can take."""
    lengths = mixed_lengths(tokens, 16) if packed else None
    return Case(f"{heads[0]}/{heads[1]} x {tokens}", tokens, heads=heads, lengths=lengths, beta=False, gate=-0.05)


def bench_inputs(case: Case) -> dict[str, Tensor]:
    """`make_inputs`, gates as a model has them at initialisation: some heads hardly forget, some within 16 tokens."""
    from gdn_cp.kernels.gate import gdn_gate_reference

    raw = Case(case.name, case.tokens, case.heads, case.dims, case.lengths, gate="raw", seed=case.seed)
    inputs = make_inputs(raw, DEVICE)
    inputs["g"] = gdn_gate_reference(inputs["g"], inputs.pop("A_log"), inputs.pop("dt_bias"))
    inputs["beta"] = inputs.pop("beta").float().sigmoid().to(case.dtype)
    return inputs


def check_contender(contender: Contender, heads: tuple[int, int]) -> dict[str, float]:
    """Largest relative errors against float64, over one long sequence and a packed batch of 2,048 tokens."""
    found: dict[str, float] = {}
    for packed in (False, True):
        case = bench_case(heads, 2048, packed)
        inputs, cu_seqlens = bench_inputs(case), case.cu_seqlens(DEVICE)
        expected = oracle(inputs, case, cu_seqlens)
        if contender.forward_only:
            with torch.no_grad():
                results = {"o": contender.call(**inputs, **case.flags(), cu_seqlens=cu_seqlens)[0]}
        else:
            results = run_with_gradients(contender.call, inputs, case, cu_seqlens)
        for name, error in errors(results, expected, inputs).items():
            found[name] = max(found.get(name, 0.0), error if math.isfinite(error) else math.inf)
    return found


def measure(contender: Contender, case: Case, repeats: int) -> Row:
    """Time one implementation on one shape; what fails is said in the row and does not stop the others."""
    row = Row(contender.name, case.heads, case.tokens, len(case.lengths or (0,)))
    inputs, cu_seqlens = bench_inputs(case), case.cu_seqlens(DEVICE)
    weight = torch.randn_like(inputs["v"])
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    call = {**leaves, **case.flags(), "cu_seqlens": cu_seqlens}

    def forward() -> Tensor:
        return contender.call(**call)[0]

    def inference() -> Tensor:
        with torch.no_grad():
            return forward()

    def backward(o: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(o, list(leaves.values()), weight)

    def both() -> tuple[Tensor, ...]:
        return backward(forward())

    try:
        row.forward_eager = time_eager(inference, repeats)
        if not contender.forward_only:
            row.both_eager = time_eager(both, repeats)
            memory = measure_memory(forward, backward)
            if memory is not None:
                row.kept_bytes_per_token, row.peak_bytes = memory[0] / case.tokens, memory[1]
        row.forward_graph = time_graph(inference, repeats)
        if not contender.forward_only:
            row.both_graph = time_graph(both, repeats)
    except Exception as error:
        row.error = f"{type(error).__name__}: {str(error)[:200]}"
    return row


def _compile_others(name: str, heads: tuple[int, int], share: int) -> None:
    """Work item: compile a share of another implementation's configurations, for one sequence and packed."""
    from triton.runtime.autotuner import Autotuner

    compile_share_only(share, SHARES)
    tuners: list[Autotuner] = []
    construct = Autotuner.__init__

    def remember(self: Autotuner, *args: Any, **kwargs: Any) -> None:
        construct(self, *args, **kwargs)
        tuners.append(self)

    Autotuner.__init__ = remember
    contender = LOADERS[name]()
    if isinstance(contender, str):
        return
    for packed in (False, True):
        for tuner in tuners:
            tuner.cache.clear()
        _run_once(contender, bench_case(heads, TUNING_TOKENS, packed))


def _compile_ours(heads: tuple[int, int], tokens: int, packed: bool) -> None:
    _run_once(ours(), bench_case(heads, tokens, packed))


def _compile_qla(heads: tuple[int, int]) -> None:
    contender = load_flash_qla()
    if isinstance(contender, Contender):
        for tokens in LENGTHS[:2]:
            _run_once(contender, bench_case(heads, tokens, False))
            _run_once(contender, bench_case(heads, tokens, True))


def _run_once(contender: Contender, case: Case) -> None:
    inputs = {name: x.requires_grad_() for name, x in bench_inputs(case).items()}
    o, _ = contender.call(**inputs, **case.flags(), cu_seqlens=case.cu_seqlens(DEVICE))
    torch.autograd.grad(o, list(inputs.values()), torch.ones_like(o))


def compile_everything(options: Chunk) -> None:
    """Fill the compilers' caches from a pool of processes; what fails here fails again, and is reported, when timed."""
    work: list[tuple[Callable[..., None], tuple]] = []
    if "flash_qla" in options.others:
        work += [(_compile_qla, (heads,)) for heads in options.qla_heads]
    for heads in options.heads:
        if "fla" in options.others:
            work += [(_compile_others, ("fla", heads, share)) for share in range(SHARES)]
        work += [(_compile_ours, (heads, tokens, packed)) for tokens in options.tokens for packed in (False, True)]
    failures = []
    with multiprocessing.get_context("spawn").Pool(options.jobs, maxtasksperchild=1) as pool:
        for item in [pool.apply_async(function, arguments) for function, arguments in work]:
            try:
                item.get()
            except Exception as error:
                failures.append(f"{type(error).__name__}: {str(error)[:200]}")
    for failure in sorted(set(failures)):
        print(f"while compiling ahead: {failure}")


def run_chunk(options: Chunk) -> int:
    """Check, tune and time; 1 if our own results are wrong."""
    started = time.monotonic()
    if options.jobs:
        compile_everything(options)
    print(f"compiled ahead in {time.monotonic() - started:.0f} s")
    quicken_autotuner()
    rows: list[Row] = []
    notes: dict[str, str] = {}
    accuracy: dict[str, dict[str, float]] = {}
    for name in ("gdn_cp", *options.others):
        contender = LOADERS[name]()
        if isinstance(contender, str):
            notes[name] = contender
            continue
        for heads in options.qla_heads if name == "flash_qla" else options.heads:
            if not _fit_to_time(contender, heads, accuracy, notes):
                if name == "gdn_cp":
                    print(f"our own results are wrong, nothing is timed: {accuracy}")
                    return 1
                continue
            if name == "fla":
                _run_once(contender, bench_case(heads, TUNING_TOKENS, False))
            for tokens in options.tokens:
                for packed in (False, True):
                    rows.append(measure(contender, bench_case(heads, tokens, packed), options.repeats))
    content = {"kind": "chunk", "machine": machine(), "notes": notes, "errors": accuracy}
    write_json(options.output, {**content, "rows": [asdict(row) for row in rows]})
    print_chunk_table(rows, notes)
    return 0


def _fit_to_time(
    contender: Contender,
    heads: tuple[int, int],
    accuracy: dict[str, dict[str, float]],
    notes: dict[str, str],
) -> bool:
    """Check against float64 and keep the errors; say in `notes` what is odd."""
    key = f"{contender.name} {heads[0]}/{heads[1]}"
    try:
        accuracy[key] = check_contender(contender, heads)
    except Exception as error:
        notes[key] = f"does not run: {type(error).__name__}: {str(error)[:200]}"
        return False
    wrong = {name: error for name, error in accuracy[key].items() if not error <= LIMIT}
    if contender.note:
        notes[contender.name] = contender.note
    if wrong:
        notes[key] = f"wrong: {', '.join(f'{name} {error:.1e}' for name, error in wrong.items())}"
    return not wrong or bool(contender.note)


def print_chunk_table(rows: list[Row], notes: dict[str, str]) -> None:
    """Ours beside each other implementation, and geometric means of the ratios of times."""
    for name, note in notes.items():
        print(f"note: {name}: {note}")
    mine = [row for row in rows if row.contender == "gdn_cp"]
    for other in sorted({row.contender for row in rows} - {"gdn_cp"}) or ["gdn_cp"]:
        theirs = {(row.heads, row.tokens, row.sequences): row for row in rows if row.contender == other}
        _print_pairs(other, [(row, theirs.get((row.heads, row.tokens, row.sequences))) for row in mine])


def _print_pairs(other: str, pairs: list[tuple[Row, Row | None]]) -> None:
    print(
        f"\nmilliseconds, ours and {other}'s; x = times faster; GiB at the peak above the inputs; bytes kept per token"
    )
    print(" H/HV  tokens seqs |   forward graph      x |   fwd+bwd graph      x |   fwd+bwd eager      x | peak | kept")
    ratios: dict[str, list[float]] = {"forward_graph": [], "both_graph": [], "both_eager": []}
    for row, their in pairs:
        if their is None:
            continue
        cells = [_compare(row, their, name, ratios[name]) for name in ratios]
        memory = f"{_gib(row.peak_bytes)} {_gib(their.peak_bytes)}"
        kept = f"{row.kept_bytes_per_token or 0:.0f} {their.kept_bytes_per_token or 0:.0f}"
        shape = f"{row.heads[0]:2d}/{row.heads[1]:<2d} {row.tokens:7d} {row.sequences:4d}"
        print(f"{shape} | {' | '.join(cells)} | {memory} | {kept} {row.error} {their.error}".rstrip())
    for name, values in ratios.items():
        if values:
            mean = math.exp(sum(map(math.log, values)) / len(values))
            print(f"{name}: geometric mean {mean:.2f}x, worst {min(values):.2f}x of {len(values)}")


def _compare(row: Row, their: Row, name: str, ratios: list[float]) -> str:
    mine, other = getattr(row, name), getattr(their, name)
    if mine is None or other is None:
        return f"{mine or math.nan:7.3f} {other or math.nan:7.3f}      -"
    ratios.append(other / mine)
    return f"{mine:7.3f} {other:7.3f} {other / mine:6.2f}"


def _gib(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**30:.2f}"
