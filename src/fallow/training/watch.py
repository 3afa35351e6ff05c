"""Steps that went wrong: a loss or gradient that is no number, or a loss that leaps."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from statistics import fmean, pstdev

from torch import Tensor

from fallow.errors import FallowError

_WINDOW = 64
_FEWEST = 16
_DEVIATIONS = 8.0
_SMALLEST_LEAP = 0.5  # nats: noise of small batches stays below


class DivergedError(FallowError):
    """The loss or a gradient is lost, and the run was stopped before the update."""


class LossWatch:
    """Compares each loss with those of the last 64 steps."""

    def __init__(self, losses: Iterable[float] = ()) -> None:
        self.losses: deque[float] = deque(losses, maxlen=_WINDOW)

    def complaint(self, loss: float, gradient_norm: float) -> str | None:
        """What is wrong with a step before its update, or None; a good loss is remembered."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if (complaint := gradient_complaint(loss, gradient_norm)) is not None:
            return complaint
        if len(self.losses) >= _FEWEST:
            mean = fmean(self.losses)
            limit = mean + max(_DEVIATIONS * pstdev(self.losses), _SMALLEST_LEAP)
            if loss > limit:
                return f"the loss leapt to {loss:.4g}, from {mean:.4g} on average before"
        self.losses.append(loss)
        return None


def gradient_complaint(loss: float, norm: float) -> str | None:
    """What is wrong with a gradient whose loss is good, or None."""
    return None if math.isfinite(norm) else f"the loss is {loss:.4g}, but the norm of the gradient is {norm}"


def first_bad_gradient(gradients: Iterable[tuple[str, Tensor | None]]) -> str | None:
    """The first parameter whose gradient is not finite."""
    for name, gradient in gradients:
        if gradient is not None and not bool(gradient.isfinite().all()):
            return name
    return None
