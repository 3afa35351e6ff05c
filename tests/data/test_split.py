"""Which documents are for validation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fallow.data.sources import Document, Source, open_source
from fallow.data.split import TRAIN, VALID, Split, survey
from fallow.errors import FallowError


def source_of(folder: Path, texts: list[str], *, name: str = "texts.jsonl") -> Source:
    path = folder / name
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return open_source(str(path))


def parts_of(source: Source, share: float) -> dict[str, list[str]]:
    split = Split.of(survey(source), share)
    parts: dict[str, list[str]] = {TRAIN: [], VALID: []}
    for document in source.documents():
        for part, piece in split.parts(document):
            parts[part].append(piece.text)
    return parts


def test_a_survey_counts_what_there_is(tmp_path: Path) -> None:
    source = source_of(tmp_path, ["one", "zwei ü", "one"])
    found = survey(source)
    assert list(found.sizes) == [3, 7, 3]
    assert found.digests[0] == found.digests[2] != found.digests[1]
    assert (found.text_bytes, found.conversations) == (13, False)


@pytest.mark.parametrize("share", [0.01, 0.1, 0.4])
def test_the_share_is_kept_and_no_text_is_in_both_parts(tmp_path: Path, share: float) -> None:
    texts = [f"text {i % 400} " * (1 + i % 400 % 9) for i in range(500)]  # a hundred of them twice
    parts = parts_of(source_of(tmp_path, texts), share)
    assert sorted(parts[TRAIN] + parts[VALID]) == sorted(texts)
    assert not set(parts[TRAIN]) & set(parts[VALID])
    assert share <= sum(map(len, parts[VALID])) / sum(map(len, texts)) < share + 0.01


def test_the_order_of_the_documents_does_not_matter(tmp_path: Path) -> None:
    texts = [f"text {i} " * 9 for i in range(100)]
    forward = parts_of(source_of(tmp_path, texts), 0.1)
    backward = parts_of(source_of(tmp_path, texts[::-1]), 0.1)
    assert sorted(forward[VALID]) == sorted(backward[VALID])
    assert forward[VALID] != texts[-len(forward[VALID]) :]


def test_a_document_larger_than_the_share_is_not_taken(tmp_path: Path) -> None:
    texts = ["large " * 1000, *(f"small {i} " * 20 for i in range(20))]
    parts = parts_of(source_of(tmp_path, texts), 0.1)
    assert texts[0] in parts[TRAIN]
    assert len(parts[VALID]) > 1


def test_of_few_large_documents_the_largest_is_cut(tmp_path: Path) -> None:
    texts = ["first line\n" * 500, "second line\n" * 700, "third line\n" * 600]
    parts = parts_of(source_of(tmp_path, texts), 0.05)
    assert parts[TRAIN][0] == texts[0]
    assert parts[TRAIN][2] == texts[2]
    assert parts[TRAIN][1] + parts[VALID][0] == texts[1]
    assert parts[VALID][0].startswith("second")
    assert 0.04 < len(parts[VALID][0]) / sum(map(len, texts)) <= 0.05


def test_equal_documents_are_cut_at_the_same_place(tmp_path: Path) -> None:
    text = "".join(f"line {i}\n" for i in range(100))
    parts = parts_of(source_of(tmp_path, [text, text]), 0.1)
    assert parts[TRAIN] == [parts[TRAIN][0]] * 2
    assert parts[VALID] == [parts[VALID][0]] * 2
    assert parts[TRAIN][0] + parts[VALID][0] == text
    assert 0.08 < len(parts[VALID][0]) / len(text) <= 0.1


def test_a_text_of_one_line_is_cut_too(tmp_path: Path) -> None:
    text = "word " * 100 + "\n"
    parts = parts_of(source_of(tmp_path, [text]), 0.1)
    assert parts[TRAIN][0] + parts[VALID][0] == text
    assert len(parts[VALID][0]) == 50


def test_what_cannot_be_split_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(FallowError, match=r"line 1 is too short to keep a share"):
        parts_of(source_of(tmp_path, ["x"]), 0.1)
    for share in (0.0, 0.5, -1.0, float("nan")):
        with pytest.raises(FallowError, match=r"must be above 0 and below 0\.5"):
            parts_of(source_of(tmp_path, ["x"]), share)
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": messages}))
    with pytest.raises(FallowError, match=r"chat\.jsonl has too few conversations"):
        Split.of(survey(open_source(str(path))), 0.1)


def test_conversations_are_split_as_wholes(tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    lines = [json.dumps({"messages": [{"role": "user", "content": f"Hi {i}"}]}) for i in range(50)]
    path.write_text("\n".join(lines))
    source = open_source(str(path))
    split = Split.of(survey(source), 0.1)
    found: list[tuple[str, Document]] = [piece for document in source.documents() for piece in split.parts(document)]
    assert [document for _, document in found] == list(source.documents())
    assert 5 <= sum(part == VALID for part, _ in found) <= 6
