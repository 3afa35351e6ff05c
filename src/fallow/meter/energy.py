"""Joules: read from the CPU's own counters where the kernel shows them, else estimated from CPU time and memory.

Needs nothing but the standard library, so that a peer's worker measures with the same meter in its own environment.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
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
class Reading:
    """The state of all that is measured: ``at`` in seconds of ``time.perf_counter``, counters in microjoules."""

    at: float
    cpu_seconds: float
    resident_bytes: int
    counters: tuple[int, ...]


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

    def reading(self, pids: Sequence[int] | None = None) -> Reading:
        """The state now, for ``between``. ``pids`` are the processes to look at, where they are known already: finding
        them takes milliseconds."""
        found = list(pids) if pids is not None else process_tree(self._pid)
        counters = tuple(domain.read() for domain in self._domains)
        return Reading(time.perf_counter(), cpu_seconds(found), resident_bytes(found), counters)

    def between(self, before: Reading, after: Reading) -> Measurement:
        """What was used between two readings, which are less than one round of a counter apart: minutes to hours under
        load."""
        seconds = after.at - before.at
        # A child that ended without being waited for takes its time along.
        cpu = max(after.cpu_seconds - before.cpu_seconds, 0.0)
        if self._domains:
            joules = sum(map(RaplDomain.joules_between, self._domains, before.counters, after.counters))
        else:
            gigabytes = (before.resident_bytes + after.resident_bytes) / 2 / 1e9
            joules = cpu * WATTS_PER_BUSY_CORE + gigabytes * WATTS_PER_RESIDENT_GB * seconds
        return Measurement(joules, seconds, cpu)

    @contextmanager
    def measure(self) -> Iterator[Measurement]:
        """Measures the block, whose ``Measurement`` is filled in when it ends."""
        measurement = Measurement()
        before = self.reading()
        try:
            yield measurement
        finally:
            used = self.between(before, self.reading())
            measurement.joules, measurement.seconds = used.joules, used.seconds
            measurement.cpu_seconds = used.cpu_seconds


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
