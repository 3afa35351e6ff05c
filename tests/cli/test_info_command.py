"""``fallow info``: what a person reads, and what a machine does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest


def fields(shown: str) -> dict[str, str]:
    lines = (line.partition("  ") for line in shown.splitlines())
    return {name: value.strip() for name, _, value in lines}


def test_the_fields(fallow, tiny_checkpoints: dict[str, Path]):
    done = fallow("info", str(tiny_checkpoints["gemma3"]))
    assert done.returncode == 0, done.stderr
    shown = fields(done.stdout)
    assert shown["model"] == "gemma3"
    assert shown["tied embeddings"] == "yes"
    assert shown["sliding window"] == "24 tokens"
    assert shown["sparsity plan"] == "none"
    assert shown["parameters"] == "409,856"
    # The one that Gemma's norms lack is added in float32.
    assert shown["kept"] == "BF16 (50 tensors), F32 (43 tensors)"
    assert shown["converted"] == "nothing: blocks stay as they are in the file"
    assert not any(mark in done.stdout for mark in ("{", "True", "False", "None"))
    assert fields(fallow("info", str(tiny_checkpoints["llama"])).stdout)["tied embeddings"] == "no"


def test_what_is_converted_is_said(fallow, tiny_checkpoints: dict[str, Path]):
    shown = fields(fallow("info", str(tiny_checkpoints["gemma3"]), "--precision", "q4").stdout)
    assert shown["kept"] == "F32 (43 tensors)"
    assert shown["converted"] == "BF16 to Q8_0 (1 tensor), BF16 to Q4_1 (49 tensors)"


@pytest.mark.parametrize("columns", [80, 120])
def test_the_tensors(fallow, environment: dict[str, str], tiny_checkpoints: dict[str, Path], columns: int):
    environment["COLUMNS"] = str(columns)
    command = ["info", str(tiny_checkpoints["gemma3"]), "--precision", "q8"]
    done = fallow(*command, "--tensors")
    table = done.stdout.partition("\n\n")[2].splitlines()
    assert table[0].split() == ["tensor", "count", "shape", "type", "in", "the", "engine"]
    rows = {line.split()[0]: line.split(maxsplit=1)[1].rstrip() for line in table[1:]}
    assert rows["embed_tokens"].split("  ")[-1] == "to 8-bit groups of 32"
    assert rows["layers.*.attention_post_norm"].split() == ["7", "64", "F32", "kept"]
    assert rows["layers.*.gate_proj"].split()[:5] == ["7", "160", "×", "64", "BF16"]
    assert len(rows) == 15  # one line each: nothing is wrapped
    assert max(map(len, done.stdout.splitlines())) <= columns
    assert "layers.*" not in fallow(*command).stdout
    listed = json.loads(fallow(*command, "--json").stdout)["tensors"]
    assert [group["name"] for group in listed] == list(rows)
    assert {"name", "count", "shape", "storage", "engine", "converted"} <= listed[0].keys()


def test_a_name_is_no_markup(fallow, tiny_checkpoints: dict[str, Path], tmp_path):
    model = shutil.copytree(tiny_checkpoints["llama"], tmp_path / "[red]a[/blue]:smile:")
    assert fields(fallow("info", str(model)).stdout)["model"] == model.name
