"""Draw the loss and throughput of a run again: python scripts/plot_run.py runs/tiny."""

from __future__ import annotations

from pathlib import Path

import tyro

from gdn_cp.training.plot import plot_run


def main(run: tyro.conf.Positional[Path], target: Path | None = None) -> None:
    """Draw `loss.png` (or `target`) from the metrics in the folder `run`."""
    print(plot_run(run, target))


if __name__ == "__main__":
    tyro.cli(main)
