"""`python -m gdn_cp.plan`: how a batch would be spread over a context-parallel group, for each choice, and why.

    python -m gdn_cp.plan --cu-seqlens 0,65536 --cp 8 --heads 16/32
    python -m gdn_cp.plan --lengths 4096,4096,57344 --cp 8 --heads 16/32 --machine h200 --json

Runs anywhere: it needs no GPU and starts no process group.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from itertools import accumulate

from gdn_cp.comm.planner import Plan, machine_names, plan
from gdn_cp.gated_delta_net import GdnDims

_COLUMNS = (
    "a2a_size",
    "tokens MB",
    "states MB",
    "halo MB",
    "kept MB",
    "exchange us",
    "states us",
    "rule us",
    "rows us",
    "matmul us",
    "host us",
    "total us",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, print the plan; 2 for arguments that make no plan."""
    options = _parser().parse_args(arguments)
    cu_seqlens = options.cu_seqlens or [0, *accumulate(options.lengths)]
    try:
        heads, widths = options.heads, options.head_dims
        dims = GdnDims(*heads, *widths, conv_kernel=options.conv_kernel)
        made = plan(
            cu_seqlens,
            options.cp,
            dims,
            kind=options.kind,
            element_size=options.element_size,
            hidden_size=options.hidden_size,
            machine=options.machine,
            peers=options.peers,
        )
    except ValueError as error:
        print(f"gdn_cp.plan: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(asdict(made) | {"cu_seqlens": list(cu_seqlens), "cp_size": options.cp}, indent=1))
    else:
        _print_table(made, f"{cu_seqlens[-1]} tokens, {len(cu_seqlens) - 1} sequences, cp {options.cp}, {options.kind}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m gdn_cp.plan", description="Choose a2a_size for a packed batch.")
    batch = parser.add_mutually_exclusive_group(required=True)
    batch.add_argument("--cu-seqlens", type=_ints, help="boundaries of the padded sequences: 0,4096,65536")
    batch.add_argument("--lengths", type=_ints, help="lengths of the padded sequences: 4096,61440")
    parser.add_argument("--cp", type=int, required=True, help="ranks of the context-parallel group")
    parser.add_argument(
        "--heads", type=_pair, required=True, help="q/k and value heads of one tensor-parallel rank: 16/32"
    )
    parser.add_argument("--head-dims", type=_pair, default=(128, 128), help="K/V (default 128/128)")
    parser.add_argument("--conv-kernel", type=int, default=4, help="taps of the convolution (default 4)")
    parser.add_argument("--kind", default="zigzag", help="zigzag (default), contiguous or batched")
    parser.add_argument("--element-size", type=int, default=2, help="bytes of an activation (default 2)")
    parser.add_argument("--hidden-size", type=int, help="of the layer (default: value heads * V / 2)")
    parser.add_argument("--machine", default="default", help=f"one of {', '.join(machine_names())}, or a JSON file")
    parser.add_argument("--peers", action="store_true", help="tokens move through peers' memory")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


def _ints(text: str) -> list[int]:
    return [int(word) for word in text.replace(",", " ").split()]


def _pair(text: str) -> tuple[int, int]:
    first, _, second = text.partition("/")
    return int(first), int(second or first)


def _rows(made: Plan) -> list[list[str]]:
    rows = []
    for p in made.predictions:
        name = f"{p.a2a_size} <-" if p.a2a_size == made.a2a_size else str(p.a2a_size)
        if p.refusal is not None:
            rows.append([name, *["-"] * (len(_COLUMNS) - 1)])
            continue
        sizes = (p.exchange_bytes, p.state_bytes, p.halo_bytes, p.kept_bytes)
        times = (p.exchange_us, p.state_us, p.rule_us, p.rows_us, p.matrices_us, p.host_us, p.total_us)
        rows.append([name, *(f"{size / 1e6:.2f}" for size in sizes), *(f"{time:.0f}" for time in times)])
    return rows


def _print_table(made: Plan, title: str) -> None:
    rows = _rows(made)
    if find_spec("rich") is not None:
        from rich.console import Console
        from rich.table import Table

        table = Table(*_COLUMNS, title=title)
        for column in table.columns:
            column.justify = "right"
        for row in rows:
            table.add_row(*row, style="bold" if row[0].endswith("<-") else None)
        Console(width=None if sys.stdout.isatty() else 130).print(table)
    else:
        widths = [max(map(len, column)) for column in zip(_COLUMNS, *rows, strict=True)]
        print(title)
        for row in (_COLUMNS, *rows):
            print("  ".join(word.rjust(width) for word, width in zip(row, widths, strict=True)))
    print("MB: sent by one rank in a layer's forward and backward (kept: held between them); us: predicted.")
    print(f"a2a_size {made.a2a_size}: {made.reason}")


if __name__ == "__main__":
    raise SystemExit(main())
