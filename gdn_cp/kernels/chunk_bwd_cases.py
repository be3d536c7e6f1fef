"""The backward's kernels of the compile report, in the configurations that `chunk_bwd` launches."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from gdn_cp.kernels.chunk_bwd_chains import chains_kernel
from gdn_cp.kernels.chunk_bwd_config import BackwardLaunch, backward_config, launch_options
from gdn_cp.kernels.chunk_bwd_local import dk_kernel, dq_kernel, scores_kernel
from gdn_cp.kernels.configs import dot_precision
from gdn_cp.kernels.tables import CHUNK
from gdn_cp.launch import GLUON

if TYPE_CHECKING:
    from gdn_cp.kernels.compile_report import CompileCase


def compile_cases() -> list[CompileCase]:
    """Every kernel at Qwen3-Next's heads in bfloat16 for head dims 128, 64, 256; the chains also with few heads."""
    cases = []
    for dim, main in ((128, True), (64, True), (256, False)):
        cases += _cases(dim, backward_config(torch.device("meta"), torch.bfloat16, dim, dim, 32), main)
    narrow = backward_config(torch.device("meta"), torch.bfloat16, 128, 128, 32)._replace(chains=(16, 4, 3))
    return [*cases, *_cases(128, narrow, True)[:2], *_fused_cases()]


def _cases(dim: int, launch: BackwardLaunch, main: bool) -> list[CompileCase]:
    """The kernels as `launch` says for K = V = dim, the chains first."""
    from gdn_cp.kernels.compile_report import CompileCase

    float32 = "G bt rq rk initial_state starts checkpoint dht ends carry_in carry_out dh0 summaries"
    float32 += " dG db q_dots k_dots state_dots"
    known = dict.fromkeys(float32.split(), "*fp32") | dict.fromkeys(("pieces", "chunks", "roles"), "*i32")
    known |= dict.fromkeys(("c0", "c1", "total_chunks"), "i32") | {"scale": "fp32"}
    constants = {
        "H": 16, "HV": 32, "K": dim, "V": dim, "BK": dim, "C": CHUNK, "V_FIRST": False, "TMA": launch.tma,
        "LEAST_BETA": 2.0**-60, "PRECISION": dot_precision(torch.bfloat16),
    }  # fmt: skip
    cases = []
    for name, kernel, config, absent in (
        ("chains", chains_kernel, launch.chains, "roles starts checkpoint ends carry_in carry_out summaries"),
        ("summary", chains_kernel, launch.chains, "starts checkpoint ends carry_in carry_out h dh M dv dh0"),
        ("scores", scores_kernel, launch.scores, ""),
        ("dq", dq_kernel, launch.dq, ""),
        ("dk", dk_kernel, launch.dk, ""),
        ("chains of pieces in slices", chains_kernel, launch.chains, "roles initial_state dht dh0 summaries"),
        ("summary in slices", chains_kernel, launch.chains, "dht starts checkpoint ends h dh M dv dh0"),
    ):
        block_v, options = launch_options(config)
        given = constants | {"BV": block_v, "STAGES": options["STAGES"], "SUMMARY": name.startswith("summary")}
        given["TRUNCATE"] = -10.0 if name.startswith("summary") else None
        given = {n: x for n, x in (given | dict.fromkeys(absent.split())).items() if n in kernel.arg_names}
        tokens, states = [CHUNK, block_v], [dim, block_v]
        blocks = {"v": tokens, "do": tokens, "U": tokens, "M": tokens, "W": tokens, "h": states, "dh": states}
        if kernel is chains_kernel:
            blocks |= {"q": [CHUNK, dim], "k": [CHUNK, dim], "X": [dim, CHUNK], "Yt": [CHUNK, CHUNK]}
        tiles = {n: f"tensordesc<bf16{block}>" for n, block in blocks.items()} if launch.tma else {}
        strides = tuple(n for n in kernel.arg_names if n.startswith("stride"))
        types = known | dict.fromkeys(strides, "i32") | tiles
        cases.append(
            CompileCase(
                name=f"chunk_bwd.{name}/bf16/K{dim}/BV{block_v}",
                kernel=kernel,
                signature={n: types.get(n, "*bf16") for n in kernel.arg_names if n not in given},
                constexprs=given,
                num_warps=options["num_warps"],
                num_stages=options["num_stages"],
                maxnreg=options.get("maxnreg"),
                divisible=strides,
                main=main,
                spills_allowed=dim > 128,  # the accumulators of dq and dk alone are most of the registers
            )
        )
    return cases


def _fused_cases() -> list[CompileCase]:
    """The kernel in Gluon at Qwen3-Next's heads in bfloat16, where this version of Triton compiles it."""
    from gdn_cp.kernels.compile_report import CompileCase

    if not GLUON:
        return []
    from gdn_cp.kernels.chunk_bwd_fused import DIM, FETCHING_REGISTERS, ROW_LAYOUT, WARPS, tile_layout
    from gdn_cp.kernels.chunk_bwd_fused_kernel import fused_kernel

    types = dict.fromkeys(("rq", "rk", "dG", "db", "q_dots", "k_dots", "state_dots"), "*fp32")
    types |= {"chunks": "*i32", "scale": "fp32", "dq": "*bf16", "dk": "*bf16"}
    types |= dict.fromkeys(("c0", "items", "stride_dt", "stride_dh"), "i32")
    tile, state = (CHUNK, DIM), (DIM, DIM)
    blocks = dict.fromkeys(("q", "k", "v", "do", "M", "dq_out", "dk_out"), tile) | {"h": state, "dh": state}
    for name, block in (blocks | {"Ag": (CHUNK, CHUNK)}).items():
        types[name] = f"tensordesc<bf16{[*block]},{tile_layout(block, torch.bfloat16)!r}>"
    types |= dict.fromkeys(("G", "bt"), f"tensordesc<fp32[1, {CHUNK}],{ROW_LAYOUT!r}>")
    constants = {
        "H": 16, "HV": 32, "D": DIM, "C": CHUNK, "LEAST_BETA": 2.0**-60, "PROGRAMS": 132,
        "REGISTERS": FETCHING_REGISTERS, "num_warps": WARPS,
    }  # fmt: skip
    return [
        CompileCase(
            name=f"chunk_bwd.fused/bf16/K{DIM}",
            kernel=fused_kernel,
            signature=types,
            constexprs=constants,
            num_warps=WARPS,
            divisible=("stride_dt", "stride_dh"),
            spills_allowed=True,  # four registers of the loop over items wait in memory during the loop inside it
        )
    ]
