from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from fallow.errors import ModelFileError, RequestError
from fallow.models import chat_template
from fallow.models.chat_template import ChatTemplate
from fallow.models.tokenizer import load_tokenizer

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1 < 2 & é 🙂?"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "Why?"},
]
TOOLS = [
    {
        "type": "function",
        "function": {"name": "f", "description": "<b>é</b>", "parameters": {"type": "object", "properties": {}}},
    }
]
# In the manner of the families that are served, with the features that their templates use.
TEMPLATES = [
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "{{- bos_token }}\n{%- if tools is not none %}\n    {{- 'Tools: ' }}\n    {%- for tool in tools %}\n"
    "        {{- tool | tojson(indent=4) }}\n        {{- '\\n' }}\n    {%- endfor %}\n{%- endif %}\n"
    "{%- set ns = namespace(last='') %}\n{%- for m in messages %}\n    {%- set ns.last = m.role %}\n"
    "    {{- '[' + m.role | upper + '] ' + m.content | trim + eos_token }}\n{%- endfor %}\n{{- ns.last }}",
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
    "{% set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}"
    "{% if loop.index > 2 %}{% break %}{% endif %}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}"
    "[INST]{{ system ~ ' ' if loop.first else '' }}{{ m.content }}[/INST]{% endif %}{% endfor %}"
    "{{ {'z': 1, 'a': '<é>'} | tojson }} {{ tools | length if tools else 0 }}",
    "  {% for m in messages %}\n    {# a comment #}\n  {%+ if true %}x{% endif %}\n{% endfor %}\n   end\n",
    "{% macro show(m) %}<{{ m.content }}>{% endmacro %}{% for m in messages | selectattr('role', 'equalto', 'user') %}"
    "{{ show(m) }}{{ m.content.split(' ') | join('|') }}{% endfor %}{{ strftime_now('%Y') }}",
]


@pytest.mark.parametrize("source", TEMPLATES, ids=range(len(TEMPLATES)))
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["plain", "tools"])
@pytest.mark.parametrize("prompted", [True, False])
def test_renders_as_transformers_does(source: str, tools: list[dict[str, Any]] | None, prompted: bool) -> None:
    utilities = pytest.importorskip("transformers.utils.chat_template_utils")
    (expected,), _ = utilities.render_jinja_template(
        [MESSAGES], tools=tools, chat_template=source, add_generation_prompt=prompted, bos_token="<s>", eos_token="</s>"
    )
    template = ChatTemplate(source, bos_token="<s>", eos_token="</s>")
    assert template.render(MESSAGES, tools=tools, add_generation_prompt=prompted) == expected


def test_the_real_template(smollm2_gguf: Path) -> None:
    tokenizer = load_tokenizer(smollm2_gguf)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.encode(text, add_special_tokens=False)[0] == tokenizer.bos_token_id


def test_parts_none_and_tool_calls() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": [1]}'}}
    cut = {"id": "2", "type": "function", "function": {"name": "f", "arguments": '{"a": '}}
    source = (
        "{% for m in messages %}{{ m.content }}|{% for c in m.tool_calls or [] %}"
        "{% if c.function.arguments is mapping %}{{ c.function.arguments.a[0] }}"
        "{% else %}{{ c.function.arguments }}{% endif %};{% endfor %}{% endfor %}"
    )
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [call, cut]},
    ]
    assert ChatTemplate(source).render(messages) == 'a\nb||1;{"a": ;'
    assert messages[1]["tool_calls"][0]["function"]["arguments"] == '{"a": [1]}'  # type: ignore[index]


@pytest.mark.parametrize(
    "messages",
    [
        ["text"],
        [{"content": "x"}],
        [{"role": 1, "content": "x"}],
        [{"role": "user", "content": 3}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
        [{"role": "user", "content": ["x"]}],
        [{"role": "assistant", "content": "", "tool_calls": "f"}],
        [{"role": "assistant", "content": "", "tool_calls": [{"function": {}}]}],
        [{"role": "user", "content": "x", "more": {1, 2}}],
    ],
    ids=str,
)
def test_messages_of_the_wrong_shape(messages: Any) -> None:
    with pytest.raises(RequestError) as caught:
        ChatTemplate("{{ messages }}").render(messages)
    assert caught.value.param == "messages"


def test_a_refusal_of_the_template_is_the_requests_fault() -> None:
    with pytest.raises(RequestError, match="Roles must alternate"):
        ChatTemplate("{{ raise_exception('Roles must alternate.') }}").render(MESSAGES)
    with pytest.raises(RequestError, match="has no attribute 'name'"):
        ChatTemplate("{{ messages[0].name.first }}").render(MESSAGES)


HOSTILE = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}"
    "{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) %}aaaaaaaaaaaaaaaa{% endfor %}{% endfor %}",
    "{{ 'a' * 10 ** 10 }}",
    "{{ [0] * 10 ** 10 }}",
    "{{ 9 ** (9 ** 9) % 7 }}",
    "{{ 'a' | center(10 ** 11) }}",
    "{{ '%0999999999d' % 1 }}",
    "{{ '{:999999999}'.format(1) }}",
    "{% set n = namespace(s='ab') %}{% for i in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}",
    "{% set n = namespace(s='ab') %}{% for i in range(99) %}{% set n.s %}{{ n.s }}{{ n.s }}{% endset %}{% endfor %}",
    "{% set n = namespace(l=[1]) %}{% for i in range(99) %}{% set n.l = [n.l, n.l] %}{% endfor %}{{ n.l }}",
    "{% set n = namespace(l=[1]) %}{% for i in range(99) %}{% set n.l = [n.l, n.l] %}{% endfor %}{{ n.l | tojson }}",
    "{% set x %}{% for a in range(99999) %}{{ messages }}{% endfor %}{% endset %}{{ x | replace('e', x) }}",
]


@pytest.mark.parametrize("source", HOSTILE)
def test_hostile_templates_end_with_a_sentence(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "_worker", chat_template._Worker())
    monkeypatch.setattr(chat_template, "CPU_SECONDS", 1)
    try:
        with pytest.raises(ModelFileError, match="damaged or hostile"):
            ChatTemplate(source).render(MESSAGES)
        assert ChatTemplate("{{ messages | length }}").render(MESSAGES) == "4"  # the next one is served again
    finally:
        chat_template._worker.stop()


@pytest.mark.parametrize(
    "source",
    [
        "{% if %}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ messages.append(1) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ " + "(" * 4000 + "1" + ")" * 4000 + " }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    ],
    ids=lambda source: source[:30],
)
def test_broken_and_prying_templates_end_with_a_sentence(source: str) -> None:
    with pytest.raises((ModelFileError, RequestError)) as caught:
        ChatTemplate(source).render(MESSAGES)
    assert str(caught.value).endswith(".")


def test_many_threads_share_the_worker() -> None:
    results: dict[int, str] = {}

    def render(i: int) -> None:
        template = ChatTemplate(f"{i}:{{{{ messages[0].content }}}}")
        for _ in range(20):
            results[i] = template.render([{"role": "user", "content": "x" * 50_000 + str(i)}])

    threads = [threading.Thread(target=render, args=(i,)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {i: f"{i}:{'x' * 50_000}{i}" for i in range(12)}


def test_a_killed_worker_is_replaced() -> None:
    template = ChatTemplate("{{ strftime_now('%Y') }}")
    template.render(MESSAGES)
    process = chat_template._worker._process
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert int(template.render(MESSAGES)) >= datetime.now().year - 1


def test_the_worker_ends_with_its_process() -> None:
    code = (
        "import os; from fallow.models import chat_template as c; c.ChatTemplate('x').render([]);"
        "print(c._worker._process.pid, flush=True); os._exit(0)"  # no clean-up runs
    )
    worker = int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60).stdout)
    for _ in range(200):
        try:
            if Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return
        except FileNotFoundError:
            return
        threading.Event().wait(0.05)
    pytest.fail("the worker outlived its parent")
