"""What the engine gives back: deltas while it writes, outputs at the end, and its own counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length", "cancelled", "error"]
TopToken = tuple[int, str, bytes, float]


@dataclass(slots=True)
class TokenLogprob:
    """A token and its log-probability; ``top`` holds (token id, token, bytes, logprob), most likely first.

    ``bytes`` is what the token adds to the text, which can be part of a character; ``token`` shows special tokens too.
    """

    token_id: int
    token: str
    bytes: bytes
    logprob: float
    top: list[TopToken]


@dataclass(slots=True)
class RequestDelta:
    """What one step added to choice ``index`` of a request.

    ``text`` can be empty (part of a character, or of what may become a stop string). ``finish_reason`` is set on the
    last delta of a choice. ``stop_reason`` is the stop string or the stop token id that ended it, if one did.
    ``completion_tokens`` counts the choice's tokens so far, the end-of-sequence token among them.
    """

    request_id: str
    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None
    finish_reason: FinishReason | None
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    error: str | None = None
    stop_reason: str | int | None = None


@dataclass(slots=True)
class CompletionOutput:
    """One finished choice. ``error`` is the reason where ``finish_reason`` is ``"error"``."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None = None
    error: str | None = None


@dataclass(slots=True)
class RequestOutput:
    """A finished request; times are seconds from its submission. ``cached_tokens`` of the prompt were not computed."""

    request_id: str
    prompt_tokens: int
    outputs: list[CompletionOutput]
    time_to_first_token: float
    seconds: float
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counts of an engine; the totals run from its start.

    ``running`` counts sequences in the batch, ``waiting`` requests that have not begun or were set back.
    ``pages_cached`` are unused pages that still hold a prefix. ``prompt_tokens`` holds cached ones too, of which there
    were ``prefix_hits``. ``busy_seconds`` is time in steps.
    """

    running: int
    waiting: int
    pages_used: int
    pages_total: int
    pages_cached: int
    prompt_tokens: int
    generated_tokens: int
    prefix_hits: int
    preemptions: int
    drafted_tokens: int
    accepted_tokens: int
    steps: int
    busy_seconds: float


class OutputBuilder:
    """Puts the deltas of one request together again."""

    def __init__(self, n: int) -> None:
        self._texts: list[list[str]] = [[] for _ in range(n)]
        self.outputs = [CompletionOutput(i, "", [], None, None) for i in range(n)]
        self.unfinished = n
        self.prompt_tokens = 0
        self.cached_tokens = 0

    def add(self, delta: RequestDelta) -> None:
        output = self.outputs[delta.index]
        self._texts[delta.index].append(delta.text)
        output.token_ids += delta.token_ids
        if delta.logprobs is not None:
            output.logprobs = output.logprobs or []
            output.logprobs += delta.logprobs
        self.prompt_tokens = delta.prompt_tokens
        if delta.index == 0:
            self.cached_tokens = delta.cached_tokens
        if delta.finish_reason is not None:
            output.text = "".join(self._texts[delta.index])
            output.finish_reason = delta.finish_reason
            output.stop_reason = delta.stop_reason
            output.error = delta.error
            self.unfinished -= 1
