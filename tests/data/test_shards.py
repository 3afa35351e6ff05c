"""Token shards: what is written is read back, and any damage is one sentence."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from fallow.data import shards
from fallow.data.shards import INDEX, ShardWriter, TokenShards
from fallow.errors import FallowError

DOCUMENTS = [list(range(7)), [3] * 20, [9], list(range(50, 90))]
TOKEN_BYTES = [b"x" * (i % 5) for i in range(100)]


def write(folder: Path, token_bytes: list[bytes] = TOKEN_BYTES, *, has_answers: bool = False) -> TokenShards:
    """Shards of ``DOCUMENTS``; every third token of a document is an answer."""
    with ShardWriter(folder, token_bytes, has_answers=has_answers) as writer:
        for document in DOCUMENTS:
            writer.begin_document(text_bytes=10)
            writer.write(document[:2], [True, False][: len(document)] if has_answers else None)
            writer.write(document[2:], [i % 3 == 0 for i in range(2, len(document))] if has_answers else None)
        writer.finish(source="test", fingerprint="f", tokenizer="t")
    return TokenShards(folder)


@pytest.mark.parametrize("shard_tokens", [5, 68, 1000])
@pytest.mark.parametrize("vocab_size", [100, 70_000])
def test_what_is_written_is_read(
    tmp_path: Path, shard_tokens: int, vocab_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "_SHARD_TOKENS", shard_tokens)
    token_bytes = [*TOKEN_BYTES, *[b"abc"] * (vocab_size - 100)]
    found = write(tmp_path / "shards", token_bytes, has_answers=True)
    tokens = [token for document in DOCUMENTS for token in document]
    assert len(found) == len(tokens) == 68
    for start, count in [(0, 68), (0, 1), (67, 1), (3, 40), (68, 0), (27, 1)]:
        part = found.read(start, count)
        assert part.dtype == np.int64
        assert part.tolist() == tokens[start : start + count]
    assert found.read_answers(7, 6).tolist() == [True, False, False, True, False, False]
    assert found.document_starts.tolist() == [0, 7, 27, 28]
    assert found.token_bytes.tolist() == [len(piece) for piece in token_bytes]
    assert (found.index.text_bytes, found.bytes_per_token) == (40, 40 / 68)
    width = 2 if vocab_size == 100 else 4
    sizes = [path.stat().st_size for path in (tmp_path / "shards").glob("tokens-*.bin")]
    assert sum(sizes) == 68 * width
    assert (len(sizes) > 1) == (shard_tokens == 5)


def test_a_token_beyond_the_vocabulary_is_refused(tmp_path: Path) -> None:
    for token in (100, -1):
        with (
            pytest.raises(FallowError, match="beyond its 100 tokens"),
            ShardWriter(tmp_path / str(token), TOKEN_BYTES, has_answers=False) as writer,
        ):
            writer.write([1, token])


@pytest.mark.parametrize(
    ("file", "at"), [("tokens-00000.bin", 20), ("answers-00000.bin", 0), ("documents.bin", 9), ("token-bytes.bin", 3)]
)
def test_a_flipped_byte_and_a_cut_file_are_found(tmp_path: Path, file: str, at: int) -> None:
    folder = tmp_path / "shards"
    write(folder, has_answers=True)
    path = folder / file
    whole = path.read_bytes()
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    with pytest.raises(FallowError, match=rf"{file} is damaged \(its content has changed\): remove its folder"):
        TokenShards(folder)
    TokenShards(folder, verify=False)
    path.write_bytes(whole[:-1])
    for verify in (True, False):
        with pytest.raises(FallowError, match=rf"{file} is damaged \(it has {len(whole) - 1} bytes where"):
            TokenShards(folder, verify=verify)
    path.unlink()
    with pytest.raises(FallowError, match=rf"{file} is damaged \(No such file"):
        TokenShards(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": 10**30},
        {"tokens": -1},
        {"tokens": "68"},
        {"tokens": 67},
        {"documents": 5},
        {"vocab_size": 1 << 40},
        {"vocab_size": 0},
        {"vocab_size": 99},
        {"text_bytes": None},
        {"has_answers": True},
        {"version": 99},
        {"files": []},
        {"files": {}},
        {"files": {"../../x": {"size": 1, "sha256": ""}}},
        {"files": {"tokens-00000.bin": 3}},
        {"source": "other"},
        {"more": 1},
    ],
)
def test_an_edited_index_is_found_even_where_it_carries_its_own_hash(tmp_path: Path, change: dict[str, object]) -> None:
    folder = tmp_path / "shards"
    write(folder)
    path = folder / INDEX
    value = json.loads(path.read_bytes()) | change
    path.write_text(json.dumps(value))
    with pytest.raises(FallowError, match="is damaged") as caught:
        TokenShards(folder)
    assert str(folder) in str(caught.value)
    if change == {"source": "other"}:
        return  # nothing is wrong with it but that it was changed
    del value["sha256"]
    value["sha256"] = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(value))
    with pytest.raises(FallowError, match="is damaged"):
        TokenShards(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 100_000, b"[]", b"{}", b'"x"', b"\xff\xfe"])
def test_an_index_that_is_none_is_one_sentence(tmp_path: Path, content: bytes) -> None:
    folder = tmp_path / "shards"
    write(folder)
    (folder / INDEX).write_bytes(content)
    with pytest.raises(FallowError, match="not an index of token shards"):
        TokenShards(folder)
    (folder / INDEX).unlink()
    with pytest.raises(FallowError, match=r"no token shards in .*index\.json cannot be read"):
        TokenShards(folder)
