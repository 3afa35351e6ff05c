"""Recipes over conversations: the loss is on the answers alone, and the sample is an answer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from test_tuning import RECIPE

from fallow.data.windows import NOT_COUNTED
from fallow.models.tokenizer import load_tokenizer
from fallow.training.corpus import open_corpus
from fallow.training.loop import StepReport
from fallow.training.recipe import Recipe, load_recipe
from fallow.training.run import train

WORDS = ("field", "land", "grain", "year")


@pytest.fixture
def chat(tiny_checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """Questions of all kinds, and always the same answer."""
    monkeypatch.setenv("FALLOW_HOME", str(tmp_path / "home"))
    questions = [
        f"Why does the {a} of the {b} rest in the {c} {d}?" for a in WORDS for b in WORDS for c in WORDS for d in WORDS
    ]
    lines = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": "It bears more."}]}
        for question in questions
    ]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    recipe = RECIPE.format(start=tiny_checkpoints["qwen3"], text=tmp_path / "chat.jsonl")
    (tmp_path / "chat.toml").write_text(recipe, encoding="utf-8")
    more = ["train.tokens=6144", "report.sample_every=48", "report.sample_prompt=Why does it rest?"]
    return load_recipe(
        tmp_path / "chat.toml", [*more, "data.isolate_documents=true", "data.context=128", "train.batch=1"]
    )


def test_only_answers_count(chat: Recipe):
    corpus = open_corpus(chat)
    batch = corpus.train.batch(0, 8)
    targets = batch.counted_targets()
    learnt = corpus.tokenizer.decode(targets[targets != NOT_COUNTED].tolist(), skip_special_tokens=False)
    assert set(learnt.split("<|im_end|>")[1:-1]) == {"It bears more."}
    assert 0.05 < np.mean(targets != NOT_COUNTED) < 0.5
    assert batch.documents is not None
    assert batch.documents.max() > 1


def test_the_answer_is_learnt_and_nothing_else(chat: Recipe, tmp_path: Path):
    reports: list[StepReport] = []
    result = train(chat, out=tmp_path / "run", on_step=reports.append)
    assert reports[-1].loss < 0.2 * reports[0].loss
    assert reports[-1].sample is not None
    assert reports[-1].sample.startswith("It bears more.")
    asked = [{"role": "user", "content": "Why?"}]
    ours = load_tokenizer(str(chat.model.start)).apply_chat_template(asked)
    assert load_tokenizer(result.model).apply_chat_template(asked) == ours
