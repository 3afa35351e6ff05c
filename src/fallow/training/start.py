"""The model that a run tunes: opened by its name, its tokenizer held against it, and its weights."""

from __future__ import annotations

import hashlib
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
    if named is not None and has_other_tokens(path, tokenizer):
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


def has_other_tokens(path: Path, tokenizer: Tokenizer) -> bool:
    """Whether the model at ``path`` comes with a tokenizer whose tokens are not those of ``tokenizer``."""
    try:
        own = load_tokenizer(path)
    except ModelFileError:  # it comes without one
        return False
    return own.vocab_size != tokenizer.vocab_size or any(
        own.token_bytes[i] != tokenizer.token_bytes[i] for i in range(own.vocab_size)
    )


def digest_of_model(path: Path) -> str:
    """SHA-256 over the tensors of the model at ``path``: what is trained beside it, or from it, belongs to these."""
    digest = hashlib.sha256()
    for name, tensor in open_checkpoint(path).tensors.items():
        digest.update(f"{name} {tensor.type.name} {tensor.shape}\n".encode())
        digest.update(tensor.read().data)
    return digest.hexdigest()
