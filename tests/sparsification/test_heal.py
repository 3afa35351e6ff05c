"""``fallow sparsify --heal`` on a tiny model: stopped, called again, and what it leaves."""

from __future__ import annotations

import inspect
import json
import os
import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fallow.engine.engine import Engine
from fallow.errors import FallowError
from fallow.models.checkpoint import open_checkpoint
from fallow.plan import SparsityPlan
from fallow.sparsification import heal
from fallow.sparsification.run import SparsifyResult, sparsify
from fallow.sparsification.text import cut, written_to_heal

CONTEXT = 320
BUDGET = 0.05
TOKENS = 4 * 2 * CONTEXT


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "source.py"
    path.write_text(inspect.getsource(random)[:9000], encoding="utf-8")
    return path


@pytest.fixture
def healed(tiny_checkpoints: dict[str, Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The tiny model healed; ``stop_at``: SIGINT comes at that step."""
    monkeypatch.setenv("FALLOW_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(heal, "_STEP_TOKENS", 2 * CONTEXT)
    notes: list[str] = []

    def call(
        stop_at: int | None = None, name: str = "lean", tokens: int = TOKENS, **options: Any
    ) -> tuple[SparsifyResult, list[str]]:
        def progress(what: str, done: int, total: int | None) -> None:
            if what.startswith("healing") and done == stop_at:
                os.kill(os.getpid(), signal.SIGINT)

        notes.clear()
        result = sparsify(
            tiny_checkpoints["qwen3"],
            out=tmp_path / name,
            text=text,
            context=CONTEXT,
            heal=tokens,
            threads=1,
            on_note=notes.append,
            progress=progress,
            **{"budget": BUDGET} | options,
        )
        return result, notes

    return call


def test_healed_to_the_end_or_stopped_and_called_again(healed, tiny_checkpoints, tmp_path: Path):
    start = tiny_checkpoints["qwen3"]
    with pytest.raises(FallowError, match=r"stopped at step 2 of 4: the same command goes on from there\.$"):
        healed(stop_at=2)
    assert not (tmp_path / "lean").exists()
    with pytest.raises(FallowError, match=r"lean\.healing holds a healing that was begun with other settings"):
        healed(tokens=2 * TOKENS)
    result, notes = healed()
    assert notes[0] == "Going on from step 2 of 4."  # no plan was looked for again
    assert not (tmp_path / "lean.healing").exists()
    assert result.healed == TOKENS
    assert result.to_json()["healed_tokens"] == TOKENS
    assert result.found.perplexity_ratio <= 1 + BUDGET
    assert result.found.plan.provenance["healed"] == f"{TOKENS} tokens"
    assert result.found.plan.provenance["healed_from"] != result.found.plan.provenance["weights"]
    assert SparsityPlan.beside(result.folder) == result.found.plan
    before, after = open_checkpoint(start), open_checkpoint(result.folder)
    assert after.config == before.config
    assert any(not np.array_equal(after.tensors[name].read(), t.read()) for name, t in before.tensors.items())
    names = {file.name for file in start.iterdir()}
    assert {file.name for file in result.folder.iterdir()} == names | {"plan.json", "frontier.svg", "frontier.png"}
    whole, notes = healed(name="whole")
    assert any("% of the keys and values. Perplexity" in note for note in notes)
    for name, tensor in open_checkpoint(whole.folder).tensors.items():
        np.testing.assert_array_equal(tensor.read(), after.tensors[name].read(), err_msg=name)
    assert whole.found == result.found


def test_what_cannot_be_healed_is_a_sentence(healed, tmp_path: Path):
    with pytest.raises(FallowError, match="give at least one window of 320"):
        healed(tokens=CONTEXT - 1)
    folder = tmp_path / "lean.healing"
    folder.mkdir()
    (folder / "healing.json").write_text(json.dumps({"tokens": 3}))
    with pytest.raises(FallowError, match=r"healing\.json is damaged: remove .*lean\.healing and begin again\.$"):
        healed()


def test_what_is_verified_is_not_healed_with():
    windows = cut([list(range(95)), list(range(100, 105)), list(range(200, 220))], 10, "numbers")
    assert [window[0] for window in windows.verified] == [10, 30, 50, 70, 200]
    others = (0, 10), (20, 30), (40, 50), (60, 70), (80, 95), (100, 105), (210, 220)
    assert windows.others == [list(range(*ends)) for ends in others]


def test_the_model_writes_what_it_is_healed_with(tiny_checkpoints):
    with Engine(tiny_checkpoints["qwen3"]) as engine:
        texts = written_to_heal(engine, 250, 20)
    assert [len(text) for text in texts] == [20] * 14
    assert len({tuple(text) for text in texts}) == 14


def test_what_is_left_is_healed(healed):
    result, _ = healed(name="smaller", remove=True, budget=0.5)
    assert result.healed == TOKENS
    assert result.found.plan.structure
    assert result.found.perplexity_ratio <= 1.5
    with Engine(result.folder) as engine:
        assert engine.generate("a")[0].outputs[0].token_ids
