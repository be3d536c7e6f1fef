"""Gated DeltaNet training under context parallelism. See README.md; the names handed on here are the public ones.

Each name is loaded from its module on first use, so that `import gdn_cp` does no work and needs no GPU and no Triton.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gdn_cp.comm.layout import ThdLayout
    from gdn_cp.gated_delta_net import GatedDeltaNet, GdnDims, gated_delta_net_mixer
    from gdn_cp.kernels.backends import choose_backend
    from gdn_cp.kernels.chunk import chunk_gated_delta_rule
    from gdn_cp.kernels.gate import fused_gdn_gate, fused_gdn_gate_chunk_cumsum
    from gdn_cp.kernels.recurrent import fused_recurrent_gated_delta_rule

__version__ = "0.1.0"

_HOME = {
    "GatedDeltaNet": "gdn_cp.gated_delta_net",
    "GdnDims": "gdn_cp.gated_delta_net",
    "ThdLayout": "gdn_cp.comm.layout",
    "choose_backend": "gdn_cp.kernels.backends",
    "chunk_gated_delta_rule": "gdn_cp.kernels.chunk",
    "fused_gdn_gate": "gdn_cp.kernels.gate",
    "fused_gdn_gate_chunk_cumsum": "gdn_cp.kernels.gate",
    "fused_recurrent_gated_delta_rule": "gdn_cp.kernels.recurrent",
    "gated_delta_net_mixer": "gdn_cp.gated_delta_net",
}

__all__ = [
    "GatedDeltaNet",
    "GdnDims",
    "ThdLayout",
    "choose_backend",
    "chunk_gated_delta_rule",
    "fused_gdn_gate",
    "fused_gdn_gate_chunk_cumsum",
    "fused_recurrent_gated_delta_rule",
    "gated_delta_net_mixer",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'gdn_cp' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
