"""How far a model's distribution is from another's: what a plan changes, whichever tokens a text happens to have."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from fallow.arrays import Float32
from fallow.errors import FallowError
from fallow.terminal import Progress

if TYPE_CHECKING:
    import numpy.typing as npt


class Distribution(Protocol):
    """What is needed of a ``ModelRunner``: logits ``[rows, vocab]`` of tokens from ``first`` on, some at a time."""

    def logit_blocks(self, tokens: npt.ArrayLike, *, first: int = 0) -> Iterator[Float32]: ...


@dataclass(frozen=True)
class Divergence:
    """``nats`` a token of Kullback-Leibler divergence, and the perplexity of what was scored over that of the dense
    model."""

    nats: float
    perplexity_ratio: float


def divergence(
    dense: Distribution,
    sparse: Distribution,
    windows: Sequence[Sequence[int]],
    *,
    last: int | None = None,
    progress: Progress = lambda what, done, total: None,
) -> Divergence:
    """How far ``sparse`` is from ``dense``, KL(dense || sparse): the mean over the places of ``windows`` where a token
    is predicted, or one of the ``last`` of its window, each of which sees its window before it.

    Raises ``FallowError`` where logits are not finite."""
    nats, excess, places, done = 0.0, 0.0, 0, 0
    for tokens in windows:
        ids = np.asarray(tokens)
        place = 0 if last is None else max(len(ids) - 1 - last, 0)
        blocks = (side.logit_blocks(ids[:-1], first=place) for side in (dense, sparse))
        for expected, found in zip(*blocks, strict=True):
            diverged, lost = _rowwise(expected, found, ids[place + 1 : place + 1 + len(expected)])
            nats += float(diverged.sum())
            excess += float(lost.sum())
            place += len(expected)
            places += len(expected)
        done += len(tokens)
        progress("comparing with dense", done, sum(map(len, windows)))
    if not (math.isfinite(nats) and math.isfinite(excess)):
        raise FallowError("The model's logits are not finite: its weights are damaged.")
    return Divergence(max(nats / places, 0.0), math.exp(min(excess / places, 700.0)))


def _rowwise(
    expected: Float32, found: Float32, following: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Of each row KL(expected || found): with p the softmax of expected, the mean under p of the difference of logits,
    less the difference of the logarithms of their sums. And by how much more likely ``expected`` finds the token
    ``following``, in nats."""
    p = expected - expected.max(1, keepdims=True)
    q = found - found.max(1, keepdims=True)
    difference = p - q
    lost = difference[np.arange(len(following)), following].astype(np.float64)
    np.exp(p, out=p)
    sums = p.sum(1, dtype=np.float64)
    mean = np.einsum("rv,rv->r", p, difference, dtype=np.float64) / sums
    np.exp(q, out=q)
    scale: npt.NDArray[np.float64] = np.log(q.sum(1, dtype=np.float64)) - np.log(sums)
    return mean + scale, lost + scale
