"""Perplexity of a text: how likely a model finds it, in windows that any other engine can be given too."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from fallow.arrays import Float32
from fallow.errors import FallowError
from fallow.evaluate.text import undo_wikitext_marks
from fallow.models.tokenizer import Tokenizer
from fallow.terminal import Progress

if TYPE_CHECKING:
    import numpy.typing as npt

DEFAULT_WINDOW = 1024


class Scorer(Protocol):
    """What is needed of a ``ModelRunner``: its context in tokens, and log-probabilities ``[T - 1]`` of ``T`` tokens."""

    max_context: int

    def score(self, tokens: npt.ArrayLike) -> Float32: ...


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
    if window < 2:
        raise FallowError(f"window is {window}: a window needs at least 2 tokens.")
    ids = tokenizer.encode(undo_wikitext_marks(text), add_special_tokens=False, allow_special=False)[:max_tokens]
    bos = tokenizer.bos_token_id
    begin = [bos] if bos is not None and tokenizer.encode("a")[:1] == [bos] else []
    step = window - len(begin)
    windows = [begin + ids[start : start + step] for start in range(0, len(ids), step)]
    windows = [tokens for tokens in windows if len(tokens) > 1]
    if not windows:
        raise FallowError("The text is too short for a perplexity: give at least two tokens.")
    return windows


def perplexity(
    runner: Scorer,
    tokenizer: Tokenizer,
    text: str,
    *,
    window: int = DEFAULT_WINDOW,
    max_tokens: int | None = None,
    progress: Progress | None = None,
) -> PerplexityResult:
    """Perplexity of ``text`` over the windows of ``token_windows``; a window is shortened to the model's context.

    ``progress`` is called with what is being done, tokens done, and tokens in all. Raises as ``token_windows`` does,
    and ``FallowError`` where the model's logits are not finite.
    """
    windows = token_windows(tokenizer, text, window=min(window, runner.max_context), max_tokens=max_tokens)
    total = sum(map(len, windows))
    nll, done = 0.0, 0
    for tokens in windows:
        nll -= float(np.sum(runner.score(tokens), dtype=np.float64))
        done += len(tokens)
        if progress is not None:
            progress("scoring", done, total)
    return result_of(tokenizer, windows, nll)


def result_of(tokenizer: Tokenizer, windows: Sequence[Sequence[int]], nll: float) -> PerplexityResult:
    """The result for windows whose scored tokens have the negative log-likelihood ``nll`` (nats) in all."""
    if not math.isfinite(nll):
        raise FallowError("The model's log-probabilities are not finite: its weights are damaged.")
    count = sum(len(tokens) - 1 for tokens in windows)
    scored_bytes = sum(len(tokenizer.token_bytes[token]) for tokens in windows for token in tokens[1:])
    return PerplexityResult(
        tokens=count,
        perplexity=math.exp(min(nll / count, 700.0)),
        bits_per_byte=nll / math.log(2) / max(scored_bytes, 1),
        nll=nll,
    )
