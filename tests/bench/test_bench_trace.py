"""Traces: reading, scaling, percentiles, the search for a rate, and a replay against a real socket."""

from __future__ import annotations

import asyncio
import json
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest

from fallow.bench.replay import Endpoint, complete, replay
from fallow.bench.servers import Prompts
from fallow.bench.trace import (
    Arrival,
    ReplayResult,
    RequestTimes,
    TraceOptions,
    highest_rate,
    percentile,
    read_trace,
    scaled,
    summary,
)
from fallow.errors import FallowError
from fallow.models.tokenizer import load_tokenizer

HEAD = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


def write_trace(folder: Path, *lines: str, head: str = HEAD) -> Path:
    file = folder / "trace.csv"
    file.write_text(head + "".join(f"{line}\n" for line in lines))
    return file


def test_a_trace_is_read_in_the_order_of_time(tmp_path: Path) -> None:
    file = write_trace(tmp_path, "2023-11-16 18:15:50.9951690,396,109", "2023-11-16 18:15:46.4951690,374,44")
    assert read_trace(file) == [Arrival(0.0, 374, 44), Arrival(4.5, 396, 109)]


def test_the_azure_trace_is_read_whole(shared_data: Path) -> None:
    arrivals = read_trace(shared_data / "azure-llm-trace-conv-2023.csv")
    assert len(arrivals) == 19_366
    assert arrivals[0].at == 0
    assert all(a.at <= b.at for a, b in pairwise(arrivals))


@pytest.mark.parametrize(
    ("lines", "head", "message"),
    [
        (["2023-11-16 18:15:46,374,44"] * 2, "a,b,c\n", "first line"),
        (["2023-11-16 18:15:46,374,44", "yesterday,1,1"], HEAD, "Line 3"),
        (["2023-11-16 18:15:46,374,44", "2023-11-16 18:15:46,-1,1"], HEAD, "negative"),
        (["2023-11-16 18:15:46,374,44", "2023-11-16 18:15:46,1"], HEAD, "Line 3"),
        (["2023-11-16 18:15:46,374,44"], HEAD, "fewer than two"),
    ],
)
def test_a_file_that_is_no_trace_is_refused(tmp_path: Path, lines: list[str], head: str, message: str) -> None:
    with pytest.raises(FallowError, match=message):
        read_trace(write_trace(tmp_path, *lines, head=head))


def test_scaling_keeps_the_shape_clips_lengths_and_is_the_same_each_time() -> None:
    arrivals = [Arrival(float(i * i), 100 * i, 50 * i) for i in range(40)]
    found = scaled(arrivals, rate=2.0, seconds=10.0, max_context=1000, max_generated=300)
    assert found == scaled(arrivals, rate=2.0, seconds=10.0, max_context=1000, max_generated=300)
    assert len(found) == 20
    assert found[-1].at == pytest.approx(19 / 2.0)
    assert found[10].at / found[5].at == pytest.approx(4.0)
    assert (found[0].context_tokens, found[0].generated_tokens) == (1, 2)
    assert (found[3].context_tokens, found[3].generated_tokens) == (300, 150)
    assert (found[19].context_tokens, found[19].generated_tokens) == (750, 250)
    assert all(r.context_tokens + r.generated_tokens <= 1000 for r in found)


def test_arrivals_at_one_instant_are_spread_evenly() -> None:
    found = scaled([Arrival(5.0, 10, 10)] * 9, rate=4.0, seconds=1.0, max_context=100, max_generated=10)
    assert [r.at for r in found] == [i / 4.0 for i in range(8)]


def test_percentiles_are_nearest_ranks() -> None:
    values = [float(i) for i in range(1, 101)]
    assert [percentile(values, p) for p in (50, 90, 99, 100)] == [50, 90, 99, 100]
    assert percentile([7.0], 90) == 7
    assert math.isinf(percentile([], 50))


def test_a_summary_counts_failures_and_leaves_them_out_of_the_times() -> None:
    requests = [
        RequestTimes(10.0, 10.5, 11.5, 11),
        RequestTimes(11.0, 12.0, 14.0, 11),
        RequestTimes(12.0, 0, 0, 0, "refused"),
    ]
    result = summary(1.0, requests)
    assert (result.requests, result.failed, result.tokens, result.first_error) == (3, 1, 22, "refused")
    assert result.tokens_per_s == pytest.approx(22 / 4.0)
    assert (result.ttft_p50, result.ttft_p90) == (0.5, 1.0)
    assert (result.tpot_p50, result.tpot_p99) == (pytest.approx(0.1), pytest.approx(0.2))
    generous = TraceOptions(Path("t"), ttft_objective=9, tpot_objective=9)
    assert not result.within(generous)
    assert summary(1.0, requests[:2]).within(generous)
    assert not summary(1.0, requests[:2]).within(TraceOptions(Path("t"), ttft_objective=9, tpot_objective=0.15))


def bears(limit: float, rate: float) -> ReplayResult:
    """A server that answers at once up to ``limit`` requests a second, and not in time above it."""
    late = 0.1 if rate <= limit else 100.0
    return summary(rate, [RequestTimes(i / rate, i / rate + late, i / rate + late + 1, 20) for i in range(8)])


@pytest.mark.parametrize("limit", [0.3, 1.0, 5.0, 37.0])
def test_the_search_ends_close_below_what_a_server_bears(limit: float) -> None:
    best, tried = highest_rate(TraceOptions(Path("t")), lambda rate: bears(limit, rate), lambda: 0.0)
    assert best is not None
    assert limit / 1.16 <= best.requests_per_s <= limit
    assert len(tried) < 15


def test_the_search_gives_up_where_nothing_is_borne_and_where_time_is_over() -> None:
    best, tried = highest_rate(TraceOptions(Path("t")), lambda rate: bears(0.0, rate), lambda: 0.0)
    assert best is None
    assert len(tried) < 10
    best, tried = highest_rate(TraceOptions(Path("t")), lambda rate: bears(1e9, rate), lambda: 1000.0)
    assert best is not None
    assert len(tried) == 1


@pytest.mark.parametrize("field", ["ttft_objective", "tpot_objective", "replay_seconds", "max_seconds", "first_rate"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_options_without_meaning_are_refused(field: str, value: float) -> None:
    with pytest.raises(FallowError, match=field):
        TraceOptions(Path("t"), **{field: value})  # type: ignore[arg-type]


@contextmanager
def server(answer: bytes) -> Iterator[tuple[str, list[dict[str, object]]]]:
    """A socket that answers every request with ``answer``, in pieces of 7 bytes; what it was asked is listed."""
    asked: list[dict[str, object]] = []
    loop = asyncio.new_event_loop()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.startswith(b"Content-Length"))
        asked.append(json.loads(await reader.readexactly(length)))
        for i in range(0, len(answer), 7):
            writer.write(answer[i : i + 7])
            await writer.drain()
        writer.close()

    listening = loop.run_until_complete(asyncio.start_server(handle, "127.0.0.1", 0))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}/v1", asked
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        listening.close()
        loop.close()


EVENTS = [
    {"choices": [{"text": "a"}], "usage": None},
    {"choices": [{"text": "b, ünd so"}]},
    {"choices": [], "usage": {"completion_tokens": 5}},
]


def stream(*, chunked: bool) -> bytes:
    events = [f"data: {json.dumps(event, ensure_ascii=False)}\n\n".encode() for event in EVENTS] + [b"data: [DONE]\n\n"]
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
    if not chunked:
        return head + b"\r\n" + b"".join(events)
    whole = b"".join(events)
    pieces = [whole[i : i + 11] for i in range(0, len(whole), 11)]  # chunks need not be events
    chunks = b"".join(f"{len(piece):x}\r\n".encode() + piece + b"\r\n" for piece in pieces)
    return head + b"Transfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n"


@pytest.mark.parametrize("chunked", [False, True])
def test_a_replay_sends_what_is_due_and_counts_what_comes(chunked: bool) -> None:
    requests = [Arrival(0.0, 3, 7), Arrival(0.2, 4, 8)]
    with server(stream(chunked=chunked)) as (url, asked):
        times = replay(Endpoint(url, "m", "key"), requests, ["one", "two"], grace_seconds=20)
    assert [(t.tokens, t.error) for t in times] == [(5, None)] * 2
    assert times[1].due - times[0].due == pytest.approx(0.2)
    assert all(t.due <= t.first <= t.last for t in times)
    assert [(a["prompt"], a["max_tokens"], a["stream"], a["model"]) for a in asked] == [
        ("one", 7, True, "m"),
        ("two", 8, True, "m"),
    ]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"HTTP/1.1 429 Too Many Requests\r\n\r\nbusy", "429"),
        (b"HTTP/1.1 200 OK\r\n\r\ndata: {\n\n", "Expecting"),
        (b'HTTP/1.1 200 OK\r\n\r\ndata: {"error": {"message": "no"}}\n\n', "no"),
        (b"HTTP/1.1 200 OK\r\n\r\ndata: [DONE]\n\n", "empty"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffffffff\r\n", "too large"),
        (b"", "HTTP"),
    ],
)
def test_answers_that_are_no_stream_are_failures_of_one_request(answer: bytes, message: str) -> None:
    with server(answer) as (url, _):
        (times,) = replay(Endpoint(url, "m"), [Arrival(0.0, 3, 7)], ["one"], grace_seconds=20)
    assert times.error is not None
    assert message in times.error


def test_a_server_that_says_nothing_does_not_hold_the_replay() -> None:
    with (
        server(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n") as (url, _),
        pytest.raises(ValueError, match="empty"),
    ):
        asyncio.run(complete(Endpoint(url, "m"), "one", 2))
    (times,) = replay(Endpoint("http://127.0.0.1:9/v1", "m"), [Arrival(0.0, 3, 7)], ["one"], grace_seconds=20)
    assert times.error is not None


def test_no_two_prompts_begin_alike_and_every_server_gets_the_same(tiny_checkpoints: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(tiny_checkpoints["llama"])
    prompts = Prompts(tokenizer)
    requests = [Arrival(0.0, length, 1) for length in (40, 300_000, 300_000, 300_000, 64)]
    first = prompts.texts(requests) + prompts.texts(requests)
    assert len({text[:200] for text in first}) == len(first)
    assert len(tokenizer.encode(first[0])) == pytest.approx(40, abs=4)
    prompts.begin_anew()
    assert prompts.texts(requests) == first[:5]


@pytest.mark.parametrize("url", ["ftp://a/v1", "localhost:8000", "http:///v1"])
def test_urls_of_no_endpoint_are_refused(url: str) -> None:
    with pytest.raises(FallowError, match="is not the URL"):
        Endpoint(url, "m").parts()
