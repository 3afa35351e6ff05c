"""The axis ``head``: a screen of the vocabulary, and what it makes a step of decoding read."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fallow.models.decoder import Decoder
from fallow.models.head_screen import (
    DIRECTIONS,
    SIGN_GROUP,
    HeadScreen,
    first_sign_columns,
    likely_tiles,
    mean_products,
    sign_columns,
)
from fallow.models.info import held_bytes
from fallow.models.tensors import Checkpoint
from fallow.plan import LayerRule
from fallow.sparsification.choices import Load

CANDIDATES = 768
"""Tokens that are computed at once: one choice in six needs more, and they are 1.6% of 49,152."""
OWN_TEXTS = (12, 512)
"""How many texts of how many tokens the model writes for its screen: a basis needs more of them than it has
directions, and what the model writes is what it chooses words after."""
_MOST_SEQUENCES = 16
"""Each has a shortlist of its own: with 32 they take as long as the whole head, read once for all."""
_LEAST_VOCABULARY = 16_384  # below it the whole head is not much more


def screens_head(checkpoint: Checkpoint, load: Load) -> bool:
    """Whether a screen makes decoding ``load`` faster, and can be had."""
    config = checkpoint.config
    fits = config.hidden_size % SIGN_GROUP == 0 and config.vocab_size >= _LEAST_VOCABULARY
    return fits and load.batch <= _MOST_SEQUENCES


def fit_screen(decoder: Decoder, checkpoint: Checkpoint, windows: Sequence[Sequence[int]]) -> HeadScreen:
    """The screen of a model's head for the hidden states that it has over ``windows`` of token ids."""
    with torch.no_grad():
        hidden = (decoder(torch.tensor(tokens)[None])[0].numpy() for tokens in windows)
        return HeadScreen.fit(mean_products(hidden), checkpoint.head)


def head_rules() -> tuple[LayerRule, ...]:
    return (LayerRule("screen", parameters={"rank": DIRECTIONS, "candidates": CANDIDATES}),)


def spared_bytes(checkpoint: Checkpoint, precision: str, load: Load) -> float:
    """What a step of ``load`` reads less where the head is screened."""
    vocab, hidden = checkpoint.head.shape
    whole = held_bytes(checkpoint.head, precision, is_head=True)
    rescored = min(load.batch * CANDIDATES / vocab, 1.0)
    again = min(load.batch * likely_tiles(vocab, CANDIDATES) / vocab, 1.0)
    first = first_sign_columns(hidden)
    signs = first + again * (sign_columns(hidden) - first)
    return whole * (1 - rescored) - vocab * (DIRECTIONS + signs / 8 + 4 * (1 + again))  # a scale and a deviation a look
