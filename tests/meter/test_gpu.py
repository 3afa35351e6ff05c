"""The energy counter of a GPU, where there is one, and what is said where there is none."""

from __future__ import annotations

import time

import pytest
import torch

from fallow.meter.gpu import GpuCounter
from fallow.training.energy import StepMeter
from fallow.training.processes import Processes


def test_a_gpu_that_cannot_be_read_says_why() -> None:
    with pytest.raises(OSError, match=r"NVML says: .+|nvidia-ml-py is not installed"):
        GpuCounter("GPU-00000000-0000-0000-0000-000000000000")


def test_without_a_gpu_nothing_is_said_of_one() -> None:
    notes: list[str] = []
    meter = StepMeter(Processes(), notes.append)
    before = meter.reading()
    seconds, joules = meter.since(before)
    assert meter.source in {"rapl", "estimate"}
    assert seconds > 0
    assert joules >= 0
    assert notes == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_the_joules_of_a_gpu_are_those_of_a_working_one() -> None:
    notes: list[str] = []
    meter = StepMeter(Processes(device=torch.device("cuda", 0)), notes.append)
    assert notes == []
    assert meter.source.endswith("+nvml")
    matrix = torch.randn(4096, 4096, device="cuda")
    before = meter.reading()
    end = time.monotonic() + 1
    while time.monotonic() < end:
        for _ in range(50):
            matrix @ matrix
        torch.cuda.synchronize()
    seconds, joules = meter.since(before)
    assert 30 < joules / seconds < 2000  # watts
