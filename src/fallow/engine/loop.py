"""The thread that owns the runner: takes requests, computes step after step, and tells each request what it got."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Protocol, TypeVar

from fallow.engine.batch import StepBatch, StepResult
from fallow.engine.outputs import EngineStats, FinishReason, RequestDelta
from fallow.engine.scheduler import Event, Scheduler
from fallow.engine.sequence import Request
from fallow.errors import OverloadedError

logger = logging.getLogger("fallow.engine")
T = TypeVar("T")


class Runner(Protocol):
    """What the loop asks of a ``ModelRunner``."""

    def step(self, batch: StepBatch) -> StepResult: ...

    def close(self) -> None: ...


class StepLoop:
    """Runs a scheduler's steps on a thread of its own until it is closed.

    ``submit``, ``cancel``, ``drain`` and ``close`` may be called on any thread.
    """

    def __init__(self, runner: Runner, scheduler: Scheduler, *, max_queue: int) -> None:
        self._runner = runner
        self._scheduler = scheduler
        self._max_queue = max_queue
        self._numbers = itertools.count()
        self._inbox: deque[Callable[[], None]] = deque()
        self._awake = threading.Event()
        self._requests: dict[str, Request] = {}  # unfinished ones; the thread's own
        # Guards the counts below, which change when a request comes, begins or ends, never in a step.
        self._changed = threading.Condition()
        self._unfinished_requests = 0
        self._unfinished_sequences = 0
        self._queued = 0
        self._refusal: str | None = None
        self._closing = False
        self._steps = 0
        self._busy_seconds = 0.0
        self._thread = threading.Thread(target=self._run, name="fallow-engine", daemon=True)
        self._thread.start()

    def next_number(self) -> int:
        return next(self._numbers)

    def submit(self, request: Request, *, wait: bool) -> None:
        """Queue a request. Raises ``OverloadedError`` where the engine is draining, or where the queue is full and
        the caller does not want to ``wait``."""
        with self._changed:
            if wait:
                self._changed.wait_for(lambda: self._refusal is not None or self._queued < self._max_queue)
            if self._refusal is not None:
                raise OverloadedError(self._refusal)
            if self._queued >= self._max_queue:
                raise OverloadedError(
                    f"The queue is full with {self._queued} requests that wait: send the request again later."
                )
            self._queued += 1
            self._unfinished_requests += 1
            self._unfinished_sequences += len(request.sequences)
            self._inbox.append(lambda: self._accept(request))
        self._awake.set()

    def cancel(self, request_id: str) -> None:
        """End a request; nothing happens where it has ended already."""
        self._inbox.append(lambda: self._cancel(request_id))
        self._awake.set()

    def between_steps(self, work: Callable[[], T]) -> T:
        """Do some work on the thread while no step runs; not to be called on it. Raises what the work raises, and
        ``OverloadedError`` where the engine is draining or closed."""
        done: Future[T] = Future()

        def run() -> None:
            try:
                done.set_result(work())
            except Exception as error:
                done.set_exception(error)

        with self._changed:
            if self._refusal is not None:
                raise OverloadedError(self._refusal)
            self._inbox.append(run)
        self._awake.set()
        return done.result()

    def drain(self, timeout: float | None) -> bool:
        """Refuse new requests and wait until all others have ended; whether they have."""
        with self._changed:
            self._refusal = self._refusal or "The engine is shutting down and takes no more requests."
            self._changed.notify_all()
            return self._changed.wait_for(lambda: not self._unfinished_requests, timeout)

    def close(self) -> None:
        """Cancel what runs, stop the thread and close the runner."""
        with self._changed:
            self._refusal = "The engine is closed."
            self._closing = True
            self._changed.notify_all()
        self._awake.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def stats(self) -> EngineStats:
        scheduler = self._scheduler
        # In this order: a request that moves on between two readings is counted twice rather than not at all.
        unfinished = self._unfinished_sequences
        running = scheduler.num_running
        return EngineStats(
            running=running,
            waiting=max(unfinished - running, 0),
            pages_used=scheduler.pages.used_pages,
            pages_total=scheduler.pages.num_pages,
            pages_cached=scheduler.pages.cached_pages,
            prompt_tokens=scheduler.prompt_tokens,
            generated_tokens=scheduler.generated_tokens,
            prefix_hits=scheduler.prefix_hits,
            preemptions=scheduler.preemptions,
            drafted_tokens=scheduler.drafted_tokens,
            accepted_tokens=scheduler.accepted_tokens,
            steps=self._steps,
            busy_seconds=self._busy_seconds,
        )

    def _run(self) -> None:
        while not self._closing:
            while self._inbox:
                self._inbox.popleft()()
            if self._scheduler.has_work:
                self._step()
            elif not self._inbox:
                self._awake.wait()
                self._awake.clear()
        while self._inbox:
            self._inbox.popleft()()
        for request in list(self._requests.values()):
            self._stop(request, "cancelled")
        self._runner.close()

    def _step(self) -> None:
        started = time.perf_counter()
        try:
            batch = self._scheduler.schedule()
            if batch is None:
                return
            if self._scheduler.begun:
                self._leave_queue()
            events = self._scheduler.commit(self._runner.step(batch))
        except Exception as error:
            self._fail(error)
            return
        finally:
            self._busy_seconds += time.perf_counter() - started
            self._steps += 1
        self._tell(events)

    def _leave_queue(self) -> None:
        with self._changed:
            self._queued -= len(self._scheduler.begun)
            self._changed.notify_all()
        self._scheduler.begun.clear()

    def _fail(self, error: Exception) -> None:
        """A step went wrong: what was in it ends, what waits goes on."""
        logger.error("A step failed; the requests in it end with an error.", exc_info=error)
        reason = f"The engine failed at a step with this request ({type(error).__name__}): send it again."
        for request in self._scheduler.running_requests() or list(self._requests.values()):
            self._stop(request, "error", reason)

    def _accept(self, request: Request) -> None:
        self._requests[request.request_id] = request
        self._scheduler.add(request)

    def _cancel(self, request_id: str) -> None:
        request = self._requests.get(request_id)
        if request is not None:
            self._stop(request, "cancelled")

    def _stop(self, request: Request, reason: FinishReason, error: str | None = None) -> None:
        self._tell(self._scheduler.stop(request, reason, error))

    def _tell(self, events: list[Event]) -> None:
        for request, delta in events:
            try:
                request.on_delta(delta)
            except Exception:
                logger.exception("The receiver of request %s failed; the request is cancelled.", request.request_id)
                request.on_delta = _ignore
                self.cancel(request.request_id)
            if delta.finish_reason is not None:
                self._sequence_ended(request)

    def _sequence_ended(self, request: Request) -> None:
        request.unfinished -= 1
        if not request.unfinished:
            del self._requests[request.request_id]
        with self._changed:
            self._unfinished_sequences -= 1
            if not request.unfinished:
                self._unfinished_requests -= 1
                self._queued -= not request.begun
                self._changed.notify_all()


def _ignore(delta: RequestDelta) -> None:
    pass
