"""Weights of Qwen3-Next and Qwen3.5 between Hugging Face's order and Megatron's, as functions on tensors.

Whole tensors on both sides: what one rank holds under tensor parallelism is cut from Megatron's by
`gdn_cp.megatron.whole_weights`. Nothing but the norms changes a number: the rest is a reordering of rows.

    Hugging Face (Qwen3-Next)              Megatron                                 order of the rows
    linear_attn.in_proj_qkvz, in_proj_ba   self_attention.in_proj                   below
    self_attn.q_proj, k_proj, v_proj       self_attention.linear_qkv                below
    mlp.gate_proj, up_proj                 mlp.linear_fc1                           gate, up

in_proj. Qwen3-Next goes by q/k head: q k v z of head 0, of head 1, ... and b a of head 0, of head 1, ... With 2 q/k and
4 v heads (one letter and figure a head; v, z, b, a come in pairs):

    in_proj_qkvz   q0 k0 v0 v1 z0 z1 | q1 k1 v2 v3 z2 z3      in_proj_ba   b0 b1 a0 a1 | b2 b3 a2 a3
    Megatron       q0 q1 | k0 k1 | v0 v1 v2 v3 | z0 z1 z2 z3 | b0 b1 b2 b3 | a0 a1 a2 a3

Qwen3.5 has Megatron's order already, in four tensors: in_proj_qkv, in_proj_z, in_proj_b, in_proj_a.

linear_qkv. Hugging Face's q_proj holds query and output gate head by head; Megatron goes by key/value head. With 4
query and 2 key/value heads:

    q_proj         q0 g0 q1 g1 q2 g2 q3 g3      k_proj   k0 k1      v_proj   v0 v1
    linear_qkv     q0 q1 g0 g1 k0 v0 | q2 q3 g2 g3 k1 v1

Norms. Hugging Face's decoder norms (and those of q and k) multiply by 1 + weight, the gated norm by weight; Megatron's
by 1 + weight all of them, or none (`HybridModel.zero_centered`).

Mixtures of experts: see `gdn_cp.megatron.huggingface_experts`.

Dimensions: h hidden size, H and HV q/k and v heads and K and V their dims, r = HV/H; G key/value heads of attention, n
query heads each, d their dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import chain

import torch
from torch import Tensor

from gdn_cp.gated_delta_net import GdnDims
from gdn_cp.megatron.huggingface_config import HybridModel
from gdn_cp.megatron.huggingface_experts import ROUTER_COPIES, OneByOne

_Named = Iterator[tuple[str, Tensor]]

_QKVZ, _BA = "linear_attn.in_proj_qkvz.weight", "linear_attn.in_proj_ba.weight"
_FOUR = tuple(f"linear_attn.in_proj_{part}.weight" for part in ("qkv", "z", "b", "a"))
_QKV = tuple(f"self_attn.{part}_proj.weight" for part in "qkv")
# Within an MLP.
_GATE_UP, _FC1 = ("gate_proj.weight", "up_proj.weight"), "linear_fc1.weight"
_DOWN, _FC2 = "down_proj.weight", "linear_fc2.weight"
# Hugging Face's name, Megatron's: copied as they are.
_GDN_COPIES = {
    "linear_attn.conv1d.weight": "self_attention.conv1d.weight",
    "linear_attn.A_log": "self_attention.A_log",
    "linear_attn.dt_bias": "self_attention.dt_bias",
    "linear_attn.out_proj.weight": "self_attention.out_proj.weight",
}
_ATTENTION_COPIES = {"self_attn.o_proj.weight": "self_attention.linear_proj.weight"}
# Norms whose gain is 1 + weight at Hugging Face.
_LAYER_NORMS = {
    "input_layernorm.weight": "input_layernorm.weight",
    "post_attention_layernorm.weight": "pre_mlp_layernorm.weight",
}
_ATTENTION_NORMS = {f"self_attn.{x}_norm.weight": f"self_attention.{x}_layernorm.weight" for x in "qk"}
_GATED_NORM = "linear_attn.norm.weight", "self_attention.out_norm.weight"
_EMBEDDING = "model.embed_tokens.weight", "embedding.word_embeddings.weight"
_FINAL_NORM = "model.norm.weight", "decoder.final_layernorm.weight"
_OUTPUT = "lm_head.weight", "output_layer.weight"


def to_megatron(source: Mapping[str, Tensor], model: HybridModel, *, ignore: tuple[str, ...] = ()) -> _Named:
    """Yield (name, tensor) of a whole Megatron GPTModel from Hugging Face's tensors, layer by layer.

    Args:
        source: Hugging Face's tensors by name; each is read once (a lazy mapping is fine). `model.language_model.` of
            the multimodal models is read as `model.`, and experts may be one tensor for all of a layer.
        model: its sizes.
        ignore: beginnings of names that shall be left out, such as "mtp." and "model.visual.".

    Dtypes are kept, except that a norm's weight is widened where adding or subtracting 1 would round it.

    Raises:
        ValueError: before anything is yielded, for a missing tensor and for one that has no place; on reaching it, for
            one of a wrong shape.
    """
    if model.experts is not None:
        source = OneByOne(source, model.experts.num_experts)
    read = _Reader(source, "Hugging Face", _huggingface_names(model), ignore, model.tie_embeddings, _OUTPUT[0])
    return _to_megatron(read, model)


def to_huggingface(source: Mapping[str, Tensor], model: HybridModel, *, ignore: tuple[str, ...] = ()) -> _Named:
    """Yield (name, tensor) of the Hugging Face model from a whole Megatron GPTModel's tensors: `to_megatron` undone.

    Arguments, order and errors as there. A norm's weight takes the dtype of the matrix beside it, the gated norm's that
    of A_log.
    """
    read = _Reader(source, "Megatron", _megatron_names(model), ignore, model.tie_embeddings, _OUTPUT[1])
    return _to_huggingface(read, model)


class _Reader:
    """The source's tensors by plain name; refuses a source that has other tensors than the model."""

    def __init__(
        self,
        source: Mapping[str, Tensor],
        side: str,
        shapes: dict[str, tuple[int, ...]],
        ignore: tuple[str, ...],
        tied: bool,
        output: str,
    ) -> None:
        self.source, self.shapes = source, shapes
        self.names = {
            name.replace("model.language_model.", "model.", 1): name
            for name in source
            if not name.startswith(ignore or ("\0",)) and not name.endswith("_extra_state")
        }
        if tied:  # some files repeat the embedding
            self.names.pop(output, None)
        missing, unknown = sorted(shapes.keys() - self.names.keys()), sorted(self.names.keys() - shapes.keys())
        if missing:
            raise ValueError(f"source: the {side} model lacks {_few(missing)}; is the configuration this model's?")
        if unknown:
            raise ValueError(
                f"source: {_few(unknown)} of the {side} model would be lost; if that is meant, name their beginnings "
                "in `ignore`"
            )

    def __call__(self, name: str) -> Tensor:
        tensor = self.source[self.names[name]]
        if tuple(tensor.shape) != self.shapes[name]:
            raise ValueError(f"{name}: has shape {tuple(tensor.shape)}, expected {self.shapes[name]}")
        return tensor


def _few(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _to_megatron(read: Callable[[str], Tensor], model: HybridModel) -> _Named:
    def gain(weight: Tensor) -> Tensor:
        return weight if model.zero_centered else _shifted(weight, 1)

    yield _EMBEDDING[1], read(_EMBEDDING[0])
    for layer, is_gdn in enumerate(model.linear_attention):
        theirs, ours = f"model.layers.{layer}.", f"decoder.layers.{layer}."
        norms = {**_LAYER_NORMS, **({} if is_gdn else _ATTENTION_NORMS)}
        copies = _copies(model, layer)
        if is_gdn:
            weight = read(theirs + _GATED_NORM[0])
            yield ours + _GATED_NORM[1], _shifted(weight, -1) if model.zero_centered else weight
            if model.family == "qwen3_next":
                sections = split_qwen3_next_in_proj(read(theirs + _QKVZ), read(theirs + _BA), model.gdn)
            else:
                sections = tuple(read(theirs + name) for name in _FOUR)
            yield ours + "self_attention.in_proj.weight", torch.cat(sections)
        else:
            qkv = join_linear_qkv(*(read(theirs + name) for name in _QKV), groups=model.num_query_groups)
            yield ours + "self_attention.linear_qkv.weight", qkv
        for their_mlp, our_mlp, _width in _mlps(model, layer):
            yield ours + our_mlp + _FC1, torch.cat([read(theirs + their_mlp + name) for name in _GATE_UP])
            yield ours + our_mlp + _FC2, read(theirs + their_mlp + _DOWN)
        yield from ((ours + to, read(theirs + name)) for name, to in copies.items())
        yield from ((ours + to, gain(read(theirs + name))) for name, to in norms.items())
    yield _FINAL_NORM[1], gain(read(_FINAL_NORM[0]))
    if not model.tie_embeddings:
        yield _OUTPUT[1], read(_OUTPUT[0])


def _to_huggingface(read: Callable[[str], Tensor], model: HybridModel) -> _Named:
    def gain(weight: Tensor, dtype: torch.dtype) -> Tensor:
        return (weight if model.zero_centered else weight.double() - 1).to(dtype)

    embedding = read(_EMBEDDING[1])
    yield _EMBEDDING[0], embedding
    for layer, is_gdn in enumerate(model.linear_attention):
        theirs, ours = f"model.layers.{layer}.", f"decoder.layers.{layer}."
        norms = {**_LAYER_NORMS, **({} if is_gdn else _ATTENTION_NORMS)}
        copies = _copies(model, layer)
        if is_gdn:
            in_proj = read(ours + "self_attention.in_proj.weight")
            yield from ((theirs + name, rows) for name, rows in _split_in_proj(in_proj, model).items())
            weight = read(ours + _GATED_NORM[1])
            weight = weight.double() + 1 if model.zero_centered else weight
            yield theirs + _GATED_NORM[0], weight.to(read(ours + "self_attention.A_log").dtype)
        else:
            qkv = split_linear_qkv(
                read(ours + "self_attention.linear_qkv.weight"), model.num_query_groups, model.kv_channels
            )
            yield from ((theirs + name, rows) for name, rows in zip(_QKV, qkv, strict=True))
        for their_mlp, our_mlp, _width in _mlps(model, layer):
            halves = read(ours + our_mlp + _FC1).chunk(2)
            yield from ((theirs + their_mlp + name, half) for name, half in zip(_GATE_UP, halves, strict=True))
            yield theirs + their_mlp + _DOWN, (down := read(ours + our_mlp + _FC2))
        yield from ((theirs + name, read(ours + to)) for name, to in copies.items())
        yield from ((theirs + name, gain(read(ours + to), down.dtype)) for name, to in norms.items())
    yield _FINAL_NORM[0], gain(read(_FINAL_NORM[1]), embedding.dtype)
    if not model.tie_embeddings:
        yield _OUTPUT[0], read(_OUTPUT[1])


def _mlps(model: HybridModel, layer: int) -> Iterator[tuple[str, str, int]]:
    """(Hugging Face's prefix, Megatron's, width) of each MLP of a layer."""
    if model.experts is not None and model.experts.sparse[layer]:
        return model.experts.mlps()
    return iter([("mlp.", "mlp.", model.ffn_hidden_size)])


def _copies(model: HybridModel, layer: int) -> dict[str, str]:
    """What of a layer is copied as it is, the MLPs aside: Hugging Face's name, Megatron's."""
    mixer = _GDN_COPIES if model.linear_attention[layer] else _ATTENTION_COPIES
    return mixer | (ROUTER_COPIES if model.experts is not None and model.experts.sparse[layer] else {})


def split_qwen3_next_in_proj(qkvz: Tensor, ba: Tensor, gdn: GdnDims) -> tuple[Tensor, ...]:
    """Rows q, k, v, z, beta, alpha of Megatron's in_proj from Qwen3-Next's two projections [.., h]."""
    H, ratio, hidden = gdn.num_k_heads, gdn.num_v_heads // gdn.num_k_heads, qkvz.shape[1]
    K, V = gdn.head_k_dim, ratio * gdn.head_v_dim
    by_head = (*qkvz.view(H, -1, hidden).split([K, K, V, V], 1), *ba.view(H, -1, hidden).split(ratio, 1))
    return tuple(part.reshape(-1, hidden) for part in by_head)


def join_qwen3_next_in_proj(sections: tuple[Tensor, ...], gdn: GdnDims) -> tuple[Tensor, Tensor]:
    """in_proj_qkvz and in_proj_ba from the sections q, k, v, z, beta, alpha: `split_qwen3_next_in_proj` undone."""
    hidden = sections[0].shape[1]
    by_head = [section.reshape(gdn.num_k_heads, -1, hidden) for section in sections]
    return torch.cat(by_head[:4], 1).view(-1, hidden), torch.cat(by_head[4:], 1).view(-1, hidden)


def _split_in_proj(in_proj: Tensor, model: HybridModel) -> dict[str, Tensor]:
    widths = model.gdn.sections
    if model.family == "qwen3_next":
        return dict(zip((_QKVZ, _BA), join_qwen3_next_in_proj(in_proj.split(widths), model.gdn), strict=True))
    return dict(zip(_FOUR, in_proj.split([model.gdn.conv_dim, *widths[3:]]), strict=True))


def join_linear_qkv(q: Tensor, k: Tensor, v: Tensor, groups: int) -> Tensor:
    """Megatron's linear_qkv [G*(2*n+2)*d, h] from q_proj [G*n*2*d, h] (gates included), k_proj, v_proj [G*d, h]."""
    hidden, dim = k.shape[1], k.shape[0] // groups
    # [G, n, query or gate, d, h]: Megatron has all queries of a group before their gates
    queries = q.view(groups, -1, 2, dim, hidden).transpose(1, 2).reshape(groups, -1, hidden)
    return torch.cat([queries, k.view(groups, dim, hidden), v.view(groups, dim, hidden)], 1).view(-1, hidden)


def split_linear_qkv(qkv: Tensor, groups: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """q_proj, k_proj and v_proj from Megatron's linear_qkv: `join_linear_qkv` undone."""
    hidden = qkv.shape[1]
    by_group = qkv.view(groups, -1, hidden)
    queries, k, v = by_group.split([by_group.shape[1] - 2 * dim, dim, dim], 1)
    q = queries.reshape(groups, 2, -1, dim, hidden).transpose(1, 2)
    return q.reshape(-1, hidden), k.reshape(-1, hidden), v.reshape(-1, hidden)


def _shifted(weight: Tensor, by: int) -> Tensor:
    """weight + by in the narrowest dtype from its own upwards that holds it exactly (float64 if none does)."""
    exact = weight.double() + by
    for dtype in (weight.dtype, torch.float32):
        if torch.equal(exact.to(dtype).double(), exact):
            return exact.to(dtype)
    return exact


def _layer_shapes(model: HybridModel, layer: int) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Names and shapes within one layer at (Hugging Face, Megatron)."""
    h, gdn = model.hidden_size, model.gdn
    v_dim = gdn.num_v_heads * gdn.head_v_dim
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(_LAYER_NORMS, (h,))
    theirs: dict[str, tuple[int, ...]] = {}
    ours: dict[str, tuple[int, ...]] = {}
    for their_mlp, our_mlp, width in _mlps(model, layer):
        theirs |= {their_mlp + name: (width, h) for name in _GATE_UP} | {their_mlp + _DOWN: (h, width)}
        ours |= {our_mlp + _FC1: (2 * width, h), our_mlp + _FC2: (h, width)}
    copies = {**_LAYER_NORMS, **_copies(model, layer)}
    if model.experts is not None and model.experts.sparse[layer]:
        shapes |= dict(zip(ROUTER_COPIES, ((model.experts.num_experts, h), (1, h)), strict=True))
    if model.linear_attention[layer]:
        copies |= {_GATED_NORM[0]: _GATED_NORM[1]}
        heads, conv = (gdn.num_v_heads,), (gdn.conv_dim, 1, gdn.conv_kernel)
        shapes |= dict(zip(_GDN_COPIES, (conv, heads, heads, (h, v_dim)), strict=True))
        shapes[_GATED_NORM[0]] = (gdn.head_v_dim,)
        ours["self_attention.in_proj.weight"] = (gdn.in_proj_dim, h)
        if model.family == "qwen3_next":
            theirs |= {_QKVZ: (gdn.conv_dim + v_dim, h), _BA: (2 * gdn.num_v_heads, h)}
        else:
            theirs |= dict(zip(_FOUR, ((width, h) for width in (gdn.conv_dim, *gdn.sections[3:])), strict=True))
    else:
        copies |= _ATTENTION_NORMS
        q, kv = model.num_attention_heads * model.kv_channels, model.num_query_groups * model.kv_channels
        shapes |= {"self_attn.o_proj.weight": (h, q), **dict.fromkeys(_ATTENTION_NORMS, (model.kv_channels,))}
        theirs |= dict(zip(_QKV, ((2 * q, h), (kv, h), (kv, h)), strict=True))
        ours["self_attention.linear_qkv.weight"] = (2 * q + 2 * kv, h)
    return theirs | shapes, ours | {copies[name]: shape for name, shape in shapes.items()}


def _all_shapes(model: HybridModel, side: int, layer_prefix: str) -> dict[str, tuple[int, ...]]:
    table, norm = (model.vocab_size, model.hidden_size), (model.hidden_size,)
    ends = {_EMBEDDING[side]: table, _FINAL_NORM[side]: norm}
    if not model.tie_embeddings:
        ends[_OUTPUT[side]] = table
    layers = (
        {f"{layer_prefix}{layer}.{name}": shape for name, shape in _layer_shapes(model, layer)[side].items()}
        for layer in range(model.num_layers)
    )
    return dict(chain(ends.items(), *(shapes.items() for shapes in layers)))


def _huggingface_names(model: HybridModel) -> dict[str, tuple[int, ...]]:
    return _all_shapes(model, 0, "model.layers.")


def _megatron_names(model: HybridModel) -> dict[str, tuple[int, ...]]:
    return _all_shapes(model, 1, "decoder.layers.")
