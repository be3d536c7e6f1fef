"""What the mixer and the plain layer refuse, before any collective: each message names the argument and the remedy.

Dimensions as in `gdn_cp.gated_delta_net`.
"""

from __future__ import annotations

import math
import operator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from gdn_cp.comm.layout import ThdLayout, _full_device

if TYPE_CHECKING:
    from gdn_cp.gated_delta_net import GdnDims

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def check_count(name: str, value: Any) -> int:
    """Return a count of heads, channels or taps as an int of at least 1."""
    try:
        count = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}={value!r} must be an int") from None
    if count < 1:
        raise ValueError(f"{name}={count} must be at least 1")
    return count


def check_eps(eps: Any) -> None:
    """Refuse an epsilon of the norm that is no positive number."""
    if isinstance(eps, bool) or not isinstance(eps, int | float):
        raise TypeError(f"norm_eps={eps!r} must be a float")
    if not (eps > 0 and math.isfinite(eps)):
        raise ValueError(f"norm_eps={eps} must be positive and finite, or a row of zeros divides by zero")


def check_creation(dtype: Any, device: Any) -> None:
    """Refuse a dtype or device that parameters cannot have; None is torch's default."""
    if dtype is not None and dtype not in _DTYPES:
        kind = ValueError if isinstance(dtype, torch.dtype) else TypeError
        raise kind(f"dtype={dtype!r}: choose torch.bfloat16, float16, float32 or float64")
    if device is not None:
        _full_device(device)


def check_tensor(name: str, x: Any) -> Tensor:
    """Return x; refuse what is no floating-point tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in _DTYPES:
        raise ValueError(f"{name} has dtype {x.dtype}, expected a floating-point dtype")
    return x


def check_layout_and_group(layout: Any, group: Any) -> None:
    """Refuse a layout or group of another type."""
    if layout is not None and not isinstance(layout, ThdLayout):
        raise TypeError(f"layout must be a gdn_cp.ThdLayout or None, got {type(layout).__name__}")
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group must be a process group or None, got {group!r} (is this rank a member of it?)")


def check_call(projected: Any, dims: GdnDims, layout: ThdLayout | None, group: dist.ProcessGroup | None) -> None:
    """Refuse rows, layout and group that do not fit each other."""
    check_layout_and_group(layout, group)
    check_tensor("projected", projected)
    size = 1 if group is None else group.size()
    if projected.dim() != 2 or projected.shape[1] != dims.in_proj_dim:
        raise ValueError(
            f"projected has shape {tuple(projected.shape)}, expected [rows, {dims.in_proj_dim}]: the sections q, k, v, "
            f"z, beta, alpha of widths {dims.sections}"
        )
    if layout is None:
        if size > 1:
            raise ValueError(
                f"layout=None with a group of {size} ranks: pass the ThdLayout that says which rows each rank holds"
            )
    else:
        if layout.cp_size != size:
            raise ValueError(
                f"layout.cp_size={layout.cp_size} but group has {size} rank(s): build the layout for this group's size"
            )
        if projected.shape[0] != layout.t_local:
            raise ValueError(
                f"projected has {projected.shape[0]} rows but layout.t_local={layout.t_local}: pass this rank's rows"
            )
        if layout.cu_seqlens_tensor().device != projected.device:
            raise ValueError(
                f"layout is on {layout.cu_seqlens_tensor().device} but projected on {projected.device}: "
                "use layout.to(device) once per batch"
            )


def check_parameters(
    projected: Tensor,
    dims: GdnDims,
    conv1d_weight: Any,
    conv1d_bias: Any,
    A_log: Any,
    dt_bias: Any,
    out_norm_weight: Any,
) -> None:
    """Refuse parameters of another shape, dtype or device than `dims` and `projected` ask for."""
    gate_dtype = torch.float64 if projected.dtype == torch.float64 else torch.float32
    expected: dict[str, tuple[Any, tuple[int, ...], torch.dtype | None]] = {
        "conv1d_weight": (conv1d_weight, (dims.conv_dim, 1, dims.conv_kernel), None),
        "conv1d_bias": (conv1d_bias, (dims.conv_dim,), None),
        "A_log": (A_log, (dims.num_v_heads,), gate_dtype),
        "dt_bias": (dt_bias, (dims.num_v_heads,), gate_dtype),
        "out_norm_weight": (out_norm_weight, (dims.head_v_dim,), None),
    }
    for name, (given, shape, dtype) in expected.items():
        if given is None:
            if name in ("A_log", "dt_bias"):
                raise ValueError(f"{name}=None: the gate needs it, [{dims.num_v_heads}] in {gate_dtype}")
            if name == "conv1d_bias":
                continue
        parameter = check_tensor(name, given)
        if tuple(parameter.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(parameter.shape)}, expected {shape} for {dims}")
        if dtype is not None and parameter.dtype != dtype:
            raise ValueError(
                f"{name} has dtype {parameter.dtype}, expected {dtype}: the gate is an exponential of it, keep it out "
                "of casts to half precision"
            )
        if parameter.device != projected.device:
            raise ValueError(f"{name} is on {parameter.device} but projected on {projected.device}")


def check_hidden_states(hidden_states: Any, hidden_size: int, weight: Tensor) -> None:
    """Refuse an input that the layer's first projection could not take."""
    check_tensor("hidden_states", hidden_states)
    if hidden_states.dim() not in (2, 3) or hidden_states.shape[-1] != hidden_size:
        raise ValueError(
            f"hidden_states has shape {tuple(hidden_states.shape)}, expected [rows, {hidden_size}] or three dimensions "
            f"ending in {hidden_size}"
        )
    if hidden_states.device != weight.device:
        raise ValueError(f"hidden_states is on {hidden_states.device} but the layer on {weight.device}")
    if hidden_states.dtype != weight.dtype and not torch.is_autocast_enabled(hidden_states.device.type):
        raise ValueError(f"hidden_states has dtype {hidden_states.dtype} but the layer {weight.dtype}: cast one")
