"""The divergence of one distribution from another, against float64 arithmetic."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest

from fallow.errors import FallowError
from fallow.evaluate.divergence import Divergence, divergence

VOCABULARY = 97


class Known:
    """Logits that each token has by itself, given in blocks of ``rows``."""

    def __init__(self, table: npt.NDArray[np.float32], rows: int = 5) -> None:
        self.table = table
        self.rows = rows

    def logit_blocks(self, tokens: npt.ArrayLike, *, first: int = 0) -> Iterator[npt.NDArray[np.float32]]:
        logits = self.table[np.asarray(tokens, int)[first:]]
        for start in range(0, len(logits), self.rows):
            yield logits[start : start + self.rows]


def tables(scale: float) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    rng = np.random.default_rng()
    dense = rng.normal(0, 5, (VOCABULARY, VOCABULARY)).astype(np.float32) + 40
    return dense, dense + rng.normal(0, scale, dense.shape).astype(np.float32)


def windows(*lengths: int) -> list[list[int]]:
    rng = np.random.default_rng()
    return [rng.integers(0, VOCABULARY, length).tolist() for length in lengths]


@pytest.mark.parametrize("scale", [1e-3, 0.1, 3.0])
def test_it_is_the_mean_over_the_places_that_predict(scale: float) -> None:
    dense, sparse = tables(scale)
    texts = windows(2, 17, 6)
    places = [token for text in texts for token in text[:-1]]
    p, q = (np.log(softmax(table[places].astype(np.float64))) for table in (dense, sparse))
    expected = (np.exp(p) * (p - q)).sum(1).mean()
    following = [token for text in texts for token in text[1:]]
    lost = (p - q)[range(len(places)), following].mean()
    found = divergence(Known(dense), Known(sparse), texts)
    assert found.nats == pytest.approx(expected, rel=1e-3, abs=1e-7)
    assert found.perplexity_ratio == pytest.approx(np.exp(lost), rel=1e-5)


@pytest.mark.parametrize("rows", [1, 5, 100])
def test_the_last_places_of_windows_alone(rows: int) -> None:
    """As if each place were a window of its own, as the tokens of ``Known`` don't look back."""
    dense, sparse = tables(0.1)
    texts = windows(2, 17, 6)
    last = [text[place - 1 : place + 1] for text in texts for place in range(max(len(text) - 3, 1), len(text))]
    expected = divergence(Known(dense), Known(sparse), last)
    found = divergence(Known(dense, rows), Known(sparse, rows), texts, last=3)
    assert found.nats == pytest.approx(expected.nats, rel=1e-6)
    assert found.perplexity_ratio == pytest.approx(expected.perplexity_ratio, rel=1e-6)


def softmax(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    e = np.exp(x - x.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def test_a_model_does_not_diverge_from_itself_or_from_itself_moved_up() -> None:
    dense, _ = tables(1.0)
    assert divergence(Known(dense), Known(dense), windows(30)) == Divergence(0, 1)
    moved = divergence(Known(dense), Known(dense + 8), windows(30))
    assert (moved.nats, moved.perplexity_ratio) == pytest.approx((0, 1), abs=1e-6)


def test_logits_that_are_no_numbers_are_refused() -> None:
    dense, sparse = tables(1.0)
    sparse[:, 3] = np.nan
    with pytest.raises(FallowError, match="damaged"):
        divergence(Known(dense), Known(sparse), windows(9))


def test_progress_comes_to_its_end() -> None:
    dense, sparse = tables(1.0)
    seen: list[tuple[int, int | None]] = []
    divergence(
        Known(dense), Known(sparse), windows(9, 4), progress=lambda what, done, total: seen.append((done, total))
    )
    assert seen == [(9, 13), (13, 13)]
