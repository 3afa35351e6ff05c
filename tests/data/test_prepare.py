"""Shards are made once, as a whole or not at all, and hold exactly the tokens of the text."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import tokenizers
from texts import text_of
from tokenizers import decoders, models, normalizers, trainers

from fallow.data import prepare as module
from fallow.data.prepare import prepare, prepare_split
from fallow.data.shards import TokenShards
from fallow.data.sources import Source, open_source
from fallow.data.tokenizers import save_tokenizer
from fallow.errors import FallowError
from fallow.models.tokenizer import Tokenizer

# Prepares argv[1] with the tokenizer in argv[2] into argv[3]; ``{before}`` runs first.
PROCESS = """
import sys, time, resource
from pathlib import Path
from fallow.data.prepare import prepare
from fallow.data.sources import open_source
from fallow.errors import FallowError
from fallow.models.tokenizer import load_tokenizer
def progress(what, done, total): pass
{before}
source, tokenizer = open_source(sys.argv[1]), load_tokenizer(sys.argv[2])
try:
    print(len(prepare(source, tokenizer, folder=Path(sys.argv[3]), progress=progress)))
except FallowError as error:
    print(error)
"""


@pytest.fixture
def saved(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    save_tokenizer(tokenizer, folder)
    return folder


@pytest.fixture
def large(tmp_path: Path) -> Source:
    """A source of several pieces: some 500 KB."""
    path = tmp_path / "large.txt"
    path.write_text(text_of(1, 20_000) * 6, encoding="utf-8")
    return open_source(str(path))


def in_process(source: Source, saved: Path, root: Path, before: str = "") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROCESS.format(before=before), source.name, str(saved), str(root)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def documents_of(shards: TokenShards) -> list[list[int]]:
    starts = [*shards.document_starts.tolist(), len(shards)]
    return [shards.read(start, end - start).tolist() for start, end in pairwise(starts)]


def sentencepiece() -> Tokenizer:
    """As Llama 2 has it: every text gets one more space in front, so a text cannot be cut."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=["<s>", "</s>"], show_progress=False)
    backend.train_from_iterator(text_of(0, 2000).split(), trainer)
    return Tokenizer(json.loads(backend.to_str()), bos_token_id=0, eos_token_ids=[1], add_bos_token=True)


@pytest.mark.parametrize("kind", ["trained", "smollm2", "sentencepiece"])
def test_the_tokens_are_those_of_the_whole_texts(
    kind: str,
    corpus: Source,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_PIECE", 50)
    monkeypatch.setattr(module, "_PIECES_AT_ONCE", 7)
    makers: dict[str, Callable[[], Tokenizer]] = {
        "trained": lambda: request.getfixturevalue("tokenizer"),
        "smollm2": lambda: request.getfixturevalue("smollm2"),
        "sentencepiece": sentencepiece,
    }
    made = makers[kind]()
    before, after = {"trained": ([0], []), "smollm2": ([], [2]), "sentencepiece": ([0], [1])}[kind]
    shards = prepare(corpus, made, folder=tmp_path)
    texts = [document.text for document in corpus.documents()]
    expected = [[*before, *made.encode(text, add_special_tokens=False, allow_special=False), *after] for text in texts]
    assert documents_of(shards) == expected
    assert shards.index.text_bytes == sum(len(text.encode()) for text in texts)
    assert shards.index.documents == 40
    assert shards.token_bytes.tolist() == [len(piece) for piece in made.token_bytes]


def test_real_books_and_code_in_pieces(smollm2: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PIECE", 500)
    import argparse
    import textwrap

    for i, file in enumerate((argparse.__file__, textwrap.__file__)):
        text = Path(file).read_text(encoding="utf-8")
        (tmp_path / f"{i}.txt").write_text(text, encoding="utf-8")
        source = open_source(str(tmp_path / f"{i}.txt"))
        tokens = prepare(source, smollm2, folder=tmp_path / "corpora").read(0, 500).tolist()
        assert tokens == smollm2.encode(text, add_special_tokens=False)[:500]


def test_special_tokens_in_a_text_are_plain_characters(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one <|endoftext|> two")
    tokens = prepare(open_source(str(tmp_path / "a.txt")), tokenizer, folder=tmp_path / "corpora")
    ids = tokens.read(0, len(tokens)).tolist()
    assert ids.count(0) == 1
    assert tokenizer.decode(ids) == "one <|endoftext|> two"


def test_a_corpus_is_made_once_for_each_text_and_tokenizer(
    corpus: Source, tokenizer: Tokenizer, smollm2: Tokenizer, tmp_path: Path
) -> None:
    said: list[tuple[str, int, int | None]] = []
    root = tmp_path / "corpora"
    first = prepare(corpus, tokenizer, folder=root, progress=lambda *step: said.append(step))
    tokenizing = [step for step in said if step[0].startswith("tokenizing")]
    assert tokenizing[-1][1] == tokenizing[-1][2] == first.index.text_bytes
    said.clear()
    for source in (corpus, open_source(str(copied(corpus, tmp_path / "elsewhere")))):
        again = prepare(source, tokenizer, folder=root, progress=lambda *step: said.append(step))
        assert again.folder == first.folder
        assert again.index == first.index
    assert said == []
    assert prepare(corpus, smollm2, folder=root).folder != first.folder
    (tmp_path / "elsewhere" / "00.txt").write_text("another text")
    assert prepare(open_source(str(tmp_path / "elsewhere")), tokenizer, folder=root).folder != first.folder
    assert len([path for path in root.iterdir() if path.is_dir()]) == 3


def copied(source: Source, folder: Path) -> Path:
    folder.mkdir()
    for path in source.files:
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_the_store_is_where_corpora_lie(
    corpus: Source, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FALLOW_HOME", str(tmp_path / "home"))
    assert prepare(corpus, tokenizer).folder.parents[1] == tmp_path / "home" / "corpora"


def test_damage_is_found_when_shards_are_used_again(corpus: Source, tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = prepare(corpus, tokenizer, folder=tmp_path).folder / "tokens-00000.bin"
    data = bytearray(path.read_bytes())
    data[-1] ^= 0x80
    path.write_bytes(data)
    with pytest.raises(FallowError, match=r"tokens-00000\.bin is damaged .*: remove its folder, and it is made again"):
        prepare(corpus, tokenizer, folder=tmp_path)
    shutil.rmtree(path.parent)
    assert prepare(corpus, tokenizer, folder=tmp_path).folder == path.parent


def test_nothing_is_taken_for_complete_after_sigkill(
    large: Source, tokenizer: Tokenizer, saved: Path, tmp_path: Path
) -> None:
    stuck = (
        "from fallow.data import prepare as module; module._PIECES_AT_ONCE = 4\n"
        "def progress(what, done, total):\n"
        "    if what.startswith('tokenizing'): print('stuck', done > 0, flush=True); time.sleep(60)"
    )
    root = tmp_path / "corpora"
    process = in_process(large, saved, root, stuck)
    assert process.stdout is not None
    assert process.stdout.readline() == "stuck True\n"
    process.kill()
    process.communicate(timeout=30)
    (partial,) = root.glob(".*.partial")
    assert list(partial.glob("*/tokens-*.bin"))
    assert not [path for path in root.iterdir() if path.is_dir() and path != partial]
    shards = prepare(large, tokenizer, folder=root)
    assert not partial.exists()
    assert tokenizer.decode(shards.read(0, len(shards)).tolist()) == next(large.documents()).text


def test_an_interruption_leaves_nothing_behind(corpus: Source, tokenizer: Tokenizer, tmp_path: Path) -> None:
    def interrupt(what: str, done: int, total: int | None) -> None:
        if what.startswith("tokenizing"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(corpus, tokenizer, folder=tmp_path, progress=interrupt)
    assert [name for name in names(tmp_path) if not name.endswith(".lock")] == []
    assert prepare(corpus, tokenizer, folder=tmp_path).index.documents == 40


def test_two_processes_at_once_make_it_once(large: Source, saved: Path, tmp_path: Path) -> None:
    tell = "def progress(what, done, total): print(what, file=sys.stderr)"
    processes = [in_process(large, saved, tmp_path / "corpora", tell) for _ in range(2)]
    answers = [process.communicate(timeout=60) for process in processes]
    assert len({output for output, _ in answers}) == 1
    assert answers[0][0].strip().isdecimal()
    assert sorted("tokenizing" in errors for _, errors in answers) == [False, True]


def test_a_full_disk_is_one_sentence_and_nothing_is_lost(
    corpus: Source, large: Source, tokenizer: Tokenizer, saved: Path, tmp_path: Path
) -> None:
    root = tmp_path / "corpora"
    there = prepare(corpus, tokenizer, folder=root)
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))"  # a write beyond fails as on a full disk
    output, errors = in_process(large, saved, root, limit).communicate(timeout=60)
    assert errors == ""
    assert output.startswith(f"The token shards of {large.name} cannot be written to {root}: File too large; free some")
    assert output.count("\n") == 1
    assert [path.name for path in root.iterdir() if path.is_dir()] == [there.folder.parent.name]
    assert prepare(corpus, tokenizer, folder=root).index == there.index


def test_a_folder_that_cannot_be_written_is_one_sentence(corpus: Source, tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FallowError, match=r"cannot be written to .*set FALLOW_HOME to another folder"):
        prepare(corpus, tokenizer, folder=tmp_path / "file" / "corpora")


def test_a_bad_source_leaves_nothing_behind(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    root = tmp_path / "corpora"
    conversation = json.dumps({"messages": [{"role": "user", "content": "Hi"}]})
    for content, reason in {
        "": "is empty",
        '{"text": "x"}\n' + conversation: "line 2: texts and conversations are mixed",
        conversation + '\n{"text": "x"}': "line 2: texts and conversations are mixed",
        conversation: "line 1: a conversation is written by a chat template",
    }.items():
        path.write_text(content)
        with pytest.raises(FallowError, match=reason):
            prepare(open_source(str(path)), tokenizer, folder=root)
    assert {path.suffix for path in root.iterdir()} == {".lock"}


def test_conversations_become_shards_with_answers(smollm2: Tokenizer, tmp_path: Path) -> None:
    lines = []
    for i in range(3):
        question = {"role": "user", "content": f"What is {i}?"}
        lines.append(json.dumps({"messages": [question, {"role": "assistant", "content": f"It is {i}."}]}))
    (tmp_path / "chat.jsonl").write_text("\n".join(lines))
    shards = prepare(open_source(str(tmp_path / "chat.jsonl")), smollm2, folder=tmp_path / "corpora")
    answers = shards.read_answers(0, len(shards))
    said = smollm2.decode(shards.read(0, len(shards))[answers].tolist(), skip_special_tokens=False)
    assert said == "It is 0.<|im_end|>It is 1.<|im_end|>It is 2.<|im_end|>"
    assert shards.index.documents == 3


def test_a_split_is_two_corpora(corpus: Source, tokenizer: Tokenizer, tmp_path: Path) -> None:
    whole = prepare(corpus, tokenizer, folder=tmp_path)
    train, valid = prepare_split(corpus, tokenizer, 0.1, folder=tmp_path)
    assert sorted([*documents_of(train), *documents_of(valid)]) == sorted(documents_of(whole))
    assert len(train) + len(valid) == len(whole)
    assert train.index.text_bytes + valid.index.text_bytes == whole.index.text_bytes
    assert 0.1 <= valid.index.text_bytes / whole.index.text_bytes < 0.2
    assert valid.index.source == f"{corpus.name}, validation"
    again = prepare_split(corpus, tokenizer, 0.1, folder=tmp_path)
    assert [part.index for part in again] == [train.index, valid.index]
    assert prepare_split(corpus, tokenizer, 0.2, folder=tmp_path)[1].index != valid.index


def test_the_split_is_of_the_text_whatever_the_tokenizer(
    corpus: Source, tokenizer: Tokenizer, smollm2: Tokenizer, tmp_path: Path
) -> None:
    parts = [prepare_split(corpus, made, 0.1, folder=tmp_path)[1] for made in (tokenizer, smollm2)]
    texts = [
        made.decode(part.read(0, len(part)).tolist()) for made, part in zip((tokenizer, smollm2), parts, strict=True)
    ]
    assert texts[0] == texts[1]


def test_one_document_is_cut(tokenizer: Tokenizer, tmp_path: Path) -> None:
    text = text_of(5, 3000)
    (tmp_path / "one.txt").write_text(text, encoding="utf-8")
    train, valid = prepare_split(open_source(str(tmp_path / "one.txt")), tokenizer, 0.1, folder=tmp_path / "corpora")
    read = [tokenizer.decode(part.read(0, len(part)).tolist()) for part in (train, valid)]
    assert "".join(read) == text
    assert 0.07 < len(read[1]) / len(text) <= 0.1
    assert (train.index.documents, valid.index.documents) == (1, 1)
