"""Function calling: how tools get into the prompt, and how calls are found in the text.

A call is written as ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>`` (the form of Hermes and Qwen). A
chat template that knows tools shows them its own way; for one that does not, the tools are described in the system
message and earlier calls and results are written out as text.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fallow.errors import RequestError
from fallow.server.requests import Message, Tool

OPEN, CLOSE = "<tool_call>", "</tool_call>"


@dataclass(frozen=True)
class CalledFunction:
    """One call: ``arguments`` is JSON text, as the API gives it."""

    id: str
    name: str
    arguments: str


class ToolCallParser:
    """Splits text, as it arrives, into what is said and what is called."""

    def __init__(self) -> None:
        self._pending = ""
        self._inside = False

    def feed(self, text: str) -> tuple[str, list[CalledFunction]]:
        """What this text adds: content, and the calls that it completed."""
        self._pending += text
        content = ""
        calls: list[CalledFunction] = []
        while True:
            if self._inside:
                end = self._pending.find(CLOSE)
                if end < 0:
                    return content, calls
                body, self._pending = self._pending[:end], self._pending[end + len(CLOSE) :]
                self._inside = False
                call = _read_call(body)
                if call is None:
                    content += OPEN + body + CLOSE
                else:
                    calls.append(call)
            else:
                start = self._pending.find(OPEN)
                if start < 0:
                    # The end may be the beginning of a tag: it is held back until that is decided.
                    held = _overlap(self._pending, OPEN)
                    content += self._pending[: len(self._pending) - held]
                    self._pending = self._pending[len(self._pending) - held :]
                    return content, calls
                content += self._pending[:start]
                self._pending = self._pending[start + len(OPEN) :]
                self._inside = True

    def end(self) -> tuple[str, list[CalledFunction]]:
        """What is left when the text has ended: a call whose end tag is missing, or an unfinished one as text."""
        rest, self._pending = self._pending, ""
        if not self._inside:
            return rest, []
        self._inside = False
        call = _read_call(rest)
        return ("", [call]) if call is not None else (OPEN + rest, [])


def _overlap(text: str, tag: str) -> int:
    """How many characters at the end of ``text`` could begin ``tag``."""
    for size in range(min(len(tag) - 1, len(text)), 0, -1):
        if tag.startswith(text[-size:]):
            return size
    return 0


def _read_call(body: str) -> CalledFunction | None:
    try:
        call = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None
    arguments = call.get("arguments", call.get("parameters", {}))
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return CalledFunction(id=f"call_{uuid.uuid4().hex[:24]}", name=call["name"], arguments=arguments)


def template_messages(
    messages: Sequence[Message], tools: Sequence[Tool], *, template_knows_tools: bool
) -> list[dict[str, Any]]:
    """The messages as a chat template wants them: plain dictionaries, text contents.

    Raises ``RequestError`` where a message has content that a text model cannot read.
    """
    rendered: list[dict[str, Any]] = []
    for position, message in enumerate(messages):
        content = _text(message, position)
        if message.role == "tool" and not template_knows_tools:
            rendered.append({"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"})
            continue
        entry: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role, "content": content}
        if message.name is not None:
            entry["name"] = message.name
        if message.tool_call_id is not None:
            entry["tool_call_id"] = message.tool_call_id
        if message.tool_calls:
            calls = [_earlier_call(call.function.name, call.function.arguments) for call in message.tool_calls]
            if template_knows_tools:
                entry["tool_calls"] = [
                    {"id": call.id, "type": "function", "function": function}
                    for call, function in zip(message.tool_calls, calls, strict=True)
                ]
            else:
                written = [f"{OPEN}\n{json.dumps(call, ensure_ascii=False)}\n{CLOSE}" for call in calls]
                entry["content"] = "\n".join([content, *written] if content else written)
        rendered.append(entry)
    if tools and not template_knows_tools:
        _describe(tools, rendered)
    return rendered


def template_tools(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """The tools as a chat template wants them."""
    return [tool.model_dump(exclude_none=True) for tool in tools]


def _earlier_call(name: str, arguments: str) -> dict[str, Any]:
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        value = arguments
    return {"name": name, "arguments": value}


def _text(message: Message, position: int) -> str:
    where = f"messages[{position}]"
    content = message.content
    if content is None:
        if message.role != "assistant":
            raise RequestError(f"{where}.content is missing: it is required.", param=f"{where}.content")
        return message.refusal or ""
    if isinstance(content, str):
        return content
    texts = []
    for index, part in enumerate(content):
        text = part.refusal if part.type == "refusal" else part.text if part.type == "text" else None
        if text is None:
            wrong = "has no text" if part.type == "text" else f"is of the type {part.type!r}"
            raise RequestError(
                f"{where}.content[{index}] {wrong}: this model reads only text.", param=f"{where}.content[{index}]"
            )
        texts.append(text)
    return "".join(texts)


def _describe(tools: Sequence[Tool], messages: list[dict[str, Any]]) -> None:
    lines = [json.dumps(tool, ensure_ascii=False) for tool in template_tools(tools)]
    text = (
        "You can call these functions, given as JSON:\n"
        + "\n".join(lines)
        + f'\nTo call one, answer with {OPEN}{{"name": "the function", "arguments": {{...}}}}{CLOSE}.'
    )
    if messages and messages[0]["role"] == "system":
        messages[0]["content"] += "\n\n" + text
    else:
        messages.insert(0, {"role": "system", "content": text})
