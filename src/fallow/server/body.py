"""Reading a request's body under a limit of size and time, and checking it against its type."""

from __future__ import annotations

import asyncio
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from fallow.server.errors import ApiError, from_validation

Body = TypeVar("Body", bound=BaseModel)

_PARSE_ASIDE = 64 * 1024  # a larger body is parsed on another thread, so that running streams go on


async def read_body(request: Request, *, limit: int, timeout: float) -> bytes:
    """The whole body. ``limit`` in bytes, with or without a Content-Length header; ``timeout`` in seconds.

    Raises ``ApiError`` 413 and 408, and ``ClientDisconnect``.
    """
    # The rest of a refused body is not read, so the connection cannot be used again.
    too_large = ApiError(
        413,
        f"The request body is over the limit of {limit} bytes: send less, or raise --max-body-bytes.",
        code="request_too_large",
        headers={"connection": "close"},
    )
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and (len(declared) > 18 or int(declared) > limit):
        raise too_large
    chunks: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(timeout):
            while True:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise ClientDisconnect
                chunk = message.get("body", b"")
                size += len(chunk)
                if size > limit:
                    raise too_large
                chunks.append(chunk)
                if not message.get("more_body", False):
                    return b"".join(chunks)
    except TimeoutError:
        raise ApiError(
            408,
            f"The request body did not arrive within {timeout:g} seconds: send it again.",
            code="request_timeout",
            headers={"connection": "close"},
        ) from None


def _validate(kind: type[Body], body: bytes) -> Body:
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise from_validation(error) from None


async def parse(kind: type[Body], body: bytes) -> Body:
    """The body as ``kind``; raises ``ApiError`` 400 with one sentence about the first field at fault."""
    if len(body) > _PARSE_ASIDE:
        return await asyncio.to_thread(_validate, kind, body)
    return _validate(kind, body)
