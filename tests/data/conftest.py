"""What the tests of the data need: texts, a tokenizer trained on them, and the real one of SmolLM2."""

from __future__ import annotations

from pathlib import Path

import pytest
from texts import text_of

from fallow.data.sources import Source, open_source
from fallow.data.train_tokenizer import train_tokenizer
from fallow.models.tokenizer import Tokenizer, load_tokenizer

VOCAB_SIZE = 300


@pytest.fixture(scope="session")
def corpus_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 40 texts of 20 to 800 words."""
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(40):
        (folder / f"{i:02}.txt").write_text(text_of(i, 20 + 20 * i), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def corpus(corpus_folder: Path) -> Source:
    return open_source(str(corpus_folder))


@pytest.fixture(scope="session")
def tokenizer(corpus: Source) -> Tokenizer:
    return train_tokenizer(corpus, VOCAB_SIZE)


@pytest.fixture(scope="session")
def smollm2(smollm2_gguf: Path) -> Tokenizer:
    return load_tokenizer(smollm2_gguf)
