"""How well a model does: on texts, on tasks, in long documents."""

from __future__ import annotations

from pathlib import Path

NEEDLE = "needle"  # what commands call it
TRIALS = 20  # needles at each depth, where nobody says


def is_needle(task: str) -> bool:
    """Whether a task is to find needles; a file of that name is another one."""
    return task == NEEDLE and not Path(task).exists()
