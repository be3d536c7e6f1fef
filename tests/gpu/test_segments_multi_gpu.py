"""The mixer with state passing over NCCL, in bfloat16: output and every gradient on each rank against one rank's.

Everything is measured against the mixer in float64 on one GPU. Tolerances:

- output and gradient of the input: 1.2 times the error of one rank in bfloat16;
- weights of the convolution and the norm: besides, each rank rounds its share to bfloat16, 2^-9 of it;
- A_log and dt_bias: sums over tokens of terms that have passed through up to five products with operands rounded by
  2^-9. The terms cancel and their errors do not, so these are measured against the root of the sum of squared terms;
  and since dg is a running sum over the 64 rows of a chunk, so are its errors, which adds up to sqrt(64) times as much.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from gdn_cp import GdnDims, gated_delta_net_mixer
from gdn_cp.comm.layout import ThdLayout
from tests.state_cases import build, divisors, relative_error

DIMS = GdnDims(4, 8, head_k_dim=128, head_v_dim=128)
SHARE = 2.0**-9
GATE = 5 * SHARE * 64**0.5
BATCHES = [
    ("zigzag", [0, 4096]),
    ("contiguous", [0, 700, 711, 3072, 4096]),
    ("zigzag", [0, 256, 320, 2048, 2048, 4096]),
]


def parameters(dtype: torch.dtype) -> dict[str, Tensor]:
    draw = torch.Generator("cuda").manual_seed(5)
    gate = torch.float64 if dtype == torch.float64 else torch.float32

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", generator=draw)

    made = {
        "conv1d_weight": random(DIMS.conv_dim, 1, DIMS.conv_kernel),
        "conv1d_bias": random(DIMS.conv_dim),
        "out_norm_weight": random(DIMS.head_v_dim),
    }
    made = {name: x.bfloat16().to(dtype) for name, x in made.items()}
    return made | {"A_log": (0.5 * random(DIMS.num_v_heads) - 3).to(gate), "dt_bias": random(DIMS.num_v_heads).to(gate)}


def batch(tokens: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator("cuda").manual_seed(6)
    widths = DIMS.in_proj_dim, DIMS.num_v_heads * DIMS.head_v_dim
    x, d_out = (torch.randn(tokens, width, device="cuda", generator=draw).bfloat16() for width in widths)
    return x, d_out


def run_mixer(projected: Tensor, d_out: Tensor, **call) -> dict[str, Tensor]:
    leaves = {name: x.requires_grad_() for name, x in parameters(projected.dtype).items()}
    x = projected.clone().requires_grad_()
    out = gated_delta_net_mixer(x, dims=DIMS, **leaves, **call)
    out.backward(d_out)
    return {"out": out.detach(), "projected": x.grad} | {name: leaf.grad for name, leaf in leaves.items()}


def sizes(exact: dict[str, Tensor]) -> dict[str, float]:
    """What the errors of the gate's parameters are measured against."""
    raw = batch(len(exact["out"]))[0][:, -DIMS.num_v_heads :].double() + parameters(torch.float64)["dt_bias"]
    terms = exact["projected"][:, -DIMS.num_v_heads :]
    to_a = torch.nn.functional.softplus(raw) / raw.sigmoid()
    return {"dt_bias": float(terms.norm()), "A_log": float((terms * to_a).norm())}


def errors_over_tolerance(rank: int, world: int) -> dict[str, float]:
    """This rank's errors, each over what is allowed, for every batch and a2a_size."""
    found = {}
    for kind, cu in BATCHES:
        whole = batch(cu[-1])
        uncut = build(kind, cu, 1).to("cuda")
        exact = run_mixer(*(x.double() for x in whole), layout=uncut)
        single = run_mixer(*whole, layout=uncut)
        layout: ThdLayout = build(kind, cu, world).to("cuda")
        gate_sizes = sizes(exact)
        for a2a_size in divisors(world):
            local = [layout.shard(x, rank) for x in whole]
            actual = run_mixer(*local, layout=layout, group=dist.group.WORLD, a2a_size=a2a_size)
            for name, value in actual.items():
                limit = 1.2 * relative_error(single[name], exact[name])
                wanted = exact[name]
                if name in ("out", "projected"):
                    parts = [torch.empty_like(value) for _ in range(world)]
                    dist.all_gather(parts, value)
                    value = layout.unshard(parts)
                else:
                    value = value.double()
                    dist.all_reduce(value)
                    limit += SHARE
                error = relative_error(value, wanted)
                if name in gate_sizes:
                    error, limit = float((value - wanted).norm()) / gate_sizes[name], GATE
                found[f"{name}, {kind} {cu}, a2a_size {a2a_size}"] = error / limit
    return found


@pytest.mark.multi_gpu
@pytest.mark.parametrize("world", [2, 4])
def test_every_a2a_size_errs_no_more_than_one_rank(run_ranks, world):
    if torch.cuda.device_count() < world:
        pytest.skip(f"needs {world} NVIDIA GPUs, this machine has {torch.cuda.device_count()}")
    for rank, found in enumerate(run_ranks(errors_over_tolerance, world, backend="nccl", timeout=240.0)):
        beyond = {name: round(error, 2) for name, error in found.items() if not error <= 1}
        assert not beyond, f"rank {rank}: times the tolerance: {beyond}"
