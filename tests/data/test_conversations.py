"""Conversations under a real chat template: the model learns to write the answers and their ends, nothing else."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fallow.data.conversations import conversation_tokens
from fallow.errors import FallowError
from fallow.models.tokenizer import Tokenizer

TURNS: list[dict[str, Any]] = [
    {"role": "user", "content": "What lies fallow?"},
    {"role": "assistant", "content": "A field.\n\nIt rests."},
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "So that it bears more."},
]


def with_template(tokenizer: Tokenizer, template: str | None) -> Tokenizer:
    document = json.loads(tokenizer.backend.to_str())
    return Tokenizer(document, bos_token_id=0, eos_token_ids=[0], chat_template=template)


def learnt(tokenizer: Tokenizer, ids: list[int], answers: list[bool]) -> str:
    return tokenizer.decode([i for i, answer in zip(ids, answers, strict=True) if answer], skip_special_tokens=False)


@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "Be brief."}]])
def test_answers_and_their_ends_are_learnt(smollm2: Tokenizer, system: list[dict[str, Any]]) -> None:
    messages = [*system, *TURNS]
    ids, answers = conversation_tokens(smollm2, messages, "here")
    whole = smollm2.apply_chat_template(messages, add_generation_prompt=False)
    assert smollm2.decode(ids, skip_special_tokens=False) == whole
    assert learnt(smollm2, ids, answers) == "A field.\n\nIt rests.<|im_end|>So that it bears more.<|im_end|>"
    prompt = smollm2.encode(smollm2.apply_chat_template(messages[:-1]), add_special_tokens=False)
    first = len(ids) - 1 - answers[::-1].index(True)
    while answers[first - 1]:
        first -= 1
    assert ids[:first] == prompt  # what the model is given when it is served


def test_what_follows_the_last_answer_is_left_out(smollm2: Tokenizer) -> None:
    more = [*TURNS, {"role": "user", "content": "Really?"}]
    assert conversation_tokens(smollm2, more, "here") == conversation_tokens(smollm2, TURNS, "here")


def test_a_tool_call_is_an_answer_too(smollm2: Tokenizer) -> None:
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.arguments | tojson }}{% endfor %}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    document = json.loads(smollm2.backend.to_str())
    tokenizer = Tokenizer(document, bos_token_id=1, eos_token_ids=[2], chat_template=template)
    call = {"type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    messages = [TURNS[0], {"role": "assistant", "content": None, "tool_calls": [call]}]
    ids, answers = conversation_tokens(tokenizer, messages, "here")
    assert learnt(tokenizer, ids, answers) == '{"a": 1}<|im_end|>'


@pytest.mark.parametrize(
    "template",
    [
        # Earlier messages lose what stood around them; Qwen3's template takes away earlier thoughts like this.
        "{% for m in messages %}{% if loop.last %}[{{ m.content }}]{% else %}{{ m.content }}{% endif %}{% endfor %}",
        "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}",
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}answer:{% endif %}",
    ],
)
def test_a_template_that_rewrites_what_it_wrote_is_refused(tokenizer: Tokenizer, template: str) -> None:
    with pytest.raises(FallowError, match=r"^file, line 3: the chat template does not put message [24] behind"):
        conversation_tokens(with_template(tokenizer, template), TURNS, "file, line 3")


def test_other_mistakes_are_one_sentence_with_the_place(tokenizer: Tokenizer, smollm2: Tokenizer) -> None:
    refusing = with_template(tokenizer, "{{ raise_exception('roles must alternate') }}")
    for made, messages, reason in [
        (refusing, TURNS, "refuses these messages: roles must alternate"),
        (with_template(tokenizer, None), TURNS, "a conversation is written by a chat template, which this tokenizer"),
        (smollm2, TURNS[:1], "no message of the assistant"),
        (smollm2, [TURNS[0], {"role": "assistant", "content": 3}], r"content must be a text"),
    ]:
        with pytest.raises(FallowError, match=rf"^line 3: .*{reason}"):
            conversation_tokens(made, messages, "line 3")
