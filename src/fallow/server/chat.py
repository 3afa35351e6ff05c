"""``/v1/chat/completions``: from the request to the engine, and from its deltas to the answer."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fallow.engine.constraint import Constraint
from fallow.engine.sampling import SamplingParams
from fallow.server.generation import Generation
from fallow.server.logprobs import chat_logprobs
from fallow.server.requests import ChatCompletionRequest, NamedTool
from fallow.server.sampling import sampling_params
from fallow.server.sse import event, json_string
from fallow.server.tools import CalledFunction, ToolCallParser, template_messages, template_tools
from fallow.server.usage import FINGERPRINT, usage

if TYPE_CHECKING:
    from fallow.engine.engine import Engine
    from fallow.engine.outputs import RequestDelta


def prepare_chat(engine: Engine, request: ChatCompletionRequest) -> tuple[list[list[int]], SamplingParams]:
    """The prompt's tokens, and how to sample. Slow (template, grammar, tokenizer): not for the event loop.

    Raises ``ApiError`` or ``FallowError``.
    """
    template = engine.tokenizer.needed_chat_template()
    tools = request.tools if request.tools and request.tool_choice != "none" else []
    knows_tools = "tools" in template.source
    messages = template_messages(request.messages, tools, template_knows_tools=knows_tools)
    shown = template_tools(tools) if tools and knows_tools else None
    text = template.render(messages, tools=shown, add_generation_prompt=True)
    sampling = sampling_params(request, constraint=_constraint(request))
    # The template writes the special tokens itself.
    return [engine.tokenizer.encode(text, add_special_tokens=False)], sampling


def _constraint(request: ChatCompletionRequest) -> Constraint | None:
    form = request.response_format
    if form is not None and form.type == "json_object":
        return Constraint.json_object()
    if form is not None and form.json_schema is not None:
        wanted = form.json_schema
        if wanted.schema_ is None:
            return Constraint.json_object()
        return Constraint.json_schema(wanted.schema_, strict=wanted.strict is True)
    if not request.tools or request.tool_choice == "none":
        return None
    if isinstance(request.tool_choice, NamedTool):
        name = request.tool_choice.function.name
        named = [tool for tool in request.tools if tool.function.name == name]
        return Constraint.from_tools(template_tools(named), required=True, parallel=False)
    return Constraint.from_tools(
        template_tools(request.tools),
        required=request.tool_choice == "required",
        parallel=request.parallel_tool_calls is not False,
    )


@dataclass
class _Choice:
    parser: ToolCallParser | None
    text: list[str] = field(default_factory=list)
    calls: list[CalledFunction] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    finish_reason: str | None = None
    begun: bool = False

    def read(self, deltas: Sequence[RequestDelta], *, logprobs: bool) -> tuple[str, list[CalledFunction], list[Any]]:
        """Take in what the engine wrote; returns what it adds to the content, the calls and the logprobs."""
        text = "".join(delta.text for delta in deltas)
        entries = [entry for delta in deltas for entry in chat_logprobs(delta.logprobs or ())] if logprobs else []
        ended = deltas[-1].finish_reason
        calls: list[CalledFunction] = []
        if self.parser is not None:
            text, calls = self.parser.feed(text)
            if ended is not None:
                rest, last = self.parser.end()
                text, calls = text + rest, calls + last
            # Line breaks between calls are not something that was said.
            if (calls or self.calls) and not text.strip():
                text = ""
        self.calls += calls
        if ended is not None:
            self.finish_reason = "tool_calls" if self.calls and ended == "stop" else ended
        return text, calls, entries


class ChatWriter:
    """The answer to one chat request, whole or as events."""

    def __init__(self, request: ChatCompletionRequest, generation: Generation, model: str) -> None:
        self._generation = generation
        self._logprobs = bool(request.logprobs)
        self._tools = bool(request.tools) and request.tool_choice != "none"
        self._include_usage = bool(request.stream_options and request.stream_options.include_usage)
        self._choices: dict[int, _Choice] = {}
        self._common = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion.chunk" if request.stream else "chat.completion",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": FINGERPRINT,
        }
        self._head = "data: " + json.dumps(self._common)[:-1] + ', "choices": [{"index": '
        self._tail = '}], "usage": null}\n\n' if self._include_usage else "}]}\n\n"

    def _choice(self, index: int) -> _Choice:
        if index not in self._choices:
            self._choices[index] = _Choice(ToolCallParser() if self._tools else None)
        return self._choices[index]

    def collect(self, batch: Sequence[tuple[int, RequestDelta]]) -> None:
        """Take in deltas for ``result``."""
        for index, deltas in by_choice(batch).items():
            choice = self._choice(index)
            text, _, entries = choice.read(deltas, logprobs=self._logprobs)
            choice.text.append(text)
            choice.logprobs += entries

    def result(self) -> dict[str, Any]:
        """The whole answer."""
        choices = []
        for index, choice in sorted(self._choices.items()):
            text = "".join(choice.text)
            message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
            if choice.calls:
                message["content"] = text or None
                message["tool_calls"] = [_call(call) for call in choice.calls]
            logprobs = {"content": choice.logprobs, "refusal": None} if self._logprobs else None
            choices.append(
                {"index": index, "message": message, "logprobs": logprobs, "finish_reason": choice.finish_reason}
            )
        return self._common | {"choices": choices, "usage": usage(self._generation)}

    def write(self, batch: Sequence[tuple[int, RequestDelta]]) -> bytes:
        """The events for these deltas: one a choice, however many tokens it got, and one for its end."""
        out: list[str] = []
        for index, deltas in by_choice(batch).items():
            choice = self._choice(index)
            before = len(choice.calls)
            text, calls, entries = choice.read(deltas, logprobs=self._logprobs)
            first = "" if choice.begun else '"role": "assistant"'
            if text or entries or not choice.begun:
                content = f'"content": {json_string(text)}'
                delta = f"{first}, {content}" if first else content
                out.append(self._event(index, delta, logprobs=entries))
                choice.begun = True
            for position, call in enumerate(calls, before):
                out.append(self._event(index, f'"tool_calls": [{json.dumps({"index": position} | _call(call))}]'))
            if choice.finish_reason is not None:
                out.append(self._event(index, "", finish_reason=choice.finish_reason))
        return "".join(out).encode()

    def _event(
        self, index: int, delta: str, *, logprobs: list[dict[str, Any]] | None = None, finish_reason: str | None = None
    ) -> str:
        scores = json.dumps({"content": logprobs, "refusal": None}) if logprobs else "null"
        reason = f'"{finish_reason}"' if finish_reason else "null"
        return f'{self._head}{index}, "delta": {{{delta}}}, "logprobs": {scores}, "finish_reason": {reason}{self._tail}'

    def finish(self) -> bytes:
        """The event with the token counts, where the client asked for one."""
        if not self._include_usage:
            return b""
        return event(self._common | {"choices": [], "usage": usage(self._generation)})


def _call(call: CalledFunction) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def by_choice(batch: Sequence[tuple[int, RequestDelta]]) -> dict[int, list[RequestDelta]]:
    """The deltas of a batch, choice by choice, in the order in which they came."""
    groups: dict[int, list[RequestDelta]] = {}
    for index, delta in batch:
        groups.setdefault(index, []).append(delta)
    return groups
