"""What the steps of a training took, told by the worker that trains. Standard library only, as is the meter."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from fallow.meter.energy import EnergyMeter, Reading
from fallow.meter.processes import peak_resident_bytes, process_tree


class StepClock:
    """Wall-clock time, joules and memory of the steps of one training, each told to ``say`` as progress.

    Time goes from the end of a step to the end of the next, so everything between two steps counts. The first one also
    holds what is done once (compiling, the first touch of memory): it counts as much as the others do on average, and
    what it took beyond that is ``compile_seconds``.
    """

    def __init__(self, say: Callable[[dict[str, Any]], None]) -> None:
        self._say = say
        self._meter = EnergyMeter()
        self._pids = [os.getpid()]
        self._began = self._meter.reading(self._pids)
        self._last: Reading | None = None
        self._first_seconds = 0.0
        self._seconds = 0.0
        self._joules = 0.0
        self._steps = 0
        self._peak_bytes = 0
        self.losses: list[float] = []

    def begin(self) -> None:
        """The first step begins."""
        self._began = self._meter.reading(self._pids)

    def step_ended(self, steps: int, loss: float, *, first_seconds: float | None = None) -> None:
        """One of ``steps`` has ended. ``first_seconds``: what the first one took, where ``begin`` was not called."""
        if self._last is None:
            self._pids = process_tree(os.getpid())  # compilers that a library keeps are part of it
        now = self._meter.reading(self._pids)
        if self._last is None:
            self._first_seconds = now.at - self._began.at if first_seconds is None else first_seconds
        else:
            used = self._meter.between(self._last, now)
            self._seconds += used.seconds
            self._joules += used.joules
        self._last = now
        self._steps += 1
        self.losses.append(loss)
        if self._steps == steps:
            self._peak_bytes = peak_resident_bytes(process_tree(os.getpid()))
        self._say({"progress": [self._steps, steps], "loss": loss})

    def used(self) -> dict[str, Any]:
        """``seconds`` and ``joules`` of all steps, ``compile_seconds`` beside them, and the peak of resident memory at
        the end of the last step, with that of processes that this one keeps."""
        assert self._steps > 1, "the first step is measured by the others"
        share = self._steps / (self._steps - 1)
        return {
            "seconds": self._seconds * share,
            "compile_seconds": max(self._first_seconds - self._seconds / (self._steps - 1), 0.0),
            "joules": self._joules * share,
            "energy_source": self._meter.source,
            "peak_memory_bytes": self._peak_bytes,
            "steps": self._steps,
            "first_loss": self.losses[0],
            "last_loss": self.losses[-1],
        }
