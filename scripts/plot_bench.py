"""Draw what the bench scripts wrote: one picture for each JSON file, beside it.

python scripts/plot_bench.py benchmarks/results/chunk.json benchmarks/results/decode.json
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import tyro

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure


@dataclass
class Options:
    """Draw benchmark results."""

    files: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """JSON files of bench_kernels.py, bench_exchange.py, bench_layer.py; each gives a .png of its name."""
    forward: bool = False
    """Draw the forward instead of forward and backward."""


def plot_chunk(content: dict[str, Any], forward: bool) -> Figure:
    """Time per token over the length, one panel for each head count; lines: implementation, one sequence or packed."""
    name = "forward" if forward else "both"
    rows = [row for row in content["rows"] if _best(row, name) is not None]
    heads = sorted({tuple(row["heads"]) for row in rows}, reverse=True)
    figure, axes = plt.subplots(1, len(heads), figsize=(4 * len(heads), 3.6), sharey=False, squeeze=False)
    for axis, head in zip(axes[0], heads, strict=True):
        _plot_heads(axis, [row for row in rows if tuple(row["heads"]) == head], name)
        axis.set_title(f"H={head[0]}, HV={head[1]}")
    axes[0][0].set_ylabel("forward" if forward else "forward + backward, ns per token")
    axes[0][-1].legend(fontsize=7)
    return figure


def _plot_heads(axis: Axes, rows: list[dict[str, Any]], name: str) -> None:
    kinds = sorted({(row["contender"], row["sequences"] > 1) for row in rows})
    for contender, packed in kinds:
        mine = [row for row in rows if (row["contender"], row["sequences"] > 1) == (contender, packed)]
        line = sorted((row["tokens"], _best(row, name) or 0.0) for row in mine)
        label = f"{contender}, {'packed' if packed else 'one sequence'}"
        style = "--" if packed else "-"
        axis.plot([x for x, _ in line], [1e6 * y / x for x, y in line], style, marker="o", markersize=3, label=label)
    axis.set_xscale("log", base=2)
    axis.set_ylim(bottom=0)
    axis.set_xlabel("tokens")


def _best(row: dict[str, Any], name: str) -> float | None:
    graph = row[f"{name}_graph"]
    return row[f"{name}_eager"] if graph is None else graph


def plot_bars(content: dict[str, Any]) -> Figure:
    """Microseconds of decode or gate beside a copy of the same bytes."""
    rows = content["rows"]
    decode = content["kind"] == "decode"
    names = [row["bank"] if decode else row["name"] for row in rows]
    figure, axis = plt.subplots(figsize=(1.6 * len(rows) + 2, 3.6))
    ours = [1e3 * row["ms" if decode else "both"] for row in rows]
    copies = [1e3 * row["copy_ms" if decode else "copy"] for row in rows]
    places = range(len(rows))
    axis.bar([x - 0.2 for x in places], ours, 0.4, label="decode" if decode else "forward + backward")
    axis.bar([x + 0.2 for x in places], copies, 0.4, label="copy of the same bytes")
    axis.set_xticks(list(places), names)
    axis.set_ylabel("microseconds")
    axis.legend()
    return figure


def plot_groups(content: dict[str, Any], group: str, member: str, value: str, label: str) -> Figure:
    """Bars of row[value], side by side for each row[group], one colour for each row[member]."""
    rows = [row for row in content["rows"] if row.get(value) is not None]
    groups, members = (list(dict.fromkeys(row[name] for row in rows)) for name in (group, member))
    figure, axis = plt.subplots(figsize=(1.5 * len(groups) + 4, 3.8))
    width = 0.8 / len(members)
    for index, name in enumerate(members):
        mine = [row for row in rows if row[member] == name]
        places = [groups.index(row[group]) + (index + 0.5) * width - 0.4 for row in mine]
        axis.bar(places, [row[value] for row in mine], width, label=name)
    axis.set_xticks(range(len(groups)), [str(name) for name in groups])
    axis.set_ylabel(label)
    axis.set_title(f"{content['ranks']} ranks", fontsize=9)
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def plot_layer(content: dict[str, Any]) -> Figure:
    """Time per token of the batch, which makes cases of all sizes comparable."""
    for row in content["rows"]:
        row["per_token"] = None if row["eager_ms"] is None else 1e6 * row["eager_ms"] / row["tokens"]
    return plot_groups(content, "case", "contender", "per_token", "forward + backward, ns per token")


def draw(content: dict[str, Any], forward: bool) -> Figure:
    """The picture of a file's kind."""
    if content["kind"] == "chunk":
        return plot_chunk(content, forward)
    if content["kind"] == "layer":
        return plot_layer(content)
    if content["kind"] == "exchange":
        return plot_groups(content, "tokens", "path", "in_gb_per_s", "GB/s leaving a rank, way in")
    return plot_bars(content)


def main(options: Options) -> int:
    """Write a .png beside each file."""
    for path in options.files:
        content = json.loads(path.read_text())
        figure = draw(content, options.forward)
        where = content["machine"]
        figure.suptitle(
            f"{where['device']}, torch {where['torch']}, triton {where['triton']}, {where['commit']}", fontsize=8
        )
        figure.tight_layout()
        figure.savefig(path.with_suffix(".png"), dpi=150)
        plt.close(figure)
        print(path.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
