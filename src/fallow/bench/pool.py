"""The driver's side: worker processes that take turns, each stopped while another one is measured."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fallow.bench.environment import PeerError, last_line
from fallow.bench.guard import GUARD
from fallow.bench.peers.base import Variant
from fallow.bench.prepare import worker_environment
from fallow.bench.result import OURS
from fallow.bench.worker import WorkerOptions
from fallow.engine.memory import available_bytes

_LAUNCH = Path(__file__).with_name("launch.py")
_LOAD_SECONDS = 1800.0
_ANSWER_SECONDS = 1800.0
_ENDING_SECONDS = 10.0
_MAX_ANSWER_BYTES = 1 << 20
_MODEL_COPIES = 4  # memory that a worker is expected to take, in sizes of its model: weights, their packed form, cache
_WORKER_BYTES = 2 << 30  # and beside the model: libraries, compilation, a KV cache


class WorkerProcess:
    """One worker. It is stopped (SIGSTOP) except while it works, so that nothing of it can spin beside another."""

    def __init__(self, variant: Variant, options: WorkerOptions, log: Path) -> None:
        self.variant = variant
        self._log = log
        module = f"fallow.bench.workers.{variant.worker}"
        if variant.engine == OURS:
            command, environment = [str(variant.python), "-m", module], dict(os.environ)
        else:
            command, environment = [str(variant.python), str(_LAUNCH), module], worker_environment(variant.python)
        environment |= {"OMP_NUM_THREADS": str(options.threads), **variant.variables}
        with log.open("wb") as stderr:
            # A process group of its own: it can be stopped as a whole, and Ctrl-C does not reach it.
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=environment,
                process_group=0,
            )
        GUARD.protect(self._process.pid)
        self._buffer = b""
        try:
            self._exchange(asdict(options), _LOAD_SECONDS, None)
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, request: dict[str, Any], on_progress: Callable[[int, int], None] | None = None) -> dict[str, Any]:
        """The answer to one request. Raises ``PeerError`` where the worker fails, dies or does not answer in time."""
        return self._exchange(request, _ANSWER_SECONDS, on_progress)

    def close(self) -> None:
        """End the process and what it started."""
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        self._signal(signal.SIGKILL)
        self._process.wait()
        GUARD.release(self._process.pid)

    def _exchange(
        self, message: dict[str, Any], seconds: float, on_progress: Callable[[int, int], None] | None
    ) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise self._failure(self._ending()) from None
        while True:
            answer = self._line(time.monotonic() + seconds)  # who tells of progress has more time
            if "progress" not in answer:
                break
            if on_progress is not None:
                on_progress(*answer["progress"])
        self._signal(signal.SIGSTOP)
        if "error" in answer:
            raise PeerError(f"{self.variant.name}: {answer['error']}")
        return answer

    def _line(self, deadline: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                if not selector.select(max(deadline - time.monotonic(), 0)):
                    raise self._failure("did not answer in time")
                piece = os.read(self._process.stdout.fileno(), 65536)
                if not piece:
                    raise self._failure(self._ending())
                if len(self._buffer) > _MAX_ANSWER_BYTES:
                    raise self._failure(f"answered more than {_MAX_ANSWER_BYTES:,} bytes")
                self._buffer += piece
        line, _, self._buffer = self._buffer.partition(b"\n")
        try:
            answer = json.loads(line)
        except ValueError:
            raise self._failure("answered something that is not JSON") from None
        if not isinstance(answer, dict):
            raise self._failure("answered something that is not an object")
        return answer

    def _ending(self) -> str:
        """How the process ended, which has closed its side."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self._process.wait(_ENDING_SECONDS)
            if code < 0:  # an instruction that the processor does not have, say
                return f"was ended by signal {-code} ({signal.strsignal(-code)})"
        return "ended without an answer"

    def _failure(self, what: str) -> PeerError:
        return PeerError(f"The worker of {self.variant.name} {what}: {last_line(self._log)}.")

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)


class WorkerPool:
    """Workers by variant, started when they are first asked and kept while memory lasts; a context manager.

    ``max_batch``, ``max_context`` and ``max_positions`` of all workers are those of the largest load.
    """

    def __init__(self, scratch: Path, *, threads: int, max_batch: int, max_context: int, max_positions: int) -> None:
        self._scratch = scratch
        self._limits = {
            "threads": threads,
            "max_batch": max_batch,
            "max_context": max_context,
            "max_positions": max_positions,
        }
        self._workers: OrderedDict[str, WorkerProcess] = OrderedDict()

    def __enter__(self) -> WorkerPool:
        return self

    @property
    def pids(self) -> dict[str, int]:
        """The processes that are kept, by the names of their variants."""
        return {name: worker.pid for name, worker in self._workers.items()}

    def __exit__(self, *exception: object) -> None:
        for worker in self._workers.values():
            worker.close()
        self._workers.clear()

    def ask(
        self,
        variant: Variant,
        request: dict[str, Any],
        on_progress: Callable[[int, int], None] | None = None,
    ) -> dict[str, Any]:
        """The answer of the worker of ``variant``. A worker that fails is closed, and ``PeerError`` raised."""
        worker = self._workers.pop(variant.name, None)
        if worker is None:
            worker = self._start(variant)
        self._workers[variant.name] = worker
        try:
            return worker.ask(request, on_progress)
        except BaseException:
            self._workers.pop(variant.name).close()
            raise

    def _start(self, variant: Variant) -> WorkerProcess:
        needed = _WORKER_BYTES + _MODEL_COPIES * size_of(variant.model)
        while self._workers and (available_bytes() or 0) < needed:
            _, oldest = self._workers.popitem(last=False)
            oldest.close()
        return start_worker(variant, self._scratch, **self._limits)


def start_worker(
    variant: Variant, scratch: Path, *, threads: int, max_batch: int, max_context: int, max_positions: int
) -> WorkerProcess:
    """A worker with its model loaded; its stderr goes to a file in ``scratch``."""
    options = WorkerOptions(
        model=str(variant.model),
        precision=variant.worker_precision,
        threads=threads,
        max_batch=max_batch,
        max_context=max_context,
        max_positions=max_positions,
        dense=variant.dense,
    )
    return WorkerProcess(variant, options, scratch / f"{variant.name.replace(' ', '-')}.log")


def size_of(model: Path) -> int:
    """Bytes of a file, or of the files of a folder; 0 where there is neither."""
    if not model.is_dir():
        return model.stat().st_size if model.exists() else 0
    return sum(path.stat().st_size for path in model.iterdir() if path.is_file())
