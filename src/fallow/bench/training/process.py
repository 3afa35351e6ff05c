"""A worker that does one job: started, listened to, and ended with what it started."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fallow.bench.environment import PeerError, last_line
from fallow.bench.guard import GUARD
from fallow.bench.prepare import worker_environment

_LAUNCH = Path(__file__).parents[1] / "launch.py"


def do_job(
    worker: str,
    job: dict[str, Any],
    *,
    python: Path | None,
    log: Path,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """What the worker ``fallow.bench.workers.<worker>`` says of ``job``; it runs in ``python``, a peer's, or in this
    one where that is None. Its stderr goes to ``log``.

    Raises ``PeerError`` where it fails.
    """
    module = f"fallow.bench.workers.{worker}"
    if python is None:
        command, environment = [sys.executable, "-m", module], dict(os.environ)
    else:
        command, environment = [str(python), str(_LAUNCH), module], worker_environment(python)
    environment["OMP_NUM_THREADS"] = str(job["threads"])
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, env=environment, process_group=0
        )
    GUARD.protect(process.pid)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        with contextlib.suppress(BrokenPipeError):  # why it has ended is in its log
            process.stdin.write(json.dumps(job).encode() + b"\n")
            process.stdin.close()
        for line in process.stdout:
            message = json.loads(line)
            if "progress" in message:
                on_progress(*message["progress"])
            elif "error" in message:
                raise PeerError(f"{worker} failed: {message['error']}")
            else:
                done: dict[str, Any] = message["done"]
                return done
        raise PeerError(f"{worker} ended without a result: {last_line(log)}.")
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.stdout.close()
        process.wait()
        GUARD.release(process.pid)
