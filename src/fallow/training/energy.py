"""Time and joules of a step, those of all processes together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from fallow.meter.energy import EnergyMeter, Reading
from fallow.meter.gpu import GpuCounter
from fallow.training.processes import Processes


@dataclass(frozen=True)
class StepReading:
    """The state of what this process measures; ``gpu`` in joules."""

    host: Reading
    gpu: float


class StepMeter:
    """Every host's processor and memory as ``EnergyMeter`` sees them, and every process's own GPU.

    A GPU whose counter cannot be read is told to ``on_note``, and ``source`` says that it is missing.
    """

    source: str

    def __init__(self, processes: Processes, on_note: Callable[[str], None]) -> None:
        self._processes = processes
        self._meter = EnergyMeter()
        self._gpu: GpuCounter | None = None
        self.source = self._meter.source
        if processes.device.type != "cuda":
            return
        try:
            self._gpu = GpuCounter(str(torch.cuda.get_device_properties(processes.device).uuid))
            self.source += "+nvml"
        except OSError as error:
            self.source += ", without the GPU"
            on_note(f"The joules are those of the host alone, for its GPU cannot be metered: {error}.")

    def reading(self) -> StepReading:
        """The state now."""
        host = self._meter.reading(self._processes.measured)
        return StepReading(host, self._gpu.joules() if self._gpu is not None else 0.0)

    def since(self, before: StepReading) -> tuple[float, float]:
        """Seconds on this process and joules of all processes since then; all must call it."""
        after = self.reading()
        used = self._meter.between(before.host, after.host)
        host = used.joules if self._processes.measured else 0.0
        return used.seconds, self._processes.total(host + after.gpu - before.gpu)
