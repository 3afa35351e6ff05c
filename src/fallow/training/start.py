"""The model that a run tunes: opened by its name, its tokenizer held against it, and its weights."""

from __future__ import annotations

from pathlib import Path

import torch

from fallow.errors import FallowError, ModelFileError
from fallow.models.checkpoint import open_checkpoint
from fallow.models.decoder import Decoder
from fallow.models.decoder_weights import load_decoder
from fallow.models.store import resolve
from fallow.models.tokenizer import Tokenizer, load_tokenizer
from fallow.terminal import Progress
from fallow.training.recipe import Recipe


def start_path(recipe: Recipe, progress: Progress | None = None) -> Path | None:
    """Where ``model.start`` lies on this machine, fetched now where it is not there; None where nothing is tuned.

    Raises ``ModelFileError`` where there is no such model.
    """
    return None if recipe.model.start is None else resolve(recipe.model.start, progress=progress)


def start_tokenizer(recipe: Recipe, path: Path, progress: Progress | None = None) -> Tokenizer:
    """The tokenizer of the model at ``path``, or that of ``data.tokenizer`` for one that comes without.

    Raises ``FallowError`` where it is another model's, or where windows are longer than the model can see.
    """
    config = open_checkpoint(path).config
    if recipe.data.context > config.max_position_embeddings:
        raise FallowError(
            f"data.context is {recipe.data.context}, but {recipe.model.start} sees "
            f"{config.max_position_embeddings} tokens: use as many at most."
        )
    named = recipe.data.tokenizer
    tokenizer = load_tokenizer(path if named is None else resolve(named, progress=progress))
    tokenizer.check_vocabulary(config.vocab_size, str(named or recipe.model.start))
    own = _own_tokenizer(path) if named is not None else None
    if own is not None and not _same_tokens(tokenizer, own):
        raise FallowError(
            f"data.tokenizer is {named}, whose tokens are not those that {recipe.model.start} was trained with: "
            "leave it out."
        )
    return tokenizer


def start_decoder(recipe: Recipe, path: Path) -> Decoder:
    """The model at ``path`` with float32 parameters (blocks dequantised), for windows of the recipe's length.

    Raises ``ModelFileError`` where a tensor cannot be read.
    """
    compute = torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32
    return load_decoder(open_checkpoint(path), compute=compute, context=recipe.data.context)


def _own_tokenizer(path: Path) -> Tokenizer | None:
    try:
        return load_tokenizer(path)
    except ModelFileError:  # it comes without one
        return None


def _same_tokens(one: Tokenizer, other: Tokenizer) -> bool:
    return one.vocab_size == other.vocab_size and all(
        one.token_bytes[i] == other.token_bytes[i] for i in range(one.vocab_size)
    )
