"""Joules from powercap files in a folder of our own, and the estimate of a process that really computes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fallow.meter.energy import WATTS_PER_BUSY_CORE, WATTS_PER_RESIDENT_GB, EnergyMeter, RaplDomain, rapl_domains
from fallow.meter.processes import peak_resident_bytes, process_tree, resident_bytes

WRAP = 262_143_328_850


def add_zone(powercap: Path, zone: str, name: str, energy_uj: int | str) -> Path:
    folder = powercap / zone
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{name}\n")
    (folder / "max_energy_range_uj").write_text(f"{WRAP}\n")
    (folder / "energy_uj").write_text(f"{energy_uj}\n")
    return folder / "energy_uj"


def test_packages_and_memory_are_added_up_and_parts_of_a_package_are_not(tmp_path: Path) -> None:
    packages = [add_zone(tmp_path, f"intel-rapl:{i}", f"package-{i}", 1_000_000 * i) for i in range(2)]
    dram = add_zone(tmp_path, "intel-rapl:0:1", "dram", 0)
    core = add_zone(tmp_path, "intel-rapl:0:0", "core", 0)
    psys = add_zone(tmp_path, "intel-rapl:2", "psys", 0)
    meter = EnergyMeter(powercap=tmp_path)
    assert meter.source == "rapl"
    with meter.measure() as measured:
        for file, joules in ((packages[0], 3), (packages[1], 5), (dram, 7), (core, 100), (psys, 1000)):
            file.write_text(str(int(file.read_text()) + joules * 1_000_000))
    assert measured.joules == pytest.approx(3 + 5 + 7)
    assert "package-0" in meter.method


def test_a_counter_that_wraps_round_loses_nothing(tmp_path: Path) -> None:
    counter = add_zone(tmp_path, "intel-rapl:0", "package-0", WRAP - 1_000_000)
    meter = EnergyMeter(powercap=tmp_path)
    with meter.measure() as measured:
        counter.write_text("1999999\n")
    assert measured.joules == pytest.approx(3.0)


@pytest.mark.parametrize(("before", "after", "joules"), [(0, 0, 0), (5, 5_000_005, 5), (WRAP, 0, 1e-6)])
def test_joules_between_two_readings(before: int, after: int, joules: float) -> None:
    assert RaplDomain("package-0", Path("energy_uj"), WRAP).joules_between(before, after) == pytest.approx(joules)


@pytest.mark.parametrize("damage", ["missing", "not a number", "unreadable"])
def test_counters_that_cannot_be_read_are_not_used(tmp_path: Path, damage: str) -> None:
    add_zone(tmp_path, "intel-rapl:0", "package-0", 0)
    counter = add_zone(tmp_path, "intel-rapl:1", "package-1", "what" if damage == "not a number" else 0)
    if damage == "missing":
        counter.unlink()
    elif damage == "unreadable":
        counter.unlink()
        counter.mkdir()  # root may read any file, but nobody reads a folder
    assert rapl_domains(tmp_path) == []
    assert EnergyMeter(powercap=tmp_path).source == "estimate"


def test_the_estimate_is_cpu_time_and_memory_at_the_stated_watts(tmp_path: Path) -> None:
    meter = EnergyMeter(powercap=tmp_path)
    before = resident_bytes([os.getpid()])
    with meter.measure() as measured:
        started = time.process_time()
        while time.process_time() - started < 0.3:
            sum(range(1000))
    assert "W per busy core" in meter.method
    assert measured.cpu_seconds >= 0.25  # the kernel counts in hundredths of a second
    assert measured.seconds >= measured.cpu_seconds - 0.05
    memory = measured.joules - measured.cpu_seconds * WATTS_PER_BUSY_CORE
    assert memory == pytest.approx(before / 1e9 * WATTS_PER_RESIDENT_GB * measured.seconds, rel=0.5)


def test_children_of_another_process_are_measured_too(tmp_path: Path) -> None:
    busy = "import time, sys\nwhile time.process_time() < 0.3: pass\nprint('done', flush=True); sys.stdin.read()"
    parent = (
        "import subprocess, sys\n"
        f"p = subprocess.Popen([sys.executable, '-c', {busy!r}], stdin=subprocess.PIPE)\n"
        "sys.stdin.read(); p.stdin.close(); p.wait()"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        meter = EnergyMeter(process.pid, powercap=tmp_path)
        with meter.measure() as measured:
            assert process.stdout.readline() == "done\n"
        assert len(process_tree(process.pid)) == 2
        assert measured.cpu_seconds >= 0.25
        assert peak_resident_bytes(process_tree(process.pid)) > peak_resident_bytes([process.pid]) > 0
    finally:
        process.stdin.close()
        assert process.wait(20) == 0
        process.stdout.close()
