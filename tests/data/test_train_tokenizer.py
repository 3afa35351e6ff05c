"""Tokenizers that are trained here: every text survives them, and other libraries read what is saved."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fallow.data.sources import Source, open_source
from fallow.data.tokenizers import boundary_tokens, save_tokenizer, tokenizer_digest
from fallow.data.train_tokenizer import END_OF_TEXT, train_tokenizer
from fallow.errors import FallowError
from fallow.models.tokenizer import Tokenizer, load_tokenizer

SAMPLES = [
    "the field lies fallow",
    "  leading, trailing  \r\n\n\n\tx",
    "naïve façade — 中文字符 العربية 🙂👩‍👩‍👧‍👦 e\u0301 \u200b\ufeff \x00\x07",
    "1234567890 3.14159 ½ ² I'll WE'VE",
    f"a {END_OF_TEXT}{END_OF_TEXT} b",
    "",
]


def with_transformers(folder: Path) -> object:
    import transformers

    return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)


def test_token_0_is_what_begins_and_ends_documents(tokenizer: Tokenizer) -> None:
    assert tokenizer.token_text(0) == END_OF_TEXT
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (0, {0})
    assert tokenizer.encode("") == [0]
    assert boundary_tokens(tokenizer) == ([0], [])
    assert tokenizer.vocab_size == 300
    words = tokenizer.encode("the field lies fallow", add_special_tokens=False)
    assert len(words) < len("the field lies fallow") / 2


@given(st.text(max_size=60))
@settings(max_examples=200, deadline=None)
def test_every_text_survives(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, allow_special=False)
    assert ids[0] == 0
    assert tokenizer.decode(ids) == text
    assert sum(len(tokenizer.token_bytes[i]) for i in ids) == len(text.encode())
    assert tokenizer.encode_batch([text]) == [ids[1:]]


def test_special_tokens_survive_as_such_or_as_characters(tokenizer: Tokenizer) -> None:
    text = SAMPLES[4]
    assert tokenizer.encode(text).count(0) == 3
    assert tokenizer.decode(tokenizer.encode(text)[1:], skip_special_tokens=False) == text
    assert tokenizer.encode_batch([text, "a"])[0].count(0) == 0
    assert tokenizer.decode(tokenizer.encode_batch([text])[0]) == text


def test_the_same_source_gives_the_same_tokenizer(corpus: Source, tokenizer: Tokenizer) -> None:
    again = train_tokenizer(corpus, tokenizer.vocab_size)
    assert tokenizer_digest(again) == tokenizer_digest(tokenizer)
    part = train_tokenizer(corpus, tokenizer.vocab_size, max_bytes=2000)
    assert tokenizer_digest(part) != tokenizer_digest(tokenizer)


def test_conversations_can_be_trained_on(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hello hello hello"}, {"role": "tool", "content": None}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": messages}))
    tokenizer = train_tokenizer(open_source(str(tmp_path / "a.jsonl")), 262)
    assert tokenizer.decode(tokenizer.encode("hello")) == "hello"
    assert len(tokenizer.encode("hello")) == 2


def test_too_little_text_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("few words")
    (tmp_path / "b.txt").write_text(" ")
    with pytest.raises(FallowError, match=r"a\.txt has too little text for 1000 tokens: only \d+ were found"):
        train_tokenizer(open_source(str(tmp_path / "a.txt")), 1000)
    with pytest.raises(FallowError, match=r"b\.txt is empty"):
        train_tokenizer(open_source(str(tmp_path / "b.txt")), 257)
    with pytest.raises(FallowError, match="vocab_size is 256: it must be at least 257"):
        train_tokenizer(open_source(str(tmp_path / "a.txt")), 256)


def test_a_saved_tokenizer_gives_the_same_ids_everywhere(tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_tokenizer(tokenizer, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    ours = load_tokenizer(tmp_path)
    assert tokenizer_digest(ours) == tokenizer_digest(tokenizer)
    assert (ours.bos_token_id, ours.eos_token_ids) == (0, {0})
    theirs = with_transformers(tmp_path)
    assert (theirs.bos_token_id, theirs.eos_token_id, len(theirs)) == (0, 0, 300)
    for text in SAMPLES:
        ids = tokenizer.encode(text)
        assert ours.encode(text) == theirs(text)["input_ids"] == ids
        assert theirs.decode(ids) == tokenizer.decode(ids, skip_special_tokens=False)
        assert theirs.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids)


def test_the_tokenizer_of_a_gguf_file_can_be_saved(smollm2: Tokenizer, tmp_path: Path) -> None:
    save_tokenizer(smollm2, tmp_path)
    ours, theirs = load_tokenizer(tmp_path), with_transformers(tmp_path)
    assert ours.token_bytes == smollm2.token_bytes
    assert (ours.bos_token_id, ours.eos_token_ids) == (smollm2.bos_token_id, smollm2.eos_token_ids)
    assert tokenizer_digest(ours) == tokenizer_digest(smollm2)
    for text in [*SAMPLES, "<|im_start|>user\nhi<|im_end|>\n"]:
        assert ours.encode(text) == theirs(text)["input_ids"] == smollm2.encode(text)
    messages = [{"role": "user", "content": "Hi"}]
    prompt = smollm2.apply_chat_template(messages)
    assert theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == prompt


@pytest.mark.parametrize(("add_bos", "add_eos"), [(False, False), (False, True), (True, True)])
def test_what_goes_around_a_text_is_saved(tokenizer: Tokenizer, tmp_path: Path, add_bos: bool, add_eos: bool) -> None:
    document = json.loads(tokenizer.backend.to_str())
    document["added_tokens"].append({**document["added_tokens"][0], "id": 300, "content": "<|end|>"})
    changed = Tokenizer(document, bos_token_id=0, eos_token_ids=[300], add_bos_token=add_bos, add_eos_token=add_eos)
    assert boundary_tokens(changed) == ([0] * add_bos, [300])
    save_tokenizer(changed, tmp_path)
    ours, theirs = load_tokenizer(tmp_path), with_transformers(tmp_path)
    for text in SAMPLES[:2]:
        assert ours.encode(text) == theirs(text)["input_ids"] == changed.encode(text)
    assert boundary_tokens(ours) == boundary_tokens(changed)
