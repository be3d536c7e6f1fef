"""Every difference between megatron-core 0.16.1 and 0.19.2 that this package meets, in one place.

0.16.1 is the newest release for Python 3.11 and older, 0.19.2 needs 3.12.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec_for_backend
from megatron.core.transformer.transformer_config import TransformerConfig


def mlp_spec(config: TransformerConfig, backend: Any = None, *, experts: bool = True) -> Any:
    """The MLP, or mixture of experts where the config has them, of `backend`'s modules (None: plain Megatron's).

    0.16.1 gives a ModuleSpec, 0.19.2 a partial that its TransformerLayer calls with more arguments.
    """
    return get_mlp_module_spec_for_backend(
        backend=backend or LocalSpecProvider(),
        num_experts=config.num_moe_experts if experts else None,
        moe_grouped_gemm=config.moe_grouped_gemm,
    )


def split_tensor_factory() -> Callable[..., Any]:
    """Megatron's factory that saves one parameter as several tensors; 0.19.2 moved it."""
    try:
        from megatron.core.ssm.utils import _split_tensor_factory  # type: ignore[import-not-found]
    except ImportError:
        from megatron.core.ssm.gated_delta_net import _split_tensor_factory
    return _split_tensor_factory


def module_name(name: str | None, child: str) -> dict[str, str]:
    """The `name` argument of a parallel linear layer, which 0.16.1 does not know."""
    return {} if name is None else {"name": f"{name}.{child}"}
