"""What every test shares: quiet threads, poisoned memory, settled examples, and one way to run on several ranks."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # several ranks and xdist workers share few cores
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # megatron-core compiles at import; tests need none of it

import pytest
import torch
from hypothesis import settings

from tests.ranks import preload_megatron
from tests.ranks import run_ranks as _run_ranks

# Without a GPU the same kernel tests run under Triton's interpreter, which must be chosen before any kernel is defined.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The same examples on every run, so that a test turns red only by a change; GDN_CP_EXPLORE=1 draws new ones.
settings.register_profile("gdn_cp", derandomize=os.environ.get("GDN_CP_EXPLORE") != "1", deadline=None)
settings.load_profile("gdn_cp")

torch.set_num_threads(1)
# Fills torch.empty with NaN, so that an element that nobody wrote is seen.
torch.use_deterministic_algorithms(True, warn_only=True)
torch.utils.deterministic.fill_uninitialized_memory = True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip GPU tests, saying why, where the GPUs that they need are absent; prepare for Megatron where it is tested."""
    if any("megatron" in path.read_text(encoding="utf-8") for path in {item.path for item in items}):
        preload_megatron()
    available = torch.cuda.device_count()
    for item in items:
        several = item.get_closest_marker("multi_gpu")
        needed = (several.args or (2,))[0] if several else 1 if item.get_closest_marker("gpu") else 0
        if needed > available:
            item.add_marker(pytest.mark.skip(reason=f"needs {needed} NVIDIA GPU(s), this machine has {available}"))


@pytest.fixture
def run_ranks():
    """The one way to test on several ranks: see `tests.ranks.run_ranks`."""
    return _run_ranks
