"""Joules of NVIDIA GPUs, from the counters of their driver. Needs ``nvidia-ml-py``, of the extra ``train``."""

from __future__ import annotations

from typing import Any


class GpuCounter:
    """The energy of one GPU since its driver was loaded, whoever used it (NVML API reference,
    ``nvmlDeviceGetTotalEnergyConsumption``: Volta and later).

    ``uuid`` names it, as PyTorch's ``get_device_properties(device).uuid`` or ``nvidia-smi -L`` do. Raises ``OSError``
    with the reason where it cannot be read.
    """

    def __init__(self, uuid: str) -> None:
        try:
            import pynvml  # noqa: PLC0415  an optional package
        except ImportError:
            raise OSError("the package nvidia-ml-py is not installed") from None
        self._nvml: Any = pynvml
        try:
            pynvml.nvmlInit()
            self._gpu = pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
            self.name: str = pynvml.nvmlDeviceGetName(self._gpu)
            self.joules()
        except pynvml.NVMLError as error:
            raise OSError(f"NVML says: {error}") from error

    def joules(self) -> float:
        """The counter, which has thousandths and moves every few hundredths of a second."""
        return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._gpu)) / 1e3
