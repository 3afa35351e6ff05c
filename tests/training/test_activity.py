"""Counts of working neurons: against counting them one by one, in the journal, and in what the command prints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fallow.cli import main
from fallow.plan import LayerRule
from fallow.training.activity import Activity, LayerActivity, measure_activity
from fallow.training.corpus import open_corpus
from fallow.training.model import new_decoder
from fallow.training.recipe import load_recipe
from fallow.training.run import train

COUNTED = ["model.activation=reglu", "report.activity_tokens=200"]


def neurons_of(decoder: Any, inputs: np.ndarray) -> list[np.ndarray]:
    """Of each layer, ``[windows, tokens, intermediate]``."""
    seen: list[np.ndarray] = []
    hooks = [p.register_forward_pre_hook(lambda _, a: seen.append(a[0].numpy())) for p in decoder.down_projections]
    with torch.no_grad():
        decoder(torch.from_numpy(inputs))
    for hook in hooks:
        hook.remove()
    return seen


def run_command(command: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert ended.value.code == 0


def test_counts_are_those_of_counting_one_by_one(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file, COUNTED)
    corpus = open_corpus(recipe)
    decoder = new_decoder(recipe, corpus.tokenizer)
    with torch.no_grad():
        decoder.layers[1].gate_proj.weight[:5] = 0  # dead
        decoder.layers[1].gate_proj.weight[5:50] *= torch.rand(45, 1) - 0.2
    found = measure_activity(decoder, corpus.valid, 200)  # six windows of 32
    assert found.tokens == 192
    total = 0.0
    for layer, values in zip(found.layers, neurons_of(decoder, corpus.valid.in_order(0, 6).inputs), strict=True):
        active = values != 0
        counts = [int(token.sum()) for window in active for token in window]
        total += sum(counts)
        assert layer.neurons == 64
        assert layer.mean == pytest.approx(np.mean(counts))
        assert layer.p99 == pytest.approx(np.quantile(counts, 0.99))
        for size, union in ((8, layer.union_8), (32, layer.union_32)):
            groups = [window[i : i + size].any(0).sum() for window in active for i in range(0, 32, size)]
            assert union == pytest.approx(np.mean(groups))
        assert layer.dead == sum(not active[..., neuron].any() for neuron in range(64))
    assert found.layers[1].dead >= 5
    assert found.resting == pytest.approx(1 - total / (192 * 2 * 64))


def test_windows_that_are_shorter_than_a_group_have_none(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file, [*COUNTED, "data.context=20"])
    corpus = open_corpus(recipe)
    (layer, _) = measure_activity(new_decoder(recipe, corpus.tokenizer), corpus.valid, 40).layers
    assert layer.union_32 is None
    assert layer.mean < layer.union_8 <= 64


def test_it_leaves_the_decoder_as_it_was(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file, COUNTED)
    corpus = open_corpus(recipe)
    decoder = new_decoder(recipe, corpus.tokenizer)
    measure_activity(decoder, corpus.valid, 64)
    assert not any(projection._forward_pre_hooks for projection in decoder.down_projections)


def test_the_journal_and_the_folder_have_them(recipe_file: Path, tmp_path: Path) -> None:
    result = train(load_recipe(recipe_file, COUNTED), out=tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "steps.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "activity" in line] == [10, 20, 30]
    last = lines[-1]["activity"]
    assert result.activity is not None
    assert last == result.activity.to_json() == json.loads((tmp_path / "run" / "activity.json").read_text())
    assert len(last["layers"]) == 2
    assert 0 < last["resting"] < 1


def test_the_plan_skips_neurons_where_few_work() -> None:
    layers = [LayerActivity(100, mean, 30, None, None, 0) for mean in (11.0, 9.0, 0.5)]
    plan = Activity(tuple(layers), 64).plan
    assert plan.ffn == (LayerRule("zeros", 1), LayerRule("zeros", 2))
    assert Activity(tuple(layers[:1]), 64).plan.is_dense


def test_nothing_is_counted_where_nobody_asks(recipe_file: Path, tmp_path: Path) -> None:
    assert train(recipe_file, out=tmp_path / "run").activity is None
    assert "activity" not in (tmp_path / "run" / "steps.jsonl").read_text()
    assert not (tmp_path / "run" / "activity.json").exists()


def test_the_command_prints_a_table_or_json(
    recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [part for override in COUNTED for part in ("--set", override)]
    command = ["train", str(recipe_file), "--out", str(tmp_path / "run"), *settings]
    run_command(command)
    shown = capsys.readouterr()
    assert "99th percentile" in shown.out
    assert "neurons rest for a token" in shown.err
    run_command([*command, "--json"])  # the run has ended: there is nothing left to do
    final = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert final["final"]
    assert [layer["neurons"] for layer in final["activity"]["layers"]] == [64, 64]
