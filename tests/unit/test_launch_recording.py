"""Recorded launches give what the function gives, on other tensors of the same shapes, and what cannot be recorded is
called as ever. Kernels are stood in for by C-like functions that read and write memory by its address."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from gdn_cp import launch, launch_bare, launch_recording
from gdn_cp.kernels.piece_plan import PIECES_VARIABLE
from gdn_cp.kernels.tuned import LAUNCHES_VARIABLE
from gdn_cp.launch import DESCRIPTORS, GLUON, describe_gluon, run_kernel, thread
from gdn_cp.launch_bare import BareLauncher, MapsOf
from gdn_cp.launch_recording import Recording, Tensors, replayable


def _add(x, y, out, n, scale, OFFSET: tl.constexpr):
    pass


ADD = JITFunction(_add)
launched: list[int] = []


def floats(address: int, n: int) -> Any:
    return (ctypes.c_float * n).from_address(address)


def run_add(programs: int, *rest: Any) -> None:
    """out = x + scale y + OFFSET, y and out perhaps described (address, rows, columns)."""
    launched.append(programs)
    values = [value[1] if isinstance(value, tuple) else value for value in rest[-6:]] if len(rest) < 16 else flat(rest)
    x, y, out, n, scale, offset = values
    y = floats(y, n) if y else [0.0] * n
    result = [a + scale * b + offset for a, b in zip(floats(x, n), y, strict=True)]
    floats(out, n)[:] = result


def flat(rest: tuple[Any, ...]) -> list[Any]:
    """The values behind what every launch has, each map's shape and strides left out."""
    assert rest[:3] == (1, 1, 100)  # the grid's other dimensions, and the current stream
    values, found = list(rest[12:]), []
    while values:
        value = values.pop(0)
        if isinstance(value, tuple):
            found.append(value[1])
            del values[:4]
        else:
            found.append(value)
    return found


class FakeMaps(MapsOf):
    def unfold(self, address: int) -> list[Any]:
        return [("map", address), *self._shape, *self._strides]


class Wrapper:
    launch_cooperative_grid = launch_pdl = False

    def __call__(self, programs: int, *rest: Any) -> None:
        run_add(programs, *rest)


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    driver = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda device: 100 + device)
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    monkeypatch.setattr(launch, "current_device", lambda: 0)
    monkeypatch.setattr(launch, "_classes", {})
    monkeypatch.setattr(launch_recording, "_recordings", {})
    monkeypatch.setattr(launch_bare, "MapsOf", FakeMaps)

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, OFFSET: int, **_: Any) -> Any:
        addresses = [(x.base if isinstance(x, DESCRIPTORS) else x) for x in args]
        run_add(grid[0], *[x.data_ptr() if isinstance(x, Tensor) else x for x in addresses], OFFSET)
        kinds = tuple((i, None) for i, x in enumerate(args) if isinstance(x, DESCRIPTORS))[::-1]
        return SimpleNamespace(run=Wrapper(), function=1, packed_metadata=2, kinds=kinds)

    def bare(compiled: Any) -> BareLauncher:
        return BareLauncher(compiled, run_add, compiled.kinds)

    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr(launch, "bare_launcher", bare)
    launched.clear()
    yield
    assert thread.recorder is None


def add(x: Tensor, y: Tensor | None, out: Tensor, scale: float = 1.0, offset: int = 0) -> Tensor:
    run_kernel(ADD, 3, x, y, out, out.numel(), scale, OFFSET=offset, num_warps=4)
    return out


def recordings() -> list[Any]:
    return list(launch_recording._recordings.values())


def random(*shape: int) -> Tensor:
    return torch.randn(shape)


def check(function: Callable[..., Tensors], expected: Callable[..., Tensors], *settings: Any, calls: int = 5) -> None:
    """Call after call is right, on fresh tensors each time; the last ones are replayed."""
    kept = []
    for call in range(calls):
        x, y = random(4, 8), random(4, 8)
        got, wanted = replayable(function, (x, y, None), settings), expected(x, y, *settings)
        kept.append((got, wanted))
        assert isinstance(recordings()[0], Recording) == (call > 0)
    for got, wanted in kept:  # later calls changed none of them
        assert len(got) == len(wanted)
        for a, b in zip(got, wanted, strict=True):
            assert (a is None) == (b is None)
            if a is not None and b is not None:
                assert a.shape == b.shape
                torch.testing.assert_close(a, b)


def chain(x: Tensor, y: Tensor, absent: None, steps: int) -> Tensors:
    """x + steps y by temporary tensors of which two live at a time, and a view of what was made on the way."""
    assert absent is None
    made = add(x, y, torch.empty(4, 8))
    first = add(made, None, x.new_empty(4, 8), offset=1)
    for _ in range(steps - 1):
        made = add(made, y, torch.empty_like(made))
    return made, None, first[1:, 2:5], x


def test_replayed_launches_give_what_the_function_gives():
    for steps in (1, 3, 6):
        check(chain, lambda x, y, steps: (x + steps * y, None, (x + y + 1)[1:, 2:5], x), steps)
        found = recordings()[0]
        assert len(found.launches) == steps + 1
        assert launched == [3] * 5 * (steps + 1)  # programs, whether replayed or not
        launched.clear()
        assert len(found.allocations) == (1 if steps == 1 else 2) + (steps == 1)
        assert found.temporary_bytes == (0, 512, 1024)[(steps > 1) + (steps > 2)]
        launch_recording._recordings.clear()


def described(x: Tensor, y: Tensor, absent: None, gluon: bool) -> Tensors:
    """Views of inputs and of temporary memory, some of them behind descriptors."""
    assert absent is None
    made = add(x, None, torch.empty(4, 8))
    map_of = partial(TensorDescriptor, shape=[2, 8], strides=[8, 1], block_shape=[2, 8])
    if gluon:
        from triton.experimental.gluon.language import NVMMASharedLayout

        map_of = partial(map_of_gluon, layout=NVMMASharedLayout(32, 32, 2))
    out = torch.empty(2, 2, 8)
    run_kernel(ADD, 2, made[2:], map_of(y[2:]), map_of(out[1]), 16, 2.0, OFFSET=0, num_warps=4)
    run_kernel(ADD, 2, x[1:], map_of(made), out[0], 16, 1.0, OFFSET=0, num_warps=4)
    return (out,)


def map_of_gluon(x: Tensor, layout: Any) -> Any:
    return describe_gluon(x, [2, 8], [8, 1], [2, 8], layout)


@pytest.mark.parametrize("gluon", [False, True])
def test_views_and_descriptors_are_followed(gluon):
    if gluon and not GLUON:
        pytest.skip("this version of Triton has no descriptors of Gluon's")
    check(described, lambda x, y, gluon: (torch.stack((x[1:3] + x[:2], x[2:] + 2 * y[2:])),), gluon)


def transposed(x: Tensor, y: Tensor, absent: None) -> Tensors:
    """All of what was made, in another order."""
    assert absent is None
    made = add(x[:, :4], y[:, :4], torch.empty(4, 4))
    return made.t(), made


def test_results_keep_their_strides():
    def expected(x: Tensor, y: Tensor) -> Tensors:
        made = (x.flatten()[:16] + y.flatten()[:16]).view(4, 4)  # the kernel knows no strides
        return made.t(), made

    check(transposed, expected)


def test_another_function_shape_setting_stride_or_alignment_is_recorded_anew(monkeypatch: pytest.MonkeyPatch):
    x, y, wide = random(4, 8), random(4, 8), random(4, 16)
    far = random(64)
    for count, (tensors, steps) in enumerate(
        [
            ((x, y, None), 2),
            ((x, y, None), 3),
            ((x[:2], y[:2], None), 2),
            ((x, y.double(), None), 2),
            ((x, wide[:, ::2], None), 2),
            ((far[1:33].view(4, 8), y, None), 2),
        ]
    ):
        replayable(chain_shape, tensors, (steps,))
        assert len(recordings()) == count + 1
    replayable(another_function, (x, y, None), (2,))
    assert len(recordings()) == count + 2
    monkeypatch.setattr(knobs.runtime, "debug", not knobs.runtime.debug)
    replayable(another_function, (x, y, None), (2,))
    assert len(recordings()) == count + 3


def another_function(x: Tensor, y: Tensor, absent: None, steps: int) -> Tensors:
    return (add(x, y, torch.empty_like(x)),)


def test_another_environment_is_recorded_anew(monkeypatch: pytest.MonkeyPatch):
    """The variables that plans of launches read may change between calls."""

    def function(x: Tensor) -> Tensors:
        offset = int(os.environ.get(PIECES_VARIABLE, 0)) + int(os.environ.get(LAUNCHES_VARIABLE, 0))
        return (add(x, None, torch.empty(8), offset=offset),)

    x = random(8)
    for offset, variables in enumerate([{}, {PIECES_VARIABLE: "1"}, {LAUNCHES_VARIABLE: "2"}, {}]):
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            for _ in range(3):
                (got,) = replayable(function, (x,), ())
                torch.testing.assert_close(got, x + offset % 3)
    assert all(isinstance(recording, Recording) for recording in recordings())
    assert len(recordings()) == 3


def chain_shape(x: Tensor, y: Tensor, absent: None, steps: int) -> Tensors:
    return (add(x.contiguous(), None, torch.empty_like(x)),)


def test_tables_are_looked_up_again():
    """What follows from a tensor's content, or from none, comes from a cache of its own, which builds what is new."""
    tables: dict[tuple[int, int], tuple[Tensor, ...]] = {}

    def find(first: int, bounds: Tensor | None) -> tuple[Tensor, ...]:
        key = first, id(bounds)
        if key not in tables:
            source = torch.ones(8) if bounds is None else bounds
            tables[key] = tuple(add(source, None, torch.empty(8), offset=first + n) for n in range(2))
        return tables[key]

    def ask(first: int, bounds: Tensor | None) -> tuple[Tensor, ...]:
        return find(first, bounds) if thread.recorder is None else thread.recorder.look_up(partial(find, first), bounds)

    def function(x: Tensor, bounds: Tensor) -> Tensors:
        out = torch.empty(8)
        for _ in range(2):  # the second time they are the same tables
            found = ask(5, bounds)
        add(x, found[0], out)
        for table, scale in (found[1], 10.0), (ask(7, bounds)[0], 100.0), (ask(3, None)[1], 1000.0):
            add(out, table, out, scale)
        return (out,)

    held = []
    for call in range(6):
        x, bounds = random(8), random(8)
        held.append(bounds)
        (got,) = replayable(function, (x, bounds), ())
        torch.testing.assert_close(got, x + (bounds + 5) + 10 * (bounds + 6) + 100 * (bounds + 7) + 5000)
        assert len(tables) == 2 * call + 3
        for n, first in enumerate((5, 6, 7, 8)):  # nobody wrote to them
            torch.testing.assert_close(tables[5 + n // 2 * 2, id(bounds)][n % 2], bounds + first)
    assert isinstance(recordings()[0], Recording)
    assert len(recordings()[0].lookups) == 3


def refused(function: Callable[..., Tensors], tensors: tuple[Tensor | None, ...]) -> str:
    """Why it is not recorded; what it returns is right each time."""
    wanted = function(*tensors)
    for _ in range(4):
        got = replayable(function, tensors, ())
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b)
    (reason,) = recordings()
    launch_recording._recordings.clear()
    assert isinstance(reason, str)
    return reason


def test_what_cannot_be_done_again_is_called_as_ever(monkeypatch: pytest.MonkeyPatch):
    x, y, other, held = random(8), random(8), random(8), []

    def keeps(x: Tensor) -> Tensors:
        held.append(add(x, None, torch.empty(8)))
        return (add(x, None, torch.empty(8)),)

    assert "aten.mul" in refused(lambda x: (add(x, None, torch.empty(8)) * 2,), (x,))
    assert "aten.zero" in refused(lambda x: (add(x, None, torch.zeros(8)),), (x,))
    assert "keeps memory" in refused(keeps, (x,))
    assert "neither an input's" in refused(lambda x: (add(x, other, torch.empty(8)),), (x,))
    assert "neither an input nor" in refused(lambda x: (add(x, None, torch.empty(8)), other), (x,))
    of_bits = lambda x: (add(x, None, torch.empty(8)).view(torch.int32),)  # noqa: E731
    assert "neither an input nor" in refused(of_bits, (x,))
    assert "same address" in refused(lambda x, y: (add(x, y, torch.empty(8)),), (x, x.view(8)))
    assert "another order" in refused(lambda x: (add(x, None, torch.empty_strided((2, 4), (1, 2))),), (x,))
    overlapping = (y.view(2, 4)[:, :3], y.view(2, 4)[:, 1:])
    inside = lambda a, b: (add(y[2:], None, torch.empty(2)),)  # noqa: E731 - in both of the views
    assert "neither an input's" in refused(inside, overlapping)
    assert refused(lambda x: (x,), (x,)) == "it launches nothing"
    made = lambda x: (add(x.view(2, 4).t().contiguous().view(8), None, torch.empty(8)),)  # noqa: E731
    assert "aten.clone" in refused(made, (x,))
    with torch.inference_mode():  # where an operation is seen that may be a view
        assert "aten.contiguous" in refused(made, (x,))
    monkeypatch.setattr(launch, "_classes", {})
    with monkeypatch.context() as patch:
        patch.setattr(launch, "MAX_CLASSES", 0)  # every launch is a first one
        two = lambda x: (add(add(x, None, torch.empty(8), offset=1), None, torch.empty(8)),)  # noqa: E731
        assert "is compiled" in refused(two, (x,))
    monkeypatch.setattr(launch, "_classes", {})
    monkeypatch.setattr(launch, "bare_launcher", lambda compiled: None)
    assert "not launched directly" in refused(lambda x: (add(x, None, torch.empty(8)),), (x,))
    monkeypatch.setattr(launch, "_direct", False)
    assert "by Triton itself" in refused(lambda x: (add(x, None, torch.empty(8)),), (x,))


def test_whoever_watches_sees_every_launch_and_operation(monkeypatch: pytest.MonkeyPatch):
    class Watch(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[Any] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.seen.append(func)
            return func(*args, **(kwargs or {}))

    x, y = random(4, 8), random(4, 8)
    for _ in range(3):
        replayable(chain, (x, y, None), (2,))
    with Watch() as watch:
        replayable(chain, (x, y, None), (2,))
    assert torch.ops.aten.new_empty.default in watch.seen  # as the function calls it, and no replay
    with monkeypatch.context() as patch:
        patch.setattr(knobs.runtime, "launch_enter_hook", print)
        before = len(launched)
        replayable(chain, (x, y, None), (2,))
        assert len(launched) - before == 3


def test_an_error_while_recording_leaves_nothing_behind():
    class Fail:
        now = False

    def fails(x: Tensor, fail: Fail) -> Tensors:
        out = add(x, None, torch.empty(8))
        if fail.now:
            raise ArithmeticError
        return (out,)

    x, fail = random(8), Fail()
    replayable(fails, (x,), (fail,))
    fail.now = True
    with pytest.raises(ArithmeticError):
        replayable(fails, (x,), (fail,))
    assert thread.recorder is None


def test_recordings_may_be_forgotten_by_another_thread(monkeypatch: pytest.MonkeyPatch):
    class Forgetful(dict[Any, Any]):
        """Loses all as soon as it has said whether there is something."""

        def __contains__(self, key: object) -> bool:
            found = super().__contains__(key)
            self.clear()
            return found

    monkeypatch.setattr(launch_recording, "_recordings", Forgetful())
    x, function = random(8), lambda x: (add(x, None, torch.empty(8)),)
    for _ in range(4):
        (got,) = replayable(function, (x,), ())
        torch.testing.assert_close(got, x)


def test_recordings_are_forgotten_when_there_are_too_many(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(launch_recording, "MAX_RECORDINGS", 4)
    for n in range(1, 20):
        for _ in range(2):
            replayable(lambda x: (add(x, None, torch.empty_like(x)),), (random(n),), ())
        assert len(recordings()) <= 4
