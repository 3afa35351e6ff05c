"""How far a model's distribution is from another's: what a plan changes, whichever tokens a text happens to have."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from fallow.arrays import Float32
from fallow.errors import FallowError
from fallow.terminal import Progress

if TYPE_CHECKING:
    import numpy.typing as npt


class Distribution(Protocol):
    """What is needed of a ``ModelRunner``: the logits ``[rows, vocab]`` after each token, some rows at a time."""

    def logit_blocks(self, tokens: npt.ArrayLike) -> Iterator[Float32]: ...


def divergence(
    dense: Distribution,
    sparse: Distribution,
    windows: Sequence[Sequence[int]],
    *,
    progress: Progress = lambda what, done, total: None,
) -> float:
    """The Kullback-Leibler divergence of ``sparse`` from ``dense``, KL(dense || sparse), in nats a token: the mean over
    the places of ``windows`` where a token is predicted, each of which sees its window before it.

    Raises ``FallowError`` where logits are not finite."""
    total, places, done = 0.0, 0, 0
    for tokens in windows:
        before = tokens[:-1]
        for expected, found in zip(dense.logit_blocks(before), sparse.logit_blocks(before), strict=True):
            total += float(_rowwise(expected, found).sum())
            places += len(expected)
        done += len(tokens)
        progress("comparing with dense", done, sum(map(len, windows)))
    if not math.isfinite(total):
        raise FallowError("The model's logits are not finite: its weights are damaged.")
    return max(total / places, 0.0)


def _rowwise(expected: Float32, found: Float32) -> npt.NDArray[np.float64]:
    """Of each row KL(expected || found): with p the softmax of expected, the mean under p of the difference of logits,
    less the difference of the logarithms of their sums."""
    p = expected - expected.max(1, keepdims=True)
    q = found - found.max(1, keepdims=True)
    difference = p - q
    np.exp(p, out=p)
    sums = p.sum(1, dtype=np.float64)
    mean = np.einsum("rv,rv->r", p, difference, dtype=np.float64) / sums
    np.exp(q, out=q)
    result: npt.NDArray[np.float64] = mean - np.log(sums) + np.log(q.sum(1, dtype=np.float64))
    return result
