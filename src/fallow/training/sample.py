"""A text from the model in training: the reference's own words, without the native engine."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fallow.models.decoder import Decoder


@torch.no_grad()
def greedy_tokens(
    decoder: Decoder,
    prompt: list[int],
    count: int,
    ends: frozenset[int] = frozenset(),
    *,
    agreed: Callable[[int], int] = lambda token: token,
) -> list[int]:
    """Up to ``count`` likeliest tokens after ``prompt`` (at least one token), each from the whole text again, within
    the decoder's context; an end token ends it and is the last.

    Processes that have a decoder in parts call this together; ``agreed`` makes of their tokens the one that all take.
    """
    ids = list(prompt)
    device = decoder.head.device
    for _ in range(min(count, decoder.context - len(ids))):
        with torch.compiler.set_stance("force_eager"):  # each length would be compiled anew
            hidden = decoder(torch.tensor([ids], device=device))
        ids.append(agreed(int(decoder.logits(hidden[0, -1]).argmax())))
        if ids[-1] in ends:
            break
    return ids[len(prompt) :]
