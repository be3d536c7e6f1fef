"""Memory that may be written over: who else can hold it, and what the fused mixer's backward then does.

No tolerance: where results are written does not change them. The layer is the smallest whose rows are 16 bytes apart.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from torch.utils.checkpoint import checkpoint

from gdn_cp import GdnDims, ThdLayout
from gdn_cp import fused_mixer as fused_module
from gdn_cp.ownership import all_of_a_storage

from .test_fused_mixer import DEVICE, fused, layer

DIMS = GdnDims(1, 4, 16, 16, 2)  # rows of the projection are a multiple of 16 bytes
LAYOUT = ThdLayout.zigzag([0, 6], 1, seqlens=[5], device=DEVICE)


@pytest.mark.parametrize(
    "hold",
    [
        lambda x: x,
        lambda x: x.view(-1),
        lambda x: x.detach(),
        lambda x: x[1:2],
        lambda x: x.numpy(),
        lambda x: x.untyped_storage(),
        lambda x: x.__dlpack__(),
        lambda x: [(x * torch.ones(4, requires_grad=True)).grad_fn],
    ],
)
@pytest.mark.parametrize("view", [False, True])
def test_whatever_holds_a_tensor_is_seen(hold: Callable[[Tensor], Any], view: bool):
    x = torch.randn(6, 4)
    x = x.unsqueeze(1).squeeze(1) if view else x
    held = [hold(x)]
    x = x.detach()
    assert not all_of_a_storage(x)
    held.clear()
    assert all_of_a_storage(x)
    part = x[2:]
    assert not all_of_a_storage(x)
    assert all_of_a_storage(x, part)
    assert not all_of_a_storage(x, torch.ones(1))


class Run:
    """One forward and backward: whether the gradient of o took z's place, what `hold` kept, and the gradients.

    The projection is a product of two, as a layer's is, and `hold` gets it.
    """

    def __init__(self, mixer: Callable[..., Tensor], hold: Callable[[Tensor], Any], again: int = 0) -> None:
        torch.manual_seed(1)
        module, rows = layer(DIMS), torch.randn(6, DIMS.in_proj_dim, device=DEVICE).requires_grad_()
        d_out, place = torch.randn(6, 4 * 16, device=DEVICE), fused_module._place_of_z
        self.taken: list[bool] = []

        def place_of_z(*args: Any) -> Tensor | None:
            gc.collect()  # the interpreter of the kernels leaves cycles
            found = place(*args)
            self.taken.append(found is not None)
            return found

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fused_module, "_place_of_z", place_of_z)
            projected = rows * torch.full((), 0.5, device=DEVICE)
            out = mixer(module, projected, LAYOUT, None)
            self.held = hold(projected)
            del projected
            for _ in range(again):
                out.backward(d_out, retain_graph=True)
                module.zero_grad()
                rows.grad = None
            out.backward(d_out)
        self.gradients = [rows.grad, *(p.grad for p in module.parameters() if p.grad is not None)]

    def same_as(self, other: Run) -> bool:
        assert len(self.gradients) == len(other.gradients) == 6
        return all(torch.equal(a, b) for a, b in zip(self.gradients, other.gradients, strict=True))


@pytest.fixture(scope="module")
def expected() -> Run:
    """Of a projection that its user holds, which is as it was afterwards."""
    found = Run(fused, lambda x: (x, x.detach().clone()))
    assert found.taken == [False]
    assert torch.equal(*found.held)
    return found


@pytest.mark.parametrize(
    ("hold", "again", "taken"),
    [
        (lambda x: None, 0, [True]),
        (lambda x: None, 1, [False, True]),  # the graph holds it until the last backward
        (lambda x: x[:1], 0, [False]),
    ],
)
def test_the_gradient_of_o_takes_the_place_of_z(
    expected: Run, hold: Callable[[Tensor], Any], again: int, taken: list[bool]
):
    found = Run(fused, hold, again)
    assert found.taken == taken
    assert found.same_as(expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_what_a_checkpoint_holds_stays_as_it_is(expected: Run, reentrant: bool):
    def recomputed(*call: Any) -> Tensor:
        return checkpoint(fused, *call, use_reentrant=reentrant)

    found = Run(recomputed, lambda x: None, 0 if reentrant else 1)
    assert found.taken == ([False] if reentrant else [False, True])  # the last lets go before it recomputes
    assert found.same_as(expected)


@pytest.mark.parametrize("keeps", [True, False])
def test_hooks_for_saved_tensors(expected: Run, keeps: bool):
    """What they keep stays as it is; what they copy is nobody's, but the projection and z are apart then."""
    kept: list[Tensor] = []

    def pack(x: Tensor) -> Any:
        kept.append(x)
        return len(kept) - 1 if keeps else x.clone()

    def hooked(*call: Any) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: kept[x] if keeps else x):
            return fused(*call)

    found = Run(hooked, lambda x: [tensor.detach().clone() for tensor in kept])
    assert found.taken == [False]
    assert all(torch.equal(a, b) for a, b in zip(kept, found.held, strict=True))
    assert found.same_as(expected)
