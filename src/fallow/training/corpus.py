"""The text of a recipe as windows of tokens, to train on and to validate with, and the tokenizer that they have."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from fallow.data.prepare import prepare, prepare_split
from fallow.data.sources import Source, open_source
from fallow.data.tokenizers import save_tokenizer
from fallow.data.train_tokenizer import train_tokenizer
from fallow.data.windows import Windows, bits_per_byte
from fallow.errors import FallowError
from fallow.files import locked, replacing_folder
from fallow.models.store import resolve, store_path
from fallow.models.tokenizer import Tokenizer, load_tokenizer
from fallow.terminal import Progress
from fallow.training.recipe import Recipe
from fallow.training.start import start_path, start_tokenizer


@dataclass(frozen=True)
class Corpus:
    """``train`` is shuffled by the recipe's seed; ``valid`` is read in order."""

    tokenizer: Tokenizer
    train: Windows
    valid: Windows

    @property
    def digest(self) -> str:
        """The same where texts and tokenizer are."""
        return f"{self.train.shards.index.digest} {self.valid.shards.index.digest}"

    def bits_per_byte(self, loss: float) -> float:
        """A loss (nats a token) on the training text in bits per byte, by its average token."""
        index = self.train.shards.index
        return bits_per_byte(loss * index.tokens, index.text_bytes)


def open_corpus(recipe: Recipe, progress: Progress | None = None) -> Corpus:
    """The recipe's text, tokenized now where it has not been before.

    Raises ``FallowError`` where a text cannot be used, is shorter than one window, or has too little for the tokenizer.
    """
    data = recipe.data
    source = open_source(data.train)
    tokenizer = _tokenizer(recipe, source, progress)
    if data.valid is None:
        train, valid = prepare_split(source, tokenizer, data.valid_share, progress=progress)
    else:
        train = prepare(source, tokenizer, progress=progress)
        valid = prepare(open_source(data.valid), tokenizer, progress=progress)
    train_windows, valid_windows = (
        Windows(shards, data.context, seed=recipe.train.seed, isolate_documents=data.isolate_documents)
        for shards in (train, valid)
    )
    return Corpus(tokenizer, train_windows, valid_windows)


def _tokenizer(recipe: Recipe, source: Source, progress: Progress | None) -> Tokenizer:
    data, start = recipe.data, start_path(recipe, progress)
    if start is not None:
        return start_tokenizer(recipe, start, progress)
    if data.tokenizer is not None:
        return load_tokenizer(resolve(data.tokenizer, progress=progress))
    return load_tokenizer(_trained_tokenizer(source, data.vocab_size, progress))


def _trained_tokenizer(source: Source, vocab_size: int, progress: Progress | None) -> Path:
    """The folder of the tokenizer of this text, in ``tokenizers`` of the model store."""
    key = json.dumps([source.fingerprint(), vocab_size])
    name = hashlib.sha256(key.encode()).hexdigest()[:16]
    place = store_path() / "tokenizers" / name
    try:
        with locked(place.parent / f"{name}.lock"):
            if not place.is_dir():
                with replacing_folder(place) as partial:
                    save_tokenizer(train_tokenizer(source, vocab_size, progress=progress), partial)
    except OSError as error:
        raise FallowError(
            f"The tokenizer of {source.name} cannot be written to {place.parent}: {error.strerror or error}; "
            "free some space or set FALLOW_HOME to another folder."
        ) from error
    return place
