"""Calling a compiled kernel without what Triton wraps around the C function that launches it.

Triton 3.6 makes tensor maps of a launch's descriptors anew each time, and looks through all arguments for them. Their
content follows from addresses and shapes alone, and PyTorch's allocator gives the same addresses step after step. So
they are kept, and the C function is called directly: for a kernel with nine descriptors that is most of the host's
time. This reaches into Triton; where it does not look as in 3.6, `bare_launcher` says None.
"""

from __future__ import annotations

import inspect
from typing import Any

import triton
from triton.tools.tensor_descriptor import TensorDescriptor

KNOWN_VERSION = "3.6."
MAX_MAPS = 256  # of one compiled kernel

_WRAPPED = {"launcher", "tensordesc_indices", "tensordesc_meta"}
"""What Triton's function that unfolds descriptors refers to."""


class BareLauncher:
    """Launches one compiled kernel: `launcher(programs, stream, values)`, values of all parameters in order.

    `values` is a list, and is changed: each descriptor becomes its tensor map, shape and strides.
    """

    def __init__(self, compiled: Any, launch: Any, kinds: tuple[tuple[int, Any], ...]) -> None:
        wrapper = compiled.run
        self._launch, self._kinds, self._function = launch, kinds, compiled.function
        # Flags of the grid; no scratch memory; the kernel's metadata; no hooks, and nothing to tell them.
        self._middle = (wrapper.launch_cooperative_grid, wrapper.launch_pdl, None, None, compiled.packed_metadata)
        self._unfolded: dict[tuple[Any, ...], list[Any]] = {}

    def __call__(self, programs: int, stream: int, values: list[Any]) -> None:
        """Launch so many programs."""
        for index, kind in self._kinds:  # from the last on, so that places before stay right
            values[index : index + 1] = self._unfold(index, kind, values[index])
        self._launch(programs, 1, 1, stream, self._function, *self._middle, None, None, None, *values)

    def _unfold(self, index: int, kind: Any, x: TensorDescriptor) -> list[Any]:
        key = (index, x.base.data_ptr(), x.padding, *x.shape, *x.strides)
        found = self._unfolded.get(key)
        if found is None:
            from triton.backends.nvidia.driver import make_tensordesc_arg

            if len(self._unfolded) >= MAX_MAPS:
                self._unfolded.clear()
            found = self._unfolded[key] = make_tensordesc_arg(x, kind)
        return found


def bare_launcher(compiled: Any) -> BareLauncher | None:
    """A launcher of what Triton compiled; None where Triton's own has to be called."""
    wrapper = compiled.run
    if not triton.__version__.startswith(KNOWN_VERSION) or type(wrapper).__name__ != "CudaLauncher":
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
