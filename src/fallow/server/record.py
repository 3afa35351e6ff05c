"""What is noted about one HTTP request: for its log line, its metrics, and its id."""

from __future__ import annotations

import json
import re
import sys
import time
import uuid
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, TextIO

from starlette.types import Scope

from fallow.server.generation import Generation

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


def request_id(given: str | None) -> str:
    """The client's own ``x-request-id`` where it is a plain word of at most 128 characters, else a new one."""
    return given if given is not None and _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


@dataclass
class RequestRecord:
    """One request, from its arrival to the end of its answer. Times are seconds of ``time.monotonic``."""

    id: str
    method: str
    route: str = "other"
    started: float = field(default_factory=time.monotonic)
    status: int | None = None
    disconnected: bool = False
    stream: bool = False
    generation: Generation | None = None

    @property
    def logged_status(self) -> int:
        """The status that was sent; 499 where the client left before there was one (nginx's convention)."""
        if self.disconnected:
            return 499
        return self.status if self.status is not None else 500

    @property
    def time_to_first_token(self) -> float | None:
        first = self.generation.first_token_at if self.generation else None
        return None if first is None else first - self.started

    @property
    def time_per_output_token(self) -> float | None:
        """Mean seconds between two tokens, from the first to the last one, of the longest choice."""
        made = self.generation
        if made is None or made.first_token_at is None or made.last_token_at is None or made.longest_choice < 2:
            return None
        return (made.last_token_at - made.first_token_at) / (made.longest_choice - 1)

    def to_json(self) -> dict[str, Any]:
        """One log entry: no prompt, no text, no key."""
        line: dict[str, Any] = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "event": "request",
            "id": self.id,
            "method": self.method,
            "route": self.route,
            "status": self.logged_status,
            "seconds": round(time.monotonic() - self.started, 4),
        }
        if self.generation is not None:
            first = self.time_to_first_token
            line |= {
                "stream": self.stream,
                "prompt_tokens": self.generation.prompt_tokens,
                "cached_tokens": self.generation.cached_tokens,
                "completion_tokens": self.generation.completion_tokens,
                "time_to_first_token": None if first is None else round(first, 4),
                "finish_reasons": [reason for _, reason in sorted(self.generation.finish_reasons.items())],
            }
        return line


def record_of(scope: Scope) -> RequestRecord:
    """The record that the gateway made for this request."""
    record: RequestRecord = scope["fallow.record"]
    return record


def log_line(entry: dict[str, Any], *, stream: TextIO | None = None) -> None:
    """One JSON object on one line of ``stream`` (default: stderr)."""
    target = sys.stderr if stream is None else stream
    try:
        target.write(json.dumps(entry) + "\n")
        target.flush()
    except (OSError, ValueError):  # a log that cannot be written must not stop the answers
        return
