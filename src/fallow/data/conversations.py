"""Conversations as tokens, and which of these are answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fallow.errors import FallowError, RequestError
from fallow.models.tokenizer import Tokenizer


def conversation_tokens(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], where: str
) -> tuple[list[int], list[bool]]:
    """Token ids of ``messages`` under the tokenizer's chat template, and for each whether it is part of an answer.

    An answer is what the template adds to the generation prompt for an assistant's message, up to the token that ends
    its turn: what the model has to write. Prompt and answer are tokenized apart, as they are when the model is served.
    What follows the last answer is left out. Raises ``FallowError`` where there is no template or no answer, where the
    template refuses the messages, and where it writes an earlier message differently when a later one follows.
    """
    template = tokenizer.chat_template
    if template is None:
        raise FallowError(
            f"{where}: a conversation is written by a chat template, which this tokenizer does not have: "
            "put a chat_template.jinja into its folder, or give texts instead."
        )
    ids: list[int] = []
    answers: list[bool] = []
    written = ""
    try:
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = template.render(messages[:i], add_generation_prompt=True)
            whole = template.render(messages[: i + 1], add_generation_prompt=False)
            if not (prompt.startswith(written) and whole.startswith(prompt)):
                raise FallowError(
                    f"{where}: the chat template does not put message {i + 1} behind what it wrote for those before, "
                    "but writes them anew: use a template whose text only grows."
                )
            asked = tokenizer.encode(prompt[len(written) :], add_special_tokens=False)
            answer = tokenizer.encode(whole[len(prompt) :], add_special_tokens=False)
            end = _turn_end(answer, tokenizer.eos_token_ids)
            ids += [*asked, *answer]
            answers += [False] * len(asked) + [True] * end + [False] * (len(answer) - end)
            written = whole
    except RequestError as error:
        raise FallowError(f"{where}: {error}") from error
    if not any(answers):
        raise FallowError(f"{where}: the conversation has no message of the assistant, so nothing can be learnt.")
    return ids, answers


def _turn_end(answer: list[int], ends: frozenset[int]) -> int:
    """How many tokens of ``answer`` the model writes: all up to its last end-of-sequence token, if it has one."""
    last = max((i for i, token in enumerate(answer) if token in ends), default=len(answer) - 1)
    return last + 1
