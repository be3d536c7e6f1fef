"""What the launches of all kernels share: the device that they run on, and which tensors the bulk copy engine reads."""

from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gdn_cp.kernels import configs


@pytest.mark.parametrize(("device", "entered"), [("cuda:1", ["cuda:1"]), ("cuda:0", []), ("cpu", [])])
def test_kernels_are_launched_on_the_device_of_their_tensors(device, entered, monkeypatch):
    log = []

    @contextmanager
    def enter(device):
        log.append(str(device))
        yield

    monkeypatch.setattr(configs, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", enter)
    launch = configs.launches(lambda x, y, *, z: (log.copy(), y, z))
    x: Any = SimpleNamespace(device=torch.device(device))
    assert launch(x, 1, z=2) == (entered, 1, 2)


@pytest.mark.parametrize(
    ("x", "fits"),
    [
        (torch.zeros(2, 3, 2, 64), True),
        (torch.zeros(1, 3, 5, 64)[:, :, 1:3], True),
        (torch.zeros(1, 3, 2, 96), False),
        (torch.zeros(1, 1, 2, 64).expand(1, 3, 2, 64), False),
        (torch.zeros(1, 3, 1, 64).expand(1, 3, 2, 64), False),
        (torch.zeros(1, 3, 2, 65)[..., 1:], False),
        (torch.zeros(1, 0, 2, 64), False),
    ],
    ids=["packed", "section", "dim", "one row for all", "one head for all", "unaligned", "empty"],
)
def test_what_the_bulk_copy_engine_reads(x, fits):
    half = x.new_empty(0).to(torch.bfloat16).new_zeros(x.untyped_storage().nbytes() // 4)
    assert configs.bulk_copy_fits(half.as_strided(x.shape, x.stride(), x.storage_offset())) is fits
    assert not configs.bulk_copy_fits(x)  # float32 products are not made by the tensor cores that it feeds
