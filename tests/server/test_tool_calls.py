"""Calls found in text, however the text is cut; and tools and messages as templates want them."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fallow.errors import RequestError
from fallow.server.requests import Message, Tool
from fallow.server.tools import CalledFunction, ToolCallParser, template_messages

TEXT = (
    'Well <b> <tool_call>\n{"name": "f", "arguments": {"a": "</b> \\u00e9"}}\n</tool_call>\n'
    '<tool_call>{"name": "g", "arguments": {}}</tool_call> bye <tool'
)


def parse(pieces: list[str]) -> tuple[str, list[CalledFunction]]:
    parser = ToolCallParser()
    content, calls = "", []
    for piece in pieces:
        text, found = parser.feed(piece)
        content += text
        calls += found
    text, found = parser.end()
    return content + text, calls + found


@given(st.lists(st.integers(0, len(TEXT)), max_size=12))
def test_calls_are_found_however_the_text_is_cut(cuts: list[int]) -> None:
    places = [0, *sorted(cuts), len(TEXT)]
    content, calls = parse([TEXT[a:b] for a, b in itertools.pairwise(places)])
    assert content == "Well <b> \n bye <tool"
    assert [(call.name, json.loads(call.arguments)) for call in calls] == [("f", {"a": "</b> é"}), ("g", {})]
    assert len({call.id for call in calls}) == 2


@given(st.text(st.sampled_from('<tool_cal>/{"name:}, \n'), max_size=80))
def test_no_text_is_lost_where_nothing_is_called(text: str) -> None:
    content, calls = parse(list(text))
    assert calls == []
    assert content == text


def test_content_is_not_held_back_longer_than_needed() -> None:
    parser = ToolCallParser()
    assert parser.feed("a < b")[0] == "a < b"
    assert parser.feed(" <tool")[0] == " "
    assert parser.feed("box")[0] == "<toolbox"


@pytest.mark.parametrize("body", ["", "nonsense", "[]", '{"arguments": {}}', '{"name": 5}', "[" * 100_000])
def test_what_is_no_call_stays_text(body: str) -> None:
    text = f"<tool_call>{body}</tool_call>"
    assert parse([text]) == (text, [])
    assert parse([f"<tool_call>{body}"]) == (f"<tool_call>{body}", [])


def test_a_call_without_its_end_tag_counts() -> None:
    content, calls = parse(['<tool_call>{"name": "f", "arguments": {"a": 1}}'])
    assert (content, [call.arguments for call in calls]) == ("", ['{"a": 1}'])


MESSAGES = [
    Message(role="developer", content="Be kind."),
    Message(role="user", content="Weather?"),
    Message.model_validate(
        {
            "role": "assistant",
            "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}],
        }
    ),
    Message(role="tool", tool_call_id="c", content="22"),
]
TOOL = Tool.model_validate({"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}})


def test_a_template_that_knows_tools_gets_them_as_data() -> None:
    system, _, assistant, tool = template_messages(MESSAGES, [TOOL], template_knows_tools=True)
    assert system == {"role": "system", "content": "Be kind."}
    assert assistant["tool_calls"][0]["function"] == {"name": "f", "arguments": {"a": 1}}
    assert (tool["role"], tool["content"], tool["tool_call_id"]) == ("tool", "22", "c")


def test_a_template_that_does_not_gets_them_as_text() -> None:
    system, _, assistant, result = template_messages(MESSAGES, [TOOL], template_knows_tools=False)
    assert system["content"].startswith("Be kind.\n\n")
    assert '"name": "f"' in system["content"]
    assert ToolCallParser().feed(assistant["content"])[1][0].arguments == '{"a": 1}'
    assert result["role"] == "user"
    assert "22" in result["content"]


def test_content_that_is_not_text_is_refused_by_name() -> None:
    image = Message.model_validate({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]})
    with pytest.raises(RequestError, match=r"messages\[1\]\.content\[0\] is of the type 'image_url'") as caught:
        template_messages([MESSAGES[1], image], [], template_knows_tools=False)
    assert caught.value.param == "messages[1].content[0]"
