"""A conversation in a terminal: its history, one streamed answer with what it cost, and the loop around it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue
from time import perf_counter
from typing import TYPE_CHECKING

from fallow.errors import FallowError, RequestError
from fallow.terminal import note, write_text

if TYPE_CHECKING:
    from fallow.engine.engine import Engine
    from fallow.engine.outputs import RequestDelta
    from fallow.engine.sampling import SamplingParams


@dataclass(frozen=True)
class Answer:
    """One answer and what it cost; times in seconds from the request, energy in joules of the whole request."""

    model: str
    text: str
    finish_reason: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    first_tokens: int  # how many came at once at the first
    time_to_first_token: float
    seconds: float
    joules: float
    energy_source: str

    @property
    def prefill_tokens_per_s(self) -> float:
        return (self.prompt_tokens - self.cached_tokens) / self.time_to_first_token

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Tokens after the first over the time after the first; None where there were none."""
        if self.completion_tokens <= self.first_tokens:
            return None
        return (self.completion_tokens - self.first_tokens) / (self.seconds - self.time_to_first_token)

    @property
    def joules_per_token(self) -> float:
        return self.joules / max(self.completion_tokens, 1)

    def summary(self) -> str:
        decode = self.decode_tokens_per_s
        parts = [
            f"{self.completion_tokens} tokens" + (f" at {decode:.0f} tokens/s" if decode else ""),
            f"prefill {self.prefill_tokens_per_s:.0f} tokens/s",
            f"first token after {self.time_to_first_token * 1000:.0f} ms",
            f"{self.joules_per_token:.3g} J/token ({self.energy_source})",
        ]
        return " · ".join(parts)

    def to_json(self) -> dict[str, object]:
        return {
            "model": self.model,
            "text": self.text,
            "finish_reason": self.finish_reason,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "ttft_s": self.time_to_first_token,
            "prefill_tokens_per_s": self.prefill_tokens_per_s,
            "decode_tokens_per_s": self.decode_tokens_per_s,
            "joules_per_token": self.joules_per_token,
            "energy_source": self.energy_source,
        }


class Conversation:
    """The messages so far, and the engine that answers them."""

    def __init__(self, engine: Engine, sampling: SamplingParams, *, system: str | None = None) -> None:
        self.engine = engine
        self.sampling = sampling
        self.opening = [{"role": "system", "content": system}] if system else []
        self.reset()

    def reset(self) -> None:
        self.messages = list(self.opening)

    def answer(self, text: str, on_text: Callable[[str], None], *, raw: bool = False) -> Answer:
        """Answer one message of the user, in pieces to ``on_text``; Ctrl-C ends the answer as ``cancelled``.

        Raises RequestError where the engine refuses it (the history is then as it was) or where the model has no chat
        template and ``raw`` is not set.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        answer = self._generate(self._prompt(messages, raw), on_text)
        self.messages = [*messages, {"role": "assistant", "content": answer.text}]
        return answer

    def _prompt(self, messages: list[dict[str, str]], raw: bool) -> list[int]:
        tokenizer = self.engine.tokenizer
        if raw:
            return tokenizer.encode(messages[-1]["content"])
        return tokenizer.encode(tokenizer.apply_chat_template(messages), add_special_tokens=False)

    def _generate(self, prompt: list[int], on_text: Callable[[str], None]) -> Answer:
        from fallow.meter.energy import EnergyMeter

        pieces: list[str] = []
        meter = EnergyMeter()
        finish_reason: str | None = None
        completion_tokens = first_tokens = cached_tokens = 0
        with meter.measure() as energy:
            started = perf_counter()
            first = last = None
            deltas: SimpleQueue[RequestDelta] = SimpleQueue()
            request_id = self.engine.submit(prompt, self.sampling, deltas.put)
            try:
                while finish_reason is None:
                    delta = deltas.get()
                    last = perf_counter()
                    if delta.finish_reason == "error":
                        raise FallowError(delta.error or "the engine failed at this request")
                    if first is None:
                        first, first_tokens = last, delta.completion_tokens
                    pieces.append(delta.text)
                    on_text(delta.text)
                    completion_tokens, cached_tokens = delta.completion_tokens, delta.cached_tokens
                    finish_reason = delta.finish_reason
            except KeyboardInterrupt:
                finish_reason = "cancelled"
            finally:
                self.engine.cancel(request_id)
            ended = perf_counter()
        return Answer(
            model=self.engine.model_name,
            text="".join(pieces),
            finish_reason=finish_reason,
            prompt_tokens=len(prompt),
            cached_tokens=cached_tokens,
            completion_tokens=completion_tokens,
            first_tokens=first_tokens,
            time_to_first_token=(first or ended) - started,
            seconds=(last or ended) - started,
            joules=energy.joules,
            energy_source=meter.source,
        )


def chat(conversation: Conversation) -> None:
    """Read messages and stream answers until /exit or the end of the input; Ctrl-C at the prompt is raised.

    Raises RequestError where the model has no chat template.
    """
    conversation.engine.tokenizer.needed_chat_template()
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (input() then edits lines and remembers them)
    note(f"{conversation.engine.model_name}: /reset forgets the conversation, /exit leaves, Ctrl-C stops an answer.")
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()  # the shell's prompt gets a line of its own
            raise
        if text == "/exit":
            return
        if text == "/reset":
            conversation.reset()
            note("The conversation is forgotten.")
        elif text:
            try:
                answer = conversation.answer(text, write_text)
            except RequestError as error:
                note(f"{error} (/reset forgets the conversation)")
                continue
            write_text("\n")
            note(answer.summary())
