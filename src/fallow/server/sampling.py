"""From the fields of a request to the engine's ``SamplingParams``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fallow.engine.sampling import SamplingParams
from fallow.server.errors import ApiError
from fallow.server.requests import ChatCompletionRequest, CompletionRequest

if TYPE_CHECKING:
    from fallow.engine.constraint import Constraint

COMPLETION_MAX_TOKENS = 16  # the default of OpenAI's /v1/completions

# Fields with the same name and meaning on both sides; None means the default there.
_SHARED = (
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "ignore_eos",
)


def sampling_params(
    request: ChatCompletionRequest | CompletionRequest, *, constraint: Constraint | None = None
) -> SamplingParams:
    """Raises ``ApiError`` or ``RequestError`` with the name of the field."""
    chosen: dict[str, Any] = {name: value for name in _SHARED if (value := getattr(request, name)) is not None}
    if isinstance(request, ChatCompletionRequest):
        if None not in (request.max_tokens, request.max_completion_tokens):
            raise ApiError(400, "max_tokens and max_completion_tokens mean the same: give one.", param="max_tokens")
        chosen["max_tokens"] = request.max_completion_tokens or request.max_tokens
        if request.logprobs:
            chosen["logprobs"] = request.top_logprobs or 0
    else:
        chosen["max_tokens"] = request.max_tokens or COMPLETION_MAX_TOKENS
        if request.logprobs is not None:
            chosen["logprobs"] = request.logprobs
    if request.stop is not None:
        chosen["stop"] = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop)
    if request.stop_token_ids is not None:
        chosen["stop_token_ids"] = tuple(request.stop_token_ids)
    if request.logit_bias:
        chosen["logit_bias"] = {int(token): value for token, value in request.logit_bias.items()}
    if request.seed is not None:
        # The engine counts from 0, and adds the index of a choice: negative seeds go to the upper half of 2**63.
        chosen["seed"] = request.seed % (2**63 - 1)
    return SamplingParams(**chosen, constraint=constraint)
