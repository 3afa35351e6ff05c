"""What a server must survive: many streams, clients that hang up, signals, hostile bodies."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from fallow.engine.engine import Engine

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
HELLO = [{"role": "user", "content": "hello"}]
SERVE = """
import json, sys
from fallow.engine.engine import Engine
from fallow.server import serve
engine = Engine(sys.argv[1], max_num_seqs=16)
serve(engine, port=0, served_model_name="tiny", on_ready=lambda url: print(url, flush=True), **json.loads(sys.argv[2]))
engine.close()
print("closed", flush=True)
"""


def metric(server: Any, name: str) -> float:
    lines = server.http.get("/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((f"{name} ", f"{name}{{")))


async def stream_events(url: str, body: dict[str, Any], *, hang_up_after: int | None = None) -> list[bytes]:
    """The data of the events of one stream, over a connection of its own; ends early by closing it."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    payload = json.dumps(body).encode()
    writer.write(b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % (COMPLETIONS.encode(), len(payload)))
    writer.write(payload)
    events: list[bytes] = []
    try:
        while line := await reader.readline():
            if line.startswith(b"HTTP/1.1") and b" 200 " not in line:
                raise AssertionError(line)
            if line.startswith(b"data: "):
                events.append(line[6:].strip())
                if events[-1] == b"[DONE]" or len(events) == hang_up_after:
                    break
    finally:
        writer.close()
    return events


def test_256_streams_of_which_a_third_hangs_up(tiny: Any) -> None:
    body = {"prompt": "some words to begin with", "max_tokens": 24, "stream": True, "ignore_eos": True}

    async def everything() -> list[list[bytes]]:
        # Each of a third closes its connection after 1 to 8 events, all the others read to the end.
        return await asyncio.gather(
            *(
                stream_events(tiny.url, body | {"seed": i}, hang_up_after=1 + i % 8 if i % 3 == 0 else None)
                for i in range(256)
            )
        )

    results = asyncio.run(asyncio.wait_for(everything(), 120))
    finished = [events for i, events in enumerate(results) if i % 3]
    assert all(events[-1] == b"[DONE]" for events in finished)
    assert all(json.loads(events[-2])["choices"][0]["finish_reason"] == "length" for events in finished)
    tiny.until_idle()
    assert tiny.engine.stats().pages_used == 0
    assert metric(tiny, "fallow_kv_pages_used") == 0
    assert metric(tiny, "fallow_http_requests_in_flight") == 1  # the one that asks


def test_a_client_that_leaves_before_a_whole_answer_is_cancelled(tiny: Any) -> None:
    generated = tiny.engine.stats().generated_tokens
    body = {"prompt": "hello", "max_tokens": 900, "n": 8, "ignore_eos": True}
    with httpx.Client(base_url=tiny.url) as leaving, pytest.raises(httpx.ReadTimeout):
        leaving.post(COMPLETIONS, json=body, timeout=httpx.Timeout(30, read=0.05))
    tiny.until_idle()
    assert tiny.engine.stats().pages_used == 0
    assert tiny.engine.stats().generated_tokens - generated < 8 * 900


class ServerProcess:
    """A server in a process of its own."""

    def __init__(self, model: Path, **settings: Any) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVE, str(model), json.dumps(settings)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip()
        assert self.url, self.process.communicate()[1]

    def end(self) -> tuple[int, str, list[dict[str, Any]]]:
        """Exit code, standard output, and the log, of which every line is JSON."""
        out, log = self.process.communicate(timeout=60)
        return self.process.returncode, out, [json.loads(line) for line in log.splitlines()]


@pytest.fixture
def server_process(tiny_model: Path) -> Iterator[Any]:
    started: list[ServerProcess] = []

    def start(**settings: Any) -> ServerProcess:
        started.append(ServerProcess(tiny_model, **settings))
        return started[-1]

    yield start
    for server in started:
        if server.process.poll() is None:
            server.process.kill()
            server.process.communicate()


def begin_streams(url: str, count: int, tokens: int) -> tuple[list[list[str]], list[threading.Thread]]:
    """Streams that have begun: each list grows by the stream's events."""
    body = {"prompt": "hello", "max_tokens": tokens, "stream": True, "ignore_eos": True}
    events: list[list[str]] = [[] for _ in range(count)]

    def read(target: list[str]) -> None:
        with httpx.stream("POST", url + COMPLETIONS, json=body, timeout=60) as response:
            for line in response.iter_lines():
                if line:
                    target.append(line)

    threads = [threading.Thread(target=read, args=(target,), daemon=True) for target in events]
    for thread in threads:
        thread.start()
    ends = time.monotonic() + 60
    while not all(events) and time.monotonic() < ends:
        time.sleep(0.005)
    assert all(events)
    return events, threads


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_under_load_finishes_what_was_begun(server_process: Any, number: int) -> None:
    server = server_process(drain_timeout=50)
    events, threads = begin_streams(server.url, count=8, tokens=900)
    server.process.send_signal(number)
    refused = None
    while refused is None:
        with httpx.Client(base_url=server.url, timeout=30) as client:
            answer = client.post(COMPLETIONS, json={"prompt": "late", "max_tokens": 1})
            refused = answer if answer.status_code == 503 else None
            health = client.get("/health") if refused else None
    assert refused.json()["error"]["code"] == "draining"
    assert refused.headers["retry-after"]
    assert health is not None
    assert (health.status_code, health.json()["status"]) == (503, "draining")
    for thread in threads:
        thread.join(60)
    assert all(got[-1] == "data: [DONE]" for got in events)
    code, out, log = server.end()
    assert code == 0
    assert "closed" in out
    done = [entry for entry in log if entry["event"] == "request" and entry["status"] == 200]
    assert sorted(entry["completion_tokens"] for entry in done)[-8:] == [900] * 8
    assert "hello" not in json.dumps(log)


def test_a_drain_that_takes_too_long_ends_streams_with_an_error(server_process: Any) -> None:
    server = server_process(drain_timeout=0)
    events, threads = begin_streams(server.url, count=4, tokens=1000)
    server.process.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join(60)
    for got in events:
        assert got[-1] == "data: [DONE]" or json.loads(got[-1].removeprefix("data: "))["error"]["code"] == "draining"
    assert server.end()[0] == 0


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("temperature", "-1", "temperature must be at least 0"),
        ("temperature", "NaN", "temperature must be a finite number"),
        ("temperature", "1e999", "temperature must be a finite number"),
        ("top_p", "-Infinity", "top_p must be a finite number"),
        ("top_p", '"x"', "top_p must be a number"),
        ("max_tokens", "-5", "max_tokens must be at least 1"),
        ("max_tokens", "1" + "0" * 40, "max_tokens must be less than"),
        ("max_tokens", "9" * 5000, "not valid JSON"),
        ("max_tokens", "true", "max_tokens must be an integer"),
        ("n", "1000000", "n must be at most"),
        ("seed", "1" + "0" * 30, "seed must be less than"),
        ("stop", '[""]', "stop[0] is too short"),
        ("stop", "[" + '"a",' * 40 + '"a"]', "stop is too long"),
        ("logit_bias", '{"x": 1}', "logit_bias.x must match"),
        ("logit_bias", '{"5": NaN}', "logit_bias.5 must be a finite number"),
        ("messages", '"x"', "messages must be an array"),
        ("messages", '[{"role": "king", "content": "x"}]', "messages[0].role must be 'system'"),
        ("messages", '[{"role": "user"}]', "messages[0].content is missing"),
        ("messages", '[{"role": "user", "content": [{"type": "image_url"}]}]', "messages[0].content[0] is of the type"),
        ("messages", '[{"role": "user", "content": "\\ud800"}]', "not valid JSON"),
        ("tools", '[{"type": "function"}]', "tools[0].function is missing"),
        ("tool_choice", '"required"', "tool_choice is only allowed"),
        ("response_format", '{"type": "xml"}', "response_format.type must be"),
        ("wings", "2", "wings is not supported"),
    ],
)
def test_a_wrong_field_is_named_in_one_sentence(tiny: Any, field: str, value: str, said: str) -> None:
    fields = {"messages": json.dumps(HELLO)} | {field: value}
    body = "{" + ", ".join(f"{json.dumps(name)}: {text}" for name, text in fields.items()) + "}"
    answer = tiny.http.post(CHAT, content=body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert said in error["message"]
    assert error["message"].endswith(".")
    assert "\n" not in error["message"]
    assert "pydantic" not in answer.text
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"prompt": "\xff\xfe"}',
        b"[" * 200_000,
        b'{"prompt": ' + b"[" * 200_000,
        b'{"a":' * 100_000,
        b"\x00" * 100,
        "\N{PILE OF POO}".encode("utf-16"),
        b'{"prompt": [' + b'1, "a", ' * 100_000 + b"1]}",
        b'{"prompt": "a", "line\\nbreak": 1}',
        b'{"prompt": "a", ' + b", ".join(b'"key%d": 1' % i for i in range(50_000)) + b"}",
    ],
)
def test_malformed_bodies_get_400(tiny: Any, body: bytes) -> None:
    for path in (CHAT, COMPLETIONS):
        answer = tiny.http.post(path, content=body)
        assert answer.status_code == 400
        assert len(answer.json()["error"]["message"]) < 600
        assert "\n" not in answer.json()["error"]["message"]


def test_a_prompt_over_the_context_is_refused(tiny: Any) -> None:
    for path, body in (
        (COMPLETIONS, {"prompt": "x" * 5000}),
        (COMPLETIONS, {"prompt": [5] * 5000}),
        (CHAT, {"messages": [{"role": "user", "content": "x" * 5000}]}),
    ):
        answer = tiny.http.post(path, json=body)
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert error["code"] == "context_length_exceeded"
        assert error["param"] == ("messages" if path == CHAT else "prompt")


def test_a_body_over_the_limit_is_refused_with_and_without_a_length(tiny_server: Any) -> None:
    server = tiny_server(max_body_bytes=10_000)
    assert server.http.post(COMPLETIONS, json={"prompt": "x" * 20_000}).status_code == 413

    def chunks() -> Iterator[bytes]:
        yield b'{"prompt": "'
        for _ in range(20):
            yield b"x" * 1000
        yield b'"}'

    answer = server.http.post(COMPLETIONS, content=chunks())
    assert answer.status_code == 413
    assert "10000 bytes" in answer.json()["error"]["message"]
    assert server.http.post(COMPLETIONS, json={"prompt": "x", "max_tokens": 1}).status_code == 200


def test_a_body_that_does_not_arrive_is_given_up(tiny_server: Any) -> None:
    server = tiny_server(body_timeout=0.2)
    host, port = server.url.removeprefix("http://").split(":")

    async def half_a_body() -> bytes:
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{" % COMPLETIONS.encode())
        answer = await asyncio.wait_for(reader.read(), 20)
        writer.close()
        return answer

    assert asyncio.run(half_a_body()).startswith(b"HTTP/1.1 408 ")


def test_a_client_that_does_not_read_is_given_up(tiny_server: Any) -> None:
    server = tiny_server(send_timeout=0.3)
    host, port = server.url.removeprefix("http://").split(":")
    # Far more than what the sockets between the two can hold.
    body = {"prompt": "x", "n": 128, "max_tokens": 200, "ignore_eos": True, "logprobs": 20, "stream": True}

    with socket.create_connection((host, int(port))) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        payload = json.dumps(body).encode()
        connection.sendall(b"POST %s HTTP/1.1\r\nhost: x\r\n" % COMPLETIONS.encode())
        connection.sendall(b"content-length: %d\r\n\r\n" % len(payload) + payload)
        ends = time.monotonic() + 60
        while 'status="499"' not in server.http.get("/metrics").text:
            assert time.monotonic() < ends
            time.sleep(0.05)
    server.until_idle()
    assert server.engine.stats().pages_used == 0


def test_a_wrong_key_is_refused(tiny_server: Any) -> None:
    server = tiny_server(api_keys=("first-key", "second-key"))
    body = {"prompt": "x", "max_tokens": 1}
    for headers in (
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": "Basic first-key"},
        {"authorization": "x"},
    ):
        for answer in (
            server.http.post(COMPLETIONS, json=body, headers=headers),
            server.http.get("/v1/models", headers=headers),
        ):
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"
    for key in ("first-key", "second-key"):
        answer = server.http.post(COMPLETIONS, json=body, headers={"authorization": f"Bearer {key}"})
        assert answer.status_code == 200
    assert server.http.get("/health").status_code == 200


def test_a_full_server_says_when_to_come_back(tiny_model: Path, tiny_server: Any) -> None:
    engine = Engine(str(tiny_model), max_num_seqs=1, max_queue=1)
    server = tiny_server(engine=engine, retry_after=7)
    _, threads = begin_streams(server.url, count=1, tokens=1000)
    answers = []
    waiting = [
        threading.Thread(
            target=lambda: answers.append(server.http.post(COMPLETIONS, json={"prompt": "x", "max_tokens": 1}))
        )
        for _ in range(6)
    ]
    for thread in waiting:
        thread.start()
    for thread in waiting + threads:
        thread.join(60)
    full = [answer for answer in answers if answer.status_code == 429]
    assert len(answers) == 6
    assert full
    assert {answer.status_code for answer in answers} <= {200, 429}
    assert all(answer.headers["retry-after"] == "7" for answer in full)
    assert all(answer.json()["error"]["code"] == "overloaded" for answer in full)
    engine.close()


def test_what_is_not_http_is_refused_and_logged_as_json(server_process: Any) -> None:
    server = server_process()
    host, port = server.url.removeprefix("http://").split(":")

    async def nonsense() -> bytes:
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"\x16\x03\x01 hello\r\n\r\n")
        answer = await asyncio.wait_for(reader.read(), 20)
        writer.close()
        return answer

    assert asyncio.run(nonsense()).startswith(b"HTTP/1.1 400 ")
    server.process.send_signal(signal.SIGTERM)
    code, _, log = server.end()
    assert code == 0
    assert any(entry["event"].startswith("uvicorn") for entry in log)


def mutate(random_: random.Random, value: Any) -> Any:
    """A body with one thing changed, somewhere."""
    odd: list[Any] = [
        None, True, -1, 0, 2**31, 2**63, -(2**70), 1.5, 1e308, "", "x", "\x00", "\N{PILE OF POO}", "x" * 3000, [], {},
        [[]], [None], {"type": "x"}, {"": 0}, [1, "a"], "auto", "required", "<|im_end|>", "{{ x }}",
    ]  # fmt: skip
    if isinstance(value, dict) and value and random_.random() < 0.8:
        key = random_.choice(list(value))
        kind = random_.random()
        if kind < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if kind < 0.15:
            return value | {random_.choice(["n", "audio", "echo", "tools", "suffix", "zzz"]): random_.choice(odd)}
        return value | {key: mutate(random_, value[key])}
    if isinstance(value, list) and value and random_.random() < 0.7:
        index = random_.randrange(len(value))
        return [*value[:index], mutate(random_, value[index]), *value[index + 1 :]]
    return random_.choice(odd)


def test_mutated_bodies_never_fail_the_server(tiny: Any) -> None:
    random_ = random.Random(7)
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    function = {"name": "f", "description": "d", "parameters": schema, "strict": False}
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    person = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema, "strict": True}}
    common = {
        "max_tokens": 1, "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 1, "n": 1, "stop": ["zz"],
        "presence_penalty": 0.1, "frequency_penalty": 0.1, "repetition_penalty": 1.1, "logit_bias": {"5": 1.0},
        "stop_token_ids": [7], "ignore_eos": False, "user": "u",
    }  # fmt: skip
    bodies: list[tuple[str, dict[str, Any]]] = [
        (COMPLETIONS, common | {"prompt": "ab", "logprobs": 2, "stream": False}),
        (COMPLETIONS, common | {"prompt": [[5, 6], [7]], "echo": True}),
        (CHAT, common | {"messages": HELLO, "logprobs": True, "top_logprobs": 2, "modalities": ["text"]}),
        (
            CHAT,
            common
            | {
                "messages": [
                    {"role": "system", "content": [{"type": "text", "text": "s"}]},
                    {"role": "assistant", "tool_calls": [call]},
                    {"role": "tool", "tool_call_id": "c", "content": "r"},
                ],
                "tools": [{"type": "function", "function": function}],
                "tool_choice": {"type": "function", "function": {"name": "f"}},
                "parallel_tool_calls": False,
            },
        ),
        (
            CHAT,
            common
            | {
                "messages": HELLO,
                "response_format": person,
                "stream": True,
                "stream_options": {"include_usage": True},
            },
        ),
    ]  # fmt: skip
    statuses = set()
    for number in range(int(os.environ.get("FALLOW_TEST_MUTATIONS", "1500"))):
        path, body = random_.choice(bodies)
        for _ in range(random_.choice((1, 1, 2, 3))):
            body = mutate(random_, body)
            if not isinstance(body, dict):
                break
        # A body that lost its limit may ask for a long answer, which is right, and slow.
        if isinstance(body, dict) and not isinstance(body.get("max_tokens"), bool | str | float | list | dict):
            body = {"max_tokens": min(body.get("max_tokens") or 1, 2)} | {
                k: v for k, v in body.items() if k != "max_tokens"
            }
        raw = json.dumps(body).encode()
        if random_.random() < 0.2:
            position = random_.randrange(len(raw))
            raw = raw[:position] + bytes([random_.randrange(256)]) + raw[position + 1 :]
        answer = tiny.http.post(path, content=raw)
        statuses.add(answer.status_code)
        assert answer.status_code < 500, (number, raw, answer.text)
        if answer.status_code != 200:
            error = answer.json()["error"]
            assert error["message"].endswith("."), (raw, error)
            assert "\n" not in error["message"], (raw, error)
    assert {200, 400} <= statuses
    tiny.until_idle()
    assert tiny.engine.stats().pages_used == 0
