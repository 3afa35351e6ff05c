"""Log-probabilities in the two forms of the API."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fallow.engine.outputs import TokenLogprob

_LOWEST = -9999.0  # JSON has no infinity


def chat_logprobs(tokens: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
    """The entries of ``choices[].logprobs.content``."""
    return [
        {
            "token": entry.token,
            "logprob": max(entry.logprob, _LOWEST),
            "bytes": list(entry.bytes),
            "top_logprobs": [
                {"token": token, "logprob": max(logprob, _LOWEST), "bytes": list(raw)}
                for _, token, raw, logprob in entry.top
            ],
        }
        for entry in tokens
    ]


def text_length(entry: TokenLogprob) -> int:
    """Characters that a token adds to the text; a special token, which is named here but not written, adds none."""
    return len(entry.token) if entry.bytes else 0


def completion_logprobs(tokens: Sequence[TokenLogprob], offset: int) -> dict[str, Any]:
    """``choices[].logprobs`` of a completion; ``offset``: characters of the text before these tokens."""
    offsets = []
    for entry in tokens:
        offsets.append(offset)
        offset += text_length(entry)
    tops = []
    for entry in tokens:
        top: dict[str, float] = {}
        # Several tokens can have the same text (parts of a character): the most likely one is kept.
        for _, token, _, logprob in entry.top:
            top.setdefault(token, max(logprob, _LOWEST))
        top.setdefault(entry.token, max(entry.logprob, _LOWEST))
        tops.append(top)
    return {
        "tokens": [entry.token for entry in tokens],
        "token_logprobs": [max(entry.logprob, _LOWEST) for entry in tokens],
        "top_logprobs": tops if any(entry.top for entry in tokens) else None,
        "text_offset": offsets,
    }
