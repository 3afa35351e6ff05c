"""The windows of a run as a file, in the order of our trainer, for a trainer that shuffles on its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fallow.data.windows import Batch, Windows
from fallow.errors import FallowError
from fallow.training.recipe import Recipe

_AT_ONCE = 256
_IGNORED = -100  # what transformers takes for a target that does not count


def write_train(path: Path, windows: Windows, sequences: int) -> None:
    """The first ``sequences`` of a training: int32 ``[2, sequences, context]``, inputs and targets."""
    pairs = np.lib.format.open_memmap(path, "w+", np.int32, (2, sequences, windows.context))
    for first in range(0, sequences, _AT_ONCE):
        count = min(_AT_ONCE, sequences - first)
        pairs[:, first : first + count] = _pair(windows.batch(first, count))
    pairs.flush()


def write_valid(path: Path, windows: Windows, count: int) -> int:
    """The first ``count`` windows in the order of the text; the bytes that their targets stand for."""
    batch = windows.in_order(0, count)
    np.save(path, _pair(batch).astype(np.int32))
    return windows.bytes_of(batch.counted_targets())


def evaluated_windows(recipe: Recipe, windows: Windows) -> int:
    """How many windows every side is evaluated on. Raises ``FallowError`` where our trainer would take fewer."""
    count = min(max(recipe.report.evaluate_tokens // windows.context, 1), len(windows))
    at_once = recipe.train.micro_batch or recipe.train.batch
    if count % at_once:
        raise FallowError(
            f"{recipe.name} evaluates {count} windows, {at_once} at once, which leaves a rest, so the sides would be "
            "evaluated on different text: make report.evaluate_tokens a multiple of the context and the batch."
        )
    return count


def _pair(batch: Batch) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    targets = batch.counted_targets()
    return np.stack([batch.inputs, np.where(targets < 0, _IGNORED, targets)])
