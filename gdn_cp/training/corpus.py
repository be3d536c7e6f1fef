"""Where the training text comes from: documents of real text as bytes, read once and in a fixed order.

The default needs no download: the Python standard library's own sources (about 600 files, 10 MB). `--data PATH` takes a
text file, a JSONL file of {"text": ...}, or a folder of both.
"""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

JSONL_SUFFIXES = (".jsonl", ".ndjson")
# Not the library proper: installed packages, tests (missing from stripped installations), and two programs.
_SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"})
# One generated file of help texts, ten times the size of the next one; it would be 7 % of all text.
_SKIPPED_FILES = frozenset({"pydoc_data/topics.py"})


def read_documents(path: Path | None = None) -> list[bytes]:
    """The documents of `path` as UTF-8 bytes, or the standard library's sources where it is None.

    A file is a document; a line of a JSONL file is one, too. Files come in the order of their relative names, so that
    every rank and every run sees the same list. Empty documents are left out. Raises ValueError where there is no text
    at all, where a JSONL line is no JSON object with a string under "text", and where a named file is not UTF-8 text.
    Inside a folder, hidden files and files that are not UTF-8 text (images, archives) are passed over.
    """
    if path is None:
        documents = [file.read_bytes() for file in _stdlib_files()]
        source = "the Python standard library"
    else:
        path = Path(path)
        documents = list(_documents_under(path))
        source = str(path)
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise ValueError(
            f"data: found no text in {source}; give a folder of UTF-8 text or JSONL files, or one such file"
        )
    return documents


def _stdlib_files() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for file in sorted(root.rglob("*.py")):
        relative = file.relative_to(root)
        if _SKIPPED_FOLDERS.isdisjoint(relative.parts) and relative.as_posix() not in _SKIPPED_FILES:
            files.append(file)
    return files


def _documents_under(path: Path) -> Iterator[bytes]:
    if path.is_file():
        yield from _read_jsonl(path) if path.suffix in JSONL_SUFFIXES else [_read_text(path)]
        return
    if not path.is_dir():
        raise ValueError(f"data={str(path)!r} is neither a file nor a folder; give a path that exists on every node")
    for file in sorted(path.rglob("*")):
        if not file.is_file() or any(part.startswith(".") for part in file.relative_to(path).parts):
            continue
        if file.suffix in JSONL_SUFFIXES:
            yield from _read_jsonl(file)
        else:
            data = file.read_bytes()
            if _is_text(data):
                yield data


def _is_text(data: bytes) -> bool:
    if b"\0" in data:
        return False
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _read_text(path: Path) -> bytes:
    data = path.read_bytes()
    if not _is_text(data):
        raise ValueError(f"data={str(path)!r} is not UTF-8 text; convert it to UTF-8 or JSONL")
    return data


def _read_jsonl(path: Path) -> Iterator[bytes]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ValueError(f"data: {path}:{number} is not JSON ({error}); each line must be one object") from None
            if not isinstance(record, dict) or not isinstance(record.get("text"), str):
                raise ValueError(
                    f'data: {path}:{number} has no string under "text"; each line must be {{"text": "..."}}'
                )
            yield record["text"].encode("utf-8")
