"""A corpus as token ids in files that are mapped into memory.

A folder holds ``tokens-00000.bin`` and so on (uint16 where the vocabulary allows, else uint32), for conversations
``answers-00000.bin`` beside each (uint8: 1 where the token is part of an answer), ``documents.bin`` (int64: where each
document begins), ``token-bytes.bin`` (uint32: for each id of the vocabulary, the bytes that it adds to a text), and
``index.json``, written last, which has the size and the SHA-256 of each of them and of itself. All numbers are
little-endian.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from fallow.errors import FallowError
from fallow.files import sync_folder, write_json

INDEX = "index.json"
VERSION = 1
_DOCUMENTS = "documents.bin"
_TOKEN_BYTES = "token-bytes.bin"
_SHARD_TOKENS = 1 << 27  # a shard is closed when it has as many
_SMALL_VOCABULARY = 1 << 16
_DOCUMENT_DTYPE = np.dtype("<i8")
_TOKEN_BYTES_DTYPE = np.dtype("<u4")

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ShardIndex:
    """What ``index.json`` says. ``text_bytes`` are the UTF-8 bytes that the tokens stand for; ``files`` maps names to
    ``{"size", "sha256"}``."""

    source: str
    fingerprint: str
    tokenizer: str
    vocab_size: int
    tokens: int
    documents: int
    text_bytes: int
    has_answers: bool
    files: dict[str, dict[str, Any]]
    version: int = VERSION

    @property
    def digest(self) -> str:
        """SHA-256 of the index, and with it of all that it describes."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


class TokenShards:
    """The tokens of a corpus, one after the other. ``len()`` is their number.

    ``document_starts`` int64 ``[documents]`` are the positions of the documents' first tokens, ``token_bytes`` uint32
    ``[vocab_size]`` the bytes that each id adds to a text: 0 for special tokens.
    """

    def __init__(self, folder: Path, *, verify: bool = True) -> None:
        """Opens ``folder``. Raises ``FallowError`` where a file is missing, has another size, or, with ``verify``,
        another SHA-256 than the index says."""
        self.folder = folder
        self.index = _read_index(folder)
        for name, record in self.index.files.items():
            _check_file(folder / name, record, verify=verify)
        self._tokens = self._mapped_all("tokens", _dtype(self.index.vocab_size))
        self._answers = self._mapped_all("answers", np.dtype(np.uint8)) if self.index.has_answers else []
        self.document_starts: Ints = self._mapped(_DOCUMENTS, _DOCUMENT_DTYPE)
        self.token_bytes: npt.NDArray[np.uint32] = self._mapped(_TOKEN_BYTES, _TOKEN_BYTES_DTYPE)
        sizes = [*map(len, self._tokens)]
        counts = (sum(sizes), len(self.document_starts), len(self.token_bytes))
        lacks_answers = self.index.has_answers and [*map(len, self._answers)] != sizes
        if lacks_answers or counts != (self.index.tokens, self.index.documents, self.index.vocab_size):
            raise _damaged(folder / INDEX, "its counts are not those of the files")

    def __len__(self) -> int:
        return self.index.tokens

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text for each token, those around documents included, on average."""
        return self.index.text_bytes / self.index.tokens

    def read(self, start: int, count: int) -> Ints:
        """Token ids ``start`` to ``start + count``, int64 ``[count]``."""
        return _slice(self._tokens, start, count)

    def read_answers(self, start: int, count: int) -> npt.NDArray[np.bool_]:
        """Which of these tokens belong to an answer, ``[count]``; for conversations only."""
        return _slice(self._answers, start, count).astype(np.bool_)

    def _mapped_all(self, kind: str, dtype: np.dtype[Any]) -> list[npt.NDArray[Any]]:
        names = sorted(name for name in self.index.files if name.startswith(f"{kind}-"))
        return [self._mapped(name, dtype) for name in names]

    def _mapped(self, name: str, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        try:
            return np.memmap(self.folder / name, dtype, mode="r")
        except ValueError as error:  # empty, or not a whole number of elements
            raise _damaged(self.folder / name, "its size is not one of a file of its kind") from error
        except OSError as error:
            raise _damaged(self.folder / name, error.strerror or "it cannot be read") from error


class ShardWriter:
    """Writes a folder of shards: ``begin_document``, then ``write`` as often as needed, for each document; then
    ``finish``. A context manager that closes its files.

    Raises ``FallowError`` where a token is not below the vocabulary's size, and ``OSError`` as the disk does.
    """

    def __init__(self, folder: Path, token_bytes: Sequence[bytes], *, has_answers: bool) -> None:
        """``token_bytes`` are those of the ``Tokenizer``."""
        folder.mkdir()
        self._folder = folder
        self._vocab_size = len(token_bytes)
        self._has_answers = has_answers
        self._starts: list[int] = []
        self._shard = 0
        self._shard_end = _SHARD_TOKENS
        self._files: dict[str, dict[str, Any]] = {}
        self._open: dict[str, _HashedFile] = {}
        self._tokens = 0
        self._text_bytes = 0
        self._write_array(_TOKEN_BYTES, np.fromiter(map(len, token_bytes), _TOKEN_BYTES_DTYPE, self._vocab_size))

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for file in self._open.values():
            with suppress(OSError):  # of a full disk: what is left in the buffer
                file.file.close()

    def begin_document(self, text_bytes: int) -> None:
        """The next document begins, whose text has as many bytes in UTF-8."""
        self._starts.append(self._tokens)
        self._text_bytes += text_bytes

    def write(self, tokens: npt.ArrayLike, answers: npt.ArrayLike | None = None) -> None:
        """More ids of the document, ``[count]``, and for conversations which of them belong to an answer."""
        ids = np.asarray(tokens, np.int64)
        if not ids.size:
            return
        if ids.min() < 0 or ids.max() >= self._vocab_size:
            raise FallowError(f"The tokenizer gave the token {ids.max()}, beyond its {self._vocab_size} tokens.")
        self._append("tokens", ids.astype(_dtype(self._vocab_size)))
        if self._has_answers:
            self._append("answers", np.asarray(answers, np.uint8))
        self._tokens += len(ids)
        if self._tokens >= self._shard_end:
            self._close_shard()

    def finish(self, *, source: str, fingerprint: str, tokenizer: str) -> None:
        """Write what is left, and the index."""
        self._close_shard()
        self._write_array(_DOCUMENTS, np.array(self._starts, _DOCUMENT_DTYPE))
        index = ShardIndex(
            source=source,
            fingerprint=fingerprint,
            tokenizer=tokenizer,
            vocab_size=self._vocab_size,
            tokens=self._tokens,
            documents=len(self._starts),
            text_bytes=self._text_bytes,
            has_answers=self._has_answers,
            files=self._files,
        )
        write_json(self._folder / INDEX, {**asdict(index), "sha256": index.digest})
        sync_folder(self._folder)

    def _append(self, kind: str, values: npt.NDArray[Any]) -> None:
        name = f"{kind}-{self._shard:05d}.bin"
        if name not in self._open:
            self._open[name] = _HashedFile((self._folder / name).open("wb"))
        self._open[name].write(values.tobytes())

    def _write_array(self, name: str, values: npt.NDArray[Any]) -> None:
        with (self._folder / name).open("wb") as file:
            hashed = _HashedFile(file)
            hashed.write(values.tobytes())
            self._files[name] = hashed.close()

    def _close_shard(self) -> None:
        for name, file in self._open.items():
            self._files[name] = file.close()
        self._open.clear()
        self._shard += 1
        self._shard_end = self._tokens + _SHARD_TOKENS


class _HashedFile:
    """A file and the SHA-256 of what was written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self._digest = hashlib.sha256()
        self._size = 0

    def write(self, data: bytes) -> None:
        self.file.write(data)
        self._digest.update(data)
        self._size += len(data)

    def close(self) -> dict[str, Any]:
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        return {"size": self._size, "sha256": self._digest.hexdigest()}


def _dtype(vocab_size: int) -> np.dtype[Any]:
    return np.dtype("<u2" if vocab_size <= _SMALL_VOCABULARY else "<u4")


def _slice(parts: Iterable[npt.NDArray[Any]], start: int, count: int) -> Ints:
    out = np.empty(count, np.int64)
    done, offset = 0, 0
    for part in parts:
        first = start + done - offset
        if done < count and first < len(part):
            taken = part[first : first + count - done]
            out[done : done + len(taken)] = taken
            done += len(taken)
        offset += len(part)
    assert done == count, "beyond the last token"
    return out


def _read_index(folder: Path) -> ShardIndex:
    path = folder / INDEX
    try:
        value = json.loads(path.read_bytes())
        digest = value.pop("sha256", None)
        index = ShardIndex(**value)
    except OSError as error:
        raise FallowError(
            f"There are no token shards in {folder}: {INDEX} cannot be read ({error.strerror}); prepare the text again."
        ) from error
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(path, "it is not an index of token shards") from error
    if index.version != VERSION:
        raise _damaged(path, f"it has version {index.version!r:.20}, but this fallow reads version {VERSION}")
    if index.digest != digest or not _is_sound(index):
        raise _damaged(path, "its content has changed")
    return index


def _is_sound(index: ShardIndex) -> bool:
    counts = (index.vocab_size, index.tokens, index.documents, index.text_bytes)
    return (
        all(type(count) is int and count >= 0 for count in counts)
        and isinstance(index.files, dict)
        and {_DOCUMENTS, _TOKEN_BYTES} <= index.files.keys()
        and all(
            Path(name).name == name and isinstance(record, dict) and {"size", "sha256"} <= record.keys()
            for name, record in index.files.items()
        )
    )


def _check_file(path: Path, record: dict[str, Any], *, verify: bool) -> None:
    try:
        size = path.stat().st_size
        digest = _sha256(path) if verify and size == record["size"] else None
    except OSError as error:
        raise _damaged(path, error.strerror or "it cannot be read") from error
    if size != record["size"]:
        raise _damaged(path, f"it has {size} bytes where {record['size']} are expected")
    if digest is not None and digest != record["sha256"]:
        raise _damaged(path, "its content has changed")


def _damaged(path: Path, reason: str) -> FallowError:
    return FallowError(f"The token shard {path} is damaged ({reason}): remove its folder, and it is made again.")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
