"""How the learning rate and the batch change over a run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class LearningRate:
    """A factor from 0 to 1 for each step.

    ``warmup`` steps rise linearly. Then ``linear`` falls to ``final`` over all that is left, ``cosine`` along half a
    cosine, ``wsd`` (warm-up, stable, decay: arXiv 2404.06395) stays and falls linearly over the last ``decay`` steps,
    ``constant`` stays.
    """

    kind: Literal["linear", "cosine", "wsd", "constant"]
    steps: int
    warmup: int = 0
    decay: int = 0
    final: float = 0.0

    def factor(self, step: int) -> float:
        """The factor at ``step`` (from 0), in the middle of which it is taken: no step has the factor 0."""
        done = step + 0.5
        if done < self.warmup:
            return done / self.warmup
        if self.kind == "constant":
            return 1.0
        begin = self.steps - self.decay if self.kind == "wsd" else self.warmup
        if done <= begin or self.steps <= begin:
            return 1.0
        part = min((done - begin) / (self.steps - begin), 1.0)
        left = 0.5 * (1 + math.cos(math.pi * part)) if self.kind == "cosine" else 1 - part
        return self.final + (1 - self.final) * left


@dataclass(frozen=True)
class BatchSize:
    """Sequences a step: ``first`` at the beginning, then rising in equal steps to ``last`` over ``ramp`` steps; or
    ``bag`` times ``last`` in each of the first ``bagged`` steps (token superposition), and then ``last``."""

    last: int
    first: int = 0
    ramp: int = 0
    bag: int = 1
    bagged: int = 0

    def bag_at(self, step: int) -> int:
        """How many tokens are one position of the model."""
        return self.bag if step < self.bagged else 1

    def at(self, step: int) -> int:
        if step < self.bagged:
            return self.bag * self.last
        if step >= self.ramp or not self.first:
            return self.last
        return self.first + (self.last - self.first) * step // self.ramp

    @staticmethod
    def superposed(sequences: int, last: int, bag: int, share: float) -> tuple[BatchSize, int]:
        """The batch sizes of a run over ``sequences``, and its steps, ``share`` of which take bags."""
        steps = max(math.ceil(sequences / (last * (1 + (bag - 1) * share))), 1)
        return BatchSize(last, bag=bag, bagged=round(share * steps)), steps

    @staticmethod
    def planned(sequences: int, last: int, first: int, share: float) -> tuple[BatchSize, int]:
        """The batch sizes of a run over ``sequences``, and its steps; ``share`` of the sequences pass on the way up."""
        ramp = round(share * sequences / ((first + last) / 2)) if first else 0
        size = BatchSize(last, first, ramp)
        left = max(sequences - size.before(ramp), 0)
        return size, max(ramp + -(-left // last), 1)

    def before(self, step: int) -> int:
        """Sequences of all steps before ``step``: where the run is in its data."""
        ramped = min(step, self.ramp) if self.first else 0
        in_bags = min(step, self.bagged) * (self.bag - 1) * self.last
        return sum(self.at(i) for i in range(ramped)) + (step - ramped) * self.last + in_bags
