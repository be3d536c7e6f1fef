"""The picture of a run: loss against the entropy of single tokens, and throughput."""

from __future__ import annotations

from pathlib import Path

from gdn_cp.training.metrics import METRICS_FILE, read_last, read_steps


def plot_run(run: Path, target: Path | None = None) -> Path:
    """Draw loss and throughput of the run in folder `run` from its metrics file; returns the PNG's path.

    Raises ValueError where the folder holds no steps.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    metrics = run / METRICS_FILE
    steps = read_steps(metrics) if metrics.exists() else []
    if not steps:
        raise ValueError(f"run={str(run)!r} holds no training steps ({METRICS_FILE}); give the folder of a run")
    start = read_last(metrics, "start") or {}
    steps = [record for record in steps if record["loss"] is not None]  # a loss that was not finite has no place
    x = [record["step"] for record in steps]

    figure, (loss, speed) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    loss.plot(x, [record["loss"] for record in steps], color="tab:blue", label="training loss")
    if "unigram_entropy" in start:
        entropy = start["unigram_entropy"]
        loss.axhline(entropy, color="tab:red", linestyle="--", label=f"unigram entropy {entropy:.3f}")
    loss.set(xlabel="step", ylabel="nats per token", title="Loss")
    loss.legend()
    loss.grid(alpha=0.3)

    unit = start.get("unit", "rank")
    speed.plot(x, [record["tokens_per_second"] for record in steps], color="tab:green", label="all ranks")
    speed.plot(x, [record["tokens_per_second_per_rank"] for record in steps], color="tab:olive", label=f"per {unit}")
    speed.set(xlabel="step", ylabel="real tokens per second", title="Throughput")
    speed.set_ylim(bottom=0)
    speed.legend()
    speed.grid(alpha=0.3)

    if "layout" in start:
        figure.suptitle(start["layout"], fontsize=10)
    target = target or run / "loss.png"
    figure.savefig(target, dpi=120)
    plt.close(figure)
    return target
