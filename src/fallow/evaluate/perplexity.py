"""Perplexity of a text: how likely a model finds it, in windows that any other engine can be given too."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from fallow.arrays import Float32
from fallow.errors import FallowError
from fallow.evaluate.text import spread, undo_wikitext_marks
from fallow.models.tokenizer import Tokenizer
from fallow.terminal import Progress

if TYPE_CHECKING:
    import numpy.typing as npt

DEFAULT_WINDOW = 1024


class Scorer(Protocol):
    """What is needed of a ``ModelRunner``: the log-probabilities of tokens from ``first`` (at least 1) on."""

    def score(self, tokens: npt.ArrayLike, *, first: int = 1) -> Float32: ...


@dataclass(frozen=True)
class PerplexityResult:
    """``tokens`` were scored; ``nll`` is the sum of their negative log-likelihoods in nats, ``perplexity`` is
    ``exp(nll / tokens)``, and ``bits_per_byte`` is ``nll`` in bits over the bytes that the scored tokens stand for."""

    tokens: int
    perplexity: float
    bits_per_byte: float
    nll: float


def token_windows(
    tokenizer: Tokenizer, text: str, *, window: int = DEFAULT_WINDOW, max_tokens: int | None = None
) -> list[list[int]]:
    """The token ids of ``text`` in document order, cut into windows that do not overlap, of ``window`` tokens each.

    A tokenizer that begins a text with a beginning-of-sequence token begins every window with it. Of each window all
    tokens but the first are scored. The last window may be shorter; one token alone is left out. WikiText's marks are
    undone first. ``max_tokens`` takes that many tokens from the beginning.

    Raises ``FallowError`` where the text has fewer than two tokens.
    """
    windows = _cut(tokenizer, text, window, max_tokens)
    if not windows:
        raise FallowError("The text is too short for a perplexity: give at least two tokens.")
    return windows


def windows_of(
    tokenizer: Tokenizer,
    texts: Iterable[str],
    *,
    window: int = DEFAULT_WINDOW,
    last: int | None = None,
    limit: int | None = None,
) -> list[list[int]]:
    """Those of ``token_windows`` of each text, or ``limit`` of them, evenly spread; a text of fewer than two tokens has
    none. Where the ``last`` tokens of each are to be scored, those that are shorter than ``window`` are left out.

    Raises ``FallowError`` where there is none, or where ``last`` tokens with one before them are more than a window.
    """
    if last is not None and not 0 < last < window:
        raise FallowError(f"The last {last:,} tokens of a window cannot be scored: a window has {window:,}.")
    windows = [tokens for text in texts for tokens in _cut(tokenizer, text, window, None)]
    if last is not None and windows:
        longest = max(map(len, windows))
        windows = [tokens for tokens in windows if len(tokens) == window]
        if not windows:
            raise FallowError(
                f"No document has a window of {window:,} tokens, the longest {longest:,}: give longer ones, or a "
                "shorter window."
            )
    if not windows:
        raise FallowError("The text is too short for a perplexity: give at least two tokens.")
    return spread(windows, len(windows) if limit is None else limit)


def _cut(tokenizer: Tokenizer, text: str, window: int, max_tokens: int | None) -> list[list[int]]:
    if window < 2:
        raise FallowError(f"window is {window}: a window needs at least 2 tokens.")
    ids = tokenizer.encode(undo_wikitext_marks(text), add_special_tokens=False, allow_special=False)[:max_tokens]
    bos = tokenizer.bos_token_id
    begin = [bos] if bos is not None and tokenizer.encode("a")[:1] == [bos] else []
    step = window - len(begin)
    windows = [begin + ids[start : start + step] for start in range(0, len(ids), step)]
    return [tokens for tokens in windows if len(tokens) > 1]


def perplexity(
    runner: Scorer,
    tokenizer: Tokenizer,
    windows: Sequence[Sequence[int]],
    *,
    last: int | None = None,
    progress: Progress | None = None,
) -> PerplexityResult:
    """Perplexity over ``windows`` of token ids, of all tokens but the first of each, or of the ``last`` ones.

    ``progress`` is called with what is being done, tokens done, and tokens in all. Raises ``FallowError`` where the
    model's logits are not finite.
    """
    total = sum(map(len, windows))
    nll, done = 0.0, 0
    for tokens in windows:
        nll -= float(np.sum(runner.score(tokens, first=_first(tokens, last)), dtype=np.float64))
        done += len(tokens)
        if progress is not None:
            progress("scoring", done, total)
    return result_of(tokenizer, windows, nll, last)


def _first(tokens: Sequence[int], last: int | None) -> int:
    """Of a window the first token that is scored: nothing stands before the first of all."""
    return 1 if last is None else max(len(tokens) - last, 1)


def result_of(
    tokenizer: Tokenizer, windows: Sequence[Sequence[int]], nll: float, last: int | None = None
) -> PerplexityResult:
    """The result for windows whose scored tokens, all but the first or the ``last``, have the negative log-likelihood
    ``nll`` (nats) in all."""
    if not math.isfinite(nll):
        raise FallowError("The model's log-probabilities are not finite: its weights are damaged.")
    scored = [tokens[_first(tokens, last) :] for tokens in windows]
    count = sum(map(len, scored))
    scored_bytes = sum(len(tokenizer.token_bytes[token]) for tokens in scored for token in tokens)
    return PerplexityResult(
        tokens=count,
        perplexity=math.exp(min(nll / count, 700.0)),
        bits_per_byte=nll / math.log(2) / max(scored_bytes, 1),
        nll=nll,
    )
