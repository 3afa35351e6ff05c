"""``/v1/completions``: from the request to the engine, and from its deltas to the answer."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fallow.errors import RequestError
from fallow.server.chat import by_choice
from fallow.server.generation import Generation
from fallow.server.logprobs import completion_logprobs, text_length
from fallow.server.requests import MAX_PROMPTS, CompletionRequest
from fallow.server.sse import event, json_string
from fallow.server.usage import FINGERPRINT, usage

if TYPE_CHECKING:
    from fallow.engine.engine import Engine
    from fallow.engine.outputs import RequestDelta, TokenLogprob


def prompts_of(request: CompletionRequest) -> list[str] | list[list[int]]:
    """The prompts, always as a list. Raises ``RequestError`` where there are more choices than one may ask for."""
    prompt: Any = request.prompt
    prompts = prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]
    if len(prompts) * (request.n or 1) > MAX_PROMPTS:
        raise RequestError(f"prompt and n ask for more than {MAX_PROMPTS} choices: send several requests.", param="n")
    return prompts


@dataclass
class _Choice:
    text: list[str]
    length: int  # characters so far
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None


class CompletionWriter:
    """The answer to one completion request, whole or as events."""

    def __init__(self, engine: Engine, request: CompletionRequest, generation: Generation, model: str) -> None:
        self._generation = generation
        self._logprobs = request.logprobs is not None
        self._include_usage = bool(request.stream_options and request.stream_options.include_usage)
        self._n = request.n or 1
        self._echoes: list[str] = []
        if request.echo:
            decode = engine.tokenizer.decode
            self._echoes = [p if isinstance(p, str) else decode(p) for p in prompts_of(request)]
        self._choices: dict[int, _Choice] = {}
        self._common = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": FINGERPRINT,
        }
        self._head = "data: " + json.dumps(self._common)[:-1] + ', "choices": [{"index": '
        self._tail = '}], "usage": null}\n\n' if self._include_usage else "}]}\n\n"

    def _read(self, index: int, deltas: Sequence[RequestDelta]) -> tuple[_Choice, str, dict[str, Any] | None]:
        """Take in what the engine wrote; returns what it adds to the text and its logprobs."""
        text = "".join(delta.text for delta in deltas)
        choice = self._choices.get(index)
        if choice is None:
            choice = self._choices[index] = _Choice([], 0)
            if self._echoes:
                text = self._echoes[index // self._n] + text
        scores = None
        if self._logprobs:
            entries = [entry for delta in deltas for entry in delta.logprobs or ()]
            scores = completion_logprobs(entries, choice.length) if entries else None
            choice.logprobs += entries
            choice.length += sum(map(text_length, entries))
        choice.finish_reason = deltas[-1].finish_reason or choice.finish_reason
        return choice, text, scores

    def collect(self, batch: Sequence[tuple[int, RequestDelta]]) -> None:
        """Take in deltas for ``result``."""
        for index, deltas in by_choice(batch).items():
            choice, text, _ = self._read(index, deltas)
            choice.text.append(text)

    def result(self) -> dict[str, Any]:
        """The whole answer."""
        choices = [
            {
                "index": index,
                "text": "".join(choice.text),
                "logprobs": completion_logprobs(choice.logprobs, 0) if self._logprobs else None,
                "finish_reason": choice.finish_reason,
            }
            for index, choice in sorted(self._choices.items())
        ]
        return self._common | {"choices": choices, "usage": usage(self._generation)}

    def write(self, batch: Sequence[tuple[int, RequestDelta]]) -> bytes:
        """The events for these deltas: one a choice, however many tokens it got."""
        out: list[str] = []
        for index, deltas in by_choice(batch).items():
            choice, text, scores = self._read(index, deltas)
            if text or scores or choice.finish_reason:
                reason = f'"{choice.finish_reason}"' if choice.finish_reason else "null"
                logprobs = json.dumps(scores) if scores else "null"
                out.append(
                    f'{self._head}{index}, "text": {json_string(text)}, "logprobs": {logprobs}, '
                    f'"finish_reason": {reason}{self._tail}'
                )
        return "".join(out).encode()

    def finish(self) -> bytes:
        """The event with the token counts, where the client asked for one."""
        if not self._include_usage:
            return b""
        return event(self._common | {"choices": [], "usage": usage(self._generation)})
