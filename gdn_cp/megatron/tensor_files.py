"""Model folders of safetensors files: read lazily, written in parts of limited size with Hugging Face's index.

A folder holds `model.safetensors`, or `model-00001-of-00003.safetensors` and so on with
`model.safetensors.index.json`, which says in which file each tensor is.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

_INDEX = "model.safetensors.index.json"


class TensorFolder(Mapping[str, Tensor]):
    """The tensors of a folder's safetensors files by name, each read from the disk when it is asked for.

    Raises ValueError for a folder without them, or with a file missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        from safetensors import SafetensorError, safe_open

        index = folder / _INDEX
        if index.is_file():
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        else:
            names = sorted(path.name for path in folder.glob("*.safetensors"))
        if not names:
            raise ValueError(f"{folder}: holds no safetensors files")
        self._home: dict[str, Any] = {}
        for name in names:
            try:
                file: Any = safe_open(str(folder / name), framework="pt")
            except (OSError, SafetensorError) as error:
                raise ValueError(f"{folder / name}: cannot be read: {error}") from None
            self._home.update(dict.fromkeys(file.keys(), file))

    def __getitem__(self, name: str) -> Tensor:
        return self._home[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._home)

    def __len__(self) -> int:
        return len(self._home)


def write_tensors(tensors: Iterable[tuple[str, Tensor]], folder: Path, *, max_bytes: int = 4 * 2**30) -> None:
    """Write tensors, as they come, to safetensors files of at most `max_bytes` each (a larger tensor has its own).

    The files get their names, and the index is written, when all are there. At most one file's tensors are in memory.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    part: dict[str, Tensor] = {}
    parts: list[list[str]] = []
    size = total = 0

    def flush() -> None:
        save_file(part, str(_partial(folder, len(parts))), metadata={"format": "pt"})
        parts.append(list(part))
        part.clear()

    for name, tensor in tensors:
        if part and size + tensor.nbytes > max_bytes:
            flush()
            size = 0
        part[name] = tensor.detach().cpu().contiguous()
        size, total = size + tensor.nbytes, total + tensor.nbytes
    flush()
    names = [f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors" for i in range(len(parts))]
    if len(parts) == 1:
        names = ["model.safetensors"]
    else:
        homes = {tensor: name for name, held in zip(names, parts, strict=True) for tensor in held}
        index = {"metadata": {"total_size": total}, "weight_map": homes}
        (folder / _INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")
    for i, name in enumerate(names):
        _partial(folder, i).replace(folder / name)


def _partial(folder: Path, index: int) -> Path:
    return folder / f".part-{index:05d}.partial"
