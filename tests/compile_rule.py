"""Compile what the delta rule launches, whole and in segments, both ways, for a GPU that need not be there.

    python -m tests.compile_rule CAPABILITY HEAD_DIM    # 80 128: prints JSON, {kernel: [bytes of shared memory, ..]}

A driver that knows only what GPU it is for stands in, and tensors are on the CPU: launches compile and do nothing.
Exit code 1, and the compiler's words, for what does not compile.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from gdn_cp.kernels import configs

PROCESSORS = 108


class Driver:
    """Stands for a GPU's."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


def compiled_for(capability: int, dim: int) -> dict[str, list[int]]:
    """Bytes of shared memory of each kernel that heads of `dim` launch, with states in and out and between ranks."""
    driver: Any = triton.runtime.driver
    driver.set_active(Driver(capability))
    configs.capability = lambda device: capability  # type: ignore[assignment]
    configs.multiprocessors = lambda device: PROCESSORS  # type: ignore[assignment]
    from gdn_cp import launch
    from gdn_cp.kernels.chunk_pieces import ENTERED, LEFT
    from gdn_cp.kernels.chunk_prepare import Prepared, prepare_leading_products
    from gdn_cp.kernels.chunk_triton import rule_backward, rule_forward
    from gdn_cp.kernels.segments import RuleOptions, SegmentRule, TokenInputs, begin_segment_backward
    from gdn_cp.kernels.tables import chunk_tables

    launch._direct = False
    found: dict[str, list[int]] = {}
    run = JITFunction.run

    def compile_only(self: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        sizes = found.setdefault(self.__name__, [])
        if compiled.metadata.shared not in sizes:
            sizes.append(compiled.metadata.shared)
        return compiled

    JITFunction.run = compile_only
    N, T, H, HV = 2, 300, 2, 4

    def rows(*shape: int) -> torch.Tensor:
        return torch.zeros(1, T, *shape, dtype=torch.bfloat16)

    inputs = rows(H, dim), rows(H, dim), rows(HV, dim), rows(HV), rows(HV)
    of_heads, states = torch.zeros(2, HV), torch.zeros(2, N, HV, dim, dim)
    bounds = torch.tensor([0, 100, T], dtype=torch.int32)
    flags = {"use_qk_l2norm_in_kernel": True, "use_gate_in_kernel": True, "use_beta_sigmoid_in_kernel": True}
    options: dict[str, Any] = flags | {"scale": 1.0, "initial_state": states[0], "cu_seqlens": bounds}
    options |= {"A_log": of_heads[0], "dt_bias": of_heads[1], "state_v_first": False}
    result: Any = rule_forward(*inputs, **options, output_final_state=True, intra_card=None)
    o, _, kept = result
    rule_backward(torch.zeros_like(o), states[1], *inputs, *kept, **options, need_dh0=True, piece_chunks=0)
    tokens, switches = TokenInputs(*inputs, *of_heads), RuleOptions(backend="triton", **flags)
    roles = torch.full((N,), ENTERED | LEFT, dtype=torch.int32)
    segments = SegmentRule(tokens, switches, bounds, roles, (0, N), truncate=True, checked=True)
    segments.summarise()
    segments.run(states[0])
    needed = (True,) * len(tokens.tensors())
    back = begin_segment_backward(
        tokens, switches, bounds, roles, segments.kept(), states[0], torch.zeros_like(o), needed, truncate=True
    )
    back.state_gradient()
    back.finish(states[1])
    prepared = Prepared(*segments.kept()[0][:5])  # type: ignore[arg-type]
    tables = chunk_tables(1, T, bounds, bounds.device)
    prepare_leading_products(*inputs[:2], prepared, tables, roles, -10.0, scale=1.0)  # those of long batches
    return found


if __name__ == "__main__":
    print(json.dumps(compiled_for(int(sys.argv[1]), int(sys.argv[2]))))
