"""Documents, tokenizers, and the stream of packs over them."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from gdn_cp.training.corpus import read_documents
from gdn_cp.training.data import Corpus, PackStream
from gdn_cp.training.tokenizer import BpeTokenizer, ByteTokenizer

TEXTS = [b"def f(x):\n    return x\n", b"import os\n", b"# caf\xc3\xa9\n" * 20, b"x = 1\n"]


def stream(seed: int = 0) -> PackStream:
    return PackStream(Corpus.build(TEXTS, ByteTokenizer()), token_budget=64, pad_multiple=8, seed=seed)


def test_standard_library_is_real_text():
    documents = read_documents()
    assert len(documents) > 200
    assert sum(map(len, documents)) > 3_000_000
    assert any(b"def wraps" in document for document in documents)  # functools
    assert all(document.strip() for document in documents)


def test_folder_takes_text_and_jsonl_and_passes_over_the_rest(tmp_path):
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.md").write_text("first")
    (tmp_path / "c.jsonl").write_text(json.dumps({"text": "third"}) + "\n\n" + json.dumps({"text": "fourth"}) + "\n")
    (tmp_path / "image.bin").write_bytes(b"\x00\xff\xfe")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / ".hidden").write_text("no")
    (tmp_path / "empty.txt").write_text("\n")
    assert read_documents(tmp_path) == [b"first", b"second", b"third", b"fourth"]
    assert read_documents(tmp_path / "c.jsonl") == [b"third", b"fourth"]
    assert read_documents(tmp_path / "b.txt") == [b"second"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bad.jsonl", b'{"text": "a"}\n{"text": \n', r"bad.jsonl:2 is not JSON"),
        ("bad.jsonl", b'["a"]\n', r'bad.jsonl:1 has no string under "text"'),
        ("bad.jsonl", b'{"text": 3}\n', r'bad.jsonl:1 has no string under "text"'),
        ("bad.txt", b"caf\xe9", "not UTF-8"),
        ("empty.txt", b"", "found no text"),
    ],
)
def test_bad_files_are_refused_by_name(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_documents(tmp_path / name)


def test_empty_folder_and_missing_path_are_refused(tmp_path):
    with pytest.raises(ValueError, match="found no text"):
        read_documents(tmp_path)
    with pytest.raises(ValueError, match="neither a file nor a folder"):
        read_documents(tmp_path / "absent")


def test_corpus_asks_for_every_byte_and_the_end():
    corpus = Corpus.build([b"ab"], ByteTokenizer())
    assert corpus.documents[0].tolist() == [256, 97, 98, 256]
    assert corpus.lengths == [3]


def test_unigram_entropy_is_that_of_the_targets():
    corpus = Corpus.build([b"aab"], ByteTokenizer())  # targets a, a, b, end
    assert math.isclose(corpus.unigram_entropy(), 1.5 * math.log(2), rel_tol=1e-12)


def test_digest_sees_text_and_boundaries():
    digests = {Corpus.build(texts, ByteTokenizer()).digest() for texts in ([b"ab", b"c"], [b"a", b"bc"], [b"ab", b"d"])}
    assert len(digests) == 3


def test_stream_continues_from_its_state_across_epochs():
    whole = stream()
    plans = [whole.next_step(3) for _ in range(10)]
    assert plans[-1].epoch >= 2
    for stop in (1, 4, 7):
        first = stream()
        for _ in range(stop):
            first.next_step(3)
        resumed = stream()
        resumed.load_state_dict(first.state_dict())
        assert [resumed.next_step(3) for _ in range(10 - stop)] == plans[stop:]


def test_every_epoch_has_every_target_once_in_another_order():
    one = stream()
    epochs = []
    for _ in range(2):
        packs = one.next_step(one.packs_per_epoch).packs
        epochs.append([piece for pack in packs for piece in pack])
    targets = sum(len(text) + 1 for text in TEXTS)
    for pieces in epochs:
        assert sum(piece.length for piece in pieces) == targets
        assert len(set(pieces)) == len(pieces)
    assert set(epochs[0]) == set(epochs[1])
    assert epochs[0] != epochs[1]


def test_seed_orders_the_stream():
    assert stream(1).next_step(4) != stream(2).next_step(4)


def test_cut_documents_are_told():
    assert "1 documents exceed the budget of 64 tokens and are cut into pieces" in stream().describe()


def test_byte_pairs_give_the_text_back(tmp_path):
    pytest.importorskip("tokenizers")
    documents = [text * 30 for text in TEXTS] + [b"a <|document|> inside"]
    trained = BpeTokenizer.train(documents, vocab_size=300)
    trained.save(tmp_path / "tokenizer.json")
    loaded = BpeTokenizer.load(tmp_path / "tokenizer.json")
    assert trained.vocab_size == loaded.vocab_size <= 300
    for document, ids, again in zip(documents, trained.encode(documents), loaded.encode(documents), strict=True):
        np.testing.assert_array_equal(ids, again)
        assert loaded._model.decode(ids.tolist(), skip_special_tokens=False).encode() == document
        assert loaded.boundary not in ids  # a boundary's spelling inside a text is text
        assert len(ids) < len(document)
