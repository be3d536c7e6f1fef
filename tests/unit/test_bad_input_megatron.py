"""Random malformed calls of the Megatron side: refused by a message that names the argument, as in test_bad_input."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

pytest.importorskip("hypothesis")
pytest.importorskip("megatron.core")

from hypothesis import given
from hypothesis import strategies as st

from tests.unit.test_bad_input import EXAMPLES, SIZES, Call, Draw, check, of_type, quiet, some_layout
from tests.unit.test_huggingface import EXPERTS, config_of

OBJECTS = [3, "x", object(), [], 1.5]
_layers: list[Any] = []


@pytest.fixture(scope="module", autouse=True)
def single_rank() -> Iterator[None]:
    from megatron.core import parallel_state

    from tests.unit.test_megatron_parallel import build_model

    with tempfile.NamedTemporaryFile() as store:
        dist.init_process_group("gloo", init_method=f"file://{store.name}", rank=0, world_size=1)
        _layers[:] = build_model().decoder.layers
        yield
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def layer_call(draw: Draw) -> Call:
    from gdn_cp.megatron import packed_seq_params_from_layout

    layer, layout = _layers[0].self_attention, some_layout(draw, 1)
    x = torch.randn(layout.t_local, 1, 32)
    other = packed_seq_params_from_layout(some_layout(draw, 2))
    plain = packed_seq_params_from_layout(layout)
    plain.layout = None
    plain.cu_seqlens_q_padded = plain.cu_seqlens_q = None
    wrong: dict[str, list[Any]] = {
        "hidden_states": [None, *of_type(Tensor), x[..., 1:], x[:, 0], x.long(), x.to("meta"), x.expand(-1, 2, -1)],
        "packed_seq_params": [*OBJECTS, other, plain],
        "inference_context": [*OBJECTS],
        **dict.fromkeys(("inference_params", "sequence_len_offset", "key_value_states", "attention_bias"), OBJECTS),
    }
    good = {"hidden_states": x, "attention_mask": None, "packed_seq_params": packed_seq_params_from_layout(layout)}
    return Call(layer.forward, good, wrong)


def packed_call(draw: Draw) -> Call:
    from gdn_cp.megatron import packed_seq_params_from_layout

    wrong = {
        "layout": [None, *OBJECTS, *([some_layout(draw, 2)])],
        "group": OBJECTS,
        "a2a_size": [size for size in (*SIZES, 2, "x") if size is not None],
    }
    return Call(packed_seq_params_from_layout, {"layout": some_layout(draw, 1), "group": dist.group.WORLD}, wrong)


def context_call(draw: Draw) -> Call:
    from gdn_cp.megatron import GdnInferenceContext

    wrong: dict[str, list[Any]] = {
        name: [0, -1, *of_type(int)] for name in ("max_batch_size", "max_sequence_length", "slots")
    }
    wrong |= {"state_v_first": [None, *OBJECTS], "state_dtype": [*OBJECTS, torch.int32, torch.float16]}
    good = {"max_batch_size": draw(st.integers(1, 9)), "max_sequence_length": draw(st.integers(1, 99))}
    return Call(GdnInferenceContext, good, wrong)


def spec_call(draw: Draw) -> Call:
    """A layer's own a2a_size and sizes, at the time when it is built."""
    from megatron.core.transformer.spec_utils import build_module

    from gdn_cp.megatron import get_gdn_layer_spec

    layer = _layers[0].self_attention
    spec = get_gdn_layer_spec(layer.config).submodules.self_attention

    def build(a2a_size: Any = "largest", bias: bool = False, use_qk_l2norm: bool = True) -> Any:
        spec.params["a2a_size"] = a2a_size
        return build_module(spec, config=layer.config, layer_number=1, bias=bias, use_qk_l2norm=use_qk_l2norm)

    wrong = {
        "a2a_size": [0, -1, "x", 1.5, [], object()],
        "bias": [True],
        "use_qk_l2norm": [False],
    }
    return Call(build, {}, wrong)


def huggingface_call(draw: Draw) -> Call:
    """One setting of a config.json missing, or one that is not known here."""
    from gdn_cp.megatron.huggingface_config import HybridModel

    whole = {**config_of(**EXPERTS), "attention_bias": False, "hidden_act": "silu"}

    def read(**changed: Any) -> HybridModel:
        return HybridModel.from_huggingface({name: x for name, x in {**whole, **changed}.items() if x is not ...})

    needed = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "linear_num_key_heads")
    wrong: dict[str, list[Any]] = {name: [...] for name in (*needed, "rms_norm_eps", "moe_intermediate_size")}
    wrong |= {
        "num_experts_per_tok": [..., 0, 7, 100],
        "attention_bias": [True],
        "hidden_act": ["gelu", "relu"],
        "layer_types": [["linear_attention"] * 3, ["mamba"] * 4],
    }
    return Call(read, {}, wrong)


ENTRIES: dict[str, Callable[[Draw], Call]] = {
    "layer": layer_call,
    "packed_seq_params_from_layout": packed_call,
    "GdnInferenceContext": context_call,
    "spec": spec_call,
    "HybridModel": huggingface_call,
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_wrong_argument_is_refused_by_name(entry):
    @quiet(EXAMPLES // len(ENTRIES) + 1)
    @given(data=st.data())
    def fuzz(data: Any) -> None:
        check(ENTRIES[entry](data.draw), data.draw)

    fuzz()


@pytest.mark.parametrize("entry", ENTRIES)
def test_the_calls_that_are_made_wrong_are_right(entry):
    @quiet(10)
    @given(data=st.data())
    def run(data: Any) -> None:
        call = ENTRIES[entry](data.draw)
        assert call.function(**call.arguments) is not None

    run()
