"""How long a step of decoding takes on this machine, for a stated load."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from fallow.engine.batch import StepBatch, greedy
from fallow.engine.runner import ModelRunner

_STEPS = 12
_PREFILL = 512  # tokens a step


class Decoding:
    """``batch`` sequences that have read ``context`` tokens of ``texts``, each with pages of its own, and go on."""

    def __init__(self, runner: ModelRunner, texts: Sequence[Sequence[int]], batch: int, context: int) -> None:
        self._runner, self._batch = runner, batch
        self._width = pages_of(context)
        self._table = np.arange(batch * self._width, dtype=np.int32).reshape(batch, self._width)
        self._position = context
        for sequence in range(batch):
            tokens = np.resize(np.asarray(texts[sequence % len(texts)], np.int32), context)
            for start in range(0, context, _PREFILL):
                part = tokens[start : start + _PREFILL]
                table = self._table[sequence : sequence + 1]
                runner.step(_batch(part, np.array([0, len(part)]), np.array([start]), table))

    def step_seconds(self) -> float:
        """The fastest of some steps; where the next ones begin is the same every time."""
        seconds = []
        tokens = np.full(self._batch, 1, np.int32)
        for step in range(_STEPS):
            positions = np.full(self._batch, self._position + step)
            batch = _batch(tokens, np.arange(self._batch + 1), positions, self._table)
            began = time.perf_counter()
            tokens = self._runner.step(batch).tokens
            seconds.append(time.perf_counter() - began)
        return min(seconds)


def pages_of(context: int) -> int:
    """Pages of one sequence of ``Decoding``."""
    return -(-(context + _STEPS) // ModelRunner.page_size)


def _batch(tokens: np.ndarray, offsets: np.ndarray, positions: np.ndarray, table: np.ndarray) -> StepBatch:
    sampling = greedy(len(positions))
    offsets, positions = offsets.astype(np.int32), positions.astype(np.int32)
    return StepBatch(tokens, offsets, positions, table, offsets[1:] - 1, sampling)
