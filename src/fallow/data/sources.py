"""Where text comes from: files, folders, datasets of the hub, or the standard library's own source and docstrings."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import sysconfig
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, BinaryIO

from fallow.data.docstrings import questions
from fallow.errors import FallowError
from fallow.files import decoded

STANDARD_LIBRARY = "python-stdlib"
STANDARD_LIBRARY_CHAT = "python-stdlib-chat"

_HUB_ID = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95})(?:/(.+))?")
_TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
_RECORD_SUFFIXES = (".jsonl", ".json.gz", ".parquet")  # .json alone is JSONL too, but in a folder mostly metadata
_LONGEST_LINE = 1 << 28  # bytes of a JSONL record
_NO_SOURCE = ("test", "tests", "site-packages", "dist-packages", "idlelib")  # folders of the standard library


@dataclass(frozen=True)
class Document:
    """A text, or the messages of a conversation; ``where`` names it in messages to the user."""

    where: str
    text: str = ""
    messages: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class Source:
    """Files that hold documents, in the order in which they are read. ``name`` is what the user called it; with
    ``docstrings`` they are Python modules, and documents are conversations about what these say of themselves."""

    name: str
    files: tuple[Path, ...]
    docstrings: bool = False

    def fingerprint(self) -> str:
        """SHA-256 over the kinds and the contents of the files: the same wherever these lie and when they were written.

        Raises ``FallowError`` where one cannot be read.
        """
        digest = hashlib.sha256()
        for path in self.files:
            kind = f"docstrings of {_module(path)}" if self.docstrings else _suffix(path) + path.suffix
            with _reading(path), path.open("rb") as file:
                digest.update(f"{kind} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
        return digest.hexdigest()

    def documents(self) -> Iterator[Document]:
        """Every document that has any text, file by file.

        Raises ``FallowError`` with the place where one cannot be read, and where there is none.
        """
        found = False
        for path in self.files:
            with _reading(path):
                for document in _conversations(path) if self.docstrings else _documents(path):
                    found = True
                    yield document
        if not found:
            raise FallowError(f"{self.name} is empty: it has no document with any text.")


def open_source(name: str) -> Source:
    """The source that ``name`` means: ``python-stdlib``, ``python-stdlib-chat`` (its docstrings as conversations), a
    file or folder, or a dataset id of the hub (``owner/name``).

    A folder is read with all its files of a known kind (``.txt``, ``.md``, ``.rst``, ``.py``, ``.jsonl``, ``.json.gz``,
    ``.parquet``; what is not Parquet ``.gz`` too), by name; so is a dataset, with all of its files, or with those that
    a pattern after its id matches (``allenai/c4/en/c4-train.0000*``). Raises ``FallowError`` where there is no such
    source or nothing in it.
    """
    if name == STANDARD_LIBRARY:
        return Source(name, tuple(standard_library_files()))
    if name == STANDARD_LIBRARY_CHAT:
        return Source(name, tuple(standard_library_files()), docstrings=True)
    path, pattern = Path(name).expanduser(), "*"
    if path.is_file():
        return Source(name, (path.resolve(),))
    if not path.exists():
        dataset = _HUB_ID.fullmatch(name)
        if dataset is None:
            raise FallowError(
                f"There is no text at {name}: give a file, a folder, a dataset id (owner/name), {STANDARD_LIBRARY} or "
                f"{STANDARD_LIBRARY_CHAT}."
            )
        pattern = dataset[2] or "*"
        path = _from_hub(dataset[1], pattern)
    folder = path.resolve()
    files = sorted(
        file
        for file in folder.rglob("*")
        if _is_known(part := file.relative_to(folder)) and fnmatchcase(part.as_posix(), pattern) and file.is_file()
    )
    if not files and pattern != "*":
        raise FallowError(f"The dataset {name.removesuffix(f'/{pattern}')} has no file of text that matches {pattern}.")
    if not files:
        kinds = ", ".join((*_TEXT_SUFFIXES, *_RECORD_SUFFIXES))
        raise FallowError(f"The folder {path} has no file that holds text ({kinds}): convert its files to one.")
    return Source(name, tuple(files))


def texts_in(path: Path) -> Iterator[str]:
    """The texts of a file's documents: those of the records of JSONL and Parquet, and all of any other file.

    Raises ``FallowError`` as ``Source.documents`` does, and where a document is a conversation.
    """
    for document in Source(str(path), (path,)).documents():
        if document.messages:
            raise FallowError(f"{document.where}: a text is expected here, but this is a conversation.")
        yield document.text


def standard_library_files() -> list[Path]:
    """The standard library's modules on this machine: single files by name, then those in packages; no tests."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = [*sorted(folder.glob("*.py")), *sorted(folder.glob("*/*.py"))]
    return [file for file in files if file.parent.name not in _NO_SOURCE]


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn what goes wrong with the file itself into a sentence."""
    try:
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise FallowError(f"{path} is damaged: {str(error).rstrip('.')}.") from None
    except OSError as error:
        raise FallowError(f"{path} cannot be read: {error.strerror or error}.") from error


def _is_known(path: Path) -> bool:
    """Whether a file of a folder is read, by its path in there."""
    hidden = any(part.startswith(".") for part in path.parts)
    known = (*_TEXT_SUFFIXES, *_RECORD_SUFFIXES)
    return not hidden and path.name.endswith((*known, *(f"{suffix}.gz" for suffix in known)))


def _suffix(path: Path) -> str:
    """The suffix that says what a file holds, below ``.gz``."""
    return Path(path.stem).suffix if path.suffix == ".gz" else path.suffix


def _documents(path: Path) -> Iterator[Document]:
    suffix = _suffix(path)
    if suffix == ".parquet":
        yield from _parquet(path)
        return
    with _opened(path) as file:
        if suffix in (".jsonl", ".json"):
            yield from _json_lines(path, file)
            return
        data = file.read()
    text = decoded(data, path)
    if text.strip():
        yield Document(str(path), text)


def _conversations(path: Path) -> Iterator[Document]:
    """A question and an answer about each public name of a Python module."""
    module = _module(path)
    try:
        pairs = [*questions(path.read_text(encoding="utf-8"), module)]
    except (SyntaxError, ValueError) as error:
        raise FallowError(f"{path} is not Python source ({type(error).__name__}).") from None
    for question, answer in pairs:
        messages = ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
        yield Document(f"{path}, {question!r}", messages=messages)


def _module(path: Path) -> str:
    """The name under which a module of the standard library is imported."""
    parts = path.relative_to(sysconfig.get_path("stdlib")).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def _opened(path: Path) -> BinaryIO | gzip.GzipFile:
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")


def _json_lines(path: Path, file: BinaryIO | gzip.GzipFile) -> Iterator[Document]:
    for number, line in enumerate(iter(lambda: file.readline(_LONGEST_LINE), b""), start=1):
        where = f"{path}, line {number}"
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            raise FallowError(f"{where}: not UTF-8 (byte {error.start} of the line).") from None
        if not text.strip():
            continue
        try:
            record = json.loads(text)
        except (ValueError, RecursionError):
            raise FallowError(f"{where}: not JSON; one object a line is expected.") from None
        yield from _record(where, record)


def _parquet(path: Path) -> Iterator[Document]:
    try:
        import pyarrow  # noqa: PLC0415  large, and most sources are not Parquet
        from pyarrow import parquet  # noqa: PLC0415
    except ImportError:
        raise FallowError(
            f"{path} is a Parquet file, which takes pyarrow to read: pip install pyarrow, or 'fallow[train]'."
        ) from None
    try:
        file = parquet.ParquetFile(path)
        columns = [name for name in ("text", "messages") if name in file.schema_arrow.names][:1]
        if not columns:
            names = ", ".join(file.schema_arrow.names)[:200]
            raise FallowError(f"{path} has neither a column text nor messages: it has {names}.")
        row = 0
        for batch in file.iter_batches(columns=columns):
            for record in batch.to_pylist():
                row += 1
                yield from _record(f"{path}, row {row}", record)
    except pyarrow.ArrowException as error:
        raise FallowError(f"{path} is not a Parquet file that can be read: {str(error)[:200]}.") from None


def _record(where: str, record: object) -> Iterator[Document]:
    """The document of one JSON object; none where its text is empty."""
    if not isinstance(record, dict) or not ("text" in record or "messages" in record):
        raise FallowError(f"{where}: an object with text (a string) or messages (a list) is expected.")
    if "text" in record:
        text = record["text"]
        if not isinstance(text, str):
            kind = "null" if text is None else type(text).__name__
            raise FallowError(f"{where}: text is {kind}, but a string is expected.")
        _check_unicode(where, text)
        if text.strip():
            yield Document(where, text)
        return
    messages = record["messages"]
    if not isinstance(messages, list) or not messages or not all(_is_message(message) for message in messages):
        raise FallowError(f"{where}: messages must be a list of objects, each with role and content.")
    _check_unicode(where, json.dumps(messages, ensure_ascii=False, default=str))
    yield Document(where, messages=tuple(messages))


def _check_unicode(where: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise FallowError(
            f"{where}: the text holds half of a surrogate pair (character {error.start}), which is no Unicode."
        ) from None


def _is_message(message: object) -> bool:
    return isinstance(message, dict) and isinstance(message.get("role"), str) and "content" in message


def _from_hub(name: str, pattern: str) -> Path:
    """A folder with the dataset's text files that match, fetched where they are not in the hub client's cache yet."""
    from huggingface_hub import snapshot_download  # noqa: PLC0415  slow, and most sources are on this machine

    known = [f"*{suffix}{end}" for suffix in (".txt", *_RECORD_SUFFIXES) for end in ("", ".gz")]
    patterns = known if pattern == "*" else [pattern]
    try:
        return Path(snapshot_download(name, repo_type="dataset", allow_patterns=patterns))
    except Exception as error:  # the hub client passes on whatever its HTTP library raises
        raise FallowError(
            f"{name} is no file or folder here, and as a dataset it could not be fetched from the hub "
            f"({type(error).__name__}: {' '.join(str(error).split())[:200].rstrip('.')}): check the name and the "
            "network, or download it elsewhere and pass its folder."
        ) from error
