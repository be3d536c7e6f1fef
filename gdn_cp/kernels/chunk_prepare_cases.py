"""The prepare kernels of the compile report, in the configurations that `chunk_prepare` launches."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from gdn_cp.kernels.chunk_prepare import (
    LEADING_SLOTS,
    NORM_EPS,
    leading_products_kernel,
    products_kernel,
    solve_kernel,
)
from gdn_cp.kernels.configs import prepare_config

if TYPE_CHECKING:
    from gdn_cp.kernels.compile_report import CompileCase


def compile_cases() -> list[CompileCase]:
    """All kernels at Qwen3-Next's heads in bfloat16 and at head dim 64; float32, which nobody trains with, beside."""
    cases = []
    for kind, dim, main in (("bf16", 128, True), ("bf16", 64, True), ("bf16", 256, False), ("fp32", 64, False)):
        cases += _cases(kind, dim, main)
    return cases


def _cases(kind: str, K: int, main: bool) -> list[CompileCase]:
    from gdn_cp.kernels.compile_report import CompileCase

    launch = prepare_config(torch.device("cpu"), torch.float32 if kind == "fp32" else torch.bfloat16, K)
    tile, floats = f"*{kind}", "*fp32"
    strides = ("stride_kt", "stride_kh", "stride_gt", "stride_bt")
    heads = {"H": 16, "HV": 32, "K": K, "EPS": NORM_EPS, "NORM": True, "DOT": launch.precision}
    switches = {"HAS_G": True, "HAS_BETA": True, "GATE": True, "HAS_BIAS": True, "SIGMOID": True}
    solve = {"k_ptr": tile, "g_ptr": tile, "beta_ptr": tile, "A_log_ptr": floats, "dt_bias_ptr": floats}
    solve |= {"chunks_ptr": "*i32", "G_ptr": floats, "bt_ptr": floats, "rk_ptr": floats, "Ag_ptr": tile}
    products = {"q_ptr": tile, "k_ptr": tile, "G_ptr": floats, "rq_ptr": floats, "rk_ptr": floats, "Ag_ptr": tile}
    products |= {"chunks_ptr": "*i32", "X_ptr": tile, "Yt_ptr": tile, "first_chunk": "i32", "scale": "fp32"}
    leading = {n: kind for n, kind in products.items() if n not in ("chunks_ptr", "first_chunk")}
    leading |= {"pieces_ptr": "*i32", "roles_ptr": "*i32"}
    product_strides = ("stride_qt", "stride_qh", "stride_kt", "stride_kh")
    return [
        CompileCase(
            name=f"chunk_prepare.solve/{kind}/K{K}",
            kernel=solve_kernel,
            signature=solve | {"n_programs": "i32"} | dict.fromkeys(strides, "i32"),
            constexprs=heads
            | switches
            | {"BK": min(K, launch.solve_block), "PRECISION": launch.solve_precision, "stride_gh": 1, "stride_bh": 1},
            num_warps=launch.solve_warps,
            num_stages=launch.solve_stages,
            divisible=strides,
            main=main,
            spills_allowed=kind == "fp32",  # whose products are unrolled for want of tensor cores
        ),
        CompileCase(
            name=f"chunk_prepare.products/{kind}/K{K}",
            kernel=products_kernel,
            signature=products | dict.fromkeys(product_strides, "i32"),
            constexprs=heads | {"BK": K, "STORE_RQ": True},
            num_warps=launch.products_warps,
            num_stages=launch.products_stages,
            maxnreg=launch.products_registers,
            divisible=product_strides,
            main=main,
            spills_allowed=kind == "fp32",
        ),
        CompileCase(
            name=f"chunk_prepare.leading_products/{kind}/K{K}",
            kernel=leading_products_kernel,
            signature=leading | dict.fromkeys(product_strides, "i32"),
            constexprs={n: x for n, x in heads.items() if n != "EPS"}
            | {"BK": K, "TRUNCATE": -10.0, "SLOTS": LEADING_SLOTS},
            num_warps=launch.products_warps,
            num_stages=launch.products_stages,
            maxnreg=launch.leading_registers,
            divisible=product_strides,
            main=main,
            spills_allowed=kind == "fp32",
        ),
    ]
