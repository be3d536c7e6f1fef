"""Memory that may be written over: who else can hold it, and what the fused mixer's backward then does.

No tolerance: where results are written does not change them. The layer is the smallest whose rows are 16 bytes apart.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from torch.autograd.function import once_differentiable
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from gdn_cp import GdnDims, ThdLayout
from gdn_cp import fused_mixer as fused_module
from gdn_cp.ownership import all_of_a_storage, is_last_use

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
    lent = isinstance(held[0], np.ndarray)  # for good, as torch has it
    held.clear()
    assert all_of_a_storage(x) != lent
    part = x[2:]
    assert not all_of_a_storage(x)
    assert all_of_a_storage(x, part) != lent
    assert not all_of_a_storage(x, torch.ones(1))


@pytest.mark.parametrize("lend", [torch.from_numpy, torch.from_dlpack, torch.frombuffer])
def test_memory_of_others_is_never_all_of_a_tensor(lend: Callable[..., Tensor]):
    array = np.ones(8, np.float32)
    x = lend(array) if lend is not torch.frombuffer else lend(array.data, dtype=torch.float32)
    assert not all_of_a_storage(x)


class Asked(torch.autograd.Function):
    """A copy that asks of its gradient whether this is its last use, and empties it then."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, answers: list[bool]) -> Tensor:
        ctx.answers = answers
        return x.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        ctx.answers.append(is_last_use(gradients))
        copy = gradients[0].clone()
        if ctx.answers[-1]:
            gradients[0].untyped_storage().resize_(0)
        return copy, None


class Product(torch.autograd.Function):
    """x @ w, as Megatron's layers have it: a function in Python."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(w)
        return x @ w

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] @ ctx.saved_tensors[0].t(), None


def answers_of(use: Callable[[Tensor], Tensor], prepare: Callable[[Tensor], object] = id) -> list[bool]:
    """Of a backward through `use` of a 4 x 3 tensor, which `prepare` gets before. Gradients must be right."""
    answers: list[bool] = []
    x = torch.randn(4, 3, requires_grad=True)
    y = Asked.apply(x, answers)
    prepare(y)
    result = use(y)
    result.backward(torch.ones_like(result))
    (expected,) = torch.autograd.grad(use(x).sum(), x)
    torch.testing.assert_close(x.grad, expected)
    return answers


@pytest.mark.parametrize(
    "use",
    [
        lambda y: y * 2,
        lambda y: y * 2 + y * 3,
        lambda y: torch.nn.functional.linear(y, torch.ones(5, 3)),
        lambda y: torch.nn.functional.linear(y.unsqueeze(1), torch.ones(5, 3)),
        lambda y: Product.apply(y, torch.ones(3, 5)),
        lambda y: Product.apply(y.unsqueeze(1), torch.ones(3, 5)),
        lambda y: Product.apply(y.view(4, 3, 1).view(2, 2, 3), torch.ones(3, 5)),
    ],
)
def test_the_last_use_of_a_gradient(use: Callable[[Tensor], Tensor]):
    assert answers_of(use) == [True]


kept: list[Any] = []


@torch.enable_grad()
def saved_by_a_graph(gradient: Tensor) -> Any:
    return (torch.ones(4, 3, requires_grad=True) * gradient).grad_fn


@pytest.mark.parametrize(
    "keep",
    [
        kept.append,
        lambda g: kept.append(g.view(-1)),
        lambda g: kept.append(g.detach()),
        lambda g: kept.append(g.numpy()),
        lambda g: kept.append(g.untyped_storage()),
        lambda g: kept.append(saved_by_a_graph(g)),
    ],
)
def test_a_gradient_that_a_hook_keeps(keep: Callable[[Tensor], object]):
    kept.clear()
    assert answers_of(lambda y: y * 2, lambda y: y.register_hook(lambda g: keep(g) and None)) == [False]
    assert len(kept) == 1


def test_gradients_with_other_uses():
    def watched(y: Any) -> None:
        y.grad_fn.register_hook(lambda *_: None)

    def retained(y: Tensor) -> None:
        y.retain_grad()
        kept.append(y)

    def added(y: Tensor) -> Tensor:
        leaf = torch.zeros(4, 3, requires_grad=True)
        kept.append(leaf)
        return (y + leaf) * 2

    kept.clear()
    assert answers_of(lambda y: y) == [False]  # the user's own
    assert answers_of(lambda y: y * 2, watched) == [False]
    assert answers_of(lambda y: y * 2, retained) == [True]  # torch keeps a copy
    assert torch.equal(kept.pop().grad, torch.full((4, 3), 2.0))
    # Both get the same gradient: who comes first leaves it to the other.
    answers: list[bool] = []
    x, leaves = torch.ones(2, 3, requires_grad=True), torch.ones(2, 3, requires_grad=True)
    ((Asked.apply(x, answers) + Asked.apply(leaves, answers)) * 2).sum().backward()
    assert answers == [False, True]
    torch.testing.assert_close(x.grad, leaves.grad, rtol=0, atol=0)
    answers_of(added)
    assert torch.equal(kept[0].grad, torch.full((4, 3), 2.0))
    y = Asked.apply(x, answers)
    of_y, of_x = torch.autograd.grad(y * 2, (y, x), torch.ones_like(y))
    assert answers[2:] == [False]
    assert torch.equal(of_y, of_x)


class Lent(torch.autograd.Function):
    """A copy, whose gradient goes on in the memory of an array."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, array: Any) -> Tensor:
        ctx.array = array
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return torch.from_numpy(ctx.array).copy_(gradients[0]), None


def test_a_gradient_in_memory_of_others():
    array = np.zeros((4, 3), np.float32)
    assert answers_of(lambda y: Lent.apply(y, array) * 2) == [False]
    assert (array == 2.0).all()


def test_nothing_is_asked_under_a_dispatch_mode():
    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    with Mode():
        assert answers_of(lambda y: y * 2) == [False]
    assert answers_of(lambda y: y * 2) == [True]


class Run:
    """One forward and backward: whether the gradient of o took z's place, and that of the output was let go of; what
    `hold` kept; and the gradients.

    The projection is a product of two, as a layer's is, and `hold` gets it.
    """

    def __init__(
        self,
        mixer: Callable[..., Tensor],
        hold: Callable[[Tensor], Any],
        again: int = 0,
        watch: Callable[[Tensor], Any] = id,
    ) -> None:  # fmt: skip
        torch.manual_seed(1)
        module, rows = layer(DIMS), torch.randn(6, DIMS.in_proj_dim, device=DEVICE).requires_grad_()
        d_out, place = torch.randn(6, 1, 4 * 16, device=DEVICE), fused_module._place_of_z
        self.taken: list[bool] = []
        self.emptied: list[bool] = []
        run_rule, weak = fused_module._rule_backward, []

        def place_of_z(*args: Any) -> Tensor | None:
            gc.collect()  # the interpreter of the kernels leaves cycles
            found = place(*args)
            self.taken.append(found is not None)
            weak.append(StorageWeakRef(args[2].untyped_storage()))
            return found

        def rule_backward(*args: Any) -> Any:
            storage = torch.UntypedStorage._new_with_weak_ptr(weak[-1].cdata)
            self.emptied.append(storage is not None and not storage.nbytes())
            return run_rule(*args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fused_module, "_place_of_z", place_of_z)
            patch.setattr(fused_module, "_rule_backward", rule_backward)
            projected = rows * torch.full((), 0.5, device=DEVICE)
            out = mixer(module, projected, LAYOUT, None)
            self.seen = watch(out)
            out = out.unsqueeze(1) * 2
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
    """Of a projection and a gradient of the output that their user holds, which are as they were afterwards."""
    seen: list[Tensor] = []

    def watch(out: Tensor) -> list[Tensor]:
        out.register_hook(lambda g: seen.extend((g, g.clone())))
        return seen

    found = Run(fused, lambda x: (x, x.detach().clone()), watch=watch)
    assert found.taken == found.emptied == [False]
    assert torch.equal(*found.held)
    assert torch.equal(*found.seen)
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
    assert found.emptied == [True] * (again + 1)  # each backward has a gradient of the output of its own
    assert found.same_as(expected)


@pytest.mark.parametrize(
    ("width", "dtype", "fits"), [(24, torch.float32, True), (20, torch.float32, False), (24, torch.float64, False)]
)
def test_z_stays_where_the_rule_cannot_copy_rows_or_has_another_type(width: int, dtype: torch.dtype, fits: bool):
    x = torch.empty(6, width)
    z = x[:, 4:12]
    assert (fused_module._place_of_z(x, z, torch.empty(6, 8, dtype=dtype)) is z) == fits


@pytest.mark.parametrize("reentrant", [True, False])
def test_what_a_checkpoint_holds_stays_as_it_is(expected: Run, reentrant: bool):
    def recomputed(*call: Any) -> Tensor:
        return checkpoint(fused, *call, use_reentrant=reentrant)

    found = Run(recomputed, lambda x: None, 0 if reentrant else 1)
    assert found.taken == ([False] if reentrant else [False, True])  # the last lets go before it recomputes
    assert found.emptied == ([False] if reentrant else [True, True])  # one backward inside another holds what it gives
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
