"""`run_kernel` against Triton's own launches: no two that Triton would compile apart share a class, and a second launch
gives the compiled kernel what Triton would. Nothing is compiled: a driver and compiled kernels stand in."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature
from triton.tools.tensor_descriptor import TensorDescriptor

from gdn_cp import launch
from gdn_cp.launch import classify, run_kernel
from gdn_cp.launch_bare import bare_launcher, is_known

TARGET = GPUTarget("cuda", 90, 32)
MEMORY = torch.zeros(64, dtype=torch.float64)


def _three(a, b, c, SIZE: tl.constexpr, FLAG: tl.constexpr = False):  # pyright: ignore[reportArgumentType]
    pass


def _mixed(a, SIZE: tl.constexpr, b):
    pass


# Not by triton.jit, which makes something else where kernels are interpreted.
THREE, MIXED = JITFunction(_three), JITFunction(_mixed)


class Compiled:
    """Stands for a compiled kernel, and keeps the arguments that it is called with."""

    function, packed_metadata = "function", "metadata"

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def run(self, *args: Any) -> None:
        self.calls.append(args)


class Driver:
    """Stands for a GPU's."""

    def __init__(self) -> None:
        self.device = 0

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 100 + device


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    stub = Driver()
    monkeypatch.setattr(triton.runtime.driver, "_active", stub)
    monkeypatch.setattr(launch, "current_device", stub.get_current_device)
    monkeypatch.setattr(launch, "_classes", {})
    return stub


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Compiled]:
    """What Triton was asked to launch, in order; a compiled kernel for each time."""
    compiled: list[Compiled] = []

    def run(self: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Compiled:
        compiled.append(Compiled())
        return compiled[-1]

    monkeypatch.setattr(JITFunction, "run", run)
    return compiled


def tensors() -> st.SearchStrategy[Tensor]:
    """On and off addresses that are multiples of 16, in several types."""
    dtypes = st.sampled_from((torch.float32, torch.bfloat16, torch.int32, torch.uint8))
    return st.builds(lambda dtype, skip: MEMORY.view(dtype)[skip:], dtypes, st.integers(0, 9))


def descriptors() -> st.SearchStrategy[TensorDescriptor]:
    """Of a few blocks and dtypes."""
    dtypes = st.sampled_from((torch.float32, torch.bfloat16))
    blocks = st.sampled_from(([8, 16], [16, 8], [8, 8]))
    return st.builds(lambda d, block: TensorDescriptor(MEMORY.view(d), [4, 16], [16, 1], block), dtypes, blocks)


def gluon_descriptors() -> st.SearchStrategy[Any]:
    """Of one block in a few layouts, where this version of Triton has them."""
    if not launch.GLUON:
        return st.nothing()
    from triton.experimental.gluon.language import NVMMASharedLayout

    layouts = [NVMMASharedLayout(width, 16, 2) for width in (32, 64, 128)]
    x = MEMORY.view(torch.bfloat16)
    return st.sampled_from(layouts).map(lambda layout: launch.describe_gluon(x, [4, 64], [64, 1], [8, 64], layout))


def numbers() -> st.SearchStrategy[Any]:
    """Ints around every boundary of Triton's classes, and floats that equal some of them."""
    edges = (-(2**31) - 1, -(2**31), -16, -1, 0, 1, 2, 15, 16, 17, 32, 2**31 - 1, 2**31, 2**31 + 16, 2**40, 2**63 - 1)
    return st.one_of(st.sampled_from(edges), st.integers(-40, 40), st.sampled_from((0.0, 1.0, 16.0)), st.none())


def specialisation(args: tuple[Any, ...], **params: Any) -> Any:
    """What Triton compiles for these arguments by: types and properties."""
    kernel = JITFunction(_three, **params)
    bind = create_function_from_signature(kernel.signature, kernel.params, make_backend(TARGET))
    return bind(*args, SIZE=8)[1]


ARGUMENTS = st.tuples(*[st.one_of(tensors(), numbers(), descriptors(), gluon_descriptors())] * 3)


@given(ARGUMENTS, ARGUMENTS, st.booleans())
def test_classes_are_at_least_as_fine_as_tritons(first, second, specialised):
    # Half of the arguments alike, so that the classes of the rest decide.
    second = (first[0], second[1], first[2])
    params = {} if specialised else {"do_not_specialize": ["b"]}
    ours = [classify(args) for args in (first, second)]
    assert ours[0] is not None
    assert ours[1] is not None
    theirs = [specialisation(args, **params) for args in (first, second)]
    assert ours[0][0] != ours[1][0] or theirs[0] == theirs[1]


def test_common_classes_are_no_finer_than_needed():
    """Lengths differ from batch to batch: they may not make classes of their own."""
    x = MEMORY.view(torch.float32)
    pairs = [((x, 17, 0.5), (x[4:], 1001, 2.0)), ((x, 32, 0.5), (x[8:], 4096, 0.5))]
    for first, second in pairs:
        ours = [classify(args) for args in (first, second)]
        assert ours[0] is not None
        assert ours[1] is not None
        assert ours[0][0] == ours[1][0]


def test_second_launch_calls_what_triton_compiled(driver, asked):
    x = MEMORY.view(torch.bfloat16)
    run_kernel(THREE, 5, x, 32, None, SIZE=64, num_warps=4)
    run_kernel(THREE, 7, x[8:], 48, None, SIZE=64, num_warps=4)
    assert len(asked) == 1
    hooks = (None, None, None)
    values = (x[8:].data_ptr(), 48, None, 64, False)
    assert asked[0].calls == [(7, 1, 1, 100, "function", "metadata", *hooks, *values)]


def test_another_class_device_constant_or_option_asks_triton(driver, asked):
    x, base = MEMORY.view(torch.bfloat16), {"SIZE": 64, "num_warps": 4}
    for count, (args, constants) in enumerate(
        [
            ((x, 32, None), base),
            ((x[1:], 32, None), base),
            ((x.view(torch.float16), 32, None), base),
            ((x, 33, None), base),
            ((x, 1, None), base),
            ((x, 1.0, None), base),
            ((x, 32, x), base),
            ((x, 32, None), base | {"SIZE": 32}),
            ((x, 32, None), base | {"num_warps": 8}),
            ((x, 32, None), base | {"FLAG": True}),
        ]
    ):
        run_kernel(THREE, 5, *args, **constants)
        assert len(asked) == count + 1
    driver.device = 1
    run_kernel(THREE, 5, x, 32, None, **base)
    assert len(asked) == count + 2
    assert not any(compiled.calls for compiled in asked)


def test_what_is_not_known_goes_tritons_way(driver, asked, monkeypatch):
    x = MEMORY.view(torch.bfloat16)

    def twice(kernel: JITFunction[Any], *args: Any, **constants: Any) -> int:
        before = len(asked)
        for _ in range(2):
            run_kernel(kernel, 5, *args, **constants)
        return len(asked) - before

    assert twice(THREE, x, True, None, SIZE=8) == 2  # a bool is no int
    assert twice(THREE, x.as_subclass(Special), 2, None, SIZE=8) == 2
    assert twice(MIXED, x, SIZE=8, b=3) == 2  # a runtime argument behind a constant
    assert twice(THREE, x, 2, SIZE=8, c=3) == 2
    assert twice(THREE, x, 2, None, SIZE=8) == 1
    with monkeypatch.context() as patch:
        patch.setattr(launch, "_direct", False)
        assert twice(THREE, x, 2, None, SIZE=8) == 2
    with monkeypatch.context() as patch:
        patch.setattr(THREE, "pre_run_hooks", [print])
        assert twice(THREE, x, 2, None, SIZE=8) == 2
    with monkeypatch.context() as patch:
        patch.setattr(knobs.runtime, "launch_enter_hook", print)
        assert twice(THREE, x, 2, None, SIZE=8) == 2
    with monkeypatch.context() as patch:
        patch.setattr(knobs.runtime, "debug", True)
        assert twice(THREE, x, 2, None, SIZE=8) == 1  # compiled anew, once
    assert twice(THREE, x, 2, None, SIZE=8) == 0


def test_classes_are_forgotten_when_there_are_too_many(driver, asked, monkeypatch):
    monkeypatch.setattr(launch, "MAX_CLASSES", 4)
    for size in range(20):
        run_kernel(THREE, 1, None, 2, 3, SIZE=size)
        assert len(launch._classes[id(THREE)][1]) <= 4
    assert len(asked) == 20


class Special(Tensor):
    """A tensor that may do as it likes."""


def tuples(x: Any) -> Any:
    """x with tuples for lists."""
    return tuple(map(tuples, x)) if isinstance(x, (list, tuple)) else x


@pytest.mark.skipif(not is_known(), reason="reaches into Triton 3.5 to 3.7 alone")
def test_bare_launches_give_the_c_function_what_tritons_wrappers_give(driver):
    from triton.backends.nvidia.driver import CudaLauncher, wrap_handle_tensordesc

    made: list[Any] = []

    def fill(*args: Any) -> tuple[Any, ...]:
        made.append(args)
        return ("map", *args)

    driver.utils = SimpleNamespace(fill_tma_descriptor=fill, fill_tma_descriptor_tiled=fill)
    calls: list[tuple[Any, ...]] = []
    meta = [{"swizzle": i, "elem_size": 2, "elem_type": 8, "block_size": [8, 16], "fp4_padded": False} for i in (1, 2)]
    tile = "tensordesc<bf16[8, 16]>"
    signature = {"a": "*bf16", "b": tile, "n": "i32", "c": tile, "S": "constexpr"}
    wrapper: Any = object.__new__(CudaLauncher)
    wrapper.launch = wrap_handle_tensordesc(lambda *args: calls.append(args), signature, meta)
    wrapper.global_scratch_size = wrapper.profile_scratch_size = 0
    wrapper.global_scratch_align = wrapper.profile_scratch_align = 1
    wrapper.launch_cooperative_grid, wrapper.launch_pdl, wrapper.num_ctas = False, True, 1
    if triton.__version__.startswith("3.7"):
        wrapper.arg_annotations, wrapper.kernel_signature = ["annotations"], b"signature"
    compiled = SimpleNamespace(run=wrapper, function=77, packed_metadata=(4, 1))
    bare = bare_launcher(compiled)
    assert bare is not None
    x = MEMORY.view(torch.bfloat16)
    for skip, rows, fresh in ((0, 4, 2), (16, 3, 2), (0, 4, 0), (0, 3, 1)):
        b, c = (TensorDescriptor(x[skip:], [n, 16], [16, 1], [8, 16]) for n in (rows, 2))
        values = [1234, b, 5, c, 64]
        wrapper(9, 1, 1, 100, 77, (4, 1), None, None, None, *values)
        before = len(made)
        bare(9, 100, values)
        assert tuples(calls[-1]) == tuples(calls[-2])
        assert len(made) - before == fresh
    wrapper.global_scratch_size = 8
    assert bare_launcher(compiled) is None
    wrapper.global_scratch_size, wrapper.launch = 0, lambda *args: None
    assert bare_launcher(compiled) is None


def test_other_launchers_are_left_alone():
    assert bare_launcher(Compiled()) is None
