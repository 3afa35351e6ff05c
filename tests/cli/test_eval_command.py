"""``fallow eval MODEL TEXT`` of a model with a plan and without."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from fallow.models.checkpoint import open_checkpoint
from fallow.plan import FILE_NAME, LayerRule, SparsityPlan


def test_a_plan_diverges_from_dense(fallow, tmp_path: Path, tiny_checkpoints: dict[str, Path]) -> None:
    model, text = tmp_path / "model", tmp_path / "text.txt"
    shutil.copytree(tiny_checkpoints["llama"], model)
    text.write_text("A field lies fallow, and the soil rests. " * 8)
    command = ["eval", str(model), str(text), "--window", "64", "--json"]
    dense = json.loads(fallow(*command).stdout)
    assert dense["kl_to_dense"] is dense["perplexity_ratio"] is None
    SparsityPlan(ffn=(LayerRule("threshold", parameters={"threshold": 0.0}),)).save(model / FILE_NAME)
    nearly = json.loads(fallow(*command).stdout)
    assert nearly["kl_to_dense"] < 1e-4  # all neurons work, in other kernels
    SparsityPlan(ffn=(LayerRule("threshold", parameters={"threshold": 0.05}),)).save(model / FILE_NAME)
    sparse = json.loads(fallow(*command).stdout)
    assert sparse["kl_to_dense"] > nearly["kl_to_dense"]
    assert sparse["tokens"] == dense["tokens"]
    assert sparse["perplexity_ratio"] == pytest.approx(sparse["perplexity"] / dense["perplexity"], rel=1e-5)
    assert json.loads(fallow(*command, "--dense").stdout) == dense
    shown = fallow(*command[:-1]).stdout
    assert "kl to dense" in shown
    assert f"{sparse['perplexity_ratio'] - 1:+.2%}" in shown


def test_windows_of_documents(fallow, tmp_path: Path, tiny_checkpoints: dict[str, Path]) -> None:
    text = tmp_path / "texts.jsonl"
    texts = ["A field lies fallow, and the soil rests. " * 20, "Short.", "What rests is not read. " * 20]
    text.write_text("".join(json.dumps({"text": content}) + "\n" for content in texts))
    command = ["eval", str(tiny_checkpoints["llama"]), str(text), "--window", "64", "--json"]
    last = json.loads(fallow(*command, "--last", "16").stdout)
    assert last["tokens"] > 32
    assert last["tokens"] % 16 == 0
    assert json.loads(fallow(*command, "--last", "16", "--limit", "2").stdout)["tokens"] == 32
    assert json.loads(fallow(*command).stdout)["tokens"] > 3 * last["tokens"]
    context = open_checkpoint(tiny_checkpoints["llama"]).config.max_position_embeddings
    text.write_text(json.dumps({"text": "rest " * 2 * context}))
    assert json.loads(fallow(*command, "--window", "1000000", "--last", "5", "--limit", "1").stdout)["tokens"] == 5
    refused = fallow(*command, "--last", "64")
    assert refused.returncode == 1
    assert "The last 64 tokens of a window cannot be scored: a window has 64." in refused.stderr
