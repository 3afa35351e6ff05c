"""The official ``openai`` client against the server with the real small model."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai
import pytest

QUESTION: list[Any] = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 24},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "likes": {"type": "array", "items": {"enum": ["tea", "coffee"]}, "minItems": 1, "maxItems": 2},
    },
    "required": ["name", "age", "likes"],
    "additionalProperties": False,
}
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 24}, "unit": {"enum": ["C", "F"]}},
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}
CLOCK: Any = {
    "type": "function",
    "function": {
        "name": "get_time",
        "description": "The time in a zone.",
        "parameters": {
            "type": "object",
            "properties": {"zone": {"enum": ["UTC", "CET"]}},
            "required": ["zone"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def client(smollm2: Any) -> openai.OpenAI:
    return smollm2.client()


def chat(client: openai.OpenAI, **fields: Any) -> Any:
    return client.chat.completions.create(
        **{"model": "smollm2", "messages": QUESTION, "temperature": 0, "max_tokens": 24} | fields
    )


def complete(client: openai.OpenAI, **fields: Any) -> Any:
    return client.completions.create(
        **{"model": "smollm2", "prompt": "The capital of France is", "temperature": 0} | fields
    )


def joined(stream: Any) -> tuple[str, list[Any]]:
    chunks = list(stream)
    return "".join(c.choices[0].delta.content or "" for c in chunks if c.choices), chunks


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["smollm2"]
    assert client.models.retrieve("smollm2").object == "model"


def test_chat(client: openai.OpenAI) -> None:
    answer = chat(client)
    assert answer.object == "chat.completion"
    assert answer.model == "smollm2"
    assert answer.choices[0].message.role == "assistant"
    assert "Paris" in answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert 0 < answer.usage.completion_tokens <= 24


def test_chat_stream_is_the_same_text(client: openai.OpenAI) -> None:
    whole = chat(client)
    text, chunks = joined(chat(client, stream=True, stream_options={"include_usage": True}))
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert all(c.usage is None for c in chunks[:-1])
    assert len({c.id for c in chunks}) == 1


def test_stream_without_usage_has_none(client: openai.OpenAI) -> None:
    _, chunks = joined(chat(client, stream=True, max_tokens=3))
    assert all(c.choices and c.usage is None for c in chunks)


def test_async_streams_side_by_side(smollm2: Any) -> None:
    async def one(client: openai.AsyncOpenAI) -> str:
        stream = await client.chat.completions.create(
            model="smollm2", messages=QUESTION, temperature=0, max_tokens=24, stream=True
        )
        return "".join([c.choices[0].delta.content or "" async for c in stream])

    async def all_of_them() -> list[str]:
        async with smollm2.async_client() as client:
            return await asyncio.gather(*(one(client) for _ in range(4)))

    assert set(asyncio.run(all_of_them())) == {chat(smollm2.client()).choices[0].message.content}


def test_cached_tokens_are_counted(client: openai.OpenAI) -> None:
    long: list[Any] = [{"role": "user", "content": "List the numbers: " + ", ".join(map(str, range(100)))}]
    chat(client, messages=long, max_tokens=1)
    assert chat(client, messages=long, max_tokens=1).usage.prompt_tokens_details.cached_tokens > 0


def test_max_tokens(client: openai.OpenAI) -> None:
    for field in ("max_tokens", "max_completion_tokens"):
        answer = client.chat.completions.create(
            model="smollm2", messages=[{"role": "user", "content": "Tell me a long story."}], **{field: 5}
        )
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage.completion_tokens == 5


@pytest.mark.parametrize("stream", [False, True])
def test_stop(client: openai.OpenAI, stream: bool) -> None:
    full = chat(client).choices[0].message.content
    assert " of " in full
    for stop in (" of ", ["never seen", " of "]):
        if stream:
            text, chunks = joined(chat(client, stop=stop, stream=True))
            reason = chunks[-1].choices[0].finish_reason
        else:
            choice = chat(client, stop=stop).choices[0]
            text, reason = choice.message.content, choice.finish_reason
        assert text == full[: full.index(" of ")]
        assert reason == "stop"


def test_n_and_seed(client: openai.OpenAI) -> None:
    fields = {"n": 3, "seed": 11, "temperature": 1.0, "max_tokens": 12}
    first, second = chat(client, **fields), chat(client, **fields)
    texts = [choice.message.content for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    assert len(set(texts)) > 1
    assert texts == [choice.message.content for choice in second.choices]
    assert first.usage.completion_tokens == second.usage.completion_tokens > 12
    streamed = {0: "", 1: "", 2: ""}
    for chunk in chat(client, stream=True, **fields):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert list(streamed.values()) == texts
    other = [c.message.content for c in chat(client, **(fields | {"seed": 12345})).choices]
    assert other != texts


def test_chat_logprobs(client: openai.OpenAI) -> None:
    answer = chat(client, logprobs=True, top_logprobs=3)
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens
    written = b"".join(bytes(entry.bytes) for entry in content).decode()
    assert written == answer.choices[0].message.content
    for entry in content:
        values = [top.logprob for top in entry.top_logprobs]
        assert len(values) == 3
        assert values == sorted(values, reverse=True)
        assert entry.logprob == pytest.approx(values[0], abs=1e-4)  # greedy takes the most likely one
        assert entry.logprob <= 0
    _, chunks = joined(chat(client, logprobs=True, top_logprobs=3, stream=True))
    streamed = [e for c in chunks if c.choices[0].logprobs for e in c.choices[0].logprobs.content]
    assert streamed == content


def test_completion(client: openai.OpenAI) -> None:
    answer = complete(client)
    assert answer.object == "text_completion"
    assert "Paris" in answer.choices[0].text
    assert answer.usage.completion_tokens <= 16
    streamed = "".join(c.choices[0].text for c in complete(client, stream=True))
    assert streamed == answer.choices[0].text


def test_completion_prompts_of_every_kind(smollm2: Any, client: openai.OpenAI) -> None:
    texts = ["The capital of France is", "One, two, three,"]
    ids = [smollm2.engine.tokenizer.encode(text) for text in texts]
    alone = [complete(client, prompt=text, max_tokens=6).choices[0].text for text in texts]
    for prompt in (texts, ids):
        answer = complete(client, prompt=prompt, max_tokens=6)
        assert [choice.text for choice in answer.choices] == alone
        assert answer.usage.prompt_tokens == sum(map(len, ids))
    assert complete(client, prompt=ids[0], max_tokens=6).choices[0].text == alone[0]
    pairs = complete(client, prompt=texts, n=2, max_tokens=6).choices
    assert [choice.index for choice in pairs] == [0, 1, 2, 3]
    assert [choice.text for choice in pairs] == [alone[0], alone[0], alone[1], alone[1]]
    echoed = complete(client, prompt=texts, echo=True, max_tokens=6).choices
    assert [choice.text for choice in echoed] == [text + end for text, end in zip(texts, alone, strict=True)]


def test_completion_logprobs(client: openai.OpenAI) -> None:
    answer = complete(client, logprobs=2, max_tokens=8)
    scores = answer.choices[0].logprobs
    assert answer.choices[0].finish_reason == "length"  # else the last token is a special one, which is not in the text
    assert "".join(scores.tokens) == answer.choices[0].text
    assert len(scores.tokens) == len(scores.token_logprobs) == len(scores.text_offset) == 8
    for token, logprob, top, offset in zip(
        scores.tokens, scores.token_logprobs, scores.top_logprobs, scores.text_offset, strict=True
    ):
        assert answer.choices[0].text[offset:].startswith(token)
        assert top[token] == pytest.approx(logprob, abs=1e-4)


def test_logit_bias_forces_a_token(smollm2: Any, client: openai.OpenAI) -> None:
    token = smollm2.engine.tokenizer.encode(" tea", add_special_tokens=False)
    assert len(token) == 1
    answer = complete(client, logit_bias={str(token[0]): 100}, max_tokens=4)
    assert answer.choices[0].text == " tea" * 4


def test_extensions(smollm2: Any, client: openai.OpenAI) -> None:
    greedy = complete(client, max_tokens=8).choices[0].text
    one = complete(client, max_tokens=8, temperature=1.0, seed=3, extra_body={"top_k": 1, "min_p": 0.1})
    assert one.choices[0].text == greedy
    token = smollm2.engine.tokenizer.encode(greedy, add_special_tokens=False)[1]
    assert complete(client, max_tokens=8, extra_body={"stop_token_ids": [token]}).usage.completion_tokens <= 2
    assert complete(client, max_tokens=40, extra_body={"ignore_eos": True}).usage.completion_tokens == 40
    assert complete(client, max_tokens=8, extra_body={"repetition_penalty": 1.2}).choices[0].text


@pytest.mark.parametrize("stream", [False, True])
def test_json_schema(client: openai.OpenAI, stream: bool) -> None:
    fields: dict[str, Any] = {
        "messages": [{"role": "user", "content": "Describe a person called Ann as JSON."}],
        "max_tokens": 120,
        "response_format": {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}},
    }
    if stream:
        text, _ = joined(chat(client, stream=True, **fields))
    else:
        answer = chat(client, **fields).choices[0]
        assert answer.finish_reason == "stop"
        text = answer.message.content
    person = json.loads(text)
    assert set(person) == {"name", "age", "likes"}
    assert 0 <= person["age"] <= 120
    assert set(person["likes"]) <= {"tea", "coffee"}


UNIQUE = {
    "type": "object",
    "properties": {
        "id": {"type": "string", "pattern": "^(?=a).*$", "maxLength": 8},
        "n": {"type": "array", "items": {"enum": [1, 2]}, "uniqueItems": True, "minItems": 2, "maxItems": 3},
    },
    "required": ["id", "n"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("strict", [None, False])
def test_json_schema_not_strict_follows_what_it_can(client: openai.OpenAI, strict: bool | None) -> None:
    form = {"name": "x", "schema": UNIQUE} | ({} if strict is None else {"strict": strict})
    answer = chat(client, max_tokens=200, response_format={"type": "json_schema", "json_schema": form}).choices[0]
    assert answer.finish_reason == "stop"
    value = json.loads(answer.message.content)
    assert set(value) == {"id", "n"}
    assert set(value["n"]) <= {1, 2}
    assert 2 <= len(value["n"]) <= 3
    assert len(value["id"]) <= 8


def test_json_schema_strict_refuses_what_it_cannot_follow(client: openai.OpenAI) -> None:
    for part, reason in (("n", "uniqueItems"), ("id", "look-ahead")):
        schema = UNIQUE | {"properties": {part: UNIQUE["properties"][part]}, "required": [part]}
        form = {"name": "x", "schema": schema, "strict": True}
        with pytest.raises(openai.BadRequestError, match=reason) as caught:
            chat(client, response_format={"type": "json_schema", "json_schema": form})
        assert caught.value.param == "response_format"


def test_json_object(client: openai.OpenAI) -> None:
    answer = chat(
        client,
        messages=[{"role": "user", "content": 'Give me the JSON object {"name": "Ann"}.'}],
        max_tokens=200,
        response_format={"type": "json_object"},
    ).choices[0]
    assert answer.finish_reason == "stop"
    assert isinstance(json.loads(answer.message.content), dict)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_tools_forced(client: openai.OpenAI, choice: Any) -> None:
    fields: dict[str, Any] = {
        "messages": [{"role": "user", "content": "What is the weather in Paris in C?"}],
        "tools": [WEATHER],
        "tool_choice": choice,
        "parallel_tool_calls": False,
        "max_tokens": 120,
    }
    answer = chat(client, **fields).choices[0]
    assert answer.finish_reason == "tool_calls"
    (call,) = answer.message.tool_calls
    assert call.type == "function"
    assert call.function.name == "get_weather"
    arguments = json.loads(call.function.arguments)
    assert set(arguments) == {"city", "unit"}
    assert arguments["unit"] in ("C", "F")
    streamed = [c.choices[0] for c in chat(client, stream=True, **fields)]
    (piece,) = [t for c in streamed for t in c.delta.tool_calls or []]
    assert (piece.index, piece.function.name) == (0, "get_weather")
    assert json.loads(piece.function.arguments) == arguments
    assert streamed[-1].finish_reason == "tool_calls"
    assert "".join(c.delta.content or "" for c in streamed).strip() == ""


def test_tools_named_takes_the_named_one(client: openai.OpenAI) -> None:
    answer = chat(
        client,
        tools=[WEATHER, CLOCK],
        tool_choice={"type": "function", "function": {"name": "get_time"}},
        max_tokens=120,
    ).choices[0]
    assert [call.function.name for call in answer.message.tool_calls] == ["get_time"]
    assert json.loads(answer.message.tool_calls[0].function.arguments)["zone"] in ("UTC", "CET")


def test_tools_auto_and_none(client: openai.OpenAI) -> None:
    for choice in ("auto", "none"):
        answer = chat(client, tools=[WEATHER], tool_choice=choice, max_tokens=60).choices[0]
        called = answer.message.tool_calls or []
        assert bool(called) == (answer.finish_reason == "tool_calls")
        assert called or answer.message.content
        assert not (choice == "none" and called)
        for call in called:
            assert call.function.name == "get_weather"
            json.loads(call.function.arguments)


def test_tool_results_go_back(client: openai.OpenAI) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}
    answer = chat(
        client,
        messages=[
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "What is the weather in Paris?"}]},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "call_1", "content": "22 degrees and sunny"},
        ],
        max_tokens=40,
    )
    assert answer.choices[0].message.content


def test_fields_without_effect_are_accepted(client: openai.OpenAI) -> None:
    answer = chat(
        client,
        store=False,
        metadata={"a": "b"},
        service_tier="auto",
        user="u",
        reasoning_effort="low",
        presence_penalty=0.1,
        frequency_penalty=0.1,
        max_tokens=2,
    )
    assert answer.choices


@pytest.mark.parametrize(
    ("fields", "error", "param", "code"),
    [
        ({"temperature": -1}, openai.BadRequestError, "temperature", None),
        ({"top_p": 2}, openai.BadRequestError, "top_p", None),
        ({"max_tokens": 0}, openai.BadRequestError, "max_tokens", None),
        ({"n": 0}, openai.BadRequestError, "n", None),
        ({"logit_bias": {"-1": 5}}, openai.BadRequestError, "logit_bias.-1", None),
        ({"logit_bias": {"999999": 5}}, openai.BadRequestError, "logit_bias", None),
        ({"messages": []}, openai.BadRequestError, "messages", None),
        ({"extra_body": {"nonsense": 1}}, openai.BadRequestError, "nonsense", None),
        ({"extra_body": {"audio": {"voice": "x"}}}, openai.BadRequestError, "audio", None),
        ({"model": "gpt-9"}, openai.NotFoundError, "model", "model_not_found"),
        (
            {"messages": [{"role": "user", "content": "word " * 4000}]},
            openai.BadRequestError,
            "messages",
            "context_length_exceeded",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}},
            openai.BadRequestError,
            "response_format",
            None,
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": True}}},
            openai.BadRequestError,
            "response_format.json_schema.schema",
            None,
        ),
    ],
)
def test_errors(
    client: openai.OpenAI,
    fields: dict[str, Any],
    error: type[openai.APIStatusError],
    param: str | None,
    code: str | None,
) -> None:
    with pytest.raises(error) as caught:
        chat(client, **fields)
    assert caught.value.status_code == {openai.BadRequestError: 400, openai.NotFoundError: 404}[error]
    body: Any = caught.value.body
    assert set(body) == {"message", "type", "param", "code"}
    assert body["message"].endswith(".")
    assert "\n" not in body["message"]
    assert param is None or body["param"] == param
    assert code is None or body["code"] == code
    assert caught.value.request_id


def test_errors_of_the_server_itself(tiny_server: Any) -> None:
    server = tiny_server(api_keys=("secret",), max_body_bytes=2000)
    fields: dict[str, Any] = {"model": "tiny", "prompt": "x", "max_tokens": 2}
    assert server.client("secret").completions.create(**fields).choices
    with pytest.raises(openai.AuthenticationError) as wrong_key:
        server.client("wrong").completions.create(**fields)
    assert wrong_key.value.status_code == 401
    assert wrong_key.value.code == "invalid_api_key"
    with pytest.raises(openai.APIStatusError) as too_large:
        server.client("secret").completions.create(**fields | {"prompt": "x" * 3000})
    assert too_large.value.status_code == 413
    server.server.begin_drain()
    with pytest.raises((openai.InternalServerError, openai.APIConnectionError)) as draining:
        server.client("secret").completions.create(**fields)
    assert getattr(draining.value, "status_code", 503) == 503
