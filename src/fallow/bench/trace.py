"""Arrivals as they were in production: read from a trace, scaled to a rate, and the highest rate that a server bears.

The format is that of the Azure LLM inference traces (Patel et al., "Splitwise", ISCA 2024): a CSV file with the columns
``TIMESTAMP,ContextTokens,GeneratedTokens``.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from fallow.errors import FallowError

MAX_ARRIVALS = 1_000_000
_COLUMNS = ["TIMESTAMP", "ContextTokens", "GeneratedTokens"]
_CONTEXT_SHARE = 0.75  # of the model's context may be prompt; the rest is for the answer
_NEAR_ENOUGH = 1.15  # between a rate that was borne and one that was not
_LEAST_RATE = 0.02


@dataclass(frozen=True)
class Arrival:
    """A request: seconds after the first one, tokens of its prompt, tokens to generate."""

    at: float
    context_tokens: int
    generated_tokens: int


@dataclass(frozen=True)
class TraceOptions:
    """How a trace is replayed.

    A rate is borne where nothing fails and the 90th percentiles of the time to first token and of the time per output
    token are within ``ttft_objective`` and ``tpot_objective`` (seconds). Each try lasts ``replay_seconds`` of arrivals;
    no new one begins ``max_seconds`` after the first. ``first_rate`` is in requests per second.
    """

    file: Path
    ttft_objective: float = 2.0
    tpot_objective: float = 0.1
    replay_seconds: float = 30.0
    max_seconds: float = 300.0
    first_rate: float = 1.0
    max_generated: int = 512

    def __post_init__(self) -> None:
        for name in ("ttft_objective", "tpot_objective", "replay_seconds", "max_seconds", "first_rate"):
            if not (getattr(self, name) > 0 and math.isfinite(getattr(self, name))):
                raise FallowError(f"{name} is {getattr(self, name)}: it must be a number above 0.")
        if self.max_generated < 2:
            raise FallowError(f"max_generated is {self.max_generated}: it must be at least 2.")


@dataclass(frozen=True)
class RequestTimes:
    """One replayed request, times in seconds: when it was due, when its first and its last token came.

    ``error`` says why it failed; it has no meaning then what the other fields hold.
    """

    due: float
    first: float
    last: float
    tokens: int
    error: str | None = None


@dataclass(frozen=True)
class ReplayResult:
    """One replay at one rate: output tokens per second from the first arrival to the last token, percentiles in
    seconds, and what was used."""

    requests_per_s: float
    requests: int
    failed: int
    tokens: int
    tokens_per_s: float
    ttft_p50: float
    ttft_p90: float
    ttft_p99: float
    tpot_p50: float
    tpot_p90: float
    tpot_p99: float
    first_error: str | None = None

    def within(self, options: TraceOptions) -> bool:
        """Whether this rate was borne."""
        return self.failed == 0 and self.ttft_p90 <= options.ttft_objective and self.tpot_p90 <= options.tpot_objective


def read_trace(file: Path) -> list[Arrival]:
    """The arrivals of a trace in the order of time. Raises ``FallowError`` where it is not such a file."""
    arrivals: list[tuple[datetime, int, int]] = []
    with file.open(newline="", encoding="utf-8", errors="replace") as lines:
        rows = csv.reader(lines)
        if next(rows, None) != _COLUMNS:
            raise FallowError(f"{file} is not a trace: its first line must be {','.join(_COLUMNS)}.")
        try:
            for row in rows:
                if len(arrivals) >= MAX_ARRIVALS:
                    raise FallowError(f"{file} has more than {MAX_ARRIVALS:,} requests: cut it.")
                time, context, generated = row
                arrivals.append((datetime.fromisoformat(time), int(context), int(generated)))
                if min(arrivals[-1][1:]) < 0:
                    raise ValueError("a number of tokens is negative")
        except (ValueError, csv.Error) as error:
            if isinstance(error, FallowError):
                raise
            raise FallowError(f"Line {rows.line_num} of {file} is not a request of a trace: {error}.") from None
    if len(arrivals) < 2:
        raise FallowError(f"{file} has fewer than two requests.")
    arrivals.sort(key=lambda arrival: arrival[0])
    first = arrivals[0][0]
    return [Arrival((time - first).total_seconds(), context, generated) for time, context, generated in arrivals]


def scaled(
    arrivals: Sequence[Arrival], *, rate: float, seconds: float, max_context: int, max_generated: int
) -> list[Arrival]:
    """The first arrivals of a trace that fill ``seconds`` at ``rate`` requests per second (eight at least).

    Times are stretched by one factor, so that bursts and lulls keep their shape. Lengths are clipped: a prompt to three
    quarters of ``max_context``, an answer to ``max_generated`` and to what the context has left, both to at least one
    token (an answer to two, so that it has a time per token).
    """
    chosen = arrivals[: max(8, round(rate * seconds))]
    span = chosen[-1].at - chosen[0].at
    stretch = (len(chosen) - 1) / rate / span if span > 0 else 0.0
    found = []
    for i, arrival in enumerate(chosen):
        at = (arrival.at - chosen[0].at) * stretch if span > 0 else i / rate
        context = min(max(arrival.context_tokens, 1), int(max_context * _CONTEXT_SHARE))
        generated = min(max(arrival.generated_tokens, 2), max_generated, max_context - context)
        found.append(Arrival(at, context, generated))
    return found


def summary(rate: float, requests: Sequence[RequestTimes]) -> ReplayResult:
    """Throughput and percentiles of one replay; percentiles of nothing are infinite."""
    good = [request for request in requests if request.error is None]
    errors = [request.error for request in requests if request.error is not None]
    ttft = [request.first - request.due for request in good]
    tpot = [(request.last - request.first) / (request.tokens - 1) for request in good if request.tokens > 1]
    tokens = sum(request.tokens for request in good)
    seconds = max((request.last for request in good), default=0.0) - min((r.due for r in requests), default=0.0)
    return ReplayResult(
        requests_per_s=rate,
        requests=len(requests),
        failed=len(errors),
        tokens=tokens,
        tokens_per_s=tokens / seconds if seconds > 0 else 0.0,
        ttft_p50=percentile(ttft, 50),
        ttft_p90=percentile(ttft, 90),
        ttft_p99=percentile(ttft, 99),
        tpot_p50=percentile(tpot, 50),
        tpot_p90=percentile(tpot, 90),
        tpot_p99=percentile(tpot, 99),
        first_error=errors[0] if errors else None,
    )


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least ``percent`` of a hundred values do not exceed (nearest rank)."""
    if not values:
        return math.inf
    return sorted(values)[max(math.ceil(len(values) * percent / 100), 1) - 1]


def highest_rate(
    options: TraceOptions, replay: Callable[[float], ReplayResult], elapsed: Callable[[], float]
) -> tuple[ReplayResult | None, list[ReplayResult]]:
    """The replay at the highest rate that is borne (None where none is), and all replays in their order.

    Doubles or halves the rate from ``first_rate`` on until one is borne and one is not, then halves the gap, as a
    ratio, until it is small or ``elapsed()`` is past ``max_seconds``.
    """
    tried: list[ReplayResult] = []
    best: ReplayResult | None = None
    too_high = math.inf
    rate = options.first_rate
    while True:
        result = replay(rate)
        tried.append(result)
        if result.within(options):
            best = result
        else:
            too_high = rate
        borne = best.requests_per_s if best else 0.0
        if elapsed() >= options.max_seconds or too_high <= borne * _NEAR_ENOUGH or rate < _LEAST_RATE:
            return best, tried
        if best is None:
            rate = too_high / 2
        elif math.isinf(too_high):
            rate = borne * 2
        else:
            rate = math.sqrt(borne * too_high)
