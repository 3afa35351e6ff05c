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
from collections.abc import Iterable


class Guard:
    """The process that watches. It is started when the first group is put under its protection."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def protect(self, group: int) -> None:
        """Kill process group ``group`` when this process ends."""
        if self._process is None or self._process.poll() is not None:
            # Ctrl-C must not reach it, so that it is there to the end.
            self._process = subprocess.Popen([sys.executable, "-I", __file__], stdin=subprocess.PIPE, process_group=0)
        self._say(f"+{group}\n")

    def release(self, group: int) -> None:
        """``group`` has ended, and its number may mean another one from now on."""
        self._say(f"-{group}\n")

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
    for group in groups:
        with contextlib.suppress(OSError):
            os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    watch(sys.stdin)
