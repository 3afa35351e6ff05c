"""The benchmarks of trials: what they would run, that they run it once, and their tables."""

from __future__ import annotations

import argparse
import importlib
import json
import signal
import sys
from pathlib import Path
from types import ModuleType

import pytest

from fallow.training.loop import Trainer
from fallow.training.recipe import load_recipe

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(params=["optimizers", "rest", "techniques"])
def benchmark(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module(request.param)


def options(tmp_path: Path, limit: int | None = None, only: str = "*") -> argparse.Namespace:
    return argparse.Namespace(runs=tmp_path / "runs", limit=limit, only=only, table=False)


def test_every_optimizer_has_as_many_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    optimizers = importlib.import_module("optimizers")
    planned = list(optimizers.trials())
    assert len({name for name, _, _ in planned}) == len(planned) == 5 * 8
    assert {optimizer: {facts["lr"] for _, _, facts in planned if facts["optimizer"] == optimizer}
            for optimizer in optimizers.RATES} == {o: set(rates) for o, rates in optimizers.RATES.items()}  # fmt: skip
    alike = [recipe.model_copy(update={"name": "", "optimizer": ()}) for _, recipe, _ in planned]
    assert all(recipe == alike[0] for recipe in alike)


def test_trials_are_run_once_and_tabled(
    benchmark: ModuleType,
    recipe_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tiny = load_recipe(recipe_file, ["model.activation=reglu", "train.tokens=1024", "report.activity_tokens=64"])
    planned = [
        (name, tiny.model_copy(update={"optimizer": recipe.optimizer, "rest": recipe.rest}), facts)
        for name, recipe, facts in benchmark.trials()
    ][:3]
    results = tmp_path / "results.jsonl"
    run_missing = sys.modules["trials"].run_missing
    run_missing(results, planned, options(tmp_path, limit=2))
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert [line["trial"] for line in lines] == [name for name, _, _ in planned[:2]]
    for line in lines:
        assert 0 < line["bits_per_byte"] < 10
        assert line["state_bytes"] > 0
        assert line["tokens_per_s"] > 0
        assert 0 < line["activity"]["resting"] < 1
    run_missing(results, planned, options(tmp_path))
    assert results.read_text().splitlines()[:2] == [json.dumps(line) for line in lines]
    assert len(results.read_text().splitlines()) == 3
    monkeypatch.setattr(benchmark, "RESULTS", results)
    monkeypatch.delenv("COLUMNS", raising=False)  # as wide as the table is
    capsys.readouterr()
    benchmark.print_results()
    table = capsys.readouterr().out
    assert f"{lines[0]['bits_per_byte']:.4f}" in table


def test_a_lost_loss_and_a_signal(recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    trials = importlib.import_module("trials")
    recipe = load_recipe(recipe_file, ["train.tokens=2560"])
    lost = recipe.model_copy(
        update={"optimizer": tuple(rule.model_copy(update={"lr": 1e30}) for rule in recipe.optimizer)}
    )
    results = tmp_path / "results.jsonl"
    trials.run_missing(results, [("lost", lost, {})], options(tmp_path))
    line = trials.finished(results)["lost"]
    assert line["bits_per_byte"] is None
    assert line["lost"].startswith("At step ")

    step = Trainer._one_step

    def stop_after_three(self: Trainer, on_step: object) -> None:
        step(self, on_step)
        if self.state.step == 3:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_one_step", stop_after_three)
        with pytest.raises(SystemExit, match=str(128 + signal.SIGTERM)):
            trials.run_missing(results, [("whole", recipe, {})], options(tmp_path))
    assert "whole" not in trials.finished(results)
    assert (tmp_path / "runs" / "whole" / "checkpoints").is_dir()
    trials.run_missing(results, [("whole", recipe, {})], options(tmp_path))
    assert trials.finished(results)["whole"]["bits_per_byte"] > 0
    assert not (tmp_path / "runs" / "whole").exists()
