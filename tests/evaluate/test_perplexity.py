"""Windows of a text and the perplexity of models whose probabilities are known beforehand."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from fallow.errors import FallowError
from fallow.evaluate.perplexity import perplexity, token_windows, windows_of
from fallow.evaluate.text import standard_library_text, undo_wikitext_marks
from fallow.models.tokenizer import Tokenizer

TEXT = "The quick brown fox jumps over the lazy dog, naïvely. " * 6


def byte_tokenizer(*, with_bos: bool) -> Tokenizer:
    """One token a byte; ``<bos>`` (id 0) before a text where it is asked for."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: i for i, text in enumerate(["<bos>", "<eos>", *alphabet])}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<bos>", "<eos>"])
    if with_bos:
        backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    document: dict[str, Any] = json.loads(backend.to_str())
    return Tokenizer(document, bos_token_id=0, eos_token_ids=[1])


class Uniform:
    """Every token of ``vocab_size`` is as likely as any other."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.seen: list[list[int]] = []

    def score(self, tokens: npt.ArrayLike, *, first: int = 1) -> npt.NDArray[np.float32]:
        ids = np.asarray(tokens)
        self.seen.append(ids.tolist())
        return np.full(len(ids) - first, -math.log(self.vocab_size), np.float32)


class Positional(Uniform):
    """The ``i``-th scored token of a window has probability ``1 / (i + 2)``, so that where it stands matters."""

    def score(self, tokens: npt.ArrayLike, *, first: int = 1) -> npt.NDArray[np.float32]:
        return -np.log(np.arange(first + 1, len(np.asarray(tokens)) + 1, dtype=np.float32))


def test_a_uniform_model_is_as_perplexed_as_it_has_tokens() -> None:
    tokenizer = byte_tokenizer(with_bos=False)
    model = Uniform(300)
    result = perplexity(model, tokenizer, token_windows(tokenizer, TEXT, window=64))
    length = len(TEXT.encode())
    assert [token for tokens in model.seen for token in tokens] == tokenizer.encode(TEXT)
    assert result.tokens == length - math.ceil(length / 64)
    assert result.perplexity == pytest.approx(300, rel=1e-5)
    assert result.bits_per_byte == pytest.approx(math.log2(300), rel=1e-5)
    assert result.nll == pytest.approx(result.tokens * math.log(300), rel=1e-5)


def test_every_token_but_the_first_of_a_window_is_scored_by_what_is_before_it_in_the_window() -> None:
    tokenizer = byte_tokenizer(with_bos=False)
    result = perplexity(Positional(0), tokenizer, token_windows(tokenizer, "x" * 10, window=4))
    expected = 2 * (math.log(2) + math.log(3) + math.log(4)) + math.log(2)  # windows of 4, 4 and 2
    assert result.tokens == 7
    assert result.nll == pytest.approx(expected, rel=1e-6)


def test_the_last_tokens_of_whole_windows_alone_are_scored() -> None:
    tokenizer = byte_tokenizer(with_bos=False)
    windows = windows_of(tokenizer, ["x" * 10, "yy", "é" * 4], window=4, last=2)
    assert list(map(tokenizer.decode, windows)) == ["xxxx", "xxxx", "éé", "éé"]
    result = perplexity(Positional(0), tokenizer, windows, last=2)
    assert result.tokens == 8
    assert result.nll == pytest.approx(4 * (math.log(3) + math.log(4)), rel=1e-6)
    assert result.bits_per_byte == pytest.approx(result.nll / math.log(2) / 8, rel=1e-6)
    assert perplexity(Positional(0), tokenizer, [[2, 3]], last=2).tokens == 1  # nothing stands before the first
    for last, message in ((4, "a window has 4"), (0, "a window has 4")):
        with pytest.raises(FallowError, match=message):
            windows_of(tokenizer, ["x" * 10], window=4, last=last)
    with pytest.raises(FallowError, match="No document has a window of 40 tokens, the longest 10: give longer ones"):
        windows_of(tokenizer, ["x" * 10], window=40, last=2)


def test_windows_of_documents_end_with_them_and_a_limit_spreads_over_all() -> None:
    tokenizer = byte_tokenizer(with_bos=False)
    texts = ["aaaabb", "c", "dddd", "eee"]
    assert list(map(tokenizer.decode, windows_of(tokenizer, texts, window=4))) == ["aaaa", "bb", "dddd", "eee"]
    assert list(map(tokenizer.decode, windows_of(tokenizer, texts, window=4, limit=2))) == ["aaaa", "dddd"]
    assert len(windows_of(tokenizer, texts, window=4, limit=9)) == 4
    with pytest.raises(FallowError, match="two tokens"):
        windows_of(tokenizer, ["a", "b"])


def test_windows_begin_with_bos_only_where_the_tokenizer_adds_it() -> None:
    plain = token_windows(byte_tokenizer(with_bos=False), "abcdefg", window=3)
    with_bos = token_windows(byte_tokenizer(with_bos=True), "abcdefg", window=3)
    assert [len(tokens) for tokens in plain] == [3, 3]  # the seventh alone has nothing before it
    assert [len(tokens) for tokens in with_bos] == [3, 3, 3, 2]
    assert all(tokens[0] == 0 for tokens in with_bos)
    ids = byte_tokenizer(with_bos=True).encode("abcdefg", add_special_tokens=False)
    assert [token for tokens in with_bos for token in tokens[1:]] == ids


def test_special_tokens_in_a_text_are_plain_characters() -> None:
    (tokens,) = token_windows(byte_tokenizer(with_bos=False), "a<eos>b", window=100)
    assert len(tokens) == 7


def test_max_tokens_bounds_the_text() -> None:
    model = Uniform(300)
    lengths: list[tuple[int, int | None]] = []
    tokenizer = byte_tokenizer(with_bos=False)
    result = perplexity(
        model,
        tokenizer,
        token_windows(tokenizer, TEXT, window=16, max_tokens=40),
        progress=lambda what, done, total: lengths.append((done, total)),
    )
    assert [len(tokens) for tokens in model.seen] == [16, 16, 8]
    assert result.tokens == 37
    assert lengths == [(16, 40), (32, 40), (40, 40)]


@pytest.mark.parametrize("text", ["", "a"])
def test_a_text_without_a_second_token_is_refused(text: str) -> None:
    with pytest.raises(FallowError, match="two tokens"):
        token_windows(byte_tokenizer(with_bos=False), text)


def test_a_window_without_a_second_token_is_refused() -> None:
    with pytest.raises(FallowError, match="window is 1"):
        token_windows(byte_tokenizer(with_bos=False), TEXT, window=1)


def test_log_probabilities_that_are_not_numbers_are_refused() -> None:
    with pytest.raises(FallowError, match="not finite"):
        perplexity(Broken(300), byte_tokenizer(with_bos=False), [[2, 3]])


class Broken(Uniform):
    def score(self, tokens: npt.ArrayLike, *, first: int = 1) -> npt.NDArray[np.float32]:
        return np.full(len(np.asarray(tokens)) - first, np.nan, np.float32)


def test_marks_of_wikitext_are_undone() -> None:
    marked = "a co @-@ founder of 1 @,@ 000 people in 3 @.@ 5 years , <unk> @ home"
    assert undo_wikitext_marks(marked) == "a co-founder of 1,000 people in 3.5 years , <unk> @ home"
    tokenizer = byte_tokenizer(with_bos=False)
    assert token_windows(tokenizer, "1 @,@ 000") == token_windows(tokenizer, "1,000")


def test_the_standard_library_is_a_text_of_the_length_asked_for() -> None:
    text = standard_library_text(100_000)
    assert len(text) == 100_000
    assert "def " in text
    assert standard_library_text(1000) == text[:1000]
