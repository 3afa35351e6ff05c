"""A request whose caller waits for the whole output."""

from __future__ import annotations

import time
from collections.abc import Sequence
from threading import Event
from typing import TYPE_CHECKING

from fallow.engine.outputs import OutputBuilder, RequestDelta, RequestOutput
from fallow.engine.sampling import SamplingParams
from fallow.errors import FallowError

if TYPE_CHECKING:
    from fallow.engine.engine import Engine


class Call:
    """One request of a caller who waits for its whole output."""

    def __init__(self, engine: Engine, prompt: str | Sequence[int], params: SamplingParams | None) -> None:
        """Submits the request, waiting where the queue is full."""
        self.done = Event()
        self._engine = engine
        self._builder = OutputBuilder((params or SamplingParams()).n)
        self._started = time.perf_counter()
        self._first_token: float | None = None
        self._ended = 0.0
        self._id = engine._submit(prompt, params, self._receive, wait=True)

    def _receive(self, delta: RequestDelta) -> None:
        if self._first_token is None and delta.token_ids:
            self._first_token = time.perf_counter()
        self._builder.add(delta)
        if not self._builder.unfinished:
            self._ended = time.perf_counter()
            self.done.set()

    def cancel(self) -> None:
        if not self.done.is_set():
            self._engine.cancel(self._id)

    def result(self) -> RequestOutput:
        """Waits. Raises ``FallowError`` where the engine failed or was closed."""
        self.done.wait()
        outputs = self._builder.outputs
        for output in outputs:
            if output.finish_reason == "error":
                raise FallowError(output.error or "The engine failed at this request.")
            if output.finish_reason == "cancelled":
                raise FallowError("The engine was closed before the answer was complete.")
        return RequestOutput(
            self._id,
            self._builder.prompt_tokens,
            outputs,
            (self._first_token or self._ended) - self._started,
            self._ended - self._started,
            self._builder.cached_tokens,
        )
