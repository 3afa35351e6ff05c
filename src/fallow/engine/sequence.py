"""One choice of a request while the engine writes it, and the request around its choices."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np

from fallow.arrays import Float32, Int32
from fallow.engine.detokenize import Detokenizer
from fallow.engine.outputs import FinishReason, RequestDelta, TokenLogprob
from fallow.engine.own_draft import OwnDraft
from fallow.engine.sampling import SamplingParams
from fallow.engine.speculate import PromptLookup, Speculation
from fallow.errors import RequestError

if TYPE_CHECKING:
    import numpy.typing as npt

    from fallow.engine.constraint import ConstraintState

T = TypeVar("T", bound=np.generic)


@dataclass(eq=False, slots=True)
class Request:
    """A submitted prompt and its ``n`` sequences.

    ``salt`` keeps its pages from being shared with other requests where it is not empty.
    """

    request_id: str
    number: int  # of its submission
    params: SamplingParams
    prompt: array[int]
    on_delta: Callable[[RequestDelta], None]
    salt: bytes = b""
    sequences: list[Sequence] = field(default_factory=list)
    unfinished: int = 0
    begun: bool = False
    cached_tokens: int = 0


class LogitEdits:
    """What is added to the logits of a sequence, and which tokens its repetition penalty is for.

    One entry a token, kept up to date token by token: the bias and the penalties of a token are one number, the same
    however the sequence came to its tokens.
    """

    def __init__(self, params: SamplingParams, prompt: Iterable[int]) -> None:
        self._bias = params.logit_bias
        self._presence = params.presence_penalty
        self._frequency = params.frequency_penalty
        self._penalised = self._presence != 0 or self._frequency != 0
        self._places: dict[int, int] = {}
        self._counts: dict[int, int] = {}
        self._tokens = _Growing(np.int32)
        self._values = _Growing(np.float32)
        for token, bias in self._bias.items():
            self._set(token, bias)
        self._repeating = params.repetition_penalty != 1
        self._seen: set[int] = set()
        self._repeated = _Growing(np.int32)
        if self._repeating:
            for token in prompt:
                self._see(token)

    def add(self, token: int) -> None:
        """The output has one more token."""
        if self._repeating:
            self._see(token)
        if self._penalised:
            count = self._counts[token] = self._counts.get(token, 0) + 1
            self._set(token, self._bias.get(token, 0.0) - self._presence - self._frequency * count)

    def _set(self, token: int, value: float) -> None:
        place = self._places.get(token)
        if place is None:
            self._places[token] = len(self._places)
            self._tokens.append(token)
            self._values.append(value)
        else:
            self._values.array[place] = value

    def _see(self, token: int) -> None:
        if token not in self._seen:
            self._seen.add(token)
            self._repeated.append(token)

    @property
    def bias_tokens(self) -> Int32:
        return self._tokens.filled

    @property
    def bias_values(self) -> Float32:
        return self._values.filled

    @property
    def repeated_tokens(self) -> Int32:
        return self._repeated.filled


class _Growing(Generic[T]):
    """An array that grows at its end."""

    def __init__(self, dtype: type[T]) -> None:
        self.array = np.empty(16, dtype)
        self._length = 0

    def append(self, value: float) -> None:
        if self._length == len(self.array):
            self.array = np.resize(self.array, 2 * self._length)
        self.array[self._length] = value
        self._length += 1

    @property
    def filled(self) -> npt.NDArray[T]:
        return self.array[: self._length]


class Sequence:
    """One choice: its tokens, its pages, and what decides when it ends.

    ``computed`` is how many of its tokens have keys and values in ``pages``; all but the last while it decodes.
    ``registered`` pages are known to the prefix index or stand for a prefix that another page holds there.
    """

    __slots__ = (
        "computed",
        "constraint",
        "detokenizer",
        "digests",
        "edits",
        "error",
        "finish_reason",
        "index",
        "lookup",
        "mask",
        "max_length",
        "order",
        "own_draft",
        "pages",
        "prompt_length",
        "registered",
        "request",
        "slot",
        "stop_ids",
        "stop_reason",
        "tokens",
    )

    def __init__(
        self,
        request: Request,
        index: int,
        *,
        max_length: int,
        stop_ids: frozenset[int],
        detokenizer: Detokenizer,
        constraint: ConstraintState | None,
        speculation: Speculation | None,
    ) -> None:
        """``max_length`` tokens of prompt and output at most; a token of ``stop_ids`` ends the sequence."""
        params = request.params
        self.request = request
        self.index = index
        self.order = (request.number, index)
        self.tokens = array("i", request.prompt)
        self.prompt_length = len(self.tokens)
        self.max_length = max_length
        self.stop_ids = stop_ids
        self.detokenizer = detokenizer
        self.constraint = constraint
        self.mask = None if constraint is None else constraint.mask()
        self.edits = LogitEdits(params, self.tokens) if params.logit_bias or params.has_penalties else None
        # The rows of a draft would each need penalties and a grammar of their own.
        drafts = speculation if constraint is None and not params.has_penalties else None
        self.lookup = PromptLookup(self.tokens) if drafts == "prompt-lookup" else None
        self.own_draft = OwnDraft() if drafts == "self" else None
        self.pages: list[int] = []
        self.digests: list[bytes] = []
        self.computed = 0
        self.registered = 0
        self.slot = -1
        self.finish_reason: FinishReason | None = None
        self.stop_reason: str | int | None = None
        self.error: str | None = None

    @property
    def seed(self) -> int:
        seed = self.request.params.seed
        assert seed is not None
        return (seed + self.index) % 2**64

    @property
    def drafts(self) -> bool:
        """Whether there may be drafts of it."""
        return self.lookup is not None or self.own_draft is not None

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.prompt_length

    def append(self, token: int) -> str:
        """Take a sampled token; the text that is certain now. Sets ``finish_reason`` where the sequence ends."""
        tokens = self.tokens
        tokens.append(token)
        if token in self.stop_ids:
            self.finish_reason = "stop"
            if token in self.request.params.stop_token_ids:
                self.stop_reason = token
                if self.request.params.include_stop_str_in_output:
                    return self.detokenizer.feed(token)[0] + self._finish_text()
            return self._finish_text()
        text, stopped = self.detokenizer.feed(token)
        if stopped is not None:
            self.finish_reason, self.stop_reason = "stop", stopped
            return text
        if len(tokens) >= self.max_length:
            self.finish_reason = "length"
            return text + self._finish_text()
        if self.edits is not None:
            self.edits.add(token)
        if self.lookup is not None:
            self.lookup.append()
        if self.constraint is not None:
            text += self._advance(self.constraint, token)
        return text

    def _advance(self, constraint: ConstraintState, token: int) -> str:
        try:
            constraint.advance(token)
            if constraint.is_finished:
                self.finish_reason = "stop"
                return self._finish_text()
            self.mask = constraint.mask()
        except RequestError as error:
            self.finish_reason, self.error = "error", str(error)
            return self._finish_text()
        return ""

    def _finish_text(self) -> str:
        text = self.detokenizer.finish()
        if self.detokenizer.stopped is not None and self.finish_reason == "length":
            self.finish_reason, self.stop_reason = "stop", self.detokenizer.stopped
        return text

    def finish(self, reason: FinishReason, error: str | None = None) -> RequestDelta:
        """End the sequence from outside; the delta that says so."""
        self.finish_reason, self.error = reason, error
        return self.delta(self.detokenizer.finish(), [], None)

    def delta(self, text: str, token_ids: list[int], logprobs: list[TokenLogprob] | None) -> RequestDelta:
        request = self.request
        return RequestDelta(
            request.request_id,
            self.index,
            text,
            token_ids,
            logprobs,
            self.finish_reason,
            self.prompt_length,
            request.cached_tokens,
            len(self.tokens) - self.prompt_length,
            self.error,
            self.stop_reason,
        )
