"""Every kernel compiled for Hopper without a GPU: no wgmma operand in registers, no spills; the table is printed."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from gdn_cp.kernels import compile_report
from gdn_cp.kernels.compile_report import CompileResult, count_wgmma

ROOT = Path(__file__).parents[2]
# Triton's interpreter, which other tests run in, is chosen when a kernel is defined: compile in a process without it.
ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}

REGISTER_OPERAND = """
import sys
import triton, triton.language as tl
from gdn_cp.kernels.compile_report import CompileCase, compile_case

@triton.jit
def product(x, y, out, SCALED: tl.constexpr):
    rows, cols = tl.arange(0, 64)[:, None], tl.arange(0, 64)[None, :]
    a, b = tl.load(x + rows * 64 + cols), tl.load(y + rows * 64 + cols)
    if SCALED:
        a = (a * 2.0).to(tl.bfloat16)
    tl.store(out + rows * 64 + cols, tl.dot(a, b))

for scaled in (False, True):
    pointers = {"x": "*bf16", "y": "*bf16", "out": "*fp32"}
    result = compile_case(CompileCase("product", product, pointers, {"SCALED": scaled}), 90)
    print(result.wgmma_ss > 0, result.wgmma_rs > 0, result.error or "compiled")
print(compile_case(CompileCase("lacks", product, {"x": "*bf16"}, {"z": 1}), 90).error)
"""

ORDER_OF_SUMS = r'''
import re
from dataclasses import replace
from gdn_cp.kernels.compile_report import CompileCase, compile_kernel
from gdn_cp.kernels.recurrent_triton import _compile_case

def sums(case):
    """Operands of every sum and product, each with the layout of its elements over threads and registers."""
    text = re.sub(r" loc\(.*\)$", "", compile_kernel(case, 90).asm["ttgir"], flags=re.MULTILINE)
    found = re.findall(r"tt.reduce.*?: \((tensor<[^>]*>)\)", text, re.DOTALL) + re.findall(r"tt\.dot .* : (.*)", text)
    for name, layout in re.findall(r"^(#\w+) = (.*)$", text, re.MULTILINE):
        found = [re.sub(name + r"\b", layout, operand) for operand in found]
    return sorted(found)

for dtype in ("fp32", "bf16"):
    for v_first in (False, True):
        cases = [_compile_case(CompileCase, kind, dtype, v_first) for kind in ("bank", "ring")]
        variants = [replace(c, constexprs={**c.constexprs, "ONE_TOKEN": one}) for c in cases for one in (True, False)]
        first, *others = [sums(variant) for variant in variants]
        print(len(first) >= 4, all(other == first for other in others))
'''


def run(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT)


def test_every_kernel_compiles_for_sm90_and_keeps_the_rules(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "report.json"
    done = run("-m", "gdn_cp.kernels.compile_report", "--json", str(path))
    with capsys.disabled():
        print("\n" + done.stdout)
    assert path.exists(), done.stderr
    results = [CompileResult(**entry) for entry in json.loads(path.read_text())["cases"]]
    broken = {result.name: result.problems(90) for result in results if result.problems(90)}
    assert not broken
    assert done.returncode == 0
    assert len(results) >= 10
    assert all(result.registers > 0 for result in results)


def test_every_file_with_kernels_is_covered_by_compile_cases():
    with_kernels = []
    for path in sorted((ROOT / "gdn_cp").rglob("*.py")):
        if re.search(r"^@(triton|gluon)\.jit", path.read_text(), re.MULTILINE):
            with_kernels.append(".".join(("gdn_cp", *path.relative_to(ROOT / "gdn_cp").with_suffix("").parts)))
    assert with_kernels
    covered = {case.kernel.fn.__module__ for _, _, case in compile_report.collect_cases(everything=True)}
    # a file of helpers, which are compiled inside others' kernels, hands over an empty list
    assert set(with_kernels) - covered - set(compile_report.find_case_modules()) == set()


def test_detector_sees_a_scaled_first_operand(tmp_path: Path):
    script = tmp_path / "register_operand.py"
    script.write_text(REGISTER_OPERAND)
    done = run(str(script))
    assert done.stdout.splitlines()[:2] == ["True False compiled", "False True compiled"], done.stderr
    assert "compile case lacks ['SCALED', 'out', 'y'] and has unknown ['z']" in done.stdout


def test_decode_of_one_token_and_of_packets_sums_in_one_order(tmp_path: Path):
    """Packets are promised the bits of single tokens; both variants must lay their sums out alike, or orders differ."""
    script = tmp_path / "order_of_sums.py"
    script.write_text(ORDER_OF_SUMS)
    done = run(str(script))
    assert done.stdout.split() == ["True"] * 8, done.stdout + done.stderr


def test_count_of_operand_kinds():
    ptx = """
    wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f1,%f2,%f3,%f4}, %rd1, %rd2, p, 1, 1, 0, 0;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f1,%f2,%f3,%f4}, {%r1,%r2,%r3,%r4}, %rd2, p, 1, 1, 0;
    wgmma.commit_group.sync.aligned;
    """
    assert count_wgmma(ptx) == (1, 1)


def test_problems_are_said_in_words():
    bad = CompileResult("k", True, False, 4, stack=8, spill_instructions=3, shared=300_000, wgmma_rs=1)
    assert bad.problems(90) == [
        "1 wgmma with the first operand in registers",
        "3 spill instructions, 8 bytes of stack",
        "300000 bytes of shared memory",
    ]
    assert CompileResult("k", True, True, 4, stack=8, spill_instructions=3).problems(90) == []
    assert CompileResult("k", True, False, 4, error="boom").problems(90) == ["does not compile: boom"]
    assert "boom" in compile_report.format_table([CompileResult("k", True, False, 4, error="boom")], 90)


def test_refuses_to_compile_interpreted_kernels(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="unset it to compile kernels"):
        compile_report.compile_report()
