"""The native sampler against float64 arithmetic: its support exactly, its frequencies by a chi-square test."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from fallow import _native
from fallow.engine.batch import SAMPLING_DTYPE, StepResult
from fallow.engine.sampling import SamplingParams
from fallow.engine.sequence import LogitEdits

Floats = npt.NDArray[np.floating[Any]]
VOCABULARIES = [1, 2, 15, 16, 17, 31, 49152]


def sample(
    logits: Floats, *, seed: Any = 0, draw: Any = 0, edits: dict[str, Any] | None = None, **how: Any
) -> StepResult:
    """One token for each row of ``logits``; a parameter is one number for all rows or one for each."""
    parameters = np.zeros(len(logits), SAMPLING_DTYPE)
    off = {"temperature": 1, "top_p": 1, "repetition_penalty": 1}
    for name, value in (off | {"seed": seed, "draw": draw} | how).items():
        parameters[name] = value
    rows = parameters.view(np.uint8).reshape(-1, SAMPLING_DTYPE.itemsize)
    return StepResult(*_native.kernels.sample(np.ascontiguousarray(logits, np.float32), rows, **edits or {}))


def draws(row: Floats, count: int, **how: Any) -> npt.NDArray[np.int32]:
    """Draws 0 to ``count`` of one row of logits."""
    rows = max(1, min(count, (1 << 21) // len(row)))
    numbers = np.split(np.arange(count), range(rows, count, rows))
    return np.concatenate([sample(np.tile(row, (len(part), 1)), draw=part, **how).tokens for part in numbers])


def random_logits(rng: np.random.Generator, *shape: int) -> npt.NDArray[np.float32]:
    return (3 * rng.standard_normal(shape)).astype(np.float32)


def distribution(
    row: Floats, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> npt.NDArray[np.float64]:
    """The probability of each token after temperature, top-k, top-p and min-p; a logit that is no number has none."""
    logits = np.where(np.isnan(row), -np.inf, row.astype(np.float64))
    order = np.argsort(-logits, kind="stable")[: top_k or None]
    weights = np.exp((logits[order] - logits[order[0]]) / temperature)
    weights /= weights.sum()
    kept = (np.cumsum(weights) - weights < top_p) & (weights >= min_p * weights[0])
    kept[0] = True
    result = np.zeros(len(logits))
    result[order] = np.where(kept, weights, 0)
    return result / result.sum()


def log_softmax(logits: Floats) -> npt.NDArray[np.float64]:
    x = logits.astype(np.float64)
    x -= x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def chi_square(tokens: npt.NDArray[np.int32], expected: Floats) -> tuple[float, float]:
    """Pearson's statistic over bins of about sixteen expected tokens or one likelier token, and what it may reach.

    The limit is the chi-square distribution's quantile at 1 - 1e-6 (4.75 standard deviations) after Wilson and Hilferty
    (1931): its cube root is nearly normal. A right sampler exceeds it with one seed in a million, and seeds are fixed.
    """
    order = np.argsort(-expected, kind="stable")
    due = expected[order] * len(tokens)
    bins = np.unique((np.cumsum(due) - due) // 16, return_inverse=True)[1]
    if bins[-1] > 0 and due[bins == bins[-1]].sum() < 8:  # what is left over
        bins[bins == bins[-1]] -= 1
    seen = np.bincount(bins, np.bincount(tokens, minlength=len(expected))[order])
    due = np.bincount(bins, due)
    freedom = max(len(due) - 1, 1)
    spread = 2 / (9 * freedom)
    return float(((seen - due) ** 2 / due).sum()), freedom * (1 - spread + 4.75 * spread**0.5) ** 3


def assert_drawn_from(tokens: npt.NDArray[np.int32], expected: Floats) -> None:
    # Above 80 temperatures below the largest logit a token's probability is 0 in float32 too.
    assert set(tokens.tolist()) <= set(np.flatnonzero(expected > 1e-30).tolist())
    statistic, limit = chi_square(tokens, expected)
    assert statistic < limit


@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("temperature", [0.0, 9e-6])
def test_greedy_takes_the_largest_logit(vocab: int, temperature: float) -> None:
    rng = np.random.default_rng(vocab)
    rows = random_logits(rng, 40, vocab)
    rows[20:] = rows[20:].round()  # equals: the lowest id
    result = sample(rows, temperature=temperature, top_p=0.9, top_k=3, draw=np.arange(40))
    assert np.array_equal(result.tokens, rows.argmax(1))


@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"temperature": 0.3},
        {"temperature": 100.0},
        {"top_k": 5},
        {"top_k": 1},
        {"top_p": 0.7},
        {"top_p": 0.0},
        {"min_p": 0.1},
        {"min_p": 1.0},
        {"temperature": 1.7, "top_k": 12, "top_p": 0.7, "min_p": 0.4},
        {"temperature": 3.0, "top_p": 0.95, "min_p": 0.01},
        {"top_k": 300, "top_p": 0.99},
    ],
    ids=str,
)
def test_tokens_follow_the_distribution(vocab: int, how: dict[str, Any]) -> None:
    rng = np.random.default_rng([vocab, *map(ord, str(how))])
    row = random_logits(rng, vocab)
    tokens = draws(row, 300 if vocab > 10_000 else 20_000, seed=rng.integers(2**63), **how)
    assert_drawn_from(tokens, distribution(row, **how))


@pytest.mark.parametrize("vocab", [31, 5000])
def test_the_chi_square_test_notices_a_small_error(vocab: int) -> None:
    row = random_logits(np.random.default_rng(vocab), vocab)
    tokens = draws(row, 10_000, seed=1)
    for wrong in ({"temperature": 1.1}, {"temperature": 0.9}, {"top_p": 0.9}, {"min_p": 0.03}):
        statistic, limit = chi_square(tokens, distribution(row, **wrong))
        assert statistic > limit


@pytest.mark.parametrize("how", [{}, {"top_k": 3}], ids=str)
def test_min_p_does_not_change_what_top_p_is_a_share_of(how: dict[str, Any]) -> None:
    row = np.log([0.5, 0.3, 0.2])
    assert set(draws(row, 200, top_p=0.6, min_p=0.5, **how).tolist()) == {0, 1}


@pytest.mark.parametrize("vocab", [300, 5000])
def test_top_p_may_keep_most_of_a_flat_distribution(vocab: int) -> None:
    row = random_logits(np.random.default_rng(vocab), vocab) / 100
    tokens = draws(row, 5000, top_p=0.9)
    assert_drawn_from(tokens, distribution(row, top_p=0.9))
    assert len(set(tokens.tolist())) > 256  # more than what is looked at first


@pytest.mark.parametrize("vocab", [31, 5000])
def test_equals_at_a_border(vocab: int) -> None:
    """Top-k and top-p keep the lowest ids of equally likely tokens, min-p keeps all of them."""
    row = np.full(vocab, -7.0)
    row[vocab - 16 :] = 2.0
    first = vocab - 16
    for how, kept in (({"top_k": 3}, 3), ({"top_k": 16, "top_p": 0.5}, 8), ({"min_p": 1.0}, 16)):
        tokens = draws(row, 4000, **how)
        assert set(tokens.tolist()) == set(range(first, first + kept))
        assert_drawn_from(tokens, np.where(np.arange(vocab) < first, 0, np.arange(vocab) < first + kept) / kept)


@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_top_k_beyond_the_vocabulary_keeps_all(vocab: int) -> None:
    row = random_logits(np.random.default_rng(vocab), vocab)
    beyond, whole = (draws(row, 50, top_k=k, top_p=0.99) for k in (2**31 - 1, vocab))
    assert np.array_equal(beyond, whole)


@pytest.mark.parametrize("how", [{}, {"top_k": 4}, {"top_p": 0.8, "min_p": 0.05}], ids=str)
def test_edited_logits(how: dict[str, Any]) -> None:
    """Repetition penalty, then additive edits, then the mask; each row has its own, some have none."""
    vocab, rows, count = 31, 6, 20_000
    rng = np.random.default_rng(len(how))
    logits = random_logits(rng, rows, vocab)
    repeated = [rng.permutation(vocab)[:size] for size in (0, 1, 12, 31, 5, 0)]
    biased = [rng.permutation(vocab)[:size] for size in (9, 0, 31, 1, 5, 0)]
    biases = [rng.uniform(-3, 3, len(ids)).astype(np.float32) for ids in biased]
    penalties = np.float32([1.3, 1.3, 1.5, 0.7, 1.0, 2.0])
    bits = rng.random((rows, vocab)) < 0.7
    bits[1] = True
    words = np.packbits(np.pad(bits, ((0, 0), (0, 1)), constant_values=True), axis=1, bitorder="little")

    edits = {
        "repeated_offsets": np.cumsum([0, *map(len, repeated)]).astype(np.int32),
        "repeated_tokens": np.concatenate(repeated).astype(np.int32),
        "bias_offsets": np.cumsum([0, *map(len, biased)]).astype(np.int32),
        "bias_tokens": np.concatenate(biased).astype(np.int32),
        "bias_values": np.concatenate(biases),
        "allowed": words.view(np.uint32),
    }
    results = [sample(logits, draw=i, repetition_penalty=penalties, edits=edits, **how).tokens for i in range(count)]
    tokens = np.array(results)
    expected = logits.astype(np.float64)
    for row in range(rows):
        x = expected[row]
        x[repeated[row]] *= np.where(x[repeated[row]] > 0, 1 / penalties[row], penalties[row])
        x[biased[row]] += biases[row]
        x[~bits[row]] = -np.inf
        assert_drawn_from(tokens[:, row], distribution(x, **how))
    greedy = sample(logits, temperature=0, repetition_penalty=penalties, edits=edits)
    assert np.array_equal(greedy.tokens, expected.argmax(1))


def test_penalties_of_a_request() -> None:
    """Presence and frequency penalties of the output, repetition penalty of the prompt too, beside a logit bias."""
    rng = np.random.default_rng(8)
    prompt, output = rng.integers(0, 17, 6).tolist(), rng.integers(0, 17, 12).tolist()
    params = SamplingParams(
        repetition_penalty=1.4, presence_penalty=0.6, frequency_penalty=-0.3, logit_bias={3: 2.5, output[0]: -1.0}
    )
    edits = LogitEdits(params, prompt)
    for token in output:
        edits.add(token)
    row = random_logits(rng, 17)
    expected = row.astype(np.float64)
    for token in set(prompt + output):
        expected[token] *= 1 / 1.4 if expected[token] > 0 else 1.4
    for token, times in Counter(output).items():
        expected[token] -= 0.6 - 0.3 * times
    for token, bias in params.logit_bias.items():
        expected[token] += bias
    count = 20_000
    lists = (edits.bias_tokens, edits.bias_values, edits.repeated_tokens)
    tokens, values, repeated = (np.tile(x, count) for x in lists)
    offsets, repeated_offsets = (np.arange(count + 1, dtype=np.int32) * np.int32(len(lists[i])) for i in (0, 2))
    arrays = {"bias_offsets": offsets, "bias_tokens": tokens, "bias_values": values}
    arrays |= {"repeated_offsets": repeated_offsets, "repeated_tokens": repeated}
    result = sample(np.tile(row, (count, 1)), draw=np.arange(count), repetition_penalty=1.4, edits=arrays)
    assert_drawn_from(result.tokens, distribution(expected))


@pytest.mark.parametrize("how", [{}, {"top_k": 20}, {"top_p": 0.9}, {"min_p": 0.02}], ids=str)
@pytest.mark.parametrize("vocab", [31, 5000])
def test_a_row_depends_on_its_seed_and_draw_alone(vocab: int, how: dict[str, Any]) -> None:
    rng = np.random.default_rng(vocab)
    rows = random_logits(rng, 64, vocab)
    seeds, numbers = rng.integers(0, 2**64, 64, np.uint64), rng.integers(0, 2000, 64)
    together = sample(rows, seed=seeds, draw=numbers, **how).tokens
    order = rng.permutation(64)
    assert np.array_equal(sample(rows[order], seed=seeds[order], draw=numbers[order], **how).tokens, together[order])
    alone = [sample(rows[i : i + 1], seed=seeds[i], draw=numbers[i], **how).tokens[0] for i in range(64)]
    assert np.array_equal(alone, together)
    assert not np.array_equal(sample(rows, seed=seeds + np.uint64(1), draw=numbers, **how).tokens, together)
    assert not np.array_equal(sample(rows, seed=seeds, draw=numbers + 1, **how).tokens, together)


@pytest.mark.parametrize("step", [(0, 1), (1, 0), (1, 1)], ids=["draws", "seeds", "both"])
def test_neighbouring_draws_and_seeds_are_independent(step: tuple[int, int]) -> None:
    count, row = 40_000, np.log([[0.1, 0.2, 0.3, 0.4]])
    logits = np.tile(row, (count, 1))
    seeds = np.arange(count, dtype=np.uint64) if step[0] else np.zeros(count, np.uint64)
    numbers = np.arange(count, dtype=np.uint64) if step[1] else np.zeros(count, np.uint64)
    first = sample(logits, seed=seeds, draw=numbers).tokens
    pairs = 4 * first[:-1:2] + first[1::2]
    assert_drawn_from(pairs, np.outer(np.exp(row), np.exp(row)).ravel())


@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_log_probabilities(vocab: int) -> None:
    """Of the unmodified logits, whatever the token was drawn from; rows may want different numbers of them."""
    rng = np.random.default_rng(vocab)
    wanted = np.array([0, 1, 5, 20, 20, -1])
    rows = random_logits(rng, 6, vocab)
    rows[4] = rows[4].round()
    mask = np.full((6, -(-vocab // 32)), 0xFFFFFFFF, np.uint32)
    mask[3] = 0
    mask[3, 0] = 1  # the most likely tokens are listed, though only token 0 may be drawn
    bias = {"bias_tokens": np.arange(vocab, dtype=np.int32), "bias_values": np.linspace(2, 5, vocab, dtype=np.float32)}
    edits = {"allowed": mask, "bias_offsets": np.int32([0, 0, vocab, vocab, vocab, vocab, vocab]), **bias}
    result = sample(rows, logprobs=wanted, temperature=0.5, top_k=30, draw=np.arange(6), edits=edits)
    expected = log_softmax(rows)
    top = min(20, vocab)
    assert result.tokens[3] == 0
    assert result.logprobs[5] == 0  # not asked for
    np.testing.assert_allclose(result.logprobs[:5], expected[np.arange(5), result.tokens[:5]], rtol=1e-6, atol=2e-6)
    assert result.top_tokens.shape == result.top_logprobs.shape == (6, top)
    for row in range(6):
        count = min(max(wanted[row], 0), vocab)
        order = np.argsort(-rows[row], kind="stable")[:count]
        assert np.array_equal(result.top_tokens[row], [*order, *[-1] * (top - count)])
        np.testing.assert_allclose(result.top_logprobs[row, :count], expected[row, order], rtol=1e-6, atol=2e-6)
        assert (result.top_logprobs[row, count:] == -np.inf).all()


@pytest.mark.parametrize("vocab", VOCABULARIES[1:])
@pytest.mark.parametrize("how", [{"temperature": 0}, {}, {"top_k": 2**20}, {"top_p": 0.999}, {"min_p": 1e-9}], ids=str)
@pytest.mark.parametrize("value", [-np.inf, np.nan])
def test_impossible_tokens_are_never_drawn(vocab: int, how: dict[str, Any], value: float) -> None:
    rng = np.random.default_rng(vocab)
    row = random_logits(rng, vocab)
    bad = rng.random(vocab) < 0.5
    bad[0], bad[-1] = True, False
    row[bad] = value
    result = sample(np.tile(row, (50, 1)), draw=np.arange(50), logprobs=20, **how)
    assert not bad[result.tokens].any()
    expected = log_softmax(np.where(bad, -np.inf, row))
    np.testing.assert_allclose(result.logprobs, expected[result.tokens], rtol=1e-6, atol=2e-6)
    possible = result.top_logprobs > -np.inf
    assert (possible.sum(1) == min(20, (~bad).sum())).all()
    assert not bad[result.top_tokens[possible]].any()
    row[:] = value
    row[vocab // 2] = -1e30
    assert (sample(np.tile(row, (50, 1)), draw=np.arange(50), **how).tokens == vocab // 2).all()


@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("how", [{"temperature": 0}, {}, {"top_k": 3}, {"top_p": 0.5}], ids=str)
def test_a_row_without_a_possible_token_says_so(vocab: int, how: dict[str, Any]) -> None:
    """It gets token 0 with a log-probability that is no number, and no likely tokens; other rows are as ever."""
    rows = np.zeros((4, vocab), np.float32)
    rows[0] = -np.inf
    rows[1] = np.nan
    mask = np.full((4, -(-vocab // 32)), 0xFFFFFFFF, np.uint32)
    mask[2] = 0
    result = sample(rows, logprobs=5, edits={"allowed": mask}, **how)
    assert (result.tokens[:3] == 0).all()
    assert np.isnan(result.logprobs[:3]).all()
    assert (result.top_tokens[:3] == -1).all()
    assert (result.top_logprobs[:3] == -np.inf).all()
    np.testing.assert_allclose(result.logprobs[3], -np.log(vocab), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "how", [{"temperature": 1.0}, {"temperature": 1.0, "top_k": 5}, {"temperature": 1e-5}], ids=str
)
def test_logits_far_apart(how: dict[str, Any]) -> None:
    row = np.array([-3e38, 3e38, -1e-38, 2.9e38, 0.0], np.float32)
    assert (draws(row, 100, **how) == 1).all()
    row[3] = np.inf
    assert (draws(row, 100, **how) == 3).all()


def test_bad_arguments_are_refused() -> None:
    logits = np.zeros((2, 40), np.float32)
    one, two = np.zeros(1, np.int32), np.array([0, 1, 1], np.int32)
    for edits, what in (
        ({"bias_offsets": two, "bias_tokens": one}, "as long as each other"),
        (
            {"bias_offsets": two, "bias_tokens": one + 40, "bias_values": np.ones(1, np.float32)},
            "outside the vocabulary",
        ),
        ({"bias_offsets": two[:2], "bias_tokens": one, "bias_values": np.ones(1, np.float32)}, "one more than"),
        ({"repeated_offsets": two, "repeated_tokens": one - 1}, "outside the vocabulary"),
        ({"repeated_offsets": np.array([0, 2, 1], np.int32), "repeated_tokens": one}, "must ascend"),
        ({"repeated_offsets": two}, "is missing"),
        ({"allowed": np.ones((2, 1), np.uint32)}, "one bit a token"),
    ):
        with pytest.raises(ValueError, match=what):
            sample(logits, edits=edits)
    with pytest.raises(ValueError, match="one SAMPLING_DTYPE"):
        _native.kernels.sample(logits, np.zeros((1, SAMPLING_DTYPE.itemsize), np.uint8))
    with pytest.raises(ValueError, match="need a vocabulary"):
        sample(logits[:, :0])
