"""The fused mixer against the composed one: output and every gradient, one rank and several, any cut, padding.

Both compute in float32 (Triton's interpreter takes nothing else on a CPU) with sums in another order: some hundred
terms with a rounding of 6e-8 each, through up to three products in a row. Gradients of A_log and dt_bias are measured
against the sums of their terms' magnitudes, since terms of both signs cancel in them and roundings do not.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

pytest.importorskip("triton")

from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from gdn_cp import GatedDeltaNet, GdnDims, ThdLayout, gated_delta_net_mixer
from gdn_cp import fused_mixer as fused_module
from gdn_cp.comm.transport import HeadBuffer, LocalTransport, MixerColumns, RowBuffer
from gdn_cp.fused_mixer import MixerParameters, fused_call, fused_mixer, refusal
from gdn_cp.kernels.piece_plan import PIECES_VARIABLE

ROUNDING = 3e-5
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("conv1d.weight", "conv1d.bias", "A_log", "dt_bias", "out_norm.weight")


def layer(dims: GdnDims, bias: bool = True) -> GatedDeltaNet:
    torch.manual_seed(0)
    sizes = (dims.num_k_heads, dims.num_v_heads, dims.head_k_dim, dims.head_v_dim, dims.conv_kernel)
    module = GatedDeltaNet(8, *sizes, conv_bias=bias, device=DEVICE)
    torch.nn.init.normal_(module.out_norm.weight)
    return module


def parameters_of(module: GatedDeltaNet) -> MixerParameters:
    conv = module.conv1d
    return MixerParameters(conv.weight, conv.bias, module.A_log, module.dt_bias, module.out_norm.weight)


def composed(module: GatedDeltaNet, x: Tensor, layout: ThdLayout | None, group: dist.ProcessGroup | None) -> Tensor:
    return gated_delta_net_mixer(x, **module.mixer_arguments(), layout=layout, group=group, backend="reference")


def fused(
    module: GatedDeltaNet, x: Tensor, layout: ThdLayout | None, group: dist.ProcessGroup | None, **changed: Any
) -> Tensor:
    parameters = parameters_of(module)
    call = fused_call(x, parameters, module.dims, layout=layout, group=group, eps=module.norm_eps)
    return fused_mixer(x, parameters, replace(call, **changed))


def results(mixer: Any, module: GatedDeltaNet, x: Tensor, dy: Tensor, *call: Any, **changed: Any) -> dict[str, Tensor]:
    """Output, input gradient and parameter gradients by name."""
    module.zero_grad()
    x = x.clone().requires_grad_()
    out = mixer(module, x, *call, **changed)
    out.backward(dy)
    gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    assert x.grad is not None
    return {"out": out.detach(), "input": x.grad, **gradients}


def errors(got: dict[str, Tensor], expected: dict[str, Tensor], group: dist.ProcessGroup | None) -> dict[str, float]:
    assert got.keys() == expected.keys()
    size = {name: x.norm() for name, x in expected.items()}
    terms = expected["input"][:, -len(expected["A_log"]) :].abs().sum(0)
    if group is not None:
        dist.all_reduce(terms, group=group)
    size["A_log"] = size["dt_bias"] = terms[expected["A_log"] != 0].norm()
    return {name: float((got[name] - x).norm() / size[name].clamp_min(1e-30)) for name, x in expected.items()}


def inputs(layout: ThdLayout, dims: GdnDims, rank: int, poison: float = torch.nan) -> tuple[Tensor, Tensor]:
    """A rank's projection and output gradient, padded rows poisoned."""
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(layout.t_local, dims.in_proj_dim, generator=generator).to(DEVICE)
    dy = torch.randn(layout.t_local, dims.sections[3], generator=generator).to(DEVICE)
    padding = layout.local_padding(rank)
    if padding is not None:
        x, dy = (torch.where(padding[:, None], poison, rows) for rows in (x, dy))
    return x, dy


def compare(layout: ThdLayout, dims: GdnDims, group: dist.ProcessGroup | None, bias: bool = True) -> dict[str, float]:
    rank = 0 if group is None else group.rank()
    module = layer(dims, bias)
    x, dy = inputs(layout, dims, rank)
    got, expected = (results(mixer, module, x, dy, layout, group) for mixer in (fused, composed))
    return errors(got, expected, group)


@pytest.mark.parametrize(
    ("dims", "layout"),
    [
        (GdnDims(1, 2, 16, 16, 4), ThdLayout.zigzag([0, 5, 5, 73], 1)),
        (GdnDims(1, 4, 16, 32, 2), ThdLayout.zigzag([0, 9, 20], 1, seqlens=[0, 8])),
        (GdnDims(1, 3, 32, 16, 3), ThdLayout.batched(2, 6, 1)),
    ],
)
def test_one_rank(dims: GdnDims, layout: ThdLayout):
    found = compare(layout.to(DEVICE), dims, None, bias=dims.conv_kernel != 3)
    assert len(found) == 6 + (dims.conv_kernel != 3)
    assert all(error < ROUNDING for error in found.values()), found


def _on_ranks(rank: int, world_size: int) -> dict[str, float]:
    """All four ranks cut one batch, then each pair of them another."""
    pair = [dist.new_group([0, 1]), dist.new_group([2, 3])][rank // 2]
    two = (
        (GdnDims(2, 4, 16, 16, 4), ThdLayout.zigzag([0, 8, 8, 12], 2, seqlens=[5, 0, 4]))
        if rank < 2
        else (GdnDims(2, 2, 16, 16, 2), ThdLayout.contiguous([0, 3, 8], 2))
    )
    four = (GdnDims(4, 4, 16, 16, 2), ThdLayout.batched(2, 8, 4))
    found = {}
    for name, group, (dims, layout) in (("two", pair, two), ("four", dist.group.WORLD, four)):
        found |= {f"{name} {what}": error for what, error in compare(layout, dims, group).items()}
    return found


@pytest.mark.skipif(DEVICE == "cuda", reason="gloo carries CPU rows, which the kernels take in the interpreter only")
def test_two_and_four_ranks(run_ranks):
    """Every rank's output and input gradient, and its part of every parameter gradient."""
    for found in run_ranks(_on_ranks, 4):
        assert len(found) == 2 * 7
        assert all(error < ROUNDING for error in found.values()), max(found.items(), key=lambda item: item[1])


@dataclass(eq=False)
class ReusedMemory:
    """A transport of one rank in natural order whose buffers are overwritten with NaN at its next move, as peers do."""

    columns: MixerColumns
    padding: Tensor | None
    lent: list[Tensor] = field(default_factory=list)

    def _lend(self, x: Tensor) -> Tensor:
        for old in self.lent:
            old.fill_(torch.nan)
        self.lent[:] = [x.clone()]
        return self.lent[0]

    def _clean(self, x: Tensor) -> Tensor:
        return x if self.padding is None else x.masked_fill(self.padding[:, None], 0)

    def send_in(self, projected: Tensor, keep_z: bool) -> tuple[RowBuffer, Tensor]:
        c = self.columns
        moved = self._lend(self._clean(torch.cat([projected[:, : c.conv], projected[:, c.gates :]], 1)))
        return RowBuffer(moved, None, c.conv, transient=True), projected[:, c.conv : c.gates].clone()

    def return_out(self, o: Tensor) -> HeadBuffer:
        return HeadBuffer(self._lend(o)[None], transient=True)

    def out_grad_buffer(self, like: Tensor) -> Tensor:
        return torch.empty_like(like)[None]

    def send_out_grad(self, buffer: Tensor) -> Tensor:
        return self._lend(buffer[0])

    def in_grad_buffer(self, like: Tensor) -> RowBuffer:
        c = self.columns
        return RowBuffer(self._lend(like.new_empty(len(like), c.conv + 2 * c.heads)), None, c.conv)

    def return_in_grad(self, buffer: RowBuffer, d_projected: Tensor, dz: Tensor | None = None) -> None:
        c, moved = self.columns, self._clean(buffer.data)
        d_projected[:, : c.conv], d_projected[:, c.gates :] = moved[:, : c.conv], moved[:, c.conv :]
        if dz is not None:
            d_projected[:, c.conv : c.gates] = dz


def test_what_the_backward_needs_is_copied_out_of_transient_buffers():
    dims, layout = GdnDims(1, 2, 16, 16, 4), ThdLayout.zigzag([0, 9, 20], 1, seqlens=[4, 10], device=DEVICE)
    module, (x, dy) = layer(dims), inputs(layout, dims, 0)
    transport = ReusedMemory(MixerColumns(16, 32, 2, 1), layout.local_padding(0))
    got = results(fused, module, x, dy, layout, None, transport=transport)
    expected = results(fused, module, x, dy, layout, None)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_sequences_cut_in_pieces(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(PIECES_VARIABLE, "1")
    found = compare(ThdLayout.zigzag([0, 130], 1, device=DEVICE), GdnDims(1, 1, 16, 16, 2), None)
    assert all(error < ROUNDING for error in found.values()), found


def test_padded_rows_are_zero_and_nothing_is_kept_without_a_gradient():
    dims, layout = GdnDims(1, 2, 16, 16, 4), ThdLayout.zigzag([0, 9, 20], 1, seqlens=[5, 11], device=DEVICE)
    module, (x, dy) = layer(dims), inputs(layout, dims, 0, torch.inf)
    padding = layout.local_padding(0)
    assert padding is not None
    found = results(fused, module, x, dy, layout, None)
    for name in ("out", "input"):
        assert not found[name][padding].any()
        assert found[name][~padding].isfinite().all()
    with torch.no_grad():
        call = fused_call(x, parameters_of(module), dims, layout=layout, group=None, eps=1e-6)
        assert not call.keep
        assert torch.equal(fused_mixer(x, parameters_of(module), call), found["out"])


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_activations_give_the_same_bits(reentrant: bool):
    dims, layout = GdnDims(1, 1, 16, 16, 2), ThdLayout.zigzag([0, 9], 1, device=DEVICE)
    module, (x, dy) = layer(dims), inputs(layout, dims, 0)

    def recomputed(*call: Any) -> Tensor:
        return checkpoint(fused, *call, use_reentrant=reentrant)

    got, expected = (results(mixer, module, x, dy, layout, None) for mixer in (recomputed, fused))
    assert all(torch.equal(got[name], value) for name, value in expected.items())


def test_what_was_read_is_let_go_before_the_rule(monkeypatch: pytest.MonkeyPatch):
    """The norm's inputs, unless the graph is kept for another backward."""
    dims, layout = GdnDims(1, 1, 16, 16, 2), ThdLayout.zigzag([0, 9], 1, device=DEVICE)
    module, (x, dy) = layer(dims), inputs(layout, dims, 0)
    run_norm, run_rule, alive = fused_module._norm_backward, fused_module._rule_backward, []

    def norm_backward(call: Any, d_out: Tensor, o: Tensor, *rest: Any) -> Any:
        alive.append(StorageWeakRef(o.untyped_storage()))
        return run_norm(call, d_out, o, *rest)

    def rule_backward(*args: Any) -> Any:
        gc.collect()  # the interpreter of the kernels leaves cycles
        alive[-1] = not alive[-1].expired()
        return run_rule(*args)

    monkeypatch.setattr(fused_module, "_norm_backward", norm_backward)
    monkeypatch.setattr(fused_module, "_rule_backward", rule_backward)
    out = fused(module, x.requires_grad_(), layout, None)
    torch.autograd.grad(out, x, dy, retain_graph=True)
    torch.autograd.grad(out, x, dy)
    assert alive == [True, False]


def test_backward_again_gives_the_same_bits():
    dims, layout = GdnDims(1, 2, 16, 16, 4), ThdLayout.zigzag([0, 9, 20], 1, device=DEVICE)
    module, (x, dy) = layer(dims), inputs(layout, dims, 0)
    x.requires_grad_()
    out = fused(module, x, layout, None)
    leaves = [x, *module.parameters()]
    first = torch.autograd.grad(out, leaves, dy, retain_graph=True, allow_unused=True)
    second = torch.autograd.grad(out, leaves, dy, allow_unused=True)
    assert sum(g is not None for g in first) == 6
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True) if a is not None)


@pytest.mark.skipif(DEVICE == "cuda", reason="counts launches of the interpreter; on a GPU the profiler counts them")
def test_launches(monkeypatch: pytest.MonkeyPatch):
    """Twelve forward and twenty backward, less the four and the five that moves between ranks take."""
    from triton.runtime.interpreter import GridExecutor

    launched = []
    run = GridExecutor.__call__
    monkeypatch.setattr(GridExecutor, "__call__", lambda *args, **named: launched.append(1) or run(*args, **named))
    dims, layout = GdnDims(1, 2, 16, 16, 4), ThdLayout.zigzag([0, 9, 20], 1)
    module, (x, dy) = layer(dims), inputs(layout, dims, 0)
    for _ in range(2):
        launched.clear()
        out = fused(module, x.requires_grad_(), layout, None)
        forward = len(launched)
        out.backward(dy)
    assert 5 <= forward <= 12 - 4
    assert 10 <= len(launched) - forward <= 20 - 5


def test_only_what_needs_a_gradient_gets_one():
    dims, layout = GdnDims(1, 2, 16, 16, 4), ThdLayout.zigzag([0, 9, 20], 1, device=DEVICE)
    module, (x, dy) = layer(dims).requires_grad_(False), inputs(layout, dims, 0)
    module.A_log.requires_grad_()
    out = fused(module, x, layout, None)
    out.backward(dy)
    assert module.A_log.grad is not None
    assert module.conv1d.weight.grad is None


def test_local_transport_keeps_the_projection_itself():
    columns = MixerColumns(16, 32, 2, 1)
    projected = torch.randn(5, columns.width)
    buffer, z = LocalTransport(columns, None).send_in(projected, keep_z=True)
    assert buffer.data is projected
    assert z.data_ptr() == projected[:, columns.conv].data_ptr()


def test_refusals_name_the_reason():
    dims, layout = GdnDims(1, 2, 16, 16, 4), ThdLayout.zigzag([0, 9], 1)
    module = layer(dims).cpu()
    x = torch.randn(9, dims.in_proj_dim)
    assert "the tensors are on cpu" in str(refusal(x, parameters_of(module), dims, layout, None))
    assert "reference" in str(refusal(x, parameters_of(module), dims, layout, "reference"))
    with pytest.raises(ValueError, match="unknown backend 'quick'"):
        refusal(x, parameters_of(module), dims, layout, "quick")
