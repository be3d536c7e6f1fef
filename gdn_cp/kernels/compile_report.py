"""Compile every Triton kernel of the package for a GPU that need not be there, and report what the compiler made of it.

A kernel file hands over its shipped configurations from a function `compile_cases()`; files are found by that function.
Each case is compiled with Triton's bundled `ptxas` in a pool of processes, and three things are read from the result:

- registers, stack and shared memory, from the cubin's resource usage;
- spills: local-memory loads and stores in the disassembly (looked at only where there is a stack frame);
- `wgmma` instructions whose first operand lies in registers. `ptxas` before 13.3 may overwrite those registers while
  the tensor core still reads them (triton #9433), so no kernel of this package may contain one.

    python -m gdn_cp.kernels.compile_report --arch 90            # the table; exit code 1 if a main case breaks a rule
    python -m gdn_cp.kernels.compile_report --all --match chunk  # everything that has "chunk" in its name
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}  # bytes a block may ask for, by compute capability


@dataclass(frozen=True)
class CompileCase:
    """One configuration of one kernel, as it is launched.

    `signature` names the type of every argument that is not a constant ("*bf16", "*fp32", "i32", "i64", "fp32"), and
    `constexprs` the value of every one that is, pointers passed as None included. Pointers are taken as 16-byte
    aligned, the integers named in `divisible` as multiples of 16. `fp_fusion=False` forbids fused multiply-adds.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2
    maxnreg: int | None = None
    fp_fusion: bool = True
    divisible: tuple[str, ...] = ()
    main: bool = True
    spills_allowed: bool = False


@dataclass(frozen=True)
class CompileResult:
    """What came of a case: sizes in bytes, `wgmma_rs` the forbidden pattern, `error` the compiler's last line."""

    name: str
    main: bool
    spills_allowed: bool
    num_warps: int
    registers: int = 0
    stack: int = 0
    spill_instructions: int = 0
    shared: int = 0
    wgmma_ss: int = 0
    wgmma_rs: int = 0
    mma_sync: int = 0
    seconds: float = 0.0
    error: str = ""

    def problems(self, arch: int) -> list[str]:
        """The rules that this result breaks, in words."""
        if self.error:
            return [f"does not compile: {self.error}"]
        found = []
        if self.wgmma_rs:
            found.append(f"{self.wgmma_rs} wgmma with the first operand in registers")
        if self.spill_instructions and not self.spills_allowed:
            found.append(f"{self.spill_instructions} spill instructions, {self.stack} bytes of stack")
        if self.shared > SHARED_LIMIT.get(arch, 232_448):
            found.append(f"{self.shared} bytes of shared memory")
        return found


def count_wgmma(ptx: str) -> tuple[int, int]:
    """`wgmma` instructions with the first operand in shared memory, and with it in registers.

    The accumulator is the first list in braces; what follows it is either a 64-bit descriptor register (shared memory)
    or a second list in braces (registers).
    """
    operands = re.findall(r"wgmma\.mma_async\S*\s*\{[^}]*\}\s*,\s*(\{|%)", ptx)
    return operands.count("%"), operands.count("{")


def find_case_modules() -> list[str]:
    """Dotted names of the package's files that define `compile_cases`, sorted."""
    package = Path(__file__).resolve().parents[1]
    names = []
    for path in sorted(package.rglob("*.py")):
        if re.search(r"^def compile_cases\(", path.read_text(), re.MULTILINE):
            names.append(".".join((package.name, *path.relative_to(package).with_suffix("").parts)))
    return names


def collect_cases(match: str = "", everything: bool = False) -> list[tuple[str, int, CompileCase]]:
    """(module, index in its list, case) of the cases asked for; names are unique."""
    found = []
    for module in find_case_modules():
        for index, case in enumerate(importlib.import_module(module).compile_cases()):
            if match in case.name and (everything or case.main):
                found.append((module, index, case))
    names = [case.name for _, _, case in found]
    assert len(names) == len(set(names)), f"two compile cases share a name: {sorted(names)}"
    return found


def _resources(cubin: bytes) -> tuple[int, int, int, int]:
    """(registers, stack, shared, spill instructions) of the one kernel in a cubin."""
    from triton import knobs

    tool = knobs.nvidia.cuobjdump.path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.check_output([tool, "--dump-resource-usage", file.name], text=True)
        values = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED):(\d+)", usage)}
        spills = 0
        if values["STACK"]:
            sass = subprocess.check_output([tool, "-sass", file.name], text=True)
            spills = len(re.findall(r"\b(?:LDL|STL)\b", sass))
    return values["REG"], values["STACK"], values["SHARED"], spills


def compile_kernel(case: CompileCase, arch: int) -> Any:
    """Triton's compiled kernel of a case for compute capability `arch` (90 for 9.0); `asm` holds each stage's text.

    Raises:
        ValueError: if the case does not name exactly the kernel's arguments.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    given = set(case.signature) | set(case.constexprs)
    if given != set(names):
        missing, unknown = sorted(set(names) - given), sorted(given - set(names))
        raise ValueError(f"compile case lacks {missing} and has unknown {unknown}")
    signature = {name: case.signature.get(name, "constexpr") for name in names}
    aligned = [i for i, name in enumerate(names) if signature[name].startswith("*") or name in case.divisible]
    make_source = ASTSource
    if getattr(case.kernel, "is_gluon", bool)():
        from triton.experimental.gluon._runtime import GluonASTSource

        make_source = GluonASTSource
    source = make_source(
        case.kernel, signature, dict(case.constexprs), {(i,): [["tt.divisibility", 16]] for i in aligned}
    )
    options: dict[str, Any] = {
        "num_warps": case.num_warps,
        "num_stages": case.num_stages,
        "enable_fp_fusion": case.fp_fusion,
    }
    if case.maxnreg is not None:
        options["maxnreg"] = case.maxnreg
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def compile_case(case: CompileCase, arch: int) -> CompileResult:
    """Compile one case and measure it; needs no GPU, and no interpreter mode."""
    started = time.monotonic()
    known = {"name": case.name, "main": case.main, "spills_allowed": case.spills_allowed, "num_warps": case.num_warps}
    try:
        compiled = compile_kernel(case, arch)
    except Exception as error:  # the compiler raises many kinds; the table has to show all of them
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return CompileResult(**known, error=lines[-1][:200], seconds=time.monotonic() - started)
    registers, stack, static_shared, spills = _resources(compiled.asm["cubin"])
    wgmma_ss, wgmma_rs = count_wgmma(compiled.asm["ptx"])
    return CompileResult(
        **known,
        registers=registers,
        stack=stack,
        spill_instructions=spills,
        shared=static_shared + compiled.metadata.shared,
        wgmma_ss=wgmma_ss,
        wgmma_rs=wgmma_rs,
        mma_sync=len(re.findall(r"\bmma\.sync\b", compiled.asm["ptx"])),
        seconds=time.monotonic() - started,
    )


def _compile_listed(module: str, index: int, arch: int) -> CompileResult:
    """The pool's work item: cases hold kernels, which do not pickle, so a case travels as its place in a list."""
    return compile_case(importlib.import_module(module).compile_cases()[index], arch)


def compile_report(arch: int = 90, match: str = "", everything: bool = False, jobs: int = 2) -> list[CompileResult]:
    """Compile the shipped configurations in `jobs` fresh processes.

    Args:
        arch: compute capability times ten: 80, 90, 100.
        match: only cases whose name contains this.
        everything: also the cases that CI leaves out (`main=False`).
        jobs: processes; each costs about 1 GiB while it compiles.

    Raises:
        RuntimeError: if kernels were defined for Triton's interpreter, which leaves nothing to compile.
    """
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise RuntimeError("TRITON_INTERPRET=1 replaces the compiler; unset it to compile kernels")
    cases = collect_cases(match, everything)
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(_compile_listed, module, index, arch) for module, index, _ in cases]
        return [future.result() for future in futures]


def format_table(results: list[CompileResult], arch: int) -> str:
    """The results as fixed-width text, one line each, broken rules behind it."""
    width = max([len(result.name) for result in results] + [4])
    lines = [
        f"{'case':<{width}} warps regs stack spills  shared wgmma RS mma.sync  sec   (sm_{arch})",
    ]
    for r in results:
        lines.append(
            f"{r.name:<{width}} {r.num_warps:5d} {r.registers:4d} {r.stack:5d} {r.spill_instructions:6d} {r.shared:7d} "
            f"{r.wgmma_ss:5d} {r.wgmma_rs:2d} {r.mma_sync:8d} {r.seconds:4.0f}   {'; '.join(r.problems(arch))}".rstrip()
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Print the table; 0 when every case keeps the rules."""
    parser = argparse.ArgumentParser(
        prog="python -m gdn_cp.kernels.compile_report", description="Compile every kernel, report."
    )
    parser.add_argument(
        "--arch", type=int, default=90, help="compute capability times ten (80, 90, 100); settings are those of 90"
    )
    parser.add_argument("--all", action="store_true", help="also the configurations that CI leaves out")
    parser.add_argument("--match", default="", help="only cases whose name contains this")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--json", type=Path, default=None, help="write the results to this file too")
    options = parser.parse_args(arguments)
    results = compile_report(options.arch, options.match, options.all, options.jobs)
    print(format_table(results, options.arch))
    if options.json is not None:
        import triton

        content = {"arch": options.arch, "triton": triton.__version__, "cases": [asdict(r) for r in results]}
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    return int(any(result.problems(options.arch) for result in results))


if __name__ == "__main__":
    # The cases hold CompileCase objects of the module's importable name, not of __main__.
    from gdn_cp.kernels import compile_report as importable

    sys.exit(importable.main())
