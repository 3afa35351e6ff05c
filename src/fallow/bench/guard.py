"""Ends what the benchmark started even where the benchmark itself is killed: a stopped worker could not do it.

A process of its own is told the process groups on its stdin, one a line (``+123`` and ``-123``). When its stdin ends,
the benchmark has ended, however that was, and what is still on the list is killed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator


class Guard:
    """The process that watches, started when the first group is put under its protection. Threads may share it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._groups: set[int] = set()
        self._ending = False
        self._lock = threading.Lock()

    def protect(self, group: int) -> None:
        """Kill process group ``group`` when this process ends."""
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                # Ctrl-C must not reach it, so that it is there to the end.
                self._process = subprocess.Popen(
                    [sys.executable, "-I", __file__], stdin=subprocess.PIPE, process_group=0
                )
            self._groups.add(group)
            self._say(f"+{group}\n")
            if self._ending:
                _kill([group])

    def release(self, group: int) -> None:
        """``group`` has ended, and its number may mean another one from now on."""
        with self._lock:
            self._groups.discard(group)
            self._say(f"-{group}\n")

    @contextlib.contextmanager
    def ending(self) -> Iterator[None]:
        """Kill what is protected, and what comes to be protected within the block."""
        with self._lock:
            self._ending = True
            _kill(self._groups)
        try:
            yield
        finally:
            self._ending = False

    def _say(self, line: str) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.write(line.encode())
            self._process.stdin.flush()


GUARD = Guard()


def watch(lines: Iterable[str]) -> None:
    """Read the groups until the input ends, then kill those that are left."""
    groups: set[int] = set()
    for line in lines:
        (groups.add if line[0] == "+" else groups.discard)(int(line[1:]))
    _kill(groups)


def _kill(groups: Iterable[int]) -> None:
    for group in groups:
        with contextlib.suppress(OSError):
            os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    watch(sys.stdin)
