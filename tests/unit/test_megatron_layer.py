"""The Megatron modules one by one: function and checkpoint keys of Megatron's own layer, and what they refuse."""

from __future__ import annotations

import importlib
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

pytest.importorskip("megatron.core")

from tests.unit.test_megatron_parallel import build_model

CU = [0, 8, 12, 32]


@pytest.fixture(scope="module", autouse=True)
def single_rank():
    """A world of one rank with the CPU shim, both undone at the end."""
    from megatron.core import parallel_state
    from megatron.core.models.common.embeddings import rope_utils, rotary_pos_embedding
    from megatron.core.tensor_parallel import random

    from gdn_cp.megatron import install_cpu_shim

    with pytest.MonkeyPatch.context() as patch, tempfile.NamedTemporaryFile() as store:
        for module, name in (
            (torch.cuda, "current_device"),
            (torch.cuda, "synchronize"),
            (torch.cuda, "current_stream"),
            (torch.Tensor, "cuda"),
            (random, "_get_cuda_rng_state"),
            (random, "_set_cuda_rng_state"),
            (random, "_CUDA_RNG_STATE_TRACKER"),
            (random, "_CUDA_RNG_STATE_TRACKER_INITIALIZED"),
            (rope_utils, "get_pos_emb_on_this_cp_rank"),
            (rotary_pos_embedding, "get_pos_emb_on_this_cp_rank"),
        ):
            patch.setattr(module, name, getattr(module, name))  # undoes what the shim does
        install_cpu_shim()
        dist.init_process_group("gloo", init_method=f"file://{store.name}", rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        yield
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def config_of(**changed: Any):
    config = build_model().config
    for name, value in changed.items():
        assert hasattr(config, name), name
        setattr(config, name, value)
    return config


def megatrons_own(config: Any, patch: pytest.MonkeyPatch, conv_bias: bool = True) -> Any:
    """Megatron's GatedDeltaNet, made to work without flash-linear-attention by a torch l2norm."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

    from gdn_cp.kernels.reference import l2norm
    from gdn_cp.megatron import RMSNorm

    module = importlib.import_module("megatron.core.ssm.gated_delta_net")
    home = getattr(module, "common", module)  # a package in 0.19.2
    patch.setattr(home, "HAVE_FLA", True)
    patch.setattr(home, "l2norm", l2norm, raising=False)
    patch.setattr(config, "deterministic_mode", True)
    return module.GatedDeltaNet(
        config,
        module.GatedDeltaNetSubmodules(in_proj=ColumnParallelLinear, out_norm=RMSNorm, out_proj=RowParallelLinear),
        layer_number=1,
        conv_bias=conv_bias,
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"]),
    )


def ours(config: Any, **changed: Any) -> Any:
    from megatron.core.transformer.spec_utils import build_module

    from gdn_cp.megatron import get_gdn_layer_spec

    spec = get_gdn_layer_spec(config).submodules.self_attention
    return build_module(spec, config=config, layer_number=1, **changed)


def shards(module: Any) -> dict[str, tuple]:
    """Every tensor that a checkpoint would hold: its key, place and shape, and its values' checksum."""
    from megatron.core.dist_checkpointing.mapping import apply_factories

    state = module.sharded_state_dict(prefix="layer.")
    apply_factories(state)
    tensors: list[Any] = []
    for value in state.values():
        tensors.extend(value if isinstance(value, list) else [value])
    described = {}
    for tensor in tensors:  # the linear layers' empty extra states are among them and have no data
        place = tensor.global_shape, tensor.global_offset, tensor.replica_id
        values = (tensor.local_shape, float(tensor.data.sum())) if isinstance(tensor.data, Tensor) else ()
        described[tensor.key] = (*place, *values)
    assert len(described) == len(tensors)
    return described


def _compare_with_megatron(rank: int, world_size: int) -> dict[str, Any]:
    """Checkpoint shards of both layers with the same weights, and their outputs on an unpacked batch."""
    config = build_model(tp=world_size).config
    with pytest.MonkeyPatch.context() as patch:
        theirs = megatrons_own(config, patch)
        patch.setattr(config, "deterministic_mode", False)
        our = ours(config, conv_bias=True)
        missing = our.load_state_dict(theirs.state_dict())
        patch.setattr(config, "deterministic_mode", True)
        x = torch.randn(19, 2, 32)
        outputs = [module(x, None)[0] for module in (our, theirs)]
        return {
            "missing": str(missing),
            "ours": shards(our),
            "theirs": shards(theirs),
            "error": float((outputs[0] - outputs[1]).norm() / outputs[1].norm()),
        }


@pytest.mark.parametrize("tp", [1, 2])
def test_layer_and_checkpoint_are_those_of_megatron(run_ranks, tp):
    for result in run_ranks(_compare_with_megatron, tp):
        assert "All keys matched" in result["missing"]
        assert result["ours"] == result["theirs"]
        sections = ("query", "key", "value", "z", "beta", "alpha")
        assert {key for key in result["ours"] if "in_proj.weight" in key} == {
            f"layer.in_proj.weight.{s}" for s in sections
        }
        assert {key for key in result["ours"] if "conv1d.bias" in key} == {
            f"layer.conv1d.bias.{s}" for s in sections[:3]
        }
        assert result["error"] < 1e-5


def _pass_checkpoints(folder: str) -> dict[str, Any]:
    """Save Megatron's layer in bfloat16, load it into ours, save that, and load it back."""
    from megatron.core import dist_checkpointing

    def load(layer: Any, name: str) -> None:
        with torch.no_grad():
            for p in layer.parameters():
                p.zero_()
        state = dist_checkpointing.load(layer.sharded_state_dict(prefix="layer."), f"{folder}/{name}")
        layer.load_state_dict({key.removeprefix("layer."): value for key, value in state.items()})

    config = config_of(params_dtype=torch.bfloat16)
    with pytest.MonkeyPatch.context() as patch:
        theirs, our = megatrons_own(config, patch), ours(config, conv_bias=True)
    before = {name: p.detach().clone() for name, p in theirs.named_parameters()}
    for name, source, target in (("theirs", theirs, our), ("ours", our, theirs)):
        Path(folder, name).mkdir()
        dist_checkpointing.save(source.sharded_state_dict(prefix="layer."), f"{folder}/{name}")
        load(target, name)
    return {
        "gate": our.A_log.dtype,
        "ours": all(torch.equal(p.to(before[name].dtype), before[name]) for name, p in our.named_parameters()),
        "theirs": all(torch.equal(p, before[name]) for name, p in theirs.named_parameters()),
    }


def test_checkpoints_pass_both_ways(tmp_path):
    assert _pass_checkpoints(str(tmp_path)) == {"gate": torch.float32, "ours": True, "theirs": True}


def test_hybrid_model_saves_layers_under_their_own_keys():
    state = build_model().sharded_state_dict()
    keys = {value.key for value in state.values()}
    assert "decoder.layers.0.self_attention.in_proj.layer_norm_weight" in keys
    assert "decoder.layers.3.self_attention.linear_qkv.layer_norm_weight" in keys
    assert "decoder.layers.2.mlp.linear_fc1.layer_norm_weight" in keys


def test_gate_stays_float32_in_a_half_precision_model():
    from megatron.core.transformer.module import Float16Module

    config = config_of(bf16=True, params_dtype=torch.bfloat16)
    layer = ours(config)
    assert layer.A_log.dtype == layer.dt_bias.dtype == torch.float32
    wrapped = Float16Module(config, layer).module
    assert wrapped.A_log.dtype == wrapped.dt_bias.dtype == torch.float32
    assert wrapped.in_proj.weight.dtype == torch.bfloat16
    assert wrapped.A_log.tensor_model_parallel
    assert 1.0 <= wrapped.A_log.exp().min() <= wrapped.A_log.exp().max() <= 16.0


def test_selective_recompute_keeps_the_projections_alone():
    """With the gradients, bit for bit, of a layer that keeps everything."""
    x, bytes_kept, gradients = torch.randn(64, 1, 32), {}, {}
    for modules in (["mlp"], ["core_attn"]):
        torch.manual_seed(0)
        layer = ours(config_of(recompute_granularity="selective", recompute_modules=modules))
        parameters = {p.data_ptr() for p in layer.parameters()}
        kept: dict[int, int] = {}

        def keep(tensor: Tensor, parameters: set[int] = parameters, kept: dict[int, int] = kept) -> Tensor:
            if tensor.data_ptr() not in parameters:
                kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out, _ = layer(x.requires_grad_(), None)
        out.square().sum().backward()
        name = modules[0]
        bytes_kept[name] = sum(kept.values())
        gradients[name] = [x.grad, *(p.grad for p in layer.parameters())]
        x = x.detach()
    dims = layer.dims
    needed = 4 * 64 * (32 + dims.in_proj_dim + dims.num_v_heads * dims.head_v_dim)  # what the linear layers read
    assert bytes_kept["core_attn"] <= needed < bytes_kept["mlp"]
    assert all(torch.equal(a, b) for a, b in zip(*gradients.values(), strict=True))


def test_rotary_by_position_equals_megatrons_own():
    """With one rank Megatron's own attention takes packed batches too, if the core attention does."""
    from megatron.core.transformer.attention import SelfAttention

    from gdn_cp import ThdLayout
    from gdn_cp.megatron import packed_seq_params_from_layout

    model = build_model()
    tokens = torch.randint(0, 64, (1, 32))
    outputs = []
    for attention in (type(model.decoder.layers[3].self_attention), SelfAttention):
        model.decoder.layers[3].self_attention.__class__ = attention
        params = packed_seq_params_from_layout(ThdLayout.zigzag(CU, 1))
        outputs.append(model(tokens, torch.zeros_like(tokens), None, packed_seq_params=params))
    assert torch.allclose(outputs[0], outputs[1], rtol=0, atol=1e-6)
    assert not torch.allclose(outputs[0], model(tokens, torch.zeros_like(tokens), None), atol=1e-3)


def test_packed_params_from_a_layout():
    from gdn_cp import ThdLayout
    from gdn_cp.megatron import packed_seq_params_from_layout

    layout = ThdLayout.zigzag(CU, 2, seqlens=[7, 4, 18])
    params = packed_seq_params_from_layout(layout)
    assert params.layout is layout
    assert params.cu_seqlens_q.tolist() == params.cu_seqlens_kv.tolist() == [0, 7, 11, 29]
    assert params.cu_seqlens_q_padded.tolist() == params.cu_seqlens_kv_padded.tolist() == CU
    assert params.max_seqlen_q == params.max_seqlen_kv == 20
    with pytest.raises(ValueError, match=r"layout.cp_size=2 but group has 1 rank\(s\)"):
        packed_seq_params_from_layout(layout, dist.group.WORLD)


def test_layout_of_plain_packed_params_is_built_once():
    from megatron.core.packed_seq_params import PackedSeqParams

    from gdn_cp.megatron.packed import layout_of_packed

    device = torch.device("cpu")
    params = PackedSeqParams("thd", torch.tensor([0, 7, 11, 29]), None, torch.tensor(CU), None)
    layout = layout_of_packed(params, 16, 2, device)
    assert (layout.kind, layout.cu_seqlens, layout.seqlens) == ("zigzag", tuple(CU), (7, 4, 18))
    assert layout_of_packed(params, 16, 2, device) is layout
    assert layout_of_packed(params, 32, 1, device).cp_size == 1  # another group size: another layout
    with pytest.raises(ValueError, match="ends at token 32, but the layers hold 28 rows over 2"):
        layout_of_packed(PackedSeqParams("thd", torch.tensor(CU)), 14, 2, device)
    with pytest.raises(ValueError, match="neither cu_seqlens_q_padded nor cu_seqlens_q"):
        layout_of_packed(PackedSeqParams("thd"), 16, 2, device)


def test_forward_refuses_what_it_does_not_do():
    from megatron.core.packed_seq_params import PackedSeqParams

    from gdn_cp import ThdLayout
    from gdn_cp.megatron import packed_seq_params_from_layout

    layer = ours(config_of())
    x = torch.randn(16, 1, 32)
    for name in ("inference_context", "inference_params", "sequence_len_offset", "key_value_states", "attention_bias"):
        with pytest.raises(ValueError, match=f"{name} was given"):
            layer(x, None, **{name: SimpleNamespace()})
    params = packed_seq_params_from_layout(ThdLayout.zigzag([0, 16], 1))
    with pytest.raises(ValueError, match="batch size 2"):
        layer(torch.randn(16, 2, 32), None, packed_seq_params=params)
    with pytest.raises(ValueError, match=r"describes 16 rows on each of 1 rank\(s\), but the layer got 12"):
        layer(x[:12], None, packed_seq_params=params)
    with pytest.raises(ValueError, match="qkv_format='sbhd'"):
        layer(x, None, packed_seq_params=PackedSeqParams("sbhd"))
    params.a2a_size = 2
    with pytest.raises(ValueError, match="a2a_size: got 2; it must divide cp_size = 1"):
        layer(x, None, packed_seq_params=params)
    for wrong in (2, "all"):
        with pytest.raises(ValueError, match=f"a2a_size: got {wrong!r}"):
            packed_seq_params_from_layout(ThdLayout.zigzag([0, 16], 1), a2a_size=wrong)


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("activation_func", torch.nn.functional.gelu, "set torch.nn.functional.silu"),
        ("linear_num_value_heads", 6, "num_v_heads=6 must be a multiple"),
        ("linear_num_key_heads", None, "num_k_heads=0"),
        ("normalization", "LayerNorm", "only 'RMSNorm'"),
    ],
)
def test_layer_refuses_settings(setting, value, message):
    with pytest.raises(ValueError, match=message):
        ours(config_of(**{setting: value}))
    with pytest.raises(ValueError, match="bias=True"):
        ours(config_of(), bias=True)
    with pytest.raises(ValueError, match="use_qk_l2norm=False"):
        ours(config_of(), use_qk_l2norm=False)


def core_attention(**changed: Any) -> Any:
    from megatron.core.transformer.enums import AttnMaskType

    from gdn_cp.megatron import CoreAttention

    arguments = {"layer_number": 1, "attn_mask_type": AttnMaskType.causal, "attention_type": "self"}
    settings = {name: changed.pop(name) for name in list(changed) if name not in arguments}
    return CoreAttention(config_of(**settings), **{**arguments, **changed})


@pytest.mark.parametrize("setting", [("attention_dropout", 0.1), ("window_size", (8, 0)), ("attention_type", "cross")])
def test_core_attention_refuses_settings(setting):
    with pytest.raises(ValueError, match=setting[0]):
        core_attention(**dict([setting]))


def test_core_attention_is_causal_softmax_per_document_and_ignores_padding():
    from gdn_cp import ThdLayout
    from gdn_cp.megatron import packed_seq_params_from_layout

    layout = ThdLayout.zigzag(CU, 1, seqlens=[7, 4, 18])
    mask = layout.global_padding()
    assert mask is not None
    q, k, v = torch.randn(32, 4, 8), torch.randn(32, 2, 8), torch.randn(32, 2, 8)
    q, k, v = (x.masked_fill(mask[:, None, None], float("nan")).requires_grad_() for x in (q, k, v))
    out = core_attention()(q, k, v, packed_seq_params=packed_seq_params_from_layout(layout))
    assert out.shape == (32, 32)
    assert not out[mask].any()
    start = 12
    for t in range(start, start + 18):
        for head in range(4):
            rows = slice(start, t + 1)
            weights = torch.softmax(k[rows, head // 2] @ q[t, head] / 8**0.5, dim=0)
            assert torch.allclose(out[t, 8 * head : 8 * head + 8], weights @ v[rows, head // 2], atol=1e-5)
    out.backward(torch.ones_like(out).masked_fill(mask[:, None], float("nan")))
    for x in (q, k, v):
        assert x.grad is not None
        assert x.grad.isfinite().all()
        assert not x.grad[mask].any()


def test_key_value_heads_are_repeated_up_to_the_ranks():
    from gdn_cp.megatron.core_attention import _with_enough_heads

    heads = torch.arange(2.0).view(1, 2, 1)
    q = torch.zeros(1, 4, 1)
    assert [x.flatten().tolist() for x in _with_enough_heads([q, heads, heads], 4)[1:]] == [[0.0, 0.0, 1.0, 1.0]] * 2
    assert _with_enough_heads([q, heads, heads], 2)[1] is heads
    for n, m, cp in ((4, 2, 8), (6, 3, 2), (12, 4, 6)):
        with pytest.raises(ValueError, match=f"{n} query and {m} key/value heads .* {cp} context-parallel ranks"):
            _with_enough_heads([torch.zeros(1, n, 1), *[torch.zeros(1, m, 1)] * 2], cp)


@pytest.mark.parametrize("zero_centered", [False, True])
def test_norm_equals_its_formula(zero_centered):
    from gdn_cp.megatron import RMSNorm

    config = config_of(layernorm_zero_centered_gamma=zero_centered, sequence_parallel=True)
    norm = RMSNorm(config, 16, eps=1e-3)
    assert norm.weight.sequence_parallel
    x = torch.randn(5, 16)
    expected = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-3)
    assert torch.allclose(norm(x), expected)
    with torch.no_grad():
        norm.weight.add_(0.5)
    assert torch.allclose(norm(x), expected * 1.5)
    half, exact = norm.bfloat16()(x.bfloat16()), expected * 1.5
    assert half.dtype == torch.bfloat16
    assert (half.float() - exact).abs().max() < 2**-7 * exact.abs().max()  # the input and the result are rounded


def test_layer_patterns():
    from gdn_cp.megatron.specs import get_hybrid_block_spec, linear_attention_pattern

    assert linear_attention_pattern(config_of(linear_attention_freq=None, num_layers=8)) == [1, 1, 1, 0] * 2
    assert linear_attention_pattern(config_of(linear_attention_freq=2)) == [1, 0, 1, 0]
    assert linear_attention_pattern(config_of(linear_attention_freq=[0, 1, 1, 1])) == [0, 1, 1, 1]
    with pytest.raises(ValueError, match="3 entries for 4 layers"):
        linear_attention_pattern(config_of(linear_attention_freq=[0, 1, 1]))
    with pytest.raises(ValueError, match="set 'RMSNorm'"):
        get_hybrid_block_spec(config_of(normalization="LayerNorm"))


@pytest.mark.parametrize(
    ("stages", "overlap", "batch", "shapes", "hangs"),
    [
        (2, True, False, False, False),
        (2, True, False, True, True),
        (2, False, False, False, True),
        (2, True, True, False, True),
        (4, True, False, True, False),
        (4, False, True, False, False),
        (4, False, True, True, True),
    ],
)
def test_interleaved_pipelines_that_would_hang_are_refused(stages, overlap, batch, shapes, hangs):
    from gdn_cp.megatron.specs import get_hybrid_block_spec

    config = config_of(
        num_layers=8,
        pipeline_model_parallel_size=stages,
        virtual_pipeline_model_parallel_size=2,
        overlap_p2p_comm=overlap,
        batch_p2p_comm=batch,
        variable_seq_lengths=shapes,
    )
    if hangs:
        with pytest.raises(ValueError, match=f"interleaved schedule of {stages} stages would hang; set overlap"):
            get_hybrid_block_spec(config)
    else:
        assert len(get_hybrid_block_spec(config, vp_stage=0, pp_rank=0).layer_specs) == 8 // stages // 2


def test_rng_tracker_of_the_cpu_forks_and_returns():
    from gdn_cp.megatron.cpu_shim import CpuRngStatesTracker

    def draw() -> Tensor:
        return torch.rand(3)

    tracker = CpuRngStatesTracker()
    tracker.add("model-parallel-rng", 7)
    torch.manual_seed(1)
    with tracker.fork():
        first = draw()
    outside = draw()
    with tracker.fork():
        second = draw()
    torch.manual_seed(1)
    assert torch.equal(draw(), outside)
    assert torch.equal(torch.rand(6, generator=torch.Generator().manual_seed(7)), torch.cat((first, second)))
    with pytest.raises(ValueError, match="seed=7"):
        tracker.add("another", 7)


def test_shim_leaves_a_machine_with_cuda_alone(monkeypatch):
    from gdn_cp.megatron import install_cpu_shim

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before = torch.cuda.current_device
    assert install_cpu_shim() is False
    assert torch.cuda.current_device is before
