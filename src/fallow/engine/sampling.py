"""How the tokens of a request are chosen, checked before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fallow.errors import RequestError

if TYPE_CHECKING:
    from fallow.engine.constraint import Constraint

MAX_CHOICES = 128
MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 1024
MAX_STOP_TOKENS = 1024
MAX_LOGPROBS = 20
MAX_SEED = 2**64 - 1
# Below this a distribution is its largest logit within float32.
GREEDY_BELOW = 1e-5


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of a request are chosen. Names and meanings are those of vLLM and of the OpenAI API.

    ``temperature=0`` always takes the most likely token. ``max_tokens=None`` goes on to the end of the context.
    ``logprobs`` is how many of the most likely tokens are returned with each token, under the unmodified distribution.
    Choice ``i`` of ``n`` is drawn with ``seed + i``; without a seed a request gets a random one. ``presence_penalty``
    and ``frequency_penalty`` look at the output, ``repetition_penalty`` (CTRL, arXiv 1909.05858) at the prompt too.

    Raises ``RequestError`` with the name of the parameter where a value is out of its range.
    """

    n: int = 1
    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    include_stop_str_in_output: bool = False
    constraint: Constraint | None = None

    def __post_init__(self) -> None:
        _whole("n", self.n, 1, MAX_CHOICES)
        if self.max_tokens is not None:
            _whole("max_tokens", self.max_tokens, 1, None)
        _number("temperature", self.temperature, 0, 100)
        _number("top_p", self.top_p, 0, 1)
        _whole("top_k", self.top_k, -1, 2**31 - 1)
        _number("min_p", self.min_p, 0, 1)
        _number("repetition_penalty", self.repetition_penalty, 0.01, 100)
        _number("presence_penalty", self.presence_penalty, -2, 2)
        _number("frequency_penalty", self.frequency_penalty, -2, 2)
        if self.seed is not None:
            _whole("seed", self.seed, 0, MAX_SEED)
        if self.logprobs is not None:
            _whole("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        for name in ("ignore_eos", "include_stop_str_in_output"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name} must be true or false, not {getattr(self, name)!r}.", param=name)
        object.__setattr__(self, "stop", _stop_strings(self.stop))
        object.__setattr__(self, "stop_token_ids", _stop_tokens(self.stop_token_ids))
        object.__setattr__(self, "logit_bias", _biases(self.logit_bias))

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def has_penalties(self) -> bool:
        """Whether the logits of a token depend on which tokens came before it, beside the model."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises ``RequestError`` where a token id is outside the model's vocabulary."""
        for param, ids in (("logit_bias", self.logit_bias), ("stop_token_ids", self.stop_token_ids)):
            for token in ids:
                if not 0 <= token < vocab_size:
                    raise RequestError(
                        f"{param} names the token {token}, but the ids of this model run from 0 to {vocab_size - 1}.",
                        param=param,
                    )


def _whole(name: str, value: object, low: int, high: int | None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise RequestError(f"{name} must be a whole number, not {_shown(value)}.", param=name)
    if value < low or (high is not None and value > high):
        limit = f"from {low} to {high}" if high is not None else f"at least {low}"
        raise RequestError(f"{name} must be {limit}, not {_shown(value)}.", param=name)


def _number(name: str, value: object, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RequestError(f"{name} must be a number, not {_shown(value)}.", param=name)
    if not low <= value <= high:  # not a number is in no range
        raise RequestError(f"{name} must be a number from {low} to {high}, not {_shown(value)}.", param=name)


def _shown(value: object) -> str:
    # The digits of a huge integer would be the whole message (and Python refuses to print some).
    return "a huge number" if isinstance(value, int) and value.bit_length() > 128 else repr(value)[:60]


def _stop_strings(stop: object) -> tuple[str, ...]:
    strings = (stop,) if isinstance(stop, str) else stop
    if not isinstance(strings, Sequence) or not all(isinstance(text, str) for text in strings):
        raise RequestError("stop must be a string or a list of strings.", param="stop")
    if len(strings) > MAX_STOP_STRINGS:
        raise RequestError(f"stop has {len(strings)} strings: give at most {MAX_STOP_STRINGS}.", param="stop")
    if any(not 1 <= len(text) <= MAX_STOP_CHARACTERS for text in strings):
        raise RequestError(f"Each string of stop must have from 1 to {MAX_STOP_CHARACTERS} characters.", param="stop")
    return tuple(strings)


def _stop_tokens(ids: object) -> tuple[int, ...]:
    if not isinstance(ids, Sequence) or isinstance(ids, str | bytes) or len(ids) > MAX_STOP_TOKENS:
        raise RequestError(
            f"stop_token_ids must be a list of at most {MAX_STOP_TOKENS} token ids.", param="stop_token_ids"
        )
    for token in ids:
        _whole("stop_token_ids", token, 0, 2**31 - 1)
    return tuple(ids)


def _biases(biases: object) -> dict[int, float]:
    if not isinstance(biases, Mapping):
        raise RequestError("logit_bias must map token ids to numbers.", param="logit_bias")
    for token, bias in biases.items():
        _whole("logit_bias", token, 0, 2**31 - 1)
        _number("logit_bias", bias, -100, 100)
    return dict(biases)
