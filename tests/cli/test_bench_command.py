"""``fallow bench`` from the command line: its table, its JSON, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from fallow.plan import FILE_NAME, LayerRule, SparsityPlan

CONTRACT = {"engine", "precision", "load", "batch", "context", "tokens_per_s", "ttft_s", "peak_memory_bytes"}


def test_json_has_the_runs_of_each_precision(fallow, tiny_checkpoints: dict[str, Path]):
    model = str(tiny_checkpoints["llama"])
    done = fallow("bench", model, "--quick", "--precision", "auto", "--precision", "q8", "--price", "3.6", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    runs = {(run["precision"], run["load"], run["batch"]) for run in result["runs"]}
    assert runs == {(precision, "decode", batch) for precision in ("auto", "q8") for batch in (1, 8)}
    assert all(run.keys() >= CONTRACT for run in result["runs"])
    assert all(
        run["usd_per_million_output_tokens"] == pytest.approx(1000 / run["tokens_per_s"]) for run in result["runs"]
    )


def test_a_plan_is_measured_beside_the_dense_model(fallow, tiny_checkpoints: dict[str, Path], tmp_path: Path):
    model = tmp_path / "planned"
    shutil.copytree(tiny_checkpoints["llama"], model)
    pages = {"sink_pages": 1, "recent_pages": 1, "top_pages": 0}
    SparsityPlan(attention=(LayerRule("top_pages", parameters=pages),)).save(model / FILE_NAME)
    loads = ("--load", "decode:2:100", "--load", "prefill:1:100")
    options = ("--precision", "auto", "--repetitions", "1", "--text", __file__, "--quality-tokens", "200")
    done = fallow("bench", str(model), *loads, *options, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    at = [(run["precision"], run["load"], run["batch"], run["context"]) for run in result["runs"]]
    forms, kinds = ("auto", "auto dense"), (("decode", 2, 100), ("prefill", 1, 100))
    assert at == [(form, *kind) for kind in kinds for form in forms]
    speeds = [run["tokens_per_s"] for run in result["runs"]]
    assert [ratio["speed"] for ratio in result["plan_ratios"]] == [speeds[0] / speeds[1], speeds[2] / speeds[3]]
    planned, dense = (quality["perplexity"] for quality in result["quality"])
    assert planned != dense
    assert "auto: plan / dense" in fallow("bench", str(model), "--load", "decode:1:40", *options).stdout


def test_the_table_has_the_perplexity_of_a_text(fallow, tiny_checkpoints: dict[str, Path], tmp_path: Path):
    text = tmp_path / "fields.txt"
    text.write_text("A field that lies fallow rests for a season. " * 40)
    options = ("--quick", "--precision", "auto", "--text", str(text), "--quality-tokens", "64")
    done = fallow("bench", str(tiny_checkpoints["llama"]), *options)
    assert done.returncode == 0, done.stderr
    assert "tokens/s" in done.stdout
    assert "fallow auto" in done.stdout
    assert "fields.txt" in done.stdout


def test_the_perplexity_alone(fallow, tiny_checkpoints: dict[str, Path]):
    options = ("--quality-only", "--precision", "auto", "--precision", "q8", "--quality-tokens", "64", "--json")
    done = fallow("bench", str(tiny_checkpoints["llama"]), *options)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["runs"] == []
    assert [(quality["precision"], quality["tokens"]) for quality in result["quality"]] == [("auto", 63), ("q8", 63)]


@pytest.mark.parametrize(
    ("options", "code", "named"),
    [
        (["--trace-only"], 2, "--trace"),
        (["--quality-only", "--quick"], 2, "--quality-only"),
        (["--quality-only", "--quality-tokens", "0"], 2, "--quality-only"),
        (["--trace-only", "--quality-only", "--trace", "nowhere.csv"], 2, "--trace-only"),
        (["--endpoint", "http://127.0.0.1:1/v1"], 2, "--trace"),
        (["--repetitions", "0"], 2, "--repetitions"),
        (["--trace", "nowhere.csv"], 1, "nowhere.csv"),
        (["--quick", "--peer", "abacus"], 1, "abacus"),
        (["--quick", "--precision", "q1"], 1, "q1"),
        (["--quick", "--text", "nowhere.txt"], 1, "nowhere.txt"),
        (["--quick", "--price", "nan"], 2, "--price"),
        (["--load", "decode:8"], 2, "decode:8"),
        (["--load", "decode:0:64"], 2, "decode:0:64"),
        (["--load", "train:1:64"], 2, "train:1:64"),
        (["--load", "decode:1:9999999"], 2, "too large"),
        (["--load", "decode:1:64", "--quick"], 2, "--load"),
        (["--load", "decode:1:4096"], 1, "4,128 tokens of context"),
    ],
)
def test_what_it_refuses(fallow, tiny_checkpoints: dict[str, Path], options: list[str], code: int, named: str):
    done = fallow("bench", str(tiny_checkpoints["llama"]), *options)
    assert done.returncode == code
    assert named in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
