"""Inference with `gdn_cp.GatedDeltaNet` on one rank: prefill, decode, and draft packets that can be taken back.

    output, cache = prefill(layer, prompts, slots=4)      # chunked rule, keeps final states and convolution tails
    output = decode(layer, hidden_states, cache)          # one token or a packet, the cache is updated in place
    cache.roll_back(rejected)                             # take the last tokens back

A cache is a ring for each sequence, of states and of the convolution's inputs, and a count of tokens that says where
the ring stands. Nothing is copied to take tokens back: the count becomes smaller, and what belongs to it is still
there. The batch is static; every tensor keeps its shape and its address, and decode reads nothing on the host.

Dimensions: B sequences, T tokens of a packet, D = conv_dim channels of the convolution, W taps, S slots of the ring of
states, R = W + S - 2 columns of the ring of inputs, HV value heads, K, V head dims, t rows of a prefill.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from gdn_cp.comm.layout import ThdLayout
from gdn_cp.gated_delta_net import RULE, GatedDeltaNet, GdnDims, gate_output, mix_sequences, split_heads
from gdn_cp.kernels.conv1d import causal_conv1d
from gdn_cp.kernels.recurrent import fused_recurrent_gated_delta_rule
from gdn_cp.mixer_checks import check_call, check_count, check_eps, check_hidden_states, check_parameters, check_tensor

_STATE_DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True, eq=False, repr=False)
class GdnCache:
    """What a layer keeps of B sequences between calls; make it with `prefill` or, without tokens, with `empty`.

    Attributes:
        dims: heads and widths of the layer.
        conv: [B, D, R], the convolution's inputs: that of the token at position p is column p % R, zeros before the
            first token. R = W - 1 with one slot, and S - 1 more to take back as many tokens.
        state: [B, S, HV, K, V] (or [..., V, K]): the state after p tokens is slot p % S.
        lengths: int64 [B], tokens so far. Negative: no sequence here; its outputs are zero and it stays untouched.
        oldest: int64 [B], the smallest length that can be gone back to.
        state_v_first: states are [V, K].
    """

    dims: GdnDims
    conv: Tensor
    state: Tensor
    lengths: Tensor
    oldest: Tensor
    state_v_first: bool = False

    @classmethod
    @torch.inference_mode(False)  # made under inference mode it could only be updated there
    def empty(
        cls,
        dims: GdnDims,
        batch: int,
        *,
        slots: int = 1,
        state_v_first: bool = False,
        dtype: torch.dtype = torch.float32,
        state_dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> GdnCache:
        """Make the cache of `batch` sequences without tokens.

        Args:
            dims: heads and widths of the layer (of this tensor-parallel rank).
            batch: number of sequences B.
            slots: S; the last S - 1 tokens can be taken back.
            state_v_first: keep states as [V, K].
            dtype: of the projections, which the convolution's inputs are kept in.
            state_dtype: float32 (None: so) or bfloat16; float64 with float64 projections.
            device: where the tensors shall be.

        Raises ValueError for a count below 1 or a dtype that is not offered, TypeError for another type.
        """
        if not isinstance(dims, GdnDims):
            raise TypeError(f"dims must be a gdn_cp.GdnDims, got {type(dims).__name__}")
        check_count("batch", batch)
        check_count("slots", slots)
        if not isinstance(state_v_first, bool):
            raise TypeError(f"state_v_first must be True or False, got {state_v_first!r}")
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"dtype must be a torch.dtype, got {dtype!r}")
        allowed = (torch.float64,) if dtype == torch.float64 else _STATE_DTYPES
        state_dtype = allowed[0] if state_dtype is None else state_dtype
        if state_dtype not in allowed:
            kind = ValueError if isinstance(state_dtype, torch.dtype) else TypeError
            raise kind(f"state_dtype={state_dtype}: choose {' or '.join(map(str, allowed))} for projections in {dtype}")
        K, V = dims.head_k_dim, dims.head_v_dim
        inner = (V, K) if state_v_first else (K, V)
        columns = max(dims.conv_kernel + slots - 2, 1)
        return cls(
            dims=dims,
            conv=torch.zeros(batch, dims.conv_dim, columns, dtype=dtype, device=device),
            state=torch.zeros(batch, slots, dims.num_v_heads, *inner, dtype=state_dtype, device=device),
            lengths=torch.zeros(batch, dtype=torch.int64, device=device),
            oldest=torch.zeros(batch, dtype=torch.int64, device=device),
            state_v_first=state_v_first,
        )

    @property
    def batch(self) -> int:
        """Sequences."""
        return self.conv.shape[0]

    @property
    def slots(self) -> int:
        """States kept of each sequence."""
        return self.state.shape[1]

    def conv_tail(self) -> Tensor:
        """[B, D, W-1]: the convolution's last inputs, oldest first, zeros before the first token."""
        back = torch.arange(1 - self.dims.conv_kernel, 0, device=self.conv.device)
        return self.conv.gather(2, self._columns(self.lengths[:, None] + back))

    def current_state(self) -> Tensor:
        """[B, HV, K, V] (or [B, HV, V, K]): the states after the last tokens; a copy."""
        return self.state[torch.arange(self.batch, device=self.state.device), self.lengths % self.slots]

    def roll_back(self, rejected: int | Sequence[int] | Tensor) -> None:
        """Take the last tokens of each sequence back, to the accepted length of a packet.

        Args:
            rejected: tokens to take back, the same of all or int [B]. All that was taken back and not decoded anew
                may be S - 1 at most, and no token of the prefill.

        Raises ValueError for more, naming the sequences. Numbers in a tensor on a GPU are not read, which would wait
        for it: there a sequence that asks for too much is lost, its length becomes -1 and its outputs zero.
        """
        counts = self._counts(rejected)
        alive = self.lengths >= 0
        target = self.lengths - counts
        bad = alive & ((counts < 0) | (target < self.oldest))
        if bad.device.type == "cpu" and bool(bad.any()):
            raise ValueError(
                f"rejected={counts.tolist()}: sequences {bad.nonzero().flatten().tolist()} cannot go back so far; with "
                f"slots={self.slots} and the tokens since prefill 0 to {(self.lengths - self.oldest).tolist()} are kept"
            )
        self.lengths.copy_(torch.where(bad, -1, torch.where(alive, target, self.lengths)))

    def _counts(self, rejected: Any) -> Tensor:
        """Rejected tokens as int64 [B] on the cache's device."""
        if isinstance(rejected, bool) or not isinstance(rejected, int | Sequence | Tensor):
            raise TypeError(f"rejected must be an int or ints of each sequence, got {type(rejected).__name__}")
        if isinstance(rejected, int):
            rejected = [rejected] * self.batch
        if not isinstance(rejected, Tensor):
            if not all(isinstance(n, int) and not isinstance(n, bool) for n in rejected):
                raise TypeError(f"rejected must hold ints, got {rejected!r}")
            if any(not 0 <= n < self.slots for n in rejected):
                raise ValueError(
                    f"rejected={list(rejected)}: with slots={self.slots} each may be 0 to {self.slots - 1}"
                )
            rejected = torch.tensor(rejected, dtype=torch.int64).to(self.lengths.device)
        if rejected.dtype not in (torch.int32, torch.int64) or tuple(rejected.shape) != (self.batch,):
            raise ValueError(
                f"rejected must be int32 or int64 [{self.batch}], one for each sequence, got {rejected.dtype} "
                f"{list(rejected.shape)}"
            )
        if rejected.device != self.lengths.device:
            raise ValueError(f"rejected is on {rejected.device} but the cache on {self.lengths.device}: move it there")
        return rejected.long()

    def _columns(self, positions: Tensor) -> Tensor:
        """Index [B, D, n] of the columns of positions [B, n]."""
        return (positions % self.conv.shape[2])[:, None].expand(-1, self.conv.shape[1], -1)

    def _append(self, inputs: Tensor) -> None:
        """Store the convolution's inputs [B, T, D] of a packet whose states are stored, and count its tokens."""
        T = inputs.shape[1]
        kept = min(T, self.conv.shape[2])
        alive = self.lengths >= 0
        columns = self._columns(self.lengths[:, None] + torch.arange(T - kept, T, device=self.conv.device))
        new = inputs[:, T - kept :].transpose(1, 2)
        self.conv.scatter_(2, columns, torch.where(alive[:, None, None], new, self.conv.gather(2, columns)))
        self.lengths.add_(alive * T)
        self.oldest.copy_(torch.maximum(self.oldest, self.lengths - (self.slots - 1)))


@torch.no_grad()
def prefill(
    layer: GatedDeltaNet,
    hidden_states: Tensor,
    *,
    layout: ThdLayout | None = None,
    slots: int = 1,
    state_v_first: bool = False,
    state_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> tuple[Tensor, GdnCache]:
    """Run the layer on whole prompts, as its `forward` does on one rank, and keep what decode needs.

    Args:
        layer: the layer.
        hidden_states: [t, hidden] packed rows (a layout is required) or [B, S, hidden].
        layout: the sequences, of cp_size 1; with `seqlens` for padded prompts. Padded rows reach neither output nor
            cache, whatever stands in them.
        slots, state_v_first, state_dtype: of the cache, see `GdnCache.empty`.
        backend: of the chunked rule, see `gdn_cp.choose_backend`.

    Returns:
        The output, shaped as `hidden_states`, zero on padded rows; and the cache of the layout's sequences.

    Raises ValueError or TypeError as `GatedDeltaNet.forward` and `GdnCache.empty`. No gradient.
    """
    _check_layer(layer)
    rows, layout = layer.packed_rows(hidden_states, layout, None)
    mixed, cache = prefill_mixer(
        layer.in_proj(rows),
        **layer.mixer_arguments(),
        layout=layout,
        slots=slots,
        state_v_first=state_v_first,
        state_dtype=state_dtype,
        backend=backend,
    )
    return layer.out_proj(mixed).view(hidden_states.shape), cache


@torch.no_grad()
def decode(layer: GatedDeltaNet, hidden_states: Tensor, cache: GdnCache, *, backend: str | None = None) -> Tensor:
    """Run the layer on the next T tokens of every sequence, from `cache`, which is updated in place.

    Args:
        layer: the layer.
        hidden_states: [B, T, hidden]: a token each, or a packet. All of a packet can be taken back if T < S.
        cache: of `prefill` or of an earlier `decode`.
        backend: of the recurrent rule: "triton", "reference" or None for an automatic choice.

    Returns:
        [B, T, hidden].

    Raises ValueError or TypeError, the cache untouched, for what does not fit the layer or the cache. No gradient.
    """
    _check_layer(layer)
    _check_cache(cache)
    check_hidden_states(hidden_states, layer.hidden_size, layer.in_proj.weight)
    if hidden_states.dim() != 3 or hidden_states.shape[0] != cache.batch or not hidden_states.shape[1]:
        raise ValueError(
            f"hidden_states must be [{cache.batch}, T >= 1, {layer.hidden_size}], tokens of each of the cache's "
            f"sequences, got {list(hidden_states.shape)}"
        )
    projected = layer.in_proj(hidden_states.flatten(0, 1)).unflatten(0, hidden_states.shape[:2])
    mixed = decode_mixer(projected, cache, **layer.mixer_arguments(), backend=backend)
    return layer.out_proj(mixed.flatten(0, 1)).view(hidden_states.shape)


@torch.no_grad()
def prefill_mixer(
    projected: Tensor,
    *,
    dims: GdnDims,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None = None,
    A_log: Tensor,
    dt_bias: Tensor,
    out_norm_weight: Tensor,
    layout: ThdLayout,
    norm_eps: float = 1e-6,
    slots: int = 1,
    state_v_first: bool = False,
    state_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> tuple[Tensor, GdnCache]:
    """`gdn_cp.gated_delta_net_mixer` on one rank, and the cache to go on from; for layers with other projections.

    Arguments as there and in `prefill`: projected [t, in_proj_dim] -> [t, HV*V].
    """
    if layout is None:
        raise ValueError("layout=None: pass the ThdLayout that says where sequences begin, cp_size 1")
    if not isinstance(dims, GdnDims):
        raise TypeError(f"dims must be a gdn_cp.GdnDims, got {type(dims).__name__}")
    check_call(projected, dims, layout, None)
    check_parameters(projected, dims, conv1d_weight, conv1d_bias, A_log, dt_bias, out_norm_weight)
    check_eps(norm_eps)
    cache = GdnCache.empty(
        dims, layout.num_sequences, slots=slots, state_v_first=state_v_first, dtype=projected.dtype,
        state_dtype=state_dtype, device=projected.device,
    )  # fmt: skip
    padding, t = layout.to("cpu").global_padding(), projected.shape[0]
    real = None if padding is None else (~padding).nonzero().flatten().to(projected.device)
    if real is not None:  # padded rows would pass through the states
        layout = ThdLayout.zigzag([0, *accumulate(layout.seqlens)], 1, device=layout.device)
        projected = projected.index_select(0, real)
    qkv, z, beta, alpha = projected.split((dims.conv_dim, *dims.sections[3:]), dim=1)
    o, final = mix_sequences(
        qkv, beta, alpha, dims, conv1d_weight=conv1d_weight, conv1d_bias=conv1d_bias, A_log=A_log, dt_bias=dt_bias,
        layout=layout, groups=None, rule=replace(RULE, backend=backend), output_final_state=True,
    )  # fmt: skip
    assert final is not None
    _fill(cache, qkv, layout.cu_seqlens_tensor().long(), final)
    out = gate_output(o, z, dims, out_norm_weight, norm_eps)
    return (out if real is None else out.new_zeros(t, out.shape[1]).index_copy_(0, real, out)), cache


@torch.no_grad()
def decode_mixer(
    projected: Tensor,
    cache: GdnCache,
    *,
    dims: GdnDims,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None = None,
    A_log: Tensor,
    dt_bias: Tensor,
    out_norm_weight: Tensor,
    norm_eps: float = 1e-6,
    backend: str | None = None,
) -> Tensor:
    """Mix the next T tokens of each sequence: projected [B, T, in_proj_dim] -> [B, T, HV*V], `cache` updated in place.

    A packet gives the bits of its tokens one at a time. Other arguments as in `prefill_mixer` and `decode`.
    """
    _check_cache(cache)
    check_tensor("projected", projected)
    if not isinstance(dims, GdnDims):
        raise TypeError(f"dims must be a gdn_cp.GdnDims, got {type(dims).__name__}")
    if projected.dim() != 3 or projected.shape[0] != cache.batch or not projected.shape[1]:
        raise ValueError(f"projected must be [{cache.batch}, T >= 1, in_proj_dim], got {list(projected.shape)}")
    B, T = projected.shape[:2]
    rows = projected.flatten(0, 1)
    check_call(rows, dims, None, None)
    check_parameters(rows, dims, conv1d_weight, conv1d_bias, A_log, dt_bias, out_norm_weight)
    check_eps(norm_eps)
    if cache.dims != dims:
        raise ValueError(f"cache is of {cache.dims}, the layer has {dims}: use a cache of this layer's prefill")
    if cache.conv.dtype != projected.dtype or cache.conv.device != projected.device:
        raise ValueError(
            f"cache keeps {cache.conv.dtype} on {cache.conv.device}, the projection gave {projected.dtype} on "
            f"{projected.device}: prefill and decode under the same dtype, autocast and device"
        )
    qkv, z, beta, alpha = rows.split((dims.conv_dim, *dims.sections[3:]), dim=1)
    new = qkv.unflatten(0, (B, T))
    # Rows that reach into the sequence before are those of the tail, whose results are dropped.
    window = torch.cat([cache.conv_tail().transpose(1, 2), new], 1)
    convolved = causal_conv1d(window.flatten(0, 1), conv1d_weight, conv1d_bias, activation="silu")
    convolved = convolved.view(window.shape)[:, dims.conv_kernel - 1 :].flatten(0, 1)
    inputs = split_heads(convolved, beta, alpha, dims, A_log, dt_bias)
    q, k, v, g, beta = (x.squeeze(0).unflatten(0, (B, T)) for x in inputs.tensors()[:5] if x is not None)
    o, _ = fused_recurrent_gated_delta_rule(
        q, k, v, g, beta, A_log=A_log, dt_bias=dt_bias, initial_state=cache.state, cache_seqlens=cache.lengths,
        state_v_first=cache.state_v_first, backend=backend, scale=RULE.scale,
        use_qk_l2norm_in_kernel=RULE.use_qk_l2norm_in_kernel, use_gate_in_kernel=RULE.use_gate_in_kernel,
        use_beta_sigmoid_in_kernel=RULE.use_beta_sigmoid_in_kernel,
    )  # fmt: skip
    cache._append(new)
    return gate_output(o.flatten(0, 1).flatten(1), z, dims, out_norm_weight, norm_eps).unflatten(0, (B, T))


def _fill(cache: GdnCache, qkv: Tensor, cu_seqlens: Tensor, final: Tensor) -> None:
    """Store in an empty cache what whole sequences leave: qkv [t, D] before the convolution, final [B, HV, K, V]."""
    lengths = cu_seqlens.diff()
    cache.lengths.copy_(lengths)
    cache.oldest.copy_(lengths)
    who = torch.arange(cache.batch, device=lengths.device)
    final = final.transpose(-1, -2) if cache.state_v_first else final
    cache.state[who, lengths % cache.slots] = final.to(cache.state.dtype)
    if len(qkv) and cache.dims.conv_kernel > 1:
        back = torch.arange(1 - cache.dims.conv_kernel, 0, device=lengths.device)
        positions = lengths[:, None] + back
        rows = (cu_seqlens[:-1, None] + positions).clamp(0, len(qkv) - 1)
        tail = qkv[rows].masked_fill((positions < 0)[..., None], 0)
        cache.conv.scatter_(2, cache._columns(positions), tail.transpose(1, 2))


def _check_layer(layer: Any) -> None:
    if not isinstance(layer, GatedDeltaNet):
        raise TypeError(
            f"layer must be a gdn_cp.GatedDeltaNet, got {type(layer).__name__}: call prefill_mixer and decode_mixer"
        )


def _check_cache(cache: Any) -> None:
    if not isinstance(cache, GdnCache):
        raise TypeError(f"cache must be a GdnCache, got {type(cache).__name__}: prefill returns it")
