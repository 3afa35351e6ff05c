"""An exponential moving average of the weights (Polyak and Juditsky 1992)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fallow.training.optimizers.shards import own_part


class WeightAverage:
    """``average = decay * average + (1 - decay) * weights`` after each step; ``decay`` rises from 0 at the start
    (``(1 + step) / (10 + step)`` at most), so that the first weights are soon forgotten."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.weights: dict[str, Tensor] = {name: p.detach().clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        averages = [own_part(average) for average in self.weights.values()]
        torch._foreach_lerp_(averages, [own_part(p.detach()) for p in self._parameters.values()], 1 - decay)

    @contextmanager
    @torch.no_grad()
    def in_place(self) -> Iterator[None]:
        """The model holds the average while the block runs."""
        kept = {name: p.detach().clone() for name, p in self._parameters.items()}
        self._write(self.weights)
        try:
            yield
        finally:
            self._write(kept)

    def _write(self, weights: dict[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.data.copy_(weights[name])
