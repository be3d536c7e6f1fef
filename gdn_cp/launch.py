"""Launching Triton kernels at a fraction of the host's time that `kernel[grid](...)` takes.

At every launch Triton binds the arguments, classifies each, and builds strings to find the compiled kernel: several
times what the driver needs, and a layer of 16,384 tokens on four GPUs launches for longer than it computes.
`run_kernel` asks Triton once for each class of arguments, keeps what it compiled, and from then on calls that directly.

Two launches are of one class only if Triton would run one compiled kernel for both. The classes here are at least as
fine as Triton's: a tensor's dtype and whether its address is a multiple of 16; whether an int is such a multiple, is 1,
or needs 64 bits; a descriptor's dtype and block; constants by value. What this module does not know goes Triton's way:
other types of arguments, kernels with hooks of their own, profilers' hooks, the interpreter, other versions of Triton.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
import triton
from torch import Tensor
from torch.nn import Parameter
from triton import knobs
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from gdn_cp.kernels.configs import current_device
from gdn_cp.launch_bare import TRITON, BareLauncher, bare_launcher

GLUON = TRITON in ((3, 6), (3, 7))
"""Whether kernels in Gluon, Triton's lower language, are known to compile with this version."""
if GLUON:
    from triton.experimental.gluon._runtime import GluonJITFunction
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
else:  # none is made
    GluonJITFunction = JITFunction
    GluonDescriptor = TensorDescriptor

DESCRIPTORS = (TensorDescriptor, GluonDescriptor)
"""What describes a tensor to the bulk copy engine."""

KNOWN_VERSIONS = ((3, 4), (3, 5), (3, 6), (3, 7))
"""Versions of Triton whose compiled kernels take what `run_kernel` gives them."""

MAX_CLASSES = 1024  # of one kernel; more would be a leak, so all are forgotten then

_direct = TRITON in KNOWN_VERSIONS


class _Compiled(NamedTuple):
    """A compiled kernel, what launches it without Triton's wrappers if they are known, and the constants that follow
    the arguments."""

    kernel: Any
    bare: BareLauncher | None
    constants: tuple[Any, ...]


class Recorder(Protocol):
    """Who is told of this thread's launches, see `gdn_cp.launch_recording`."""

    def launched(self, bare: BareLauncher, programs: int, args: tuple[Any, ...], values: list[Any]) -> None:
        """`bare` is about to be called with `programs` and `values` for `args` and the constants behind them."""
        ...

    def look_up(self, find: Callable[[Tensor | None], tuple[Tensor, ...]], of: Tensor | None) -> tuple[Tensor, ...]:
        """find(of): tables that follow from a tensor's content, to be found anew each time."""
        ...

    def refuse(self, reason: str) -> None:
        """There was something that cannot be done again by what `launched` was told."""
        ...


class _Thread(threading.local):
    recorder: Recorder | None = None


thread = _Thread()
"""What there is of each thread."""

_Class = tuple[Any, ...]
# By the kernel's id, which is its own as long as the kernel stands here.
_classes: dict[int, tuple[Any, dict[_Class, _Compiled]]] = {}
# What descriptors have besides their tensors, and in `_shape` what tells them apart but for the tensor's address.
_described: dict[_Class, dict[str, Any]] = {}


def run_kernel(kernel: Any, programs: int, *args: Any, **constants: Any) -> None:
    """`kernel[(programs,)](*args, **constants)`, on the current device and stream.

    Args:
        kernel: what `triton.jit` or `gluon.jit` made.
        programs: of a one-dimensional grid.
        args: tensors, numbers, descriptors or None for the kernel's first parameters, which are no constexprs.
        constants: its constexprs, and options of the compiler (num_warps, ...), by name.
    """
    classified, recorder = None, thread.recorder
    known = kernel.__class__ is JITFunction or kernel.__class__ is GluonJITFunction
    if _direct and known and not kernel.pre_run_hooks and not watched():
        classified = classify(args)
    if classified is None:
        if recorder is not None:
            recorder.refuse("a kernel is launched by Triton itself")
        kernel[(programs,)](*args, **constants)
        return
    of_args, values = classified
    device = current_device()
    key = (device, knobs.runtime.debug, *constants, *constants.values(), *of_args)
    entry = _classes.get(id(kernel))
    if entry is None:
        entry = _classes[id(kernel)] = (kernel, {})
    found = entry[1].get(key)
    if found is None:
        if recorder is not None:
            recorder.refuse("a kernel is compiled")
        _compile(kernel, programs, args, constants, entry[1], key)
        return
    compiled, bare, following = found
    driver: Any = triton.runtime.driver.active
    stream = driver.get_current_stream(device)
    values += following
    if bare is not None:
        if recorder is not None:
            recorder.launched(bare, programs, args, values)
        bare(programs, stream, values)
    else:  # as `JITFunction.run` does
        if recorder is not None:
            recorder.refuse("this version of Triton is not launched directly")
        compiled.run(programs, 1, 1, stream, compiled.function, compiled.packed_metadata, None, None, None, *values)


def describe(x: Tensor, shape: list[int], strides: list[int], block: list[int]) -> TensorDescriptor:
    """`TensorDescriptor(x, shape, strides, block)`, whose checks are made once for arguments that are alike."""
    return _describe(TensorDescriptor, x, shape, strides, block)


def describe_gluon(x: Tensor, shape: list[int], strides: list[int], block: list[int], layout: Any) -> Any:
    """`describe` for a kernel in Gluon, whose tiles have a `layout` in shared memory."""
    return _describe(GluonDescriptor, x, shape, strides, block, layout)


def _describe(kind: type[Any], x: Tensor, shape: list[int], strides: list[int], block: list[int], *layout: Any) -> Any:
    key = (kind, x.dtype, *shape, *strides, *block, *layout)
    checked = _described.get(key)
    if checked is None or x.data_ptr() & 15:
        if len(_described) >= MAX_CLASSES:
            _described.clear()
        made = kind(x, shape, strides, block, *layout)
        _described[key] = {name: value for name, value in vars(made).items() if name != "base"}
        return made
    made = object.__new__(kind)
    fields = vars(made)
    fields.update(checked)
    fields["base"] = x
    return made


def raw_stream(device: torch.device) -> int:
    """The address of a CUDA device's current stream, as Triton asks for it: without the object around it."""
    driver: Any = triton.runtime.driver.active
    return driver.get_current_stream(current_device() if device.index is None else device.index)


def classify(args: tuple[Any, ...]) -> tuple[list[Any], list[Any]] | None:
    """(the class of each argument, what a compiled kernel is given for it); None if there is one of unknown type."""
    classes: list[Any] = []
    values = [*args]
    add = classes.append  # every microsecond here is one for each launch
    for place, x in enumerate(args):
        kind = x.__class__
        if kind is Tensor or kind is Parameter:
            values[place] = address = x.data_ptr()
            add((x.dtype,) if address & 15 else x.dtype)
        elif kind is int:
            add(not x & 15 if 1 < x < 2147483648 else (x,))
        elif kind is TensorDescriptor:
            add((x.base.dtype, *x.block_shape))
        elif kind is GluonDescriptor:
            add((x.base.dtype, *x.block_shape, x.layout))
        elif x is None or kind is float:
            add(kind)
        else:
            return None
    return classes, values


def watched() -> bool:
    """Whether somebody wants to know of launches, or has a say in how kernels are compiled."""
    runtime = knobs.runtime
    for hook in (runtime.launch_enter_hook, runtime.launch_exit_hook):
        if hook is not None and getattr(hook, "calls", True):  # a chain of hooks is there without any in it
            return True
    return getattr(runtime, "add_stages_inspection_hook", None) is not None


def _compile(
    kernel: Any, programs: int, args: tuple[Any, ...], constants: dict[str, Any], classes: dict[_Class, _Compiled],
    key: _Class,
) -> None:  # fmt: skip
    """Launch Triton's way, and keep what it compiled unless runtime arguments stand elsewhere than in front."""
    compiled = kernel[(programs,)](*args, **constants)
    given, rest = kernel.params[: len(args)], kernel.params[len(args) :]
    if any(p.is_constexpr for p in given) or not all(p.is_constexpr for p in rest):
        return
    if len(classes) >= MAX_CLASSES:
        classes.clear()
    following = tuple(constants.get(p.name, p.default) for p in rest)
    classes[key] = _Compiled(compiled, bare_launcher(compiled), following)
