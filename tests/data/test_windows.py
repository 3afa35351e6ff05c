"""Windows: what is trained on follows from the seed and a number alone, and every token has its turn."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from fallow.data.prepare import prepare, prepare_split
from fallow.data.shards import ShardWriter, TokenShards
from fallow.data.sources import Source
from fallow.data.windows import NOT_COUNTED, Windows, bits_per_byte
from fallow.errors import FallowError
from fallow.models.tokenizer import Tokenizer


def shards_of(folder: Path, documents: list[list[int]], answers: list[list[bool]] | None = None) -> TokenShards:
    with ShardWriter(folder, [b"x" * (i % 4) for i in range(1000)], has_answers=answers is not None) as writer:
        for i, document in enumerate(documents):
            writer.begin_document(text_bytes=len(document))
            writer.write(document, answers[i] if answers is not None else None)
        writer.finish(source="numbers", fingerprint="", tokenizer="")
    return TokenShards(folder)


@pytest.fixture
def numbers(tmp_path: Path) -> TokenShards:
    """The numbers up to 104 in documents of 30, 1, 1, 8, 50 and 15 tokens."""
    ends = [30, 31, 32, 40, 90, 105]
    return shards_of(tmp_path / "numbers", [[*range(a, b)] for a, b in pairwise([0, *ends])])


def test_every_token_is_a_target_once_an_epoch(numbers: TokenShards) -> None:
    windows = Windows(numbers, 10, seed=1)
    assert len(windows) == 10
    epochs = [windows.batch(10 * epoch, 10) for epoch in range(3)]
    for epoch in epochs:
        assert (epoch.targets == epoch.inputs + 1).all()
        assert sorted(epoch.targets.flatten().tolist()) == list(range(1, 101))
        assert (epoch.inputs.dtype, epoch.inputs.shape) == (np.dtype(np.int64), (10, 10))
    orders = {tuple(epoch.inputs[:, 0].tolist()) for epoch in epochs}
    assert len(orders) == 3
    ordered = windows.in_order(2, 3)
    assert ordered.inputs[:, 0].tolist() == [20, 30, 40]
    assert ordered.scored is ordered.documents is None
    assert (ordered.counted_targets() == ordered.targets).all()


def test_bags_hold_what_follows_them(numbers: TokenShards) -> None:
    batch = Windows(numbers, 12, seed=2).batch(0, 3)
    for size in (2, 3, 4, 12):
        bags = batch.in_bags(size)
        assert bags.inputs.shape == bags.targets.shape == (3, 12 // size, size)
        assert (bags.inputs.reshape(3, 12) == batch.inputs).all()
        for row, inputs in enumerate(batch.inputs):
            text = [*inputs, batch.targets[row, -1]]  # the window and the token after it
            for position in range(12 // size):
                following = text[(position + 1) * size : (position + 2) * size]
                missing = [NOT_COUNTED] * (size - len(following))
                assert bags.targets[row, position].tolist() == [*following, *missing]
    whole = batch.in_bags(1)
    assert (whole.targets[..., 0] == batch.targets).all()


def test_what_does_not_count_does_not_in_a_bag_either(tmp_path: Path) -> None:
    answers = [[i % 3 == 0 for i in range(41)]]
    batch = Windows(shards_of(tmp_path / "chat", [[*range(41)]], answers), 8, seed=1).batch(0, 5)
    counted = batch.in_bags(4).targets
    assert set(counted[counted != NOT_COUNTED].tolist()) < {i for i in range(41) if i % 3 == 0}


def test_a_sequence_depends_on_the_seed_and_its_number_alone(numbers: TokenShards) -> None:
    windows = Windows(numbers, 7, seed=3)
    expected = windows.batch(0, 40).inputs
    for first, count in [(39, 1), (13, 20), (0, 5), (5, 30)]:
        fresh = Windows(numbers, 7, seed=3)
        assert (fresh.batch(first, count).inputs == expected[first : first + count]).all()
        assert (windows.batch(first, count).inputs == expected[first : first + count]).all()
    assert (Windows(numbers, 7, seed=4).batch(0, 40).inputs != expected).any()


def test_the_order_is_the_same_on_every_machine(numbers: TokenShards) -> None:
    """A run that goes on under another NumPy must see the text that it has not seen yet."""
    first = Windows(numbers, 10, seed=1234).batch(0, 20).inputs[:, 0] // 10
    assert first.tolist() == [5, 6, 3, 9, 7, 4, 1, 2, 8, 0, 9, 2, 0, 7, 6, 1, 8, 4, 5, 3]


def test_documents_are_numbered_within_a_window(numbers: TokenShards) -> None:
    windows = Windows(numbers, 20, seed=0, isolate_documents=True)
    documents = windows.in_order(0, 5).documents
    assert documents is not None
    assert documents[0].tolist() == [0] * 20
    assert documents[1].tolist() == [0] * 10 + [1] + [2] + [3] * 8
    assert documents[2].tolist() == [0] * 20
    assert documents[4].tolist() == [0] * 10 + [1] * 10
    shuffled = windows.batch(0, 5)
    assert shuffled.documents is not None
    for inputs, found in zip(shuffled.inputs, shuffled.documents, strict=True):
        assert found.tolist() == documents[inputs[0] // 20].tolist()


def test_only_answers_count_in_conversations(tmp_path: Path) -> None:
    documents = [[*range(10)], [*range(10, 31)]]
    answers = [[token % 3 == 0 for token in document] for document in documents]
    windows = Windows(shards_of(tmp_path / "chat", documents, answers), 6, seed=0)
    batch = windows.batch(0, 5)
    assert batch.scored is not None
    assert (batch.scored == (batch.targets % 3 == 0)).all()
    counted = batch.counted_targets()
    assert (counted[batch.scored] == batch.targets[batch.scored]).all()
    assert (counted[~batch.scored] == NOT_COUNTED).all()
    assert windows.bytes_of(counted) == sum(token % 4 for token in range(3, 31, 3))


def test_a_corpus_smaller_than_the_context_is_one_sentence(numbers: TokenShards) -> None:
    assert len(Windows(numbers, 104, seed=0)) == 1
    with pytest.raises(FallowError, match=r"numbers has 105 tokens, fewer than one window of 105 and the token after"):
        Windows(numbers, 105, seed=0)


def test_bits_per_byte_counts_the_bytes_of_the_targets(corpus: Source, tokenizer: Tokenizer, tmp_path: Path) -> None:
    shards = prepare(corpus, tokenizer, folder=tmp_path)
    windows = Windows(shards, 64, seed=0)
    batches = [windows.in_order(first, 1) for first in range(len(windows))]
    targets = np.concatenate([batch.counted_targets().flatten() for batch in batches])
    text_bytes = sum(windows.bytes_of(batch.counted_targets()) for batch in batches)
    assert text_bytes == sum(len(tokenizer.token_bytes[token]) for token in targets.tolist())
    scored_text = b"".join(tokenizer.token_bytes[token] for token in targets.tolist())
    whole = "".join(document.text for document in corpus.documents()).encode()
    assert whole.startswith(scored_text)
    assert len(whole) - len(scored_text) < 64 * 8
    nll = len(targets) * math.log(tokenizer.vocab_size)  # of a model that knows nothing
    assert bits_per_byte(nll, text_bytes) == pytest.approx(math.log2(300) * len(targets) / text_bytes)


def test_no_window_of_one_part_holds_text_of_the_other(corpus: Source, tokenizer: Tokenizer, tmp_path: Path) -> None:
    train, valid = prepare_split(corpus, tokenizer, 0.2, folder=tmp_path)
    seen = [
        {tuple(row.tolist()) for first in range(len(windows)) for row in windows.batch(first, 1).inputs}
        for windows in (Windows(train, 48, seed=0), Windows(valid, 48, seed=0))
    ]
    assert all(seen)
    assert not seen[0] & seen[1]
    texts = [part.read(0, len(part)).tolist() for part in (train, valid)]
    held_out = {tuple(texts[1][i : i + 30]) for i in range(0, len(texts[1]) - 30)}
    assert not any(tuple(texts[0][i : i + 30]) in held_out for i in range(len(texts[0]) - 30))
