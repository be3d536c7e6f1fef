"""Launch settings that `scripts/tune_kernels.py` measured on a kind of GPU, in place of the shipped ones: opt-in.

The environment variable GDN_CP_LAUNCHES names the file. Nothing is measured while training runs, and a setting depends
on the architecture, the dtype and the head dim alone: all ranks that read one file launch alike, whatever the lengths.

    {"entries": [{"capability": 90, "dtype": "bfloat16", "dim": 128, "kernel": "dk", "launch": [32, 4, 3]}, ...]}
"""

from __future__ import annotations

import json
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

LAUNCHES_VARIABLE = "GDN_CP_LAUNCHES"
SETTINGS = {
    "scores": ("columns", "warps", "stages", "registers"),
    "dq": ("columns", "warps", "stages", "registers"),
    "dk": ("columns", "warps", "stages", "registers"),
    "products": ("warps", "stages"),
    "solve": ("block", "warps"),
}
"""For each kernel that can be tuned what its numbers mean; the limit of registers may be left out."""

_Entries = dict[tuple[int, str, int], dict[str, tuple[int, ...]]]


def tuned_launches(capability: int, dtype: torch.dtype, dim: int) -> dict[str, tuple[int, ...]]:
    """Settings by kernel for K = V = `dim` on an architecture (90 for sm_90); empty without a file or an entry.

    Raises ValueError if the file that GDN_CP_LAUNCHES names cannot be read or holds something else.
    """
    path = os.environ.get(LAUNCHES_VARIABLE)
    if not path:
        return {}
    return _read(path).get((capability, str(dtype).removeprefix("torch."), dim), {})


@lru_cache(maxsize=4)
def _read(path: str) -> _Entries:
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        entries: _Entries = {}
        for entry in content["entries"]:
            key = (int(entry["capability"]), str(entry["dtype"]), int(entry["dim"]))
            entries.setdefault(key, {})[entry["kernel"]] = read_launch(entry)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{LAUNCHES_VARIABLE}={path!r} is no file of launch settings ({type(error).__name__}: {error}): "
            "write one with scripts/tune_kernels.py, or unset the variable"
        ) from error
    return entries


def read_launch(entry: dict[str, Any]) -> tuple[int, ...]:
    """The numbers of an entry, of a known kernel and of the right count."""
    meaning = SETTINGS[entry["kernel"]]
    launch = tuple(int(number) for number in entry["launch"])
    optional = meaning[-1] == "registers"
    if not len(meaning) - optional <= len(launch) <= len(meaning) or min(launch) < 1:
        raise ValueError(f"{entry['kernel']} takes {meaning}, all positive, got {launch}")
    return launch
