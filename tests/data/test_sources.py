"""Every kind of source is read, and what cannot be read is one sentence with the place."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from fallow.data.docstrings import questions
from fallow.data.sources import Document, Source, open_source
from fallow.errors import FallowError


def documents(path: Path | str) -> list[Document]:
    return list(open_source(str(path)).documents())


def texts(path: Path | str) -> list[str]:
    return [document.text for document in documents(path)]


def test_files_of_every_kind(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"text": text, "title": "x"}) + "\n" for text in ("one", "  ", "zwei ü"))
    for name, content in {
        "a.txt": "plain\r\ntext ü",
        "b.jsonl": lines + "\n",
        "c.md": " \n",
        "d.json.gz": lines,
        "e.py.gz": "import this",
        "f.csv": "not read",
        "g.json": "{}",
        ".h.txt": "hidden",
        "i/j.rst": "deeper",
        ".k/l.txt": "hidden",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        data = content.encode()
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert texts(tmp_path) == ["plain\r\ntext ü", "one", "zwei ü", "one", "zwei ü", "import this", "deeper"]
    assert texts(tmp_path / "f.csv") == ["not read"]
    assert documents(tmp_path / "b.jsonl")[1].where == f"{tmp_path}/b.jsonl, line 3"


def test_conversations(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": messages}))
    assert [list(document.messages) for document in documents(tmp_path / "a.jsonl")] == [messages]


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    parquet.write_table(pyarrow.table({"id": [1, 2, 3], "text": ["one", "", "zwei ü"]}), tmp_path / "a.parquet")
    parquet.write_table(pyarrow.table({"messages": [messages]}), tmp_path / "b.parquet")
    parquet.write_table(pyarrow.table({"content": ["x"], "id": [1]}), tmp_path / "c.parquet")
    parquet.write_table(pyarrow.table({"text": ["x", None]}), tmp_path / "d.parquet")
    (tmp_path / "e.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-9])
    assert texts(tmp_path / "a.parquet") == ["one", "zwei ü"]
    assert list(documents(tmp_path / "b.parquet")[0].messages) == messages
    for name, reason in {
        "c": "neither a column text nor messages: it has content, id",
        "d": "row 2: text is null",
        "e": "not a Parquet file that can be read",
    }.items():
        with pytest.raises(FallowError, match=reason) as caught:
            documents(tmp_path / f"{name}.parquet")
        assert str(tmp_path / name) in str(caught.value)


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(FallowError, match=r"a\.parquet is a Parquet file.*pip install pyarrow"):
        documents(tmp_path / "a.parquet")


def test_questions_that_docstrings_answer() -> None:
    source = """'''A module about fields.

    It has several lines.
    '''
class Field:
    "Something that lies there, fallow."
    def rest(self): "Let it lie for a whole year."
    def _inner(self): "Nobody asks what this is for."
async def bear(): "Bear grain, as much as it can."
def short(): "Too short."
def silent(): pass
"""
    assert list(questions(source, "farm.land")) == [
        ("What is the Python module farm.land for?", "A module about fields.\n\nIt has several lines."),
        ("What is the class farm.land.Field in Python?", "Something that lies there, fallow."),
        ("What does the method farm.land.Field.rest do in Python?", "Let it lie for a whole year."),
        ("What does the function farm.land.bear do in Python?", "Bear grain, as much as it can."),
    ]


def test_the_standard_library_in_conversation() -> None:
    source = open_source("python-stdlib-chat")
    whole = {document.messages[0]["content"]: document.messages[1]["content"] for document in source.documents()}
    assert len(whole) > 3000
    answer = whole["What does the function textwrap.shorten do in Python?"]
    assert answer.startswith("Collapse and truncate the given text")
    assert "What does the method json.decoder.JSONDecoder.decode do in Python?" in whole
    assert source.fingerprint() != open_source("python-stdlib").fingerprint()


def test_the_standard_library() -> None:
    source = open_source("python-stdlib")
    names = {path.name for path in source.files}
    assert {"argparse.py", "decoder.py"} <= names
    assert not any({"test", "tests", "site-packages"} & {*path.parts} for path in source.files)
    assert sum(len(document.text) for document in source.documents()) > 4_000_000


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.txt", b"good \xff bad", r"not text in UTF-8 \(byte 5\)"),
        ("a.txt", b"", "empty: it has no document with any text"),
        ("a.jsonl", b'{"text": " "}\n', "empty: it has no document with any text"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xe4"}\n', r"line 2: not UTF-8 \(byte 10 of the line\)"),
        ("a.jsonl", b'{"text": "x"}\n\n{"text"\n', "line 3: not JSON"),
        ("a.jsonl", b"[" * 100_000, "line 1: not JSON"),
        ("a.jsonl", b'{"text": "x", "n": ' + b"9" * 5000 + b"}", "line 1: not JSON"),
        ("a.jsonl", b'{"text": "x\\ud83d"}', "line 1: the text holds half of a surrogate pair .character 1"),
        ("a.jsonl", b'{"messages": [{"role": "user", "content": "\\ud83d"}]}', "line 1: .*surrogate pair"),
        ("a.jsonl", b'{"txet": "x"}', "line 1: an object with text .* or messages .* is expected"),
        ("a.jsonl", b'"text"', "line 1: an object with text"),
        ("a.jsonl", b'{"text": 3}', "line 1: text is int"),
        ("a.jsonl", b'{"text": null}', "line 1: text is null"),
        ("a.jsonl", b'{"messages": []}', "line 1: messages must be a list of objects"),
        ("a.jsonl", b'{"messages": ["hi"]}', "line 1: messages must be a list of objects"),
        ("a.jsonl", b'{"messages": [{"role": "user"}]}', "line 1: messages must be a list of objects"),
        ("a.txt.gz", b"no gzip", "is damaged"),
        ("a.txt.gz", gzip.compress(b"some text" * 99, mtime=0)[:-12], "is damaged"),
        ("a.txt.gz", gzip.compress(os.urandom(9999))[:5000] + b"x" * 5000, "is damaged|not text"),
    ],
)
def test_bad_input_is_one_sentence_with_the_place(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(FallowError, match=reason) as caught:
        documents(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_damage_within_a_compressed_file(tmp_path: Path) -> None:
    data = bytearray(gzip.compress(b"some text of a book. " * 999, compresslevel=0))
    data[5000] ^= 1
    (tmp_path / "a.txt.gz").write_bytes(data)
    with pytest.raises(FallowError, match="is damaged: CRC"):
        documents(tmp_path / "a.txt.gz")
    broken = gzip.compress(b"")[:10] + b"\xff" + zlib.compress(b"x")
    (tmp_path / "a.txt.gz").write_bytes(broken)
    with pytest.raises(FallowError, match="is damaged"):
        documents(tmp_path / "a.txt.gz")


def test_there_is_no_such_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FallowError, match=r"no text at .*nowhere.*python-stdlib"):
        open_source(str(tmp_path / "nowhere"))
    with pytest.raises(FallowError, match=r"has no file that holds text \(\.txt, "):
        open_source(str(tmp_path))
    source = Source("x", (tmp_path / "gone.txt",))
    for read in (source.fingerprint, lambda: list(source.documents())):
        with pytest.raises(FallowError, match=r"gone\.txt cannot be read: No such file"):
            read()


def test_a_dataset_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub client gives a folder of its cache, which is hidden."""
    import huggingface_hub

    folder = tmp_path / ".cache" / "snapshots"
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "train.jsonl").write_text('{"text": "one"}')
    calls: list[str] = []

    def snapshot_download(name: str, *, repo_type: str, allow_patterns: list[str]) -> str:
        assert repo_type == "dataset"
        assert "*.parquet" in allow_patterns
        calls.append(name)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    assert texts("owner/books") == ["one"]
    assert calls == ["owner/books"]
    (tmp_path / "owner").mkdir()
    shutil.copy(folder / "data" / "train.jsonl", tmp_path / "owner" / "books")
    assert texts("owner/books") == ['{"text": "one"}']  # a file of that name is meant first


def test_some_files_of_a_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    (tmp_path / "en").mkdir()
    for name in ("en/train.00", "en/train.01", "en/valid.00", "de"):  # the cache may hold more than was asked for
        (tmp_path / f"{name}.jsonl").write_text(f'{{"text": "{name}"}}')
    asked: list[list[str]] = []

    def snapshot_download(name: str, *, repo_type: str, allow_patterns: list[str]) -> str:
        asked.append([name, *allow_patterns])
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    assert texts("owner/books/en/train.0*") == ["en/train.00", "en/train.01"]
    assert asked == [["owner/books", "en/train.0*"]]
    with pytest.raises(FallowError, match=r"owner/books has no file of text that matches fr/\*"):
        open_source("owner/books/fr/*")


def test_no_network_is_one_sentence(tmp_path: Path) -> None:
    code = (
        "from fallow.data.sources import open_source; from fallow.errors import FallowError\n"
        "try: open_source('owner/books')\nexcept FallowError as error: print(error)"
    )
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("owner/books is no file or folder here, and as a dataset it could not be fetched")
    assert done.stdout.count("\n") == 1


def test_the_fingerprint_is_that_of_the_contents(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "a.txt").write_text("text")
    before = open_source(str(tmp_path / "one")).fingerprint()
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    os.utime(tmp_path / "two" / "a.txt", (0, 0))
    assert open_source(str(tmp_path / "two")).fingerprint() == before
    (tmp_path / "two" / "a.txt").rename(tmp_path / "two" / "a.jsonl")  # read another way
    assert open_source(str(tmp_path / "two")).fingerprint() != before
    (tmp_path / "one" / "a.txt").write_text("texT")
    assert open_source(str(tmp_path / "one")).fingerprint() != before
