"""Joules: read from the CPU's own counters where the kernel shows them, else estimated from CPU time and memory.

Needs nothing but the standard library, so that a peer's worker measures with the same meter in its own environment.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fallow.meter.processes import cpu_seconds, process_tree, resident_bytes

POWERCAP = Path("/sys/class/powercap")

# Cloud Carbon Footprint's coefficients (ccf-coefficients, 2026-04-24): a thread of a 4th generation EPYC draws 2.282 W
# at full load, from SPECpower_ssj2008 results, which are those of the whole server; a core has two threads.
WATTS_PER_BUSY_CORE = 2 * 2.282
# The same project's memory coefficient: 0.000392 kWh for a gigabyte-hour.
WATTS_PER_RESIDENT_GB = 0.392
ESTIMATE_METHOD = (
    f"CPU seconds x {WATTS_PER_BUSY_CORE:.2f} W per busy core + resident memory x {WATTS_PER_RESIDENT_GB} W/GB "
    "(Cloud Carbon Footprint coefficients, AMD EPYC 4th generation)"
)


@dataclass
class Measurement:
    """What a ``with meter.measure()`` block took; ``cpu_seconds`` is time on cores, whatever the source of joules."""

    joules: float = 0.0
    seconds: float = 0.0
    cpu_seconds: float = 0.0


@dataclass(frozen=True)
class RaplDomain:
    """One counter of Linux's powercap interface, in microjoules; after ``wrap_uj`` it begins again at 0."""

    name: str
    file: Path
    wrap_uj: int

    def read(self) -> int:
        return int(self.file.read_text())

    def joules_between(self, before: int, after: int) -> float:
        """Energy between two readings that are less than one round of the counter apart."""
        return ((after - before) % (self.wrap_uj + 1)) / 1e6


class EnergyMeter:
    """Measures blocks of code. ``source`` says what its joules are:

    ``"rapl"``: the counters of all CPU packages and of their memory, where it has one, under /sys/class/powercap
    (Linux kernel documentation, "Power Capping Framework"): everything the machine did in that time.

    ``"estimate"``: where no counter can be read (most virtual machines; files that only root may read). CPU time and
    resident memory of process ``pid`` (this one by default) and of its children, at the stated figures: what this
    process caused, without idle cores, disks or fans. It compares engines on one machine; it is no invoice.
    """

    source: Literal["rapl", "estimate"]

    def __init__(self, pid: int | None = None, *, powercap: Path = POWERCAP) -> None:
        self._pid = pid or os.getpid()
        self._domains = rapl_domains(powercap)
        self.source = "rapl" if self._domains else "estimate"

    @property
    def method(self) -> str:
        """One line for people: where the joules come from."""
        if self.source == "rapl":
            return "RAPL counters: " + ", ".join(domain.name for domain in self._domains)
        return ESTIMATE_METHOD

    @contextmanager
    def measure(self) -> Iterator[Measurement]:
        """Fills in the measurement when the block ends. Counters wrap round within minutes to hours under load, so a
        block should not last longer than that."""
        measurement = Measurement()
        pids = process_tree(self._pid)
        cpu_before, memory_before = cpu_seconds(pids), resident_bytes(pids)
        counters_before = [domain.read() for domain in self._domains]
        started = time.perf_counter()
        try:
            yield measurement
        finally:
            measurement.seconds = time.perf_counter() - started
            counters = [domain.read() for domain in self._domains]
            pids = process_tree(self._pid)
            # A child that ended without being waited for takes its time along.
            measurement.cpu_seconds = max(cpu_seconds(pids) - cpu_before, 0.0)
            if self._domains:
                measurement.joules = sum(
                    domain.joules_between(before, after)
                    for domain, before, after in zip(self._domains, counters_before, counters, strict=True)
                )
            else:
                gigabytes = (memory_before + resident_bytes(pids)) / 2 / 1e9
                measurement.joules = (
                    measurement.cpu_seconds * WATTS_PER_BUSY_CORE
                    + gigabytes * WATTS_PER_RESIDENT_GB * measurement.seconds
                )


def rapl_domains(powercap: Path = POWERCAP) -> list[RaplDomain]:
    """The counters of every CPU package, and of its memory where there is one; empty unless all of them can be read.

    ``core`` and ``uncore`` are parts of their package, and ``psys`` holds it, so they are left out.
    """
    domains = []
    try:
        for zone in sorted(powercap.glob("intel-rapl:*")):  # AMD's counters have this name too
            name = (zone / "name").read_text().strip()
            if name.startswith("package") or name == "dram":
                wrap_uj = int((zone / "max_energy_range_uj").read_text())
                domain = RaplDomain(name, zone / "energy_uj", wrap_uj)
                domain.read()
                domains.append(domain)
    except (OSError, ValueError):
        return []
    return domains
