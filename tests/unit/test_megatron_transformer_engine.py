"""The specs of Transformer Engine modules: their shape, on stand-ins with the interface of Megatron's wrappers.

Transformer Engine itself needs CUDA and is not here. The stand-ins take what the wrappers take, which is read from
Megatron's source, and compute the same on a CPU.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("megatron.core")

from tests.unit.test_megatron_parallel import VOCAB, build_model, step


def stand_ins() -> Any:
    """An Engine of plain modules that look like Transformer Engine's."""
    from megatron.core.models.backends import LocalSpecProvider
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

    from gdn_cp.megatron import CoreAttention, RMSNorm
    from gdn_cp.megatron.transformer_engine import Engine

    class NormAndColumnLinear(ColumnParallelLinear):
        def __init__(
            self,
            input_size,
            output_size,
            *,
            config,
            init_method,
            gather_output,
            bias,
            skip_bias_add,
            is_expert,
            skip_weight_param_allocation=False,
            tp_comm_buffer_name=None,
            tp_group=None,
            stride=1,
            name=None,
        ):
            super().__init__(
                input_size,
                output_size,
                config=config,
                init_method=init_method,
                gather_output=gather_output,
                bias=bias,
                skip_bias_add=skip_bias_add,
                is_expert=is_expert,
                tp_group=tp_group,
            )
            self._norm = [RMSNorm(config, input_size, config.layernorm_epsilon)]  # not a submodule
            self.layer_norm_weight = self._norm[0].weight

        def forward(self, x, *arguments):
            return super().forward(self._norm[0](x), *arguments)

        def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
            from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

            return make_sharded_tensors_for_checkpoint(
                self.state_dict(prefix="", keep_vars=True), prefix, {"weight": 0}, sharded_offsets
            )

    class RowLinear(RowParallelLinear):
        def __init__(
            self,
            input_size,
            output_size,
            *,
            config,
            init_method,
            bias,
            input_is_parallel,
            skip_bias_add,
            is_expert,
            tp_comm_buffer_name=None,
            tp_group=None,
            name=None,
        ):
            super().__init__(
                input_size,
                output_size,
                config=config,
                init_method=init_method,
                bias=bias,
                input_is_parallel=input_is_parallel,
                skip_bias_add=skip_bias_add,
                is_expert=is_expert,
                tp_group=tp_group,
            )

    class Norm:
        def __new__(cls, config, hidden_size, eps=1e-5):
            return RMSNorm(config, hidden_size, eps)

    class Attention(CoreAttention):
        """Needs the boundaries, as Transformer Engine's does for packed rows."""

        def __init__(
            self,
            config,
            layer_number,
            attn_mask_type,
            attention_type,
            attention_dropout=None,
            softmax_scale=None,
            k_channels=None,
            v_channels=None,
            cp_comm_type="p2p",
            pg_collection=None,
        ):
            super().__init__(
                config, layer_number, attn_mask_type, attention_type, attention_dropout, softmax_scale, cp_comm_type,
                pg_collection,
            )  # fmt: skip

        def forward(
            self, query, key, value, attention_mask, attn_mask_type, attention_bias=None, packed_seq_params=None
        ):
            if packed_seq_params is not None:
                assert packed_seq_params.cu_seqlens_q_padded is not None
                assert packed_seq_params.max_seqlen_q
            return super().forward(query, key, value, attention_mask, attn_mask_type, attention_bias, packed_seq_params)

    class Provider(LocalSpecProvider):
        def column_parallel_layer_norm_linear(self):
            return NormAndColumnLinear

        def row_parallel_linear(self):
            return RowLinear

        def fuse_layernorm_and_linear(self):
            return True

    return Engine(NormAndColumnLinear, RowLinear, Norm, Attention, Provider())


def build_both(tp: int, cp: int, sp: bool) -> tuple[nn.Module, nn.Module]:
    """The model of plain modules and that of stand-ins, with the same weights."""
    from megatron.core.models.gpt import GPTModel

    from gdn_cp.megatron import get_hybrid_block_spec, transformer_engine

    plain = build_model(tp=tp, cp=cp, sp=sp)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformer_engine, "load_engine", stand_ins)
        spec = get_hybrid_block_spec(plain.config, transformer_engine=True)
    fused = GPTModel(
        plain.config, spec, vocab_size=VOCAB, max_sequence_length=256, position_embedding_type="rope",
        rotary_percent=0.5,
    )  # fmt: skip
    return plain, fused


def fused_name(name: str) -> str:
    """Where a parameter of the plain model is in the fused one."""
    layer, _, rest = name.partition(".input_layernorm.")
    if rest:
        mixer = "linear_qkv" if layer == "decoder.layers.3" else "in_proj"
        return f"{layer}.self_attention.{mixer}.layer_norm_{rest}"
    return name.replace(".pre_mlp_layernorm.", ".mlp.linear_fc1.layer_norm_")


def _compare(rank: int, world_size: int, tp: int, sp: bool) -> dict[str, Any]:
    from megatron.core.dist_checkpointing.mapping import apply_factories

    plain, fused = build_both(tp, world_size // tp, sp)
    ours = dict(fused.named_parameters())
    renamed = {fused_name(name): p for name, p in plain.named_parameters()}
    with torch.no_grad():
        for name, parameter in renamed.items():
            parameter.add_(torch.randn_like(parameter), alpha=0.01) if parameter.dim() == 1 and tp == 1 else None
            ours[name].copy_(parameter)
    tokens = torch.randint(0, VOCAB, (64,), generator=torch.Generator().manual_seed(5))
    losses = [step(model, tokens, tp=tp, cp=world_size // tp) for model in (plain, fused)]
    keys = []
    for model in (plain, fused):
        state = model.sharded_state_dict()
        apply_factories(state)
        flat = [t for value in state.values() for t in (value if isinstance(value, list) else [value])]
        keys.append(
            {(t.key, t.global_offset, t.global_shape) for t in flat if isinstance(getattr(t, "data", None), Tensor)}
        )
    return {
        "names": ours.keys() == renamed.keys(),
        "losses": [float(loss) for loss in losses],
        "gradients": max(float((ours[n].grad - p.grad).norm() / p.grad.norm()) for n, p in renamed.items()),
        "keys": keys[0] ^ keys[1],
    }


@pytest.mark.parametrize(("tp", "sp"), [(1, False), (2, True)])
def test_model_of_fused_modules_is_the_plain_model(run_ranks, tp, sp):
    for result in run_ranks(_compare, 2, tp, sp):
        assert result["names"]
        assert result["losses"][0] == result["losses"][1]
        assert result["gradients"] == 0.0
        assert not result["keys"]  # one checkpoint serves both


def signature_in_source(name: str, method: str) -> set[str]:
    """Argument names of a method of Megatron's Transformer Engine wrappers, from the source: without the engine the
    classes are no more than mocks."""
    spec = importlib.util.find_spec("megatron.core.extensions.transformer_engine")
    assert spec is not None
    assert spec.origin is not None
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    (found,) = (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == name)
    (function,) = (node for node in found.body if isinstance(node, ast.FunctionDef) and node.name == method)
    return {argument.arg for argument in (*function.args.args, *function.args.kwonlyargs)}


@pytest.mark.parametrize(
    ("field", "name", "method"),
    [
        ("norm_and_column_linear", "TELayerNormColumnParallelLinear", "__init__"),
        ("row_linear", "TERowParallelLinear", "__init__"),
        ("norm", "TENorm", "__new__"),
        ("attention", "TEDotProductAttention", "__init__"),
        ("attention", "TEDotProductAttention", "forward"),
    ],
)
def test_stand_ins_have_the_interface_of_megatrons_wrappers(field, name, method):
    ours = set(inspect.signature(getattr(getattr(stand_ins(), field), method)).parameters)
    # `name` came with megatron-core 0.19 and is given only where Megatron gives it.
    assert ours - {"name"} <= signature_in_source(name, method)


def test_absence_and_misfits_are_refused():
    from types import SimpleNamespace

    from gdn_cp import ThdLayout
    from gdn_cp.megatron import packed_seq_params_from_layout
    from gdn_cp.megatron.specs import get_hybrid_block_spec
    from gdn_cp.megatron.transformer_engine import gdn_layer_spec, packed_attention

    config: Any = SimpleNamespace(
        normalization="RMSNorm",
        num_layers=4,
        linear_attention_freq=4,
        pipeline_model_parallel_layout=SimpleNamespace(get_layer_id_list=lambda **_: [0, 1, 2, 3]),
        pipeline_model_parallel_size=1,
        virtual_pipeline_model_parallel_size=None,
        linear_num_key_heads=4,
        linear_num_value_heads=8,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_conv_kernel_dim=4,
        tensor_model_parallel_size=2,
        fp8="hybrid",
    )
    with pytest.raises(ValueError, match=r"Transformer Engine is not installed: pip install 'gdn_cp\[te\]'"):
        get_hybrid_block_spec(config, transformer_engine=True)
    config.linear_num_value_heads = 4  # 136 rows over 2 ranks
    with pytest.raises(ValueError, match=r"input projection's rows .* over tensor_model_parallel_size=2"):
        gdn_layer_spec(config, stand_ins())

    class Attention(nn.Module):
        def forward(self, x, packed_seq_params=None):
            return x

    contiguous = packed_seq_params_from_layout(ThdLayout.contiguous([0, 16], 2))
    attention = packed_attention(Attention)()
    with pytest.raises(ValueError, match="knows the zigzag layout only"):
        attention(torch.zeros(8), packed_seq_params=contiguous)
    zigzag = packed_seq_params_from_layout(ThdLayout.zigzag([0, 16], 2))
    assert attention(torch.zeros(8), packed_seq_params=zigzag).shape == (8,)
