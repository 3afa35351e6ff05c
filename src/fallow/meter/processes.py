"""What Linux knows about a process and its children: CPU time and memory. Needs nothing but the standard library."""

from __future__ import annotations

import os
import time
from pathlib import Path

PROC = Path("/proc")
_TICKS = os.sysconf("SC_CLK_TCK")


def process_tree(pid: int, proc: Path = PROC) -> list[int]:
    """``pid`` and all its living descendants."""
    children: dict[int, list[int]] = {}
    for entry in proc.iterdir():
        if entry.name.isdigit():
            fields = _stat_fields(proc, int(entry.name))
            if fields is not None:
                children.setdefault(int(fields[1]), []).append(int(entry.name))
    tree = [pid]
    for member in tree:
        tree.extend(children.get(member, ()))
    return tree


def cpu_seconds(pids: list[int], proc: Path = PROC) -> float:
    """User and system time of ``pids`` since each began, with that of their children that have ended.

    In hundredths of a second, mostly; this process's own part is exact.
    """
    ticks, exact = 0, 0.0
    for pid in pids:
        fields = _stat_fields(proc, pid)
        if fields is None:
            continue
        own, children = fields[11:13], fields[13:15]  # utime, stime; cutime, cstime
        ticks += sum(map(int, children))
        if pid == os.getpid():
            exact = time.process_time()
        else:
            ticks += sum(map(int, own))
    return exact + ticks / _TICKS


def resident_bytes(pids: list[int], proc: Path = PROC) -> int:
    """Memory that is resident now, files mapped into it among it (``VmRSS``); shared pages count in each process."""
    return sum(_status_bytes(proc, pid, "VmRSS:") for pid in pids)


def peak_resident_bytes(pids: list[int], proc: Path = PROC) -> int:
    """The sum over ``pids`` of the most that each had resident (``VmHWM``)."""
    return sum(_status_bytes(proc, pid, "VmHWM:") for pid in pids)


def _stat_fields(proc: Path, pid: int) -> list[str] | None:
    """``/proc/PID/stat`` after the name, which may hold spaces; None where the process has gone. proc(5)."""
    try:
        return (proc / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None


def _status_bytes(proc: Path, pid: int, name: str) -> int:
    try:
        for line in (proc / str(pid) / "status").read_text(errors="replace").splitlines():
            if line.startswith(name):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0
