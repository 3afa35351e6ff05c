"""Sends the requests of a trace to an OpenAI endpoint when they are due, and notes when their tokens come."""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from urllib.parse import SplitResult, urlsplit

from fallow.bench.trace import Arrival, RequestTimes
from fallow.errors import FallowError

_LINE_BYTES = 1 << 20


@dataclass(frozen=True)
class Endpoint:
    """The base URL of an OpenAI API (``http://host:port/v1``), the model's name there, and a key where it needs one."""

    url: str
    model: str
    api_key: str | None = None

    def parts(self) -> SplitResult:
        """Raises ``FallowError`` where it is no http or https URL."""
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise FallowError(f"{self.url} is not the URL of an OpenAI endpoint, such as http://127.0.0.1:8000/v1.")
        return parts


def replay(
    endpoint: Endpoint, requests: Sequence[Arrival], prompts: Sequence[str], *, grace_seconds: float
) -> list[RequestTimes]:
    """Each request at its time, whatever became of those before it; ``prompts[i]`` is the text of ``requests[i]``.

    What has not ended ``grace_seconds`` after the last arrival has failed.
    """
    return asyncio.run(_replay(endpoint, requests, prompts, grace_seconds))


async def _replay(
    endpoint: Endpoint, requests: Sequence[Arrival], prompts: Sequence[str], grace_seconds: float
) -> list[RequestTimes]:
    start = time.perf_counter() + 0.05
    deadline = start + requests[-1].at + grace_seconds
    tasks = [
        asyncio.create_task(_timed(endpoint, request, prompt, start, deadline))
        for request, prompt in zip(requests, prompts, strict=True)
    ]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()


async def _timed(endpoint: Endpoint, request: Arrival, prompt: str, start: float, deadline: float) -> RequestTimes:
    due = start + request.at
    await asyncio.sleep(max(due - time.perf_counter(), 0))
    try:
        async with asyncio.timeout(deadline - time.perf_counter()):
            first, last, tokens = await complete(endpoint, prompt, request.generated_tokens)
    except TimeoutError:
        return RequestTimes(due, 0, 0, 0, "it did not end in time")
    except (OSError, ValueError, asyncio.IncompleteReadError) as error:
        return RequestTimes(due, 0, 0, 0, f"{type(error).__name__}: {error}"[:200])
    return RequestTimes(due, first, last, tokens)


async def complete(endpoint: Endpoint, prompt: str, max_tokens: int) -> tuple[float, float, int]:
    """Stream one completion: the times of its first and its last piece of text, and its number of tokens (what the
    server's usage says, else the number of pieces). Raises ``ValueError`` where the server refuses it."""
    first = last = 0.0
    pieces, tokens = 0, None
    body = {
        "model": endpoint.model,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    async for data in _events(endpoint, "/completions", json.dumps(body).encode()):
        event = json.loads(data)
        if "error" in event:
            raise ValueError(str(event["error"]))
        if event.get("usage"):
            tokens = int(event["usage"]["completion_tokens"])
        if event.get("choices"):
            last = time.perf_counter()
            first = first or last
            pieces += 1
    if not pieces:
        raise ValueError("the answer was empty")
    return first, last, tokens if tokens is not None else pieces


async def _events(endpoint: Endpoint, path: str, body: bytes) -> AsyncIterator[bytes]:
    """The data of a stream of server-sent events, until ``[DONE]`` or its end."""
    parts = endpoint.parts()
    secure = ssl.create_default_context() if parts.scheme == "https" else None
    port = parts.port or (443 if secure else 80)
    reader, writer = await asyncio.open_connection(parts.hostname, port, ssl=secure, limit=_LINE_BYTES)
    try:
        head = [
            f"POST {parts.path.rstrip('/')}{path} HTTP/1.1",
            f"Host: {parts.netloc}",
            "Content-Type: application/json",
            "Accept: text/event-stream",
            f"Content-Length: {len(body)}",
            "Connection: close",
        ]
        if endpoint.api_key:
            head.append(f"Authorization: Bearer {endpoint.api_key}")
        writer.write("\r\n".join(head).encode() + b"\r\n\r\n" + body)
        await writer.drain()
        status = (await reader.readline()).split()
        chunked = False
        while header := (await reader.readline()).strip().lower():
            chunked |= header.startswith(b"transfer-encoding:") and header.endswith(b"chunked")
        if len(status) < 2 or status[1] != b"200":
            answer = (await reader.read(2000)).decode(errors="replace")
            raise ValueError(f"HTTP {status[1].decode() if len(status) > 1 else '?'}: {answer}")
        async for line in _lines(reader, chunked):
            if line.startswith(b"data:"):
                data = line[5:].strip()
                if data == b"[DONE]":
                    return
                yield data
    finally:
        writer.close()


async def _lines(reader: asyncio.StreamReader, chunked: bool) -> AsyncIterator[bytes]:
    """The lines of a body, out of its chunks where it has them (RFC 9112, section 7.1)."""
    left = b""
    while True:
        if chunked:
            size = int((await reader.readline()).partition(b";")[0], 16)
            if size > _LINE_BYTES:
                raise ValueError("the server sent a chunk that is too large")
            piece = (await reader.readexactly(size + 2))[:size]
        else:
            piece = await reader.read(65536)
        if not piece:
            break
        *lines, left = (left + piece).split(b"\n")
        if len(left) > _LINE_BYTES:
            raise ValueError("the server sent a line that is too long")
        for line in lines:
            yield line
    yield left
