"""``fallow eval MODEL TEXT`` of a model with a plan and without."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from fallow.plan import FILE_NAME, LayerRule, SparsityPlan


def test_a_plan_diverges_from_dense(fallow, tmp_path: Path, tiny_checkpoints: dict[str, Path]) -> None:
    model, text = tmp_path / "model", tmp_path / "text.txt"
    shutil.copytree(tiny_checkpoints["llama"], model)
    text.write_text("A field lies fallow, and the soil rests. " * 8)
    command = ["eval", str(model), str(text), "--window", "64", "--json"]
    dense = json.loads(fallow(*command).stdout)
    assert dense["kl_to_dense"] is None
    SparsityPlan(ffn=(LayerRule("threshold", parameters={"threshold": 0.0}),)).save(model / FILE_NAME)
    nearly = json.loads(fallow(*command).stdout)
    assert nearly["kl_to_dense"] < 1e-4  # all neurons work, in other kernels
    SparsityPlan(ffn=(LayerRule("threshold", parameters={"threshold": 0.05}),)).save(model / FILE_NAME)
    sparse = json.loads(fallow(*command).stdout)
    assert sparse["kl_to_dense"] > nearly["kl_to_dense"]
    assert sparse["tokens"] == dense["tokens"]
    assert json.loads(fallow(*command, "--dense").stdout) == dense
    assert "kl to dense" in fallow(*command[:-1]).stdout
