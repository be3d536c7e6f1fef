"""A converted model has the logits of transformers' model, and converts back to the same bits."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("megatron.core")
pytest.importorskip("safetensors")

from gdn_cp.megatron import huggingface
from gdn_cp.megatron.huggingface_config import HybridModel
from gdn_cp.megatron.tensor_files import TensorFolder, write_tensors
from gdn_cp.megatron.whole_weights import load_whole, share_of
from scripts import convert_hf
from tests.unit.test_huggingface_config import EXPERTS, SIZES, config_of

FAMILIES = ("qwen3_next", "qwen3_5_text")
DOCUMENTS = (13, 1, 30, 20)
# Both compute in float32, in another order: each errs by 3e-6 to 5e-6 of the same model in float64, on logits up to 2.
TOLERANCE = 2e-5


def theirs(family: str, **changed: Any) -> Any:
    """transformers' model with every weight away from its initial value, and a spread in the logits."""
    transformers = pytest.importorskip("transformers")
    if family == "qwen3_next":
        config = transformers.Qwen3NextConfig(**{**SIZES, "mlp_only_layers": list(range(4)), **changed})
        make = transformers.Qwen3NextForCausalLM
    elif family == "qwen3_5_moe_text":
        if not hasattr(transformers, "Qwen3_5MoeTextConfig"):
            pytest.skip("this transformers has no Qwen3.5 with experts")
        sizes = {name: size for name, size in SIZES.items() if name != "intermediate_size"}
        config = transformers.Qwen3_5MoeTextConfig(**{**sizes, **EXPERTS, **changed})
        make = transformers.Qwen3_5MoeForCausalLM
    else:
        if not hasattr(transformers, "Qwen3_5TextConfig"):
            pytest.skip("this transformers has no Qwen3.5")
        config = transformers.Qwen3_5TextConfig(**{**SIZES, **changed})
        make = transformers.Qwen3_5ForCausalLM
    torch.manual_seed(3)
    model = make(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * (0.3 if p.dim() == 1 else 0.08))
        model.model.layers[0].linear_attn.norm.weight[0] = 0.1  # 0.1 - 1 is no float32
    return model


def tokens() -> Tensor:
    return torch.randint(0, SIZES["vocab_size"], (sum(DOCUMENTS),), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def their_logits(model: Any) -> Tensor:
    """Document by document: [tokens, vocabulary]."""
    return torch.cat([model(document[None]).logits[0] for document in tokens().split(DOCUMENTS)])


@torch.no_grad()
def our_logits(
    source: Any, model: HybridModel, *, tp: int = 1, cp: int = 1, ep: int = 1, packed: bool = True
) -> Tensor:
    """All tokens' logits from the Megatron model, cut as said; equal on all ranks."""
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from megatron.core.transformer.transformer_config import TransformerConfig

    from gdn_cp import ThdLayout
    from gdn_cp.comm.layout import pad_cu_seqlens
    from gdn_cp.megatron import get_hybrid_block_spec, install_cpu_shim, packed_seq_params_from_layout

    install_cpu_shim()
    parallel_state.destroy_model_parallel()
    expert_tp = tp if ep == 1 else 1
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp,
        context_parallel_size=cp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=expert_tp,
    )
    model_parallel_cuda_manual_seed(1)
    config = TransformerConfig(
        **model.transformer_settings(),
        tensor_model_parallel_size=tp,
        context_parallel_size=cp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=expert_tp,
        use_cpu_initialization=True,
    )
    block: Any = get_hybrid_block_spec(config)
    gpt = GPTModel(config, block, **model.model_settings(), parallel_output=False).eval()
    assert HybridModel.from_megatron(config, gpt, family=model.family) == model
    load_whole(
        gpt,
        source,
        model,
        parallel_state.get_tensor_model_parallel_group(),
        expert_tp_group=parallel_state.get_expert_tensor_parallel_group(),
        expert_group=parallel_state.get_expert_model_parallel_group(),
    )
    if not packed:
        return torch.cat([gpt(ids[None], torch.zeros_like(ids)[None], None)[0] for ids in tokens().split(DOCUMENTS)])
    group = parallel_state.get_context_parallel_group()
    cu = torch.tensor([0, *DOCUMENTS]).cumsum(0)
    padded = pad_cu_seqlens(cu, cp)
    layout = ThdLayout.zigzag(padded.cu_seqlens, cp, seqlens=padded.seqlens)
    ids = layout.shard(padded.pad(tokens()), group.rank())[None]
    params = packed_seq_params_from_layout(layout, group)
    local = gpt(ids, torch.zeros_like(ids), None, packed_seq_params=params)[0].contiguous()
    parts = [torch.empty_like(local) for _ in range(cp)]
    dist.all_gather(parts, local, group=group)
    return padded.unpad(layout.unshard(parts))


def _cuts(rank: int, world_size: int, folder: str, cuts: list[dict[str, Any]]) -> list[Tensor]:
    source = TensorFolder(Path(folder))
    model = HybridModel.from_json(json.loads(Path(folder, "model.json").read_text()))
    return [our_logits(source, model, **cut) for cut in cuts]


@pytest.mark.parametrize(
    ("family", "changed", "options"),
    [
        ("qwen3_next", {}, []),
        ("qwen3_next", {}, ["--no-zero-centered"]),
        ("qwen3_next", {**EXPERTS, "mlp_only_layers": [1]}, []),
        ("qwen3_next", {**EXPERTS, "mlp_only_layers": [], "norm_topk_prob": False}, []),
        ("qwen3_5_text", {}, ["--ignore", "mtp.", "model.visual."]),
        ("qwen3_5_moe_text", {}, []),
    ],
    ids=["qwen3_next", "plain_norms", "qwen3_next_experts", "experts_not_normalised", "qwen3_5", "qwen3_5_experts"],
)
def test_converted_folder_has_the_same_logits_under_every_cut_and_converts_back(
    run_ranks, tmp_path, family, changed, options
):
    from safetensors.torch import load_file, save_file

    model = theirs(family, **changed)
    hf, megatron, back = (tmp_path / name for name in ("hf", "megatron", "back"))
    model.save_pretrained(hf)
    assert convert_hf.main(["to-megatron", "--source", str(hf), "--target", str(megatron), *options]) == 0
    expected = their_logits(model)
    assert expected.std() > 0.3
    out_norm = TensorFolder(megatron)["decoder.layers.0.self_attention.out_norm.weight"]
    assert out_norm.dtype == (torch.float32 if "--no-zero-centered" in options else torch.float64)
    on_two: list[dict[str, Any]] = [{"tp": 2}, {"cp": 2}, {"tp": 2, "packed": False}]
    if changed or family == "qwen3_5_moe_text":
        on_two += [{"cp": 2, "ep": 2}, {"tp": 2, "ep": 2}]
    for cuts, world in (([{"packed": False}, {}], 1), (on_two, 2)):
        for rank, results in enumerate(run_ranks(_cuts, world, str(megatron), cuts)):
            errors = [float((logits - expected).abs().max()) for logits in results]
            assert max(errors) < TOLERANCE, (rank, errors)

    assert convert_hf.main(["to-hf", "--source", str(megatron), "--target", str(back)]) == 0
    before, after = load_file(hf / "model.safetensors"), load_file(back / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype, name
        assert torch.equal(tensor, after[name]), name
    again = type(model).from_pretrained(back)
    assert (their_logits(again) - expected).abs().max() < TOLERANCE
    save_file({}, str(tmp_path / "empty.safetensors"))  # a target that is not empty is refused
    assert convert_hf.main(["to-hf", "--source", str(megatron), "--target", str(tmp_path)]) == 2


@pytest.mark.parametrize("zero_centered", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_and_tied_models_convert_back_to_the_same_bits(family, zero_centered):
    model = theirs(family, tie_word_embeddings=True).bfloat16()
    sizes = HybridModel.from_huggingface(model.config.to_dict(), zero_centered=zero_centered)
    state = model.state_dict()
    whole = dict(huggingface.to_megatron(state, sizes))
    assert "output_layer.weight" not in whole
    back = dict(huggingface.to_huggingface(whole, sizes))
    del state["lm_head.weight"]
    assert back.keys() == state.keys()
    for name, tensor in state.items():
        assert back[name].dtype == tensor.dtype, name
        assert torch.equal(back[name], tensor), name


def test_rows_stand_as_documented():
    """The pictures of the module's docstring, one number a row."""
    from gdn_cp import GdnDims

    def rows(text: str) -> Tensor:
        kinds = "qkvzbag"
        return torch.tensor([[kinds.index(x[0]) * 10.0 + int(x[1])] for x in text.replace("|", " ").split()])

    gdn = GdnDims(2, 4, 1, 1)
    qkvz, ba = rows("q0 k0 v0 v1 z0 z1 | q1 k1 v2 v3 z2 z3"), rows("b0 b1 a0 a1 | b2 b3 a2 a3")
    sections = huggingface.split_qwen3_next_in_proj(qkvz, ba, gdn)
    expected = rows("q0 q1 | k0 k1 | v0 v1 v2 v3 | z0 z1 z2 z3 | b0 b1 b2 b3 | a0 a1 a2 a3")
    assert torch.equal(torch.cat(sections), expected)
    joined = huggingface.join_qwen3_next_in_proj(sections, gdn)
    assert torch.equal(joined[0], qkvz)
    assert torch.equal(joined[1], ba)
    q, k, v = rows("q0 g0 q1 g1 q2 g2 q3 g3"), rows("k0 k1"), rows("v0 v1")
    qkv = huggingface.join_linear_qkv(q, k, v, 2)
    assert torch.equal(qkv, rows("q0 q1 g0 g1 k0 v0 | q2 q3 g2 g3 k1 v1"))
    for part, expected in zip(huggingface.split_linear_qkv(qkv, 2, 1), (q, k, v), strict=True):
        assert torch.equal(part, expected)


def test_shifted_norms_keep_every_bit():
    weight = torch.tensor([0.0, 1.0, 0.251, -3.7, 1e-3, 2**-9], dtype=torch.bfloat16)
    shifted = huggingface._shifted(weight, -1)
    assert shifted.dtype == torch.float32
    assert torch.equal(shifted.double() + 1, weight.double())
    assert huggingface._shifted(torch.tensor([0.75, 1.5], dtype=torch.bfloat16), -1).dtype == torch.bfloat16
    assert huggingface._shifted(torch.tensor([0.1]), -1).dtype == torch.float64


def test_weights_that_would_be_lost_or_are_missing_or_of_a_wrong_shape_are_refused():
    model = theirs("qwen3_next")
    sizes = HybridModel.from_huggingface(model.config.to_dict())
    state = model.state_dict()
    extra = {
        "mtp.fc.weight": torch.zeros(1),
        **{n.replace("model.", "model.language_model.", 1): x for n, x in state.items()},
    }
    with pytest.raises(ValueError, match=r"mtp.fc.weight of the Hugging Face model would be lost"):
        huggingface.to_megatron(extra, sizes)
    whole = dict(huggingface.to_megatron(extra, sizes, ignore=("mtp.",)))
    with pytest.raises(ValueError, match=r"lacks model.layers.1.linear_attn.A_log"):
        huggingface.to_megatron({n: x for n, x in state.items() if "1.linear_attn.A_log" not in n}, sizes)
    with pytest.raises(ValueError, match=r"Megatron model lacks decoder.layers.3.self_attention.linear_qkv.weight"):
        huggingface.to_huggingface({n: x for n, x in whole.items() if "linear_qkv" not in n}, sizes)
    wrong = {**state, "model.layers.0.linear_attn.in_proj_ba.weight": torch.zeros(4, 32)}
    with pytest.raises(ValueError, match=r"in_proj_ba.weight: has shape \(4, 32\), expected \(8, 32\)"):
        dict(huggingface.to_megatron(wrong, sizes))
    with pytest.raises(ValueError, match=r"in_proj.weight: the tensor-parallel size 4 does not divide its 2 rows"):
        share_of("decoder.layers.0.self_attention.in_proj.weight", torch.zeros(2, 1), odd_heads(), 4, 0)


def test_experts_in_one_tensor_are_read_as_one_by_one():
    model = theirs("qwen3_5_moe_text")
    sizes = HybridModel.from_huggingface(model.config.to_dict())
    together = {name: x.detach() for name, x in model.state_dict().items()}
    apart = {}
    for name, tensor in together.items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            for i, expert in enumerate(tensor):
                prefix = f"{name.rpartition('.')[0]}.{i}."
                parts = ["gate_proj", "up_proj"] if "gate_up" in name else ["down_proj"]
                for part, rows in zip(parts, expert.chunk(len(parts)), strict=True):
                    apart[f"{prefix}{part}.weight"] = rows
        else:
            apart[name] = tensor
    assert len(together) == len(apart) - 4 * (3 * 6 - 2)
    whole = [dict(huggingface.to_megatron(source, sizes)) for source in (together, apart)]
    assert whole[0].keys() == whole[1].keys()
    assert all(torch.equal(tensor, whole[1][name]) for name, tensor in whole[0].items())
    back = dict(huggingface.to_huggingface(whole[0], sizes))
    assert all(torch.equal(back[name], tensor) for name, tensor in apart.items())


def test_every_tensor_of_the_published_qwen3_next_has_its_place():
    """Names and shapes of Qwen3-Next-80B-A3B, whose sizes are transformers' defaults, against transformers' own."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen3NextConfig()
    sizes = HybridModel.from_huggingface(config.to_dict())
    assert sizes.experts is not None
    assert (sizes.num_layers, sum(sizes.linear_attention), sizes.experts.num_experts) == (48, 36, 512)
    with torch.device("meta"):
        state = transformers.Qwen3NextForCausalLM(config).state_dict()
    theirs = {name: tuple(x.shape) for name, x in state.items()}
    ours = huggingface._huggingface_names(sizes)
    for layer in range(48):  # transformers holds a layer's experts in two tensors and writes them one by one
        place = f"model.layers.{layer}.mlp.experts."
        experts, two_widths, hidden = theirs.pop(place + "gate_up_proj")
        assert theirs.pop(place + "down_proj") == (experts, hidden, two_widths // 2)
        for i in range(experts):
            theirs |= {f"{place}{i}.{part}_proj.weight": (two_widths // 2, hidden) for part in ("gate", "up")}
            theirs[f"{place}{i}.down_proj.weight"] = (hidden, two_widths // 2)
    assert theirs == ours
    assert sum(x.numel() for x in state.values()) == 79_674_391_296


def test_fused_norms_and_grouped_experts_take_their_whole_tensors():
    """The names that Transformer Engine's modules give, on the second of two expert-parallel ranks."""
    from torch import nn

    from gdn_cp.megatron.whole_weights import _parameters_by_whole_name

    names = (
        "self_attention.in_proj.layer_norm_weight",
        "mlp.linear_fc1.layer_norm_weight",
        "mlp.experts.linear_fc1.weight0",
        "mlp.experts.linear_fc2.weight2",
        "mlp.experts.local_experts.1.linear_fc1.weight",
        "mlp.shared_experts.linear_fc1.weight",
    )
    model = nn.Module()
    for name in names:
        home = model
        *path, last = f"decoder.layers.0.{name}".split(".")
        for step in path:
            if not hasattr(home, step):
                home.add_module(step, nn.Module())
            home = home.get_submodule(step)
        home.register_parameter(last, nn.Parameter(torch.zeros(1)))
    layer: Any = model.get_submodule("decoder.layers.0")
    layer.layer_number = 5
    found = {name.removeprefix("decoder.layers.4.") for name, _ in _parameters_by_whole_name(model, 3)}
    assert found == {
        "input_layernorm.weight",
        "pre_mlp_layernorm.weight",
        "mlp.experts.local_experts.3.linear_fc1.weight",
        "mlp.experts.local_experts.5.linear_fc2.weight",
        "mlp.experts.local_experts.4.linear_fc1.weight",
        "mlp.shared_experts.linear_fc1.weight",
    }


def test_experts_that_one_side_cannot_say_are_refused():
    from types import SimpleNamespace

    from gdn_cp.megatron.huggingface_experts import Experts, moe_pattern

    sizes = HybridModel.from_huggingface({**config_of(**EXPERTS), "mlp_only_layers": [1]})
    assert sizes.experts is not None
    assert sizes.experts.sparse == (1, 0, 1, 1)
    assert HybridModel.from_json(json.loads(json.dumps(dataclasses.asdict(sizes)))) == sizes
    with pytest.raises(ValueError, match="qwen3_5_moe_text: every layer has experts"):
        dataclasses.replace(sizes, family="qwen3_5_moe_text").to_huggingface("float32")
    with pytest.raises(ValueError, match=r"experts.sparse: 4 entries for 3 layers"):
        dataclasses.replace(sizes, num_layers=3, linear_attention=(1, 1, 0))
    plain = {
        "moe_router_score_function": "softmax",
        "moe_router_enable_expert_bias": False,
        "moe_router_num_groups": None,
        "moe_router_topk_scaling_factor": None,
        "moe_shared_expert_gate": True,
        "moe_apply_probs_on_input": False,
        "num_moe_experts": 4,
        "moe_shared_expert_intermediate_size": 8,
        "num_layers": 3,
        "moe_layer_freq": 2,
    }
    assert moe_pattern(SimpleNamespace(**plain)) == [1, 0, 1]
    for name, value in (("moe_shared_expert_gate", False), ("moe_shared_expert_intermediate_size", None)):
        with pytest.raises(ValueError, match=name):
            Experts.from_megatron(SimpleNamespace(**{**plain, name: value}))
    with pytest.raises(ValueError, match="moe_layer_freq has 2 entries for 3 layers"):
        moe_pattern(SimpleNamespace(**{**plain, "moe_layer_freq": [1, 0]}))


def _pipeline(rank: int, world_size: int, tied: bool) -> dict[str, Any]:
    """Two pipeline stages: which whole tensors this stage's parameters equal."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    from gdn_cp.megatron import get_hybrid_block_spec, install_cpu_shim

    install_cpu_shim()
    parallel_state.initialize_model_parallel(pipeline_model_parallel_size=world_size)
    state = theirs("qwen3_next", tie_word_embeddings=tied)
    model = HybridModel.from_huggingface(state.config.to_dict())
    config = TransformerConfig(
        **model.transformer_settings(),
        pipeline_model_parallel_size=world_size,
        pipeline_dtype=torch.float32,
        use_cpu_initialization=True,
    )
    block: Any = get_hybrid_block_spec(config)
    ends = {"pre_process": rank == 0, "post_process": rank == world_size - 1}
    gpt = GPTModel(config, block, **model.model_settings(), **ends)
    whole = dict(huggingface.to_megatron(state.state_dict(), model))
    load_whole(gpt, whole, model)
    return {
        name: [key for key, x in whole.items() if x.shape == p.shape and torch.equal(x.float(), p)]
        for name, p in gpt.named_parameters()
    }


@pytest.mark.parametrize("tied", [False, True])
def test_pipeline_stages_take_their_layers(run_ranks, tied):
    pytest.importorskip("transformers")
    first, second = run_ranks(_pipeline, 2, tied)
    for name, found in first.items():
        assert found == [name]
    output = "embedding.word_embeddings.weight" if tied else "output_layer.weight"
    for name, found in second.items():
        moved = name.replace("layers.0.", "layers.2.").replace("layers.1.", "layers.3.")
        assert found == [output if name == "output_layer.weight" else moved]
    assert len(first) == 2 * 10 + 1
    assert len(second) == 10 + 8 + 2


def odd_heads() -> HybridModel:
    one = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 1, "linear_value_head_dim": 1}
    return HybridModel.from_huggingface(config_of(**one))


def test_large_models_are_written_in_parts_with_an_index(tmp_path):
    tensors = {f"t{i}": torch.full((8,), float(i)) for i in range(5)}
    write_tensors(tensors.items(), tmp_path, max_bytes=64)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [
        *(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)),
        "model.safetensors.index.json",
    ]
    folder = TensorFolder(tmp_path)
    assert {name: folder[name][0].item() for name in folder} == {f"t{i}": float(i) for i in range(5)}
    assert json.loads((tmp_path / names[3]).read_text())["metadata"]["total_size"] == 160
    (tmp_path / names[0]).write_bytes(b"cut short")
    with pytest.raises(ValueError, match=r"model-00001-of-00003\.safetensors: cannot be read"):
        TensorFolder(tmp_path)
    with pytest.raises(ValueError, match="holds no safetensors files"):
        TensorFolder(tmp_path / "absent")
