"""What prices are taken of: SmolLM2, and two windows of text."""

from __future__ import annotations

import inspect
import random
from pathlib import Path

import pytest

from fallow.models.checkpoint import open_checkpoint
from fallow.models.decoder import Decoder
from fallow.models.decoder_weights import load_decoder
from fallow.models.tokenizer import load_tokenizer

_TOKENS = 300


@pytest.fixture(scope="session")
def decoder(smollm2_gguf: Path) -> Decoder:
    return load_decoder(open_checkpoint(smollm2_gguf), context=_TOKENS).eval().requires_grad_(False)


@pytest.fixture(scope="session")
def windows(smollm2_gguf: Path) -> list[list[int]]:
    ids = load_tokenizer(smollm2_gguf).encode(inspect.getsource(random))
    return [ids[:_TOKENS], ids[_TOKENS : 2 * _TOKENS]]
