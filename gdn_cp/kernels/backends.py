"""Which implementation of the delta rule serves a call, and why.

    "triton"     the kernels of `chunk_triton`, for NVIDIA GPUs
    "reference"  the chunked form in plain torch, for any device and dtype
    "recurrent"  token by token in plain torch: slow, the definition itself

A caller names one, or the environment variable GDN_CP_BACKEND does, or the choice is automatic: Triton on CUDA where
it can serve the call, else the reference, with one warning for each reason that Triton gave.
"""

import os
import warnings
from dataclasses import dataclass

import torch

ENVIRONMENT_VARIABLE = "GDN_CP_BACKEND"
NAMES = ("triton", "reference", "recurrent")

_warned: set[str] = set()


@dataclass(frozen=True)
class DeltaRuleCall:
    """What a backend needs to know of a call to `chunk_gated_delta_rule` to accept or to refuse it."""

    device_type: str  # "cpu", "cuda", ...
    capability: tuple[int, int] | None  # compute capability of the CUDA device, None elsewhere
    dtype: torch.dtype  # of q, k and v
    gate_dtype: torch.dtype | None  # of g, None without decay
    beta_dtype: torch.dtype | None  # of beta, None when it is ones
    B: int  # batch
    T: int  # tokens of each batch row
    H: int  # query and key heads
    HV: int  # value heads
    K: int  # key head dim
    V: int  # value head dim
    N: int  # sequences
    varlen: bool = False  # cu_seqlens given
    has_initial_state: bool = False
    output_final_state: bool = False
    use_qk_l2norm_in_kernel: bool = False
    use_gate_in_kernel: bool = False
    use_beta_sigmoid_in_kernel: bool = False
    state_v_first: bool = False
    requires_grad: bool = False


@dataclass(frozen=True)
class Choice:
    """A backend's name and why it was chosen, in words for a log."""

    backend: str
    reason: str


def choose_backend(call: DeltaRuleCall, requested: str | None = None) -> Choice:
    """The backend for `call`.

    Args:
        call: see `DeltaRuleCall`.
        requested: "triton", "reference", "recurrent", "auto", or None for what GDN_CP_BACKEND says (unset: "auto").

    Raises:
        ValueError: for an unknown name, or when a backend was asked for by name that cannot serve the call.
    """
    name, source = requested, "the argument backend"
    if name is None:
        name = os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
        source = f"the environment variable {ENVIRONMENT_VARIABLE}"
    if name == "auto":
        return _choose_automatically(call)
    if name not in NAMES:
        raise ValueError(f"unknown backend {name!r} from {source}: choose one of {', '.join(NAMES)} or auto")
    if name == "triton":
        refusal = triton_refusal(call)
        if refusal is not None:
            raise ValueError(
                f"backend 'triton', asked for by {source}, cannot serve this call: {refusal}. "
                "Use backend='auto' to fall back to the reference"
            )
    return Choice(name, f"asked for by {source}")


def triton_refusal(call: DeltaRuleCall) -> str | None:
    """Why the Triton backend cannot serve `call`; None when it can."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if call.device_type != "cuda" and not (call.device_type == "cpu" and interpreted):
        return f"its tensors are on {call.device_type}, Triton needs an NVIDIA GPU (or TRITON_INTERPRET=1 on a CPU)"
    try:
        from gdn_cp.kernels import chunk_triton
    except ImportError as error:
        return f"it cannot be imported ({error})"
    return chunk_triton.unsupported(call)


def wants_kernels(x: torch.Tensor) -> bool:
    """Whether the gate, the convolution, the norm and decode are to run their Triton kernels on x: on a GPU, in any
    dtype but float64, unless GDN_CP_BACKEND asks for one of the plain torch implementations."""
    wanted = os.environ.get(ENVIRONMENT_VARIABLE) not in ("reference", "recurrent")
    return x.is_cuda and x.dtype != torch.float64 and wanted


def _choose_automatically(call: DeltaRuleCall) -> Choice:
    if call.device_type != "cuda":
        return Choice("reference", f"the tensors are on {call.device_type}")
    refusal = triton_refusal(call)
    if refusal is None:
        return Choice("triton", "CUDA tensors that it supports")
    if refusal not in _warned:
        _warned.add(refusal)
        warnings.warn(
            f"gdn_cp: the Triton delta rule cannot serve this call, {refusal}; the plain torch reference runs instead, "
            "which is slower and keeps more memory for the backward",
            RuntimeWarning,
            stacklevel=4,
        )
    return Choice("reference", f"Triton cannot serve the call: {refusal}")
