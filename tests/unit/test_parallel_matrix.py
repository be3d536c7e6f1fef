"""Megatron's own schedules, DistributedDataParallel and gradient sums around a hybrid GPTModel, for the whole matrix.

Tensor (tp), sequence (sp), context (cp), pipeline (pp) and data parallelism in all products of 8 ranks; data
parallelism takes what the others leave. A case trains on 4 or 8 packs of different documents and token counts, each
pack a micro-batch with its own layout, dealt to the data-parallel ranks; with pipeline stages several are in flight.
The gradient of every parameter must be that of one process that runs the packs one after the other in a loop of its
own. One run of eight ranks does all cases.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.unit.test_megatron_parallel import FFN, HIDDEN, VOCAB, share_of_tp_rank

pytest.importorskip("megatron.core")

WORLD = 8
TOLERANCE = 1e-5  # float32: sums in another order differ by their rounding, which terms that cancel amplify
PARAMETERS = {4: 41, 8: 79}  # of the uncut model, by layers; one less where embedding and output layer are tied

VARIED = ([13, 0, 19, 1], [40], [9, 9, 9], [2, 31], [17, 3, 3], [8, 24], [5], [21, 12, 7])
# Micro-batches of equal token counts, for pipelines that are not told to send shapes along.
EQUAL = ([32], [16, 16], [8, 24], [8, 8, 8, 8])
EQUAL_TOKENS = 32


@dataclass(frozen=True)
class Case:
    """One cut of the model, and how it is run.

    `layers`: of the model. `vp`: pieces of the model on each pipeline stage (interleaved). `packs`: how many.
    `equal_counts`: of tokens in each. `cp_sizes`: context-parallel size of each micro-batch; empty: `cp` for all of
    them. `megatron_groups`: take their groups from Megatron. `runs`: of the same step.
    """

    tp: int = 1
    cp: int = 1
    pp: int = 1
    vp: int = 1
    layers: int = 4
    sp: bool = False
    packs: int = 4
    equal_counts: bool = False
    kind: str = "zigzag"
    plain_params: bool = False
    tied: bool = False
    cp_sizes: tuple[int, ...] = ()
    megatron_groups: bool = False
    a2a_size: int | str | None = None
    runs: int = 1
    config: dict[str, Any] = field(default_factory=dict, hash=False)


def _products() -> dict[str, Case]:
    cases = {}
    for tp, cp, pp in itertools.product((1, 2), (1, 2, 4), (1, 2)):
        dp = WORLD // (tp * cp * pp)
        if dp == 0:
            continue
        packs = 8 if dp > 2 else 4
        cases[f"tp{tp}_cp{cp}_pp{pp}_dp{dp}"] = Case(tp, cp, pp, packs=packs)
        if tp > 1:
            cases[f"tp{tp}_sp_cp{cp}_pp{pp}_dp{dp}"] = Case(tp, cp, pp, sp=True, packs=packs)
    return cases


ALL_CUTS = Case(tp=2, cp=2, pp=2, sp=True)
FULL = {"recompute_granularity": "full", "recompute_num_layers": 1}
# Megatron's recompute of "layernorm" asks Transformer Engine for its FP8 state, also where there is none.
SELECTIVE = {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]}
# Of two stages each is before and after the other: what passes both ways at once must not be one batch of messages,
# and messages of shapes always are.
BOTH_WAYS = {"variable_seq_lengths": False, "overlap_p2p_comm": True, "batch_p2p_comm": False}
CASES: dict[str, Case] = {
    **_products(),
    "all_cuts_equal_token_counts": replace(ALL_CUTS, equal_counts=True, config={"variable_seq_lengths": False}),
    "all_cuts_plain_params": replace(ALL_CUTS, plain_params=True),
    "tp2_sp_cp2_tied_embeddings": replace(ALL_CUTS, pp=1, tied=True),
    "all_cuts_tied_embeddings": replace(ALL_CUTS, tied=True),
    "all_cuts_interleaved": replace(ALL_CUTS, vp=2, equal_counts=True, config=BOTH_WAYS),
    "cp2_pp2_interleaved_tied_embeddings": Case(cp=2, pp=2, vp=2, tied=True, equal_counts=True, config=BOTH_WAYS),
    "cp2_pp4_interleaved": Case(cp=2, pp=4, vp=2, layers=8, config={**BOTH_WAYS, "variable_seq_lengths": True}),
    "all_cuts_contiguous_outputs_freed": replace(
        ALL_CUTS, kind="contiguous", config={"deallocate_pipeline_outputs": True}
    ),
    "all_cuts_recompute_full_uniform": replace(ALL_CUTS, config={**FULL, "recompute_method": "uniform"}),
    "all_cuts_a2a1_recompute_full_block": replace(ALL_CUTS, a2a_size=1, config={**FULL, "recompute_method": "block"}),
    "all_cuts_recompute_selective": replace(ALL_CUTS, config=SELECTIVE),
    "all_cuts_recompute_deterministic_twice": replace(
        ALL_CUTS, runs=2, config={**SELECTIVE, "deterministic_mode": True}
    ),
    "all_cuts_deterministic_twice": replace(ALL_CUTS, runs=2, config={"deterministic_mode": True}),
    "dynamic_cp_4_2_4": Case(cp=4, packs=8, cp_sizes=(4, 2, 4)),
    "dynamic_cp_4_2_1_4_pp2": Case(cp=4, pp=2, packs=8, cp_sizes=(4, 2, 1, 4)),
    "dynamic_cp_2_1_2_tp2_sp_pp2": replace(ALL_CUTS, cp_sizes=(2, 1, 2)),
    "dynamic_cp_4_2_4_megatron_groups_pp2": Case(pp=2, cp_sizes=(4, 2, 4), megatron_groups=True),
}


def destroy_groups() -> None:
    """End the last case's groups: Megatron only forgets them, and their threads and sockets would slow the rest.

    The layers' own stay: torch names those by their ranks, and the next ones must not get a name used before.
    """
    import torch.distributed as dist
    from megatron.core import parallel_state

    dist.barrier()
    parallel_state.destroy_model_parallel()
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD and not group.group_desc.startswith("gdn_cp"):
            dist.destroy_process_group(group)


def build_model(case: Case) -> list[Any]:
    """This rank's pieces of a GPTModel, over fresh groups: three layers of GDN, one of attention, and so on."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from megatron.core.transformer.transformer_config import TransformerConfig

    from gdn_cp.megatron import get_hybrid_block_spec, install_cpu_shim

    install_cpu_shim()
    destroy_groups()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=case.tp,
        context_parallel_size=case.cp,
        pipeline_model_parallel_size=case.pp,
        virtual_pipeline_model_parallel_size=case.vp if case.vp > 1 else None,
        hybrid_context_parallel=case.megatron_groups,
        create_gloo_process_groups=False,
    )
    model_parallel_cuda_manual_seed(1)
    torch.manual_seed(0)
    settings = {"variable_seq_lengths": case.pp > 1, **case.config}
    config = TransformerConfig(
        num_layers=case.layers,
        hidden_size=HIDDEN,
        num_attention_heads=8,
        num_query_groups=2,
        kv_channels=8,
        ffn_hidden_size=FFN,
        tensor_model_parallel_size=case.tp,
        context_parallel_size=case.cp,
        pipeline_model_parallel_size=case.pp,
        virtual_pipeline_model_parallel_size=case.vp if case.vp > 1 else None,
        pipeline_dtype=torch.float32,
        sequence_parallel=case.sp,
        calculate_per_token_loss=True,
        moe_token_dispatcher_type="alltoall",  # the default refuses variable_seq_lengths even without experts
        use_cpu_initialization=True,
        normalization="RMSNorm",
        layernorm_zero_centered_gamma=True,
        activation_func=torch.nn.functional.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        qk_layernorm=True,
        attention_output_gate=True,
        linear_attention_freq=4,
        linear_num_key_heads=4,
        linear_num_value_heads=8,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        **settings,
    )
    pieces = []
    for piece in range(case.vp):
        place: dict[str, Any] = {"vp_stage": piece} if case.vp > 1 else {}
        at = {"ignore_virtual": False, **place}
        model = GPTModel(
            config,
            get_hybrid_block_spec(config, **place),
            vocab_size=VOCAB,
            max_sequence_length=256,
            position_embedding_type="rope",
            rotary_percent=0.5,
            pre_process=parallel_state.is_pipeline_first_stage(**at),
            post_process=parallel_state.is_pipeline_last_stage(**at),
            share_embeddings_and_output_weights=case.tied,
            **place,
        )
        pieces.append(model)
    return pieces


def packs_of(case: Case) -> list[list[int]]:
    """The document lengths of each pack."""
    return list(EQUAL if case.equal_counts else VARIED)[: case.packs]


def tokens_of(pack: int, lengths: list[int]) -> Tensor:
    return torch.randint(0, VOCAB, (sum(lengths),), generator=torch.Generator().manual_seed(pack))


def batch_of(case: Case, pack: int, group: Any) -> dict[str, Any]:
    """A rank's share of a pack: ids, labels, the mask of real targets, and the pack's parameters."""
    from megatron.core.packed_seq_params import PackedSeqParams

    from gdn_cp import ThdLayout
    from gdn_cp.comm.layout import pad_cu_seqlens
    from gdn_cp.megatron import packed_seq_params_from_layout

    lengths = packs_of(case)[pack]
    bounds = [0, *itertools.accumulate(lengths)]
    padded = pad_cu_seqlens(bounds, group.size(), case.kind, local_multiple=case.tp)
    make = ThdLayout.zigzag if case.kind == "zigzag" else ThdLayout.contiguous
    layout = make(padded.cu_seqlens, group.size(), seqlens=padded.seqlens)
    a2a_size = case.a2a_size if group.size() > 1 else None
    params: Any = packed_seq_params_from_layout(layout, group, a2a_size)
    if case.megatron_groups:
        params.local_cp_size = group.size()
    if case.plain_params:
        names = ("qkv_format", "cu_seqlens_q", "cu_seqlens_kv", "cu_seqlens_q_padded", "cu_seqlens_kv_padded")
        params = PackedSeqParams(**{name: getattr(params, name) for name in (*names, "max_seqlen_q", "max_seqlen_kv")})
    tokens = tokens_of(pack, lengths)
    mask = torch.ones(len(tokens))
    mask[[end - 1 for start, end in itertools.pairwise(bounds) if end > start]] = 0
    ids, labels, mask = (layout.shard(padded.pad(x), group.rank())[None] for x in (tokens, tokens.roll(-1), mask))
    return {"ids": ids, "labels": labels, "mask": mask, "params": params}


def forward(model: Any, batch: dict[str, Any]) -> Tensor:
    positions = torch.zeros_like(batch["ids"])
    return model(batch["ids"], positions, None, labels=batch["labels"], packed_seq_params=batch["params"])


def forward_step(batches: Iterator[dict[str, Any]], model: Any) -> tuple[Tensor, Callable[..., Any]]:
    """What Megatron's schedules call: the output of this stage, and the loss to take of the last one's."""
    batch = next(batches)

    def loss_of(per_token: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        loss = (per_token * batch["mask"]).sum()
        return loss, batch["mask"].sum().to(torch.int), loss.detach()

    return forward(model, batch), loss_of


def group_of_size(case: Case, size: int, dp_cp_ranks: list[list[int]]) -> Any:
    """The group of `size` neighbours of the data- and context-parallel ranks that holds this rank."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    if size == case.cp:
        return parallel_state.get_context_parallel_group()
    if case.megatron_groups:
        return parallel_state.get_hybrid_data_context_parallel_groups(group_size=size)
    own = None
    for ranks in dp_cp_ranks:
        for start in range(0, len(ranks), size):
            group = dist.new_group(ranks[start : start + size])
            if dist.get_rank() in ranks[start : start + size]:
                own = group
    return own


def plan_of(case: Case) -> list[dict[str, Any]]:
    """This rank's micro-batches: each takes as many packs as there are groups of its size."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    dp_cp = parallel_state.get_data_parallel_group(with_context_parallel=True)
    everyones: list[Any] = [None] * WORLD
    if case.cp_sizes:
        dist.all_gather_object(everyones, dist.get_process_group_ranks(dp_cp))
    distinct = sorted({tuple(ranks) for ranks in everyones if ranks})
    sizes = case.cp_sizes or (case.cp,) * (case.packs * case.cp // dp_cp.size())
    groups = {size: group_of_size(case, size, [list(ranks) for ranks in distinct]) for size in sorted(set(sizes))}
    plan, taken = [], 0
    for size in sizes:
        plan.append(batch_of(case, taken + dp_cp.rank() // size, groups[size]))
        taken += dp_cp.size() // size
    assert taken == case.packs, f"{taken} packs"
    return plan


def whole_name(model: Any, name: str, case: Case) -> str:
    """A parameter's name in the uncut model: a pipeline stage counts its layers from 0, and may hold a tied copy."""
    if case.tied and name == "output_layer.weight":
        return "embedding.word_embeddings.weight"
    if not name.startswith("decoder.layers."):
        return name
    local, rest = name.removeprefix("decoder.layers.").split(".", 1)
    return f"decoder.layers.{model.decoder.layers[int(local)].layer_number - 1}.{rest}"


def reference_of(case: Case, rank: int) -> dict[str, Any]:
    """Loss, values and gradients of one process, which runs every pack by itself and knows no schedule."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    (model,) = build_model(case)
    box: list[Any] = [None]
    if rank == 0:
        batches = [batch_of(case, pack, parallel_state.get_context_parallel_group()) for pack in range(case.packs)]
        count = sum(float(batch["mask"].sum()) for batch in batches)
        loss = torch.stack([(forward(model, batch) * batch["mask"]).sum() / count for batch in batches]).sum()
        loss.backward()
        named = list(model.named_parameters())
        box[0] = {
            "loss": float(loss.detach()),
            "values": {name: p.detach().clone() for name, p in named},
            "gradients": {name: p.grad.clone() for name, p in named},
        }
    dist.broadcast_object_list(box, src=0)
    return box[0]


def run_case(case: Case, reference: dict[str, Any]) -> dict[str, Any]:
    """Train one step with Megatron's schedule and sums; compare loss and gradients with the reference's.

    Errors of gradients are relative to the norm of the whole parameter's gradient.
    """
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.pipeline_parallel import get_forward_backward_func

    pieces = build_model(case)
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    parameters = [(whole_name(piece, name, case), p) for piece in pieces for name, p in piece.named_parameters()]

    def share(key: str, name: str) -> Tensor:
        return share_of_tp_rank(name, reference[key][name], tp_rank, case.tp)

    with torch.no_grad():
        for name, parameter in parameters:
            parameter.copy_(share("values", name))
    config = pieces[0].config
    config.finalize_model_grads_func = finalize_model_grads
    wrapped = [DistributedDataParallel(config, DistributedDataParallelConfig(), piece) for piece in pieces]
    plan = plan_of(case)
    outcomes = []
    for _ in range(case.runs):
        for piece in wrapped:
            piece.zero_grad_buffer()
        losses = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(plan) for _ in pieces] if case.vp > 1 else iter(plan),
            model=wrapped,
            num_microbatches=len(plan),
            seq_length=EQUAL_TOKENS,
            micro_batch_size=1,
        )
        loss = torch.stack([*losses, torch.zeros(())]).sum()
        outcomes.append([loss, *(parameter.main_grad.clone() for _, parameter in parameters)])
    loss = outcomes[0][0].clone()
    dist.all_reduce(loss)
    count = sum(max(length - 1, 0) for lengths in packs_of(case) for length in lengths)
    return {
        "loss": abs(float(loss) / case.tp / count / reference["loss"] - 1),
        "gradients": {
            name: float((parameter.main_grad - share("gradients", name)).norm() / reference["gradients"][name].norm())
            for name, parameter in parameters
        },
        "same_bits": all(torch.equal(a, b) for again in outcomes[1:] for a, b in zip(outcomes[0], again, strict=True)),
        "micro_batches": len(plan),
    }


def _every_case(rank: int, world_size: int) -> dict[str, dict[str, Any]]:
    references: dict[Case, dict[str, Any]] = {}
    results = {}
    for name, case in CASES.items():
        uncut = Case(packs=case.packs, layers=case.layers, equal_counts=case.equal_counts, tied=case.tied)
        if uncut not in references:
            references[uncut] = reference_of(uncut, rank)
        results[name] = run_case(case, references[uncut])
    return results


@pytest.fixture(scope="module")
def every_case() -> list[dict[str, dict[str, Any]]]:
    from tests.ranks import run_ranks

    return run_ranks(_every_case, WORLD, timeout=280)


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_one_process(every_case, name):
    case = CASES[name]
    seen: set[str] = set()
    for rank, results in enumerate(every_case):
        result = results[name]
        assert result["loss"] < TOLERANCE, f"rank {rank}"
        too_far = {key: error for key, error in result["gradients"].items() if not error < TOLERANCE}
        assert not too_far, f"rank {rank}"
        seen |= result["gradients"].keys()
    assert len(seen) == PARAMETERS[case.layers] - case.tied


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.pp > 1])
def test_several_micro_batches_were_in_flight(every_case, name):
    assert all(results[name]["micro_batches"] > 1 for results in every_case)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.runs > 1])
def test_deterministic_mode_gives_the_same_bits_again(every_case, name):
    assert all(results[name]["same_bits"] for results in every_case)
