"""The training run: set up, resume, step by step with logs and checkpoints, plot and weights at the end."""

from __future__ import annotations

import math
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from gdn_cp.comm.choice import possible_a2a_sizes
from gdn_cp.training import checkpoint
from gdn_cp.training.config import TrainConfig, check_config
from gdn_cp.training.corpus import read_documents
from gdn_cp.training.data import Corpus, PackStream, StepPlan
from gdn_cp.training.engine import build_engine
from gdn_cp.training.faults import Progress, Watchdog, located
from gdn_cp.training.flops import peak_tflops, training_flops
from gdn_cp.training.metrics import METRICS_FILE, RunLog, StepMetrics, peak_memory_gib, read_steps
from gdn_cp.training.model import build_model, compute_dtype
from gdn_cp.training.parallel import Ranks, choose_device, distributed, model_parallel
from gdn_cp.training.plot import plot_run
from gdn_cp.training.step import StepResult, run_step
from gdn_cp.training.tokenizer import BpeTokenizer, ByteTokenizer, Tokenizer
from gdn_cp.training.weights import describe_model, export_weights

_SUMMARY_STEPS = 5  # the summary's loss is the mean of the last few, since packs differ


@dataclass(frozen=True)
class Summary:
    """How a run ended. `final_loss`: mean of the last five steps; entropy of single tokens in nats."""

    final_loss: float
    unigram_entropy: float
    steps: int
    plot: Path | None

    @property
    def below_entropy(self) -> bool:
        """Whether the model has learnt more than how often each token occurs."""
        return self.final_loss < self.unigram_entropy

    def line(self) -> str:
        """The summary as the script prints it."""
        sign, verdict = ("<", "yes") if self.below_entropy else (">=", "no")
        return (
            f"summary: {self.steps} steps, final loss {self.final_loss:.4f} {sign} unigram entropy "
            f"{self.unigram_entropy:.4f}: below entropy: {verdict}"
        )


def train(config: TrainConfig) -> Summary:
    """Run the training that `config` describes on the ranks that torchrun started (or on one).

    Raises ValueError, on every rank, for choices that cannot work, and FloatingPointError where a loss is not finite
    and `on_nonfinite` says stop.
    """
    device = choose_device(config.run.device)
    with distributed(device, config.run.timeout_minutes):
        check_config(config, dist.get_world_size())
        with model_parallel(config.parallel, device, config.run.timeout_minutes) as ranks:
            return _Run(config, ranks).train()


class _Run:
    """The pieces of one run on one rank."""

    def __init__(self, config: TrainConfig, ranks: Ranks) -> None:
        self.config = config
        self.ranks = ranks
        self.out = config.run.out
        self.checkpoints = self.out / "checkpoints"
        resumed = None
        if config.run.resume is not None:
            resumed = checkpoint.find_checkpoint(config.run.resume, self.checkpoints)
        else:
            _refuse_used_folder(self.out)
        self.resumed_from = resumed
        texts = read_documents(config.data.data)
        self.tokenizer_name = config.data.tokenizer
        corpus = Corpus.build(texts, _tokenizer(config, texts, ranks))
        if corpus.vocab_size > config.model.vocab:
            raise ValueError(f"vocab={config.model.vocab} is less than the tokenizer's {corpus.vocab_size} tokens")
        self.digest = _agree_on_data(corpus)
        self.entropy = corpus.unigram_entropy()
        self.stream = PackStream(corpus, config.data.token_budget, config.data.pad_multiple, config.run.seed)
        self.module, transformer = build_model(config, ranks)
        self.engine = build_engine(self.module, config.optim, ranks, transformer)
        self.step = 0
        self.progress = Progress(ranks.rank)
        if resumed is not None:
            self._load(resumed)

    def facts(self) -> dict[str, Any]:
        """What a checkpoint must share with the run that continues it."""
        config = self.config
        return {
            "tp": self.ranks.tp_size,
            "cp": self.ranks.cp_size,
            "dp": self.ranks.dp_size,
            "device": self.ranks.device.type,
            "precision": str(compute_dtype(config.run.precision, self.ranks.device)).removeprefix("torch."),
            "seed": config.run.seed,
            "data_digest": self.digest,
            "token_budget": config.data.token_budget,
            "pad_multiple": config.data.pad_multiple,
            "packs_per_step": config.data.packs_per_step,
            "model": config.to_dict()["model"],
        }

    def _load(self, folder: Path) -> None:
        manifest = checkpoint.read_manifest(folder)
        checkpoint.check_facts(manifest or {}, self.facts(), folder)
        manifest, own, shared = checkpoint.load_checkpoint(folder, self.ranks.tp_rank)
        self.engine.load_state(shared, own)
        self.stream.load_state_dict(manifest["data"])
        _set_rng_state(own["rng"])
        self.step = manifest["step"]

    def save(self) -> Path:
        """Write a checkpoint of the present state."""
        self.progress.enter("checkpoint")
        shared, own = self.engine.state()
        return checkpoint.save_checkpoint(
            self.checkpoints,
            self.step,
            {**self.facts(), "data": self.stream.state_dict()},
            own={**own, "rng": _rng_state()},
            shared=shared if self.ranks.holds_shared_state else None,
            shared_index=self.ranks.tp_rank,
            keep=self.config.run.keep_checkpoints,
        )

    def train(self) -> Summary:
        """Step to the end, watched."""
        with Watchdog(self.progress, self.config.run.watchdog_seconds), located(self.progress, self.ranks.device):
            return self._train()

    def _train(self) -> Summary:
        run = self.config.run
        unit = "GPU" if self.ranks.device.type == "cuda" else "rank"
        with RunLog(
            self.out,
            is_writer=self.ranks.rank == 0,
            first_step=self.step,
            last_step=run.steps,
            unit=unit,
            progress=run.progress,
        ) as log:
            self._announce(log, unit)
            while self.step < run.steps:
                began = time.perf_counter()
                lr = self.config.optim.lr_at(self.step + 1, run.steps)
                self.progress.enter("data", self.step + 1)
                plan = self.stream.next_step(self.config.data.packs_per_step)
                result = run_step(self.engine, self.stream, plan, self.ranks, lr, self.progress, run.check_ranks)
                self.step += 1
                if not result.finite:
                    self._handle_nonfinite(log, plan, result)
                log.step(self._measure(plan, result, lr, time.perf_counter() - began))
                if run.checkpoint_every > 0 and (self.step % run.checkpoint_every == 0 and self.step < run.steps):
                    log.say(f"checkpoint: {self.save()}")
            if run.checkpoint_every >= 0:
                log.say(f"checkpoint: {self.save()}")
            self.progress.enter("finish")
            return self._finish(log)

    def _announce(self, log: RunLog, unit: str) -> None:
        parameters = sum(p.numel() for p in self.module.parameters())
        log.event(
            "start",
            config=self.config.to_dict(),
            layout=self.ranks.describe(),
            unit=unit,
            first_step=self.step,
            unigram_entropy=self.entropy,
            parameters_per_rank=parameters,
            torch=torch.__version__,
            python=platform.python_version(),
            data_digest=self.digest,
        )
        log.say(f"ranks: {self.ranks.describe()}; {parameters:,} parameters on this rank; run folder {self.out}")
        if self.ranks.cp_size > 1:
            log.say(f"GDN layers: a2a_size {_describe_a2a_size(self.config)}")
        log.say(f"data: {self.stream.describe()}")
        log.say(f"data: unigram entropy {self.entropy:.4f} nats per token ({self.tokenizer_name})")
        if self.resumed_from is not None:
            log.say(f"resumed from {self.resumed_from} after step {self.step}")
        elif self.config.run.resume is not None:
            log.say(f"resume: no complete checkpoint under {self.checkpoints}; starting from the beginning")

    def _measure(self, plan: StepPlan, result: StepResult, lr: float, seconds: float) -> StepMetrics:
        ranks = self.ranks
        speed = plan.num_targets / seconds
        tflops = training_flops(self.config.model, plan.seqlens) / seconds / ranks.world_size / 1e12
        peak = peak_tflops(ranks.device)
        return StepMetrics(
            step=self.step,
            loss=result.loss,
            grad_norm=result.grad_norm,
            lr=lr,
            tokens=plan.num_targets,
            epoch=plan.epoch,
            seconds=seconds,
            tokens_per_second=speed,
            tokens_per_second_per_rank=speed / ranks.world_size,
            tflops_per_rank=tflops,
            mfu=None if peak is None else tflops / peak,
            memory_gib=peak_memory_gib(ranks.device),
            skipped=not result.applied,
            a2a_sizes=result.a2a_sizes if ranks.cp_size > 1 else (),
        )

    def _handle_nonfinite(self, log: RunLog, plan: StepPlan, result: StepResult) -> None:
        """Save the packs of the step (rank 0) and, unless such steps are to be left out, stop every rank."""
        path = self.out / "nonfinite" / f"step_{self.step:08d}.pt"
        if self.ranks.rank == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            batches = [vars(self.stream.build(pack)) for pack in plan.packs]
            content = {"step": self.step, "loss": result.loss, "grad_norm": result.grad_norm, "packs": batches}
            torch.save(content, path)
        text = f"step {self.step}: loss {result.loss}, gradient norm {result.grad_norm} (batch saved to {path})"
        log.event("nonfinite", step=self.step, batch=str(path))
        if self.config.run.on_nonfinite == "stop":
            raise FloatingPointError(f"{text}; lower --lr, or leave such steps out with --on-nonfinite skip")
        log.say(text)

    def _finish(self, log: RunLog) -> Summary:
        weights = self.out / "weights.safetensors"
        writer = self.ranks.rank == 0
        export_weights(weights, self.module, self.config.model, self.ranks.tp_group, write=writer)
        if not writer:
            return Summary(math.nan, self.entropy, self.step, None)
        described = describe_model(self.out / "model.json", self.module)
        losses = [record["loss"] for record in read_steps(self.out / METRICS_FILE) if not record["skipped"]]
        last = losses[-_SUMMARY_STEPS:]
        plot = plot_run(self.out)
        summary = Summary(sum(last) / max(1, len(last)), self.entropy, self.step, plot)
        log.event("end", steps=self.step, final_loss=summary.final_loss, unigram_entropy=self.entropy)
        log.say(f"weights: {weights}, described for scripts/convert_hf.py: {described}")
        log.say(f"plot: {plot}")
        log.say(summary.line())
        return summary


def _describe_a2a_size(config: TrainConfig) -> str:
    parallel, model = config.parallel, config.model
    if not isinstance(parallel.a2a_size, str):
        return str(parallel.a2a_size or parallel.cp)
    heads = model.gdn_key_heads // parallel.tp, model.gdn_value_heads // parallel.tp
    sizes = possible_a2a_sizes(parallel.cp, *heads)
    if parallel.a2a_size == "largest":
        return str(sizes[-1])
    return f"auto, for each pack one of {', '.join(map(str, sizes))}"


def _refuse_used_folder(out: Path) -> None:
    used = [dist.get_rank() == 0 and (out / METRICS_FILE).exists()]
    dist.broadcast_object_list(used, src=0)
    if used[0]:
        raise ValueError(
            f"out={str(out)!r} already holds a run; continue it with --resume auto, or choose another --out"
        )


def _tokenizer(config: TrainConfig, texts: list[bytes], ranks: Ranks) -> Tokenizer:
    """The run's tokenizer; a trained one is made by rank 0 once and kept in the run's folder."""
    if config.data.tokenizer == "bytes":
        return ByteTokenizer()
    path = config.run.out / "tokenizer.json"
    failure: list[str | None] = [None]
    if ranks.rank == 0 and not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            BpeTokenizer.train(texts, config.model.vocab).save(path)
        except (ValueError, OSError) as error:
            failure[0] = str(error)
    dist.broadcast_object_list(failure, src=0)
    if failure[0] is not None:
        raise ValueError(failure[0])
    return BpeTokenizer.load(path)


def _agree_on_data(corpus: Corpus) -> str:
    """The corpus's fingerprint, after making sure that every rank has the same."""
    digest = corpus.digest()
    digests: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(digests, digest)
    for rank, other in enumerate(digests):
        if other != digests[0]:
            raise ValueError(
                f"data: rank {rank} reads other text than rank 0 ({other} against {digests[0]}); "
                "give --data a folder that is the same on every node"
            )
    return digest


def _rng_tracker() -> Any:
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    return get_cuda_rng_tracker()


def _rng_state() -> dict[str, Any]:
    state = {"torch": torch.get_rng_state(), "tracker": _rng_tracker().get_states()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_rng_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    _rng_tracker().set_states(state["tracker"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
