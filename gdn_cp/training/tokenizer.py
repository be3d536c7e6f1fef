"""Text to token ids: bytes as they are, or a byte-pair encoding trained on the very data.

Both share one special token, the document boundary, with which every document begins and ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

BOUNDARY = "<|document|>"


class Tokenizer(Protocol):
    """What the data pipeline asks of a tokenizer; `boundary` is the id that opens and closes a document."""

    name: str
    vocab_size: int
    boundary: int

    def encode(self, documents: Sequence[bytes]) -> list[np.ndarray]:
        """Ids (int32) of each document, boundaries not included."""
        ...


class ByteTokenizer:
    """Byte b is token b; 256 is the document boundary."""

    name = "bytes"
    vocab_size = 257
    boundary = 256

    def encode(self, documents: Sequence[bytes]) -> list[np.ndarray]:
        """Ids (int32) of each document, boundaries not included."""
        return [np.frombuffer(document, dtype=np.uint8).astype(np.int32) for document in documents]


class BpeTokenizer:
    """A byte-level byte-pair encoding (needs the package `tokenizers`), kept in one JSON file."""

    name = "bpe"

    def __init__(self, model: Any) -> None:
        model.encode_special_tokens = True  # the boundary's spelling inside a document is text, not a boundary
        self._model = model
        self.vocab_size = model.get_vocab_size()
        self.boundary = model.token_to_id(BOUNDARY)

    @classmethod
    def train(cls, documents: Sequence[bytes], vocab_size: int) -> BpeTokenizer:
        """Learn at most `vocab_size` tokens (the 256 bytes and the boundary are among them) from `documents`."""
        tokenizers = _import_tokenizers()
        model = tokenizers.Tokenizer(tokenizers.models.BPE())
        model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        model.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[BOUNDARY],
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        model.train_from_iterator((_decode(document) for document in documents), trainer)
        return cls(model)

    @classmethod
    def load(cls, path: Path) -> BpeTokenizer:
        """Read what `save` wrote."""
        return cls(_import_tokenizers().Tokenizer.from_file(str(path)))

    def save(self, path: Path) -> None:
        """Write the tokenizer as one JSON file."""
        self._model.save(str(path))

    def encode(self, documents: Sequence[bytes]) -> list[np.ndarray]:
        """Ids (int32) of each document, boundaries not included."""
        encodings = self._model.encode_batch_fast([_decode(document) for document in documents])
        return [np.asarray(encoding.ids, dtype=np.int32) for encoding in encodings]


def _decode(document: bytes) -> str:
    return document.decode("utf-8", errors="replace")


def _import_tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError:
        raise ValueError(
            "tokenizer='bpe' needs the package `tokenizers`; install it or use tokenizer='bytes'"
        ) from None
    return tokenizers
