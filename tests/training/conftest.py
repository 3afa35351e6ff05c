"""A recipe that trains in seconds, and its text."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

RECIPE = """
name = "tiny"
[model]
hidden_size = 32
intermediate_size = 64
layers = 2
heads = 2
qk_norm = true
[data]
train = "{text}"
vocab_size = 320
context = 32
[train]
tokens = 7680
batch = 8
schedule = "wsd"
precision = "fp32"
compile = false
[[optimizer]]
kind = "muon"
parameters = ["layers.*_proj.weight"]
lr = 0.02
[[optimizer]]
kind = "adamw"
parameters = ["*"]
lr = 0.003
[report]
evaluate_every = 10
evaluate_tokens = 256
checkpoint_every = 5
keep_checkpoints = 3
"""
WORDS = ("the", "field", "lies", "fallow", "so", "that", "rest", "of", "land", "can", "bear", "grain", "year", "come")


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of a few common words, one a line of JSON."""
    draw = random.Random(1)
    path = tmp_path_factory.mktemp("text") / "fields.jsonl"
    lines = (" ".join(draw.choices(WORDS, k=60)) + ". " + chr(draw.randrange(0x3B1, 0x3C9)) * 3 for _ in range(300))
    path.write_text("".join(f'{{"text": "{line}"}}\n' for line in lines), encoding="utf-8")
    return path


@pytest.fixture
def recipe_file(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The recipe in a folder of its own; corpora are kept for the whole session."""
    monkeypatch.setenv("FALLOW_HOME", str(text.parent / "home"))
    path = tmp_path / "tiny.toml"
    path.write_text(RECIPE.format(text=text), encoding="utf-8")
    return path
