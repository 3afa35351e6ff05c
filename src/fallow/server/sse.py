"""Server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html) from a generation."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from json.encoder import encode_basestring_ascii
from typing import TYPE_CHECKING, Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from fallow.server.errors import ApiError
from fallow.server.generation import Generation

if TYPE_CHECKING:
    from fallow.engine.outputs import RequestDelta

json_string: Callable[[str], str] = encode_basestring_ascii

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would hold the events back
]


def event(payload: dict[str, Any]) -> bytes:
    """One event out of any object; the common events are put together by their writers, without ``json.dumps``."""
    return b"data: " + json.dumps(payload).encode() + b"\n\n"


class EventStream(Response):
    """The ASGI answer that streams a generation.

    ``write(deltas)`` gives the bytes of the events for what arrived; ``finish()`` those that come after the last
    token. An error in mid-stream becomes an event with OpenAI's error body, and the stream ends without ``[DONE]``.
    """

    def __init__(
        self,
        generation: Generation,
        *,
        write: Callable[[Sequence[tuple[int, RequestDelta]]], bytes],
        finish: Callable[[], bytes],
    ) -> None:
        super().__init__()
        self._generation = generation
        self._write = write
        self._finish = finish

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            # The first tokens come before the status, so that a failure before them has the right one.
            deltas = await self._generation.batch()
            await send({"type": "http.response.start", "status": 200, "headers": list(_HEADERS)})
            try:
                while deltas:
                    if body := self._write(deltas):
                        await send({"type": "http.response.body", "body": body, "more_body": True})
                    deltas = await self._generation.batch()
                tail = self._finish() + b"data: [DONE]\n\n"
            except ApiError as error:
                tail = event(error.body())
            await send({"type": "http.response.body", "body": tail, "more_body": False})
        finally:
            self._generation.close()
