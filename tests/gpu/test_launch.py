"""Direct launches on a GPU: the result that Triton's own launch gives, in every class and again and again."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

from gdn_cp import launch
from gdn_cp.launch import run_kernel

pytestmark = pytest.mark.gpu


@triton.jit
def affine_kernel(x, y, out, n, stride, scale, BLOCK: tl.constexpr, OFFSET: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i * stride, mask=i < n, other=0.0) * scale + OFFSET
    if y is not None:
        value += tl.load(y + i, mask=i < n, other=0.0)
    tl.store(out + i, value, mask=i < n)


@triton.jit
def copy_kernel(source, target, n, R: tl.constexpr, C: tl.constexpr):
    i = tl.program_id(0) * R
    if i < n:
        target.store([i, 0], source.load([i, 0]))


def affine(x: Tensor, y: Tensor | None, n: int, stride: int, scale: float, offset: int = 0) -> Tensor:
    out = torch.zeros(n, dtype=x.dtype, device="cuda")
    run_kernel(affine_kernel, -(-n // 64), x, y, out, n, stride, scale, BLOCK=64, OFFSET=offset, num_warps=2)
    return out


def test_every_class_gets_its_own_kernel():
    x = torch.randint(-99, 99, (4096,), device="cuda").float()
    y = torch.randint(-99, 99, (4096,), device="cuda").float()
    for dtype in (torch.float32, torch.bfloat16):
        a, b = x.to(dtype), y.to(dtype)
        for _ in range(2):
            for skip in (0, 1, 8, 3):
                for n, stride in ((17, 1), (64, 2), (1, 16), (100, 32), (250, 5)):
                    for other in (None, b[skip:]):
                        for offset in (0, 3):
                            expected = a[skip:][: n * stride : stride] * 2.0 + offset
                            expected = expected if other is None else expected + other[:n]
                            assert torch.equal(affine(a[skip:], other, n, stride, 2.0, offset), expected)


def test_parameters_and_wide_numbers():
    x = torch.nn.Parameter(torch.arange(64.0, device="cuda"))
    for scale in (1.0, 0.5, 1.0):
        assert torch.equal(affine(x, None, 64, 1, scale), x.detach() * scale)
    one = torch.full((1,), 7.0, device="cuda")
    for stride in (2**31 + 16, 3, 2**31 + 16):  # of a single element: nothing is read there
        assert affine(one, None, 1, stride, 1.0).tolist() == [7.0]


def test_descriptors_follow_their_tensors():
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("descriptors made on the host need sm_90")
    for seed in range(4):
        torch.manual_seed(seed)
        for rows, columns in ((32, 64), (48, 64), (32, 32)):
            x = torch.randn(rows, columns, device="cuda").bfloat16()
            y = torch.zeros_like(x)
            made = [TensorDescriptor(t, [rows, columns], [columns, 1], [16, columns]) for t in (x, y)]
            run_kernel(copy_kernel, rows // 16, *made, rows, R=16, C=columns)
            assert torch.equal(x, y)


def test_hooks_see_launches_and_streams_are_followed(monkeypatch):
    x = torch.arange(64.0, device="cuda")
    affine(x, None, 64, 1, 1.0)
    with monkeypatch.context() as patch:
        seen = []
        patch.setattr(knobs.runtime, "launch_enter_hook", seen.append)
        affine(x, None, 64, 1, 1.0)
    assert len(seen) == 1
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # on a stream of its own: a launch elsewhere would not be captured
        out = affine(x, None, 64, 1, 3.0)
    x.fill_(2.0)
    graph.replay()
    torch.cuda.synchronize()
    assert out.tolist() == [6.0] * 64


def test_direct_launches_are_what_runs_here():
    x = torch.arange(64.0, device="cuda")
    affine(x, None, 64, 1, 1.0)
    assert launch._direct
    assert launch._classes[id(affine_kernel)][1]
