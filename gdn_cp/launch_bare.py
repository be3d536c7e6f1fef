"""Calling a compiled kernel without what Triton wraps around the C function that launches it.

Triton makes tensor maps of a launch's descriptors anew each time, and looks through all arguments for them. Their
content follows from addresses and shapes alone, and PyTorch's allocator gives the same addresses step after step. So
they are kept, and the C function is called directly: for a kernel with nine descriptors that is most of the host's
time. This reaches into Triton; where it does not look as in 3.5 to 3.7, `bare_launcher` says None.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import triton
from triton.tools.tensor_descriptor import TensorDescriptor

TRITON: tuple[int, ...] = tuple(int(part) for part in triton.__version__.split(".")[:2])
"""The version of Triton, (3, 6) for 3.6.0."""

KNOWN_VERSIONS = ((3, 5), (3, 6), (3, 7))
MAX_MAPS = 256  # of one descriptor

_WRAPPED = {"launcher", "tensordesc_indices", "tensordesc_meta"}
"""What Triton's function that unfolds descriptors refers to."""


def is_known() -> bool:
    """Whether launches can be bare with this version of Triton."""
    return TRITON in KNOWN_VERSIONS


class _Address:
    """Stands for the tensor of a descriptor, of which Triton asks the address alone."""

    def __init__(self, address: int) -> None:
        self._address = address

    def data_ptr(self) -> int:
        return self._address


class _Described(NamedTuple):
    """A descriptor without its tensor: what Triton reads of it."""

    base: _Address
    shape: list[int]
    strides: list[int]
    padding: str
    round_f32_to_tf32: bool


class MapsOf:
    """The tensor maps of one descriptor's shape at the addresses that were asked for."""

    def __init__(self, kind: Any, like: TensorDescriptor) -> None:
        self._kind = kind
        self._shape, self._strides = list(like.shape), list(like.strides)
        self._options = like.padding, _rounds(like)
        self._unfolded: dict[int, list[Any]] = {}

    def unfold(self, address: int) -> list[Any]:
        """The tensor map at an address, shape and strides, as the C function takes them."""
        found = self._unfolded.get(address)
        if found is None:
            from triton.backends.nvidia.driver import make_tensordesc_arg

            if len(self._unfolded) >= MAX_MAPS:
                self._unfolded.clear()
            described = _Described(_Address(address), self._shape, self._strides, *self._options)
            found = self._unfolded[address] = make_tensordesc_arg(described, self._kind)
        return found


def _rounds(x: TensorDescriptor) -> bool:
    """Whether loads round to tf32, which Triton 3.7 knows."""
    return getattr(x, "round_f32_to_tf32", False)


class BareLauncher:
    """Launches one compiled kernel: `launcher(programs, stream, values)`, values of all parameters in order.

    `values` is a list, and is changed: each descriptor becomes its tensor map, shape and strides.
    """

    def __init__(self, compiled: Any, launch: Any, kinds: tuple[tuple[int, Any], ...]) -> None:
        wrapper = compiled.run
        self._launch, self._kinds, self._function = launch, kinds, compiled.function
        flags, metadata = (wrapper.launch_cooperative_grid, wrapper.launch_pdl), compiled.packed_metadata
        # No hooks, nothing to tell them, and no scratch memory, in either order.
        self._together = hasattr(wrapper, "kernel_signature")  # since 3.7, whose C function serves all kernels
        if self._together:
            nothing = (None, None, None, None, None)
            self._middle = (*flags, metadata, *nothing, wrapper.arg_annotations, wrapper.kernel_signature)
        else:
            self._middle = (*flags, None, None, metadata, None, None, None)
        self._maps: dict[tuple[Any, ...], MapsOf] = {}

    def __call__(self, programs: int, stream: int, values: list[Any]) -> None:
        """Launch so many programs."""
        for index, kind in self._kinds:  # from the last on, so that places before stay right
            x = values[index]
            values[index : index + 1] = self._maps_of(index, kind, x).unfold(x.base.data_ptr())
        self.launch(programs, stream, values)

    def launch(self, programs: int, stream: int, values: list[Any]) -> None:
        """Launch so many programs; `values` with descriptors already unfolded."""
        if self._together:
            self._launch(programs, 1, 1, stream, self._function, *self._middle, values)
        else:
            self._launch(programs, 1, 1, stream, self._function, *self._middle, *values)

    def unfold(self, values: list[Any]) -> tuple[list[Any], list[int], dict[int, MapsOf]]:
        """(`values` with descriptors unfolded, where each value of before begins there, the maps of the descriptors by
        their places before)."""
        flat: list[Any] = []
        begins, maps, kinds = [], {}, dict(self._kinds)
        for index, x in enumerate(values):
            begins.append(len(flat))
            if index in kinds:
                maps[index] = self._maps_of(index, kinds[index], x)
                flat += maps[index].unfold(x.base.data_ptr())
            else:
                flat.append(x)
        return flat, begins, maps

    def _maps_of(self, index: int, kind: Any, x: TensorDescriptor) -> MapsOf:
        key = (index, x.padding, _rounds(x), *x.shape, *x.strides)
        found = self._maps.get(key)
        if found is None:
            if len(self._maps) >= MAX_MAPS:
                self._maps.clear()
            found = self._maps[key] = MapsOf(kind, x)
        return found


def bare_launcher(compiled: Any) -> BareLauncher | None:
    """A launcher of what Triton compiled; None where Triton's own has to be called."""
    wrapper = compiled.run
    if not is_known() or type(wrapper).__name__ != "CudaLauncher":
        return None
    if wrapper.global_scratch_size or wrapper.profile_scratch_size:  # memory that is allocated for each launch
        return None
    launch, kinds = wrapper.launch, ()
    if inspect.isfunction(launch):
        inner = inspect.getclosurevars(launch).nonlocals
        if inner.keys() != _WRAPPED or None in inner["tensordesc_meta"]:
            return None
        places = sorted(inner["tensordesc_indices"])
        launch, kinds = inner["launcher"], tuple(zip(places, inner["tensordesc_meta"], strict=True))[::-1]
    return BareLauncher(compiled, launch, kinds)
