"""From the engine's thread to the event loop: one wake-up for all the deltas of a step."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from starlette.types import Receive

from fallow.server.errors import ApiError

if TYPE_CHECKING:
    from fallow.engine.engine import Engine
    from fallow.engine.outputs import RequestDelta
    from fallow.engine.sampling import SamplingParams


class DisconnectedError(Exception):
    """The client hung up before its answer was complete."""


class Mailbox:
    """Deltas on their way from the engine's thread (``post``) to the event loop.

    The engine posts one delta a sequence and step. Only the first post after a delivery wakes the loop, so a step
    over many sequences costs one wake-up, not one each.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._posted: deque[tuple[Callable[[RequestDelta], None], RequestDelta]] = deque()
        self._woken = False

    def post(self, receiver: Callable[[RequestDelta], None], delta: RequestDelta) -> None:
        """Called on any thread; ``receiver(delta)`` runs on the event loop soon."""
        self._posted.append((receiver, delta))
        if not self._woken:
            self._woken = True
            try:
                self._loop.call_soon_threadsafe(self._deliver)
            except RuntimeError:  # the loop has been closed: nobody waits for deltas any more
                self._posted.clear()

    def _deliver(self) -> None:
        # Cleared before the queue is read: a post from now on wakes the loop again, so none is left lying.
        self._woken = False
        while self._posted:
            receiver, delta = self._posted.popleft()
            receiver(delta)


class Generation:
    """The engine requests behind one HTTP request: one a prompt, ``n`` choices each.

    Choice ``c`` of prompt ``p`` has the index ``p * n + c`` in the answer. Times are seconds of ``time.monotonic``.
    """

    def __init__(self, engine: Engine, mailbox: Mailbox, *, n: int) -> None:
        self._engine = engine
        self._mailbox = mailbox
        self._n = n
        self._ids: list[str] = []
        self._unfinished = 0
        self._arrived: list[tuple[int, RequestDelta]] = []
        self._waiter: asyncio.Future[None] | None = None
        self._disconnected = False
        self._closed = False
        self._stopped = False
        self._watcher: asyncio.Task[None] | None = None
        self._completion_tokens: dict[int, int] = {}
        self._prompts: dict[int, tuple[int, int]] = {}  # prompt → tokens, of which cached
        self.finish_reasons: dict[int, str] = {}
        self.first_token_at: float | None = None
        self.last_token_at: float | None = None

    @property
    def prompt_tokens(self) -> int:
        return sum(tokens for tokens, _ in self._prompts.values())

    @property
    def cached_tokens(self) -> int:
        return sum(cached for _, cached in self._prompts.values())

    @property
    def completion_tokens(self) -> int:
        return sum(self._completion_tokens.values())

    @property
    def longest_choice(self) -> int:
        return max(self._completion_tokens.values(), default=0)

    async def start(self, prepare: Callable[[], tuple[Sequence[str | list[int]], SamplingParams]]) -> None:
        """Hand the prompts to the engine: all of them, or none where one is refused.

        ``prepare`` (templates, grammars) and the submission (tokenizing) run on another thread.
        """
        await asyncio.to_thread(self._submit, prepare)

    def _submit(self, prepare: Callable[[], tuple[Sequence[str | list[int]], SamplingParams]]) -> None:
        prompts, sampling = prepare()
        # Before the first submission: its deltas may arrive while the next one is under way.
        self._unfinished = len(prompts) * self._n
        try:
            for position, prompt in enumerate(prompts):
                self._ids.append(self._engine.submit(prompt, sampling, self._sink(position)))
        except BaseException:
            self._cancel()
            raise
        if self._closed:  # the client left, or the server stopped, while this thread was at work
            self._cancel()

    def _sink(self, prompt: int) -> Callable[[RequestDelta], None]:
        def receive(delta: RequestDelta) -> None:
            self._receive(prompt, delta)

        return lambda delta: self._mailbox.post(receive, delta)

    def _receive(self, prompt: int, delta: RequestDelta) -> None:
        index = prompt * self._n + delta.index
        if delta.token_ids:
            self.last_token_at = time.monotonic()
            if self.first_token_at is None:
                self.first_token_at = self.last_token_at
        if delta.index == 0:  # the other choices find the prompt of the first one in the cache
            self._prompts[prompt] = (delta.prompt_tokens, delta.cached_tokens)
        self._completion_tokens[index] = delta.completion_tokens
        if delta.finish_reason is not None and index not in self.finish_reasons:
            self.finish_reasons[index] = delta.finish_reason
            self._unfinished -= 1
        self._arrived.append((index, delta))
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def watch(self, receive: Receive) -> None:
        """Cancel the generation as soon as the client hangs up."""

        async def until_disconnect() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            self._disconnected = True
            self._wake()

        self._watcher = asyncio.get_running_loop().create_task(until_disconnect())

    async def batch(self) -> list[tuple[int, RequestDelta]]:
        """All deltas since the last call, each with the index of its choice; waits for one, empty at the end.

        Raises ``DisconnectedError`` where the client hung up, ``ApiError`` where the engine failed or was stopped.
        """
        while not (self._arrived or self._disconnected or self._stopped) and self._unfinished:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        if self._disconnected:
            raise DisconnectedError
        if self._stopped and self._unfinished:
            raise _draining()
        batch, self._arrived = self._arrived, []
        for _, delta in batch:
            _raise_failure(delta)
        return batch

    def stop(self) -> None:
        """Let the request end with an error: the server has no more time for it."""
        self._stopped = True
        self._wake()

    def close(self) -> None:
        """Stop what still runs. Every generation is closed, however its request ended."""
        self._closed = True
        if self._watcher is not None:
            self._watcher.cancel()
        if self._unfinished:
            self._cancel()

    def _cancel(self) -> None:
        for request_id in list(self._ids):
            self._engine.cancel(request_id)


def _draining() -> ApiError:
    return ApiError(503, "The server is shutting down and stopped this request: send it again.", code="draining")


def _raise_failure(delta: RequestDelta) -> None:
    if delta.finish_reason == "cancelled":
        raise _draining()
    if delta.finish_reason == "error":
        raise ApiError(500, delta.error or "The engine failed at this request.", code="engine_error")
