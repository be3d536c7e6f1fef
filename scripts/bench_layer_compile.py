"""Fill the compilers' caches for bench_layer.py from a pool of processes, before the ranks start.

Compiled one after the other by each rank, what flash-linear-attention's autotuners try, Megatron's torch.compile and
this package's kernels take minutes. Here one process each compiles a share of the configurations, Megatron's layer on
one rank, and this package's mixer for each number of heads. What fails here is said, and met again by the ranks.

Dimensions: P ranks.
"""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from bench_layer_pair import Widths, build_theirs, describe_to_theirs, layer_config, start_megatron
from kernel_cases import Contender, first_configuration_only, load_fla
from kernel_timing import compile_share_only
from torch import Tensor

from gdn_cp import GatedDeltaNet, ThdLayout

LENGTHS = (2048, 16384)  # the batch that is checked, and the first that is timed: torch.compile looks at both


def compile_ahead(widths: Widths, cp_size: int, a2a_sizes: Sequence[int], shares: int) -> None:
    """Compile for the kernels of one rank of `cp_size`; `shares` processes for flash-linear-attention's alone."""
    one_rank = _of_one_rank(widths, cp_size)
    work: list[tuple[Callable[..., None], tuple[Any, ...]]] = [
        (_compile_share, (one_rank, share, shares)) for share in range(shares)
    ]
    work += [(_compile_theirs, (one_rank,))]
    work += [(_compile_ours, (_of_one_rank(widths, a),)) for a in a2a_sizes]
    with ProcessPoolExecutor(len(work), mp_context=multiprocessing.get_context("spawn")) as pool:
        numbered = enumerate(work)
        running = {pool.submit(function, number, *arguments): function for number, (function, arguments) in numbered}
        for done in as_completed(running):
            error = done.exception()
            if error is not None:
                name = running[done].__name__
                print(f"while compiling ahead, {name}: {type(error).__name__}: {str(error)[:300]}", flush=True)


def _of_one_rank(widths: Widths, ranks: int) -> Widths:
    """A layer with the heads of one of `ranks`."""
    return replace(widths, key_heads=widths.key_heads // ranks, value_heads=widths.value_heads // ranks)


def _packed(tokens: int) -> ThdLayout:
    return ThdLayout.zigzag([0, tokens // 4, tokens], 1, device="cuda")


def _leaf(*shape: int) -> Tensor:
    return torch.rand(*shape, dtype=torch.bfloat16, device="cuda").requires_grad_()


def _use_gpu(number: int) -> None:
    torch.cuda.set_device(number % torch.cuda.device_count())


def _compile_share(number: int, widths: Widths, share: int, shares: int) -> None:
    """Each `shares`-th configuration of what Megatron's layer calls of flash-linear-attention."""
    _use_gpu(number)
    compile_share_only(share, shares)
    fla = load_fla()
    if not isinstance(fla, Contender):
        return
    from fla.modules.convolution import causal_conv1d  # pyright: ignore[reportMissingImports]
    from fla.modules.l2norm import l2norm  # pyright: ignore[reportMissingImports]

    T, heads, width = LENGTHS[0], widths.value_heads, widths.head_dim
    channels, bounds = (2 * widths.key_heads + heads) * width, _packed(T).cu_seqlens_tensor()
    qkv, _ = causal_conv1d(
        x=_leaf(1, T, channels),
        weight=_leaf(channels, widths.conv),
        bias=None,
        activation="silu",
        initial_state=None,
        output_final_state=False,
        cu_seqlens=bounds,
    )
    qkv.sum().backward()
    l2norm(_leaf(1, T, 2 * widths.key_heads, width)).sum().backward()
    o, _ = fla.call(
        **{name: _leaf(1, T, heads, width) for name in ("q", "k", "v")},
        g=torch.zeros(1, T, heads, device="cuda", requires_grad=True),
        beta=_leaf(1, T, heads),
        cu_seqlens=bounds,
    )
    o.sum().backward()


def _compile_theirs(number: int, widths: Widths) -> None:
    """What torch.compile makes of Megatron's layer, whose shapes after the exchange are those of one rank."""
    _use_gpu(number)
    device = torch.device("cuda", torch.cuda.current_device())
    first_configuration_only()
    with tempfile.NamedTemporaryFile() as file:
        dist.init_process_group("nccl", init_method=f"file://{file.name}", rank=0, world_size=1)
        start_megatron(1, device)
        layer, _ = build_theirs(layer_config(widths, 1, device), device)
        if layer is None:
            return
        for tokens in LENGTHS:
            out, _ = layer(_leaf(tokens, 1, widths.hidden), None, packed_seq_params=describe_to_theirs(_packed(tokens)))
            out.sum().backward()
        dist.destroy_process_group()


def _compile_ours(number: int, widths: Widths) -> None:
    """This package's kernels for one rank's heads."""
    _use_gpu(number)
    heads = (widths.key_heads, widths.value_heads, widths.head_dim, widths.head_dim, widths.conv)
    layer = GatedDeltaNet(widths.hidden, *heads, device="cuda", dtype=torch.bfloat16)
    layer(_leaf(LENGTHS[0], widths.hidden), layout=_packed(LENGTHS[0])).sum().backward()
