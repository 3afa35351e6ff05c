"""The comparison of trainings: the real HF ``Trainer`` and ours on tiny models, and what is made of their results."""

from __future__ import annotations

import importlib.util
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fallow.bench.training.clock import StepClock
from fallow.bench.training.comparison import Comparison
from fallow.bench.training.process import do_job
from fallow.bench.training.records import Records
from fallow.bench.training.run import compare_trainings, tune
from fallow.bench.training.sides import check_models, load_sides
from fallow.bench.training.windows import write_train, write_valid
from fallow.errors import FallowError
from fallow.meter.processes import process_tree
from fallow.models.hf_document import hf_document
from fallow.training.corpus import Corpus, open_corpus
from fallow.training.export import export_model
from fallow.training.model import new_decoder
from fallow.training.recipe import Recipe, load_recipe
from fallow.training.step import Step
from fallow.training.validation import validate

needs_trainer = pytest.mark.skipif(
    importlib.util.find_spec("accelerate") is None, reason="HF Trainer needs accelerate: pip install '.[test]'."
)
RECIPE = """
name = "tiny"
[model]
hidden_size = 32
intermediate_size = 64
layers = 2
heads = 2
[data]
train = "{text}"
valid_share = 0.2
vocab_size = 304
context = 32
[train]
tokens = 1024
batch = 4
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
evaluate_every = 2
evaluate_tokens = 256
"""
ADAMW = """
optimizer = "adamw"
tokens = 512
batch = 4
lr = 0.001
precision = "fp32"
compile = false
"""
SEARCH = """
[[ours]]
key = "optimizer.0.lr"
values = [0.01, 0.02]
[[ours]]
key = "train.batch"
values = [4, 2]
"""
WORDS = ("the", "field", "lies", "fallow", "so", "that", "rest", "of", "land", "can", "bear", "grain", "year", "come")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    draw = random.Random(3)
    path = tmp_path_factory.mktemp("text") / "fields.jsonl"
    path.write_text("".join(json.dumps({"text": " ".join(draw.choices(WORDS, k=60))}) + "\n" for _ in range(200)))
    return path


@pytest.fixture
def recipe_file(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe with its baseline beside it; HF ``Trainer`` is the tests' own, corpora are kept for the module."""
    monkeypatch.setenv("FALLOW_HOME", str(text.parent / "home"))
    monkeypatch.setenv("FALLOW_PEER_PYTHON_TRAINER", sys.executable)
    (tmp_path / "baselines").mkdir()
    (tmp_path / "baselines" / "tiny-adamw.toml").write_text(ADAMW)
    (tmp_path / "baselines" / "tiny-search.toml").write_text(SEARCH)
    path = tmp_path / "tiny.toml"
    path.write_text(RECIPE.format(text=text))
    return path


@pytest.fixture
def recipe(recipe_file: Path) -> Recipe:
    return load_recipe(recipe_file)


@pytest.fixture
def corpus(recipe: Recipe) -> Corpus:
    return open_corpus(recipe)


def settings(**changes: Any) -> dict[str, Any]:
    given = {"optimizer": "adamw", "batch": 4, "lr": 1e-12, "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1}
    given |= {"warmup_share": 0.0, "muon_lr": None, "muon_momentum": 0.95, "precision": "fp32", "compile": False}
    return given | changes


def hf_trainer(recipe: Recipe, corpus: Corpus, folder: Path, steps: int, **changes: Any) -> dict[str, Any]:
    """What HF ``Trainer`` makes of the first windows, from the weights of our decoder."""
    decoder = new_decoder(recipe, corpus.tokenizer)
    export_model(
        decoder.config, dict(decoder.named_parameters()), corpus.tokenizer, folder / "start", dtype=torch.float32
    )
    write_train(folder / "train.npy", corpus.train, steps * 4)
    write_valid(folder / "valid.npy", corpus.valid, 8)
    job = {
        "config": hf_document(decoder.config, "float32"),
        "settings": settings(**changes),
        "train": str(folder / "train.npy"),
        "valid": str(folder / "valid.npy"),
        "weights": str(folder / "start" / "model.safetensors"),
        "steps": steps,
        "seed": 0,
        "threads": 1,
        "folder": str(folder / "run"),
    }
    return do_job("hf_trainer", job, python=Path(sys.executable), log=folder / "log")


@needs_trainer
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 2e-2)])
def test_the_baseline_sees_our_model_and_our_windows_in_our_order(
    recipe: Recipe, corpus: Corpus, tmp_path: Path, precision: str, tolerance: float
):
    said = hf_trainer(recipe, corpus, tmp_path, steps=5, precision=precision)  # its rate moves no weight
    decoder = new_decoder(recipe, corpus.tokenizer)
    step = Step(decoder, (), micro_batch=None, clip=None)
    losses = [step.gradients(corpus.train.batch(4 * i, 4))[0] for i in range(5)]
    assert abs(losses[0] - losses[-1]) > 1e-3
    assert said["first_loss"] == pytest.approx(losses[0], abs=tolerance)
    assert said["last_loss"] == pytest.approx(losses[-1], abs=tolerance)
    ours = validate(decoder, corpus.valid, tokens=256, batch=4)
    assert (said["validation_tokens"], said["tokens"]) == (ours.tokens, 5 * 4 * 32)
    assert said["loss"] == pytest.approx(ours.loss, abs=tolerance)
    assert said["parameters"] == sum(p.numel() for p in decoder.parameters())
    assert said["seconds"] > 0
    assert said["peak_memory_bytes"] > 1e8


@pytest.mark.slow
@needs_trainer
def test_the_baseline_learns_with_muon(recipe: Recipe, corpus: Corpus, tmp_path: Path):
    said = hf_trainer(recipe, corpus, tmp_path, steps=24, optimizer="muon", muon_lr=0.02, lr=0.01)
    assert said["last_loss"] < said["first_loss"] - 1


@pytest.mark.slow
@needs_trainer
def test_a_loss_that_is_no_number_is_told(recipe: Recipe, corpus: Corpus, tmp_path: Path):
    said = hf_trainer(recipe, corpus, tmp_path, steps=24, lr=1e30)
    assert "the loss is nan" in said["diverged"]


def test_two_optimizers_as_one_follow_the_rates_of_the_one():
    pytest.importorskip("transformers")
    from fallow.bench.workers.hf_trainer import MuonWithAdamW

    matrix, vector = (torch.nn.Parameter(torch.ones(shape)) for shape in ((4, 4), (4,)))
    both = MuonWithAdamW(torch.optim.Muon([matrix], lr=0.1), torch.optim.AdamW([vector], lr=0.1))
    both.load_state_dict(both.state_dict())
    both.param_groups[0]["lr"] = 0.0
    matrix.grad, vector.grad = torch.eye(4), torch.ones(4)
    both.step()
    assert torch.equal(matrix, torch.ones(4, 4))
    assert bool((vector < 0.95).all())


def test_windows_are_written_in_the_order_of_the_seed(recipe: Recipe, corpus: Corpus, tmp_path: Path):
    write_train(tmp_path / "train.npy", corpus.train, 300)
    text_bytes = write_valid(tmp_path / "valid.npy", corpus.valid, 8)
    train, valid = np.load(tmp_path / "train.npy"), np.load(tmp_path / "valid.npy")
    batch, ordered = corpus.train.batch(256, 44), corpus.valid.in_order(0, 8)
    assert np.array_equal(train[:, 256:], [batch.inputs, batch.targets])
    assert np.array_equal(valid, [ordered.inputs, ordered.targets])
    assert text_bytes == corpus.valid.bytes_of(ordered.targets)


def test_the_clock_counts_the_first_step_as_the_others():
    said: list[dict[str, Any]] = []
    clock = StepClock(said.append)
    clock.begin()
    began = time.perf_counter()
    for seconds in (0.2, 0.01, 0.01, 0.01):
        time.sleep(seconds)
        clock.step_ended(4, 1.0)
    total = time.perf_counter() - began
    used = clock.used()
    assert 0.23 <= used["seconds"] + used["compile_seconds"] <= total
    assert used["seconds"] >= 4 * 0.01
    assert [message["progress"] for message in said] == [[n, 4] for n in range(1, 5)]


@needs_trainer
@pytest.mark.slow
def test_an_interrupted_comparison_goes_on(recipe_file: Path, tmp_path: Path):
    results = tmp_path / "results.jsonl"
    labels: set[str] = set()

    def compared() -> Comparison:
        labels.clear()
        return compare_trainings(
            recipe_file,
            seeds=1,
            threads=1,
            results=results,
            progress=lambda what, done, total: labels.add(what),
        )

    first = compared()
    assert {"baseline, seed 0", "ours, seed 0"} <= labels
    whole = results.read_bytes()
    assert [json.loads(line)["side"] for line in whole.splitlines()] == ["baseline", "ours"]
    results.write_bytes(whole[:-40])  # killed while the last line was written
    again = compared()
    assert "ours, seed 0" in labels
    assert "baseline, seed 0" not in labels
    assert again.runs["baseline"] == first.runs["baseline"]
    assert again.runs["ours"][0]["loss"] == first.runs["ours"][0]["loss"]

    command = [sys.executable, "-m", "fallow", "bench", "train", recipe_file, "--seeds", "1", "--results", results]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["target_loss"] == first.runs["baseline"][0]["loss"]
    for side, tokens in (("ours", 1024), ("baseline", 512)):
        figures = found[side]
        assert (figures["seed"], figures["tokens"]) == (0, tokens)
        assert min(figures["seconds"], figures["joules"], figures["peak_memory_bytes"]) > 0
    assert found["ratio"] == pytest.approx(found["baseline"]["seconds"] / found["ours"]["seconds"])
    assert [run["side"] for run in found["runs"]] == ["baseline", "ours"]
    table = subprocess.run(command, capture_output=True, text=True, check=False)
    assert table.returncode == 0, table.stderr
    assert "times as fast to the target" in table.stdout


@pytest.mark.slow
def test_a_search_runs_no_trial_twice(recipe_file: Path, tmp_path: Path):
    trials = tmp_path / "baselines" / "tiny-trials.jsonl"
    first = tune(recipe_file, "ours", threads=1, jobs=2)
    lines = trials.read_bytes()
    assert len(lines.splitlines()) == 3  # the second stage begins with what the first one found
    assert not any(trial["quiet"] for trial in first.trials)
    assert first.loss == min(trial["loss"] for trial in first.trials)
    assert first.best.keys() == {"optimizer.0.lr", "train.batch"}
    assert {trial["tokens"] for trial in first.trials} == {341}
    trials.write_bytes(lines[:-5])
    labels: set[str] = set()
    second = tune(recipe_file, "ours", threads=1, progress=lambda what, done, total: labels.add(what))
    assert second.best == first.best
    assert len([label for label in labels if label.startswith("ours, ")]) == 1
    # What is compiled changes no loss, so it makes no other trial.
    third = tune(recipe_file, "ours", threads=1, overrides=["train.compile=true"])
    assert third.trials == second.trials


def test_a_trial_that_fails_leaves_those_beside_it(recipe_file: Path, tmp_path: Path):
    search = tmp_path / "baselines" / "tiny-search.toml"
    search.write_text('[[ours]]\nkey = "train.batch"\nvalues = [3, 4]\nshare = 1.0\n')  # 3 does not divide the text
    with pytest.raises(FallowError, match="leaves a rest"):
        tune(recipe_file, "ours", threads=1, jobs=2)
    (kept,) = Records(tmp_path / "baselines" / "tiny-trials.jsonl").all()
    assert kept["config"]["train"]["batch"] == 4
    assert kept["tokens"] == 1024


@pytest.mark.parametrize("jobs", [1, 2])
def test_ctrl_c_ends_the_trials_that_run(recipe_file: Path, jobs: int):
    # A background job inherits that SIGINT is ignored, and would not hear it.
    hearing = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    command = [sys.executable, "-c", f"{hearing}; from fallow.cli import main; main()", "bench", "train", recipe_file]
    options = ["--tune", "ours", "--jobs", str(jobs), "--set", "train.tokens=100_000_000"]
    with subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True) as search:
        try:
            while len(trainers := trainers_of(search.pid)) < jobs:
                assert search.poll() is None, search.stderr.read() if search.stderr else ""
                time.sleep(0.1)
            search.send_signal(signal.SIGINT)
            search.wait(timeout=60)
        finally:
            search.kill()
    assert search.returncode == 130
    assert not any("our_trainer" in command_line(pid) for pid in trainers)


def trainers_of(pid: int) -> list[int]:
    return [child for child in process_tree(pid) if "our_trainer" in command_line(child)]


def command_line(pid: int) -> str:
    """Empty where the process has gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def record(side: str, seed: int, loss: float, seconds: float, tokens: int = 1000) -> dict[str, Any]:
    return {
        **{"side": side, "config": {}, "seed": seed, "tokens": tokens, "corpus": "x", "diverged": None},
        **{"loss": loss, "bits_per_byte": loss / 2, "seconds": seconds, "compile_seconds": 1.0, "joules": seconds},
        **{"trained_tokens": tokens, "tokens_per_s": tokens / seconds, "peak_memory_bytes": 10**9, "quiet": True},
        **{"commit": "abc", "energy_source": "estimate"},
    }


def test_the_ratio_is_the_median_of_neighbours_to_the_median_target():
    baseline = [record("baseline", 0, 4.0, 100), record("baseline", 1, 4.2, 110), record("baseline", 2, 4.1, 60)]
    ours = [record("ours", seed, 4.1 - seed / 100, seconds, 500) for seed, seconds in enumerate((50, 50, 40))]
    muon = [record("baseline_muon", seed, 4.11 if seed == 1 else 3.9, 50) for seed in range(3)]
    found = Comparison("tiny", {"baseline": baseline, "ours": ours, "baseline_muon": muon}).to_json()
    assert (found["target_loss"], found["bits_per_byte"]) == (4.1, 2.05)
    assert found["ratio"] == 2.0
    assert found["breakdown"]["ours"] == {"tokens": 2.0, "tokens_per_s": pytest.approx(1.0)}
    assert found["baseline"]["seconds"] == 100
    assert (found["ours"]["seconds"], found["medians"]["ours"]["seconds"]) == (50, 50)
    assert found["ratios"]["baseline_muon"] is None
    assert found["breakdown"]["baseline_muon"] is None
    assert found["shortfalls"] == [
        "baseline_muon ended at 4.1100 with seed 1, above the target of 4.1000: give it more tokens."
    ]


def test_records_are_found_by_what_decides_about_the_loss(tmp_path: Path):
    records = Records(tmp_path / "records.jsonl")
    first = record("ours", 0, 4.0, 10) | {"config": {"train": {"batch": 4, "compile": True}}}
    records.add(first)
    other = first | {"config": {"train": {"batch": 4}}}
    assert records.find(other, same_speed=False) == first
    assert records.find(other, same_speed=True) is None
    assert records.find(first | {"seed": 1}, same_speed=False) is None
    with records.path.open("a") as file:
        file.write("nonsense\n")
    with pytest.raises(FallowError, match="line 2: this is no record"):
        records.all()


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("baselines/tiny-adamw.toml", "optimizer = 'adamw'\ntokens = 1\nbatch = 1\nlr = 1\nmuon_lr = 1", "muon_lr"),
        ("baselines/tiny-adamw.toml", ADAMW + "weigth_decay = 0.1", "did you mean weight_decay"),
        ("baselines/tiny-muon.toml", ADAMW.replace("adamw", "muon"), "muon_lr"),
        ("tiny-free.toml", RECIPE.replace("64", "128"), "parameters"),
    ],
)
def test_files_that_cannot_be_compared(recipe_file: Path, name: str, content: str, named: str):
    (recipe_file.parent / name).write_text(content.replace("{text}", "python-stdlib"))
    with pytest.raises(FallowError, match=named):
        compare_trainings(recipe_file, seeds=1, threads=1, results=recipe_file.parent / "results.jsonl")


def test_a_free_architecture_may_not_cost_more_to_serve(recipe_file: Path):
    (recipe_file.parent / "tiny-free.toml").write_text(recipe_file.read_text().replace("layers = 2", "layers = 3"))
    with pytest.raises(FallowError, match="multiply-accumulates a token"):
        tune(recipe_file, "free", overrides=["model.tie_embeddings=false"], threads=1)


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("model.activation=relu2", "no baseline for it"),
        ("data.isolate_documents=true", "isolate_documents"),
        ("train.batch=3", "evaluate_tokens"),
        ("data.train=/nowhere", "/nowhere"),
    ],
)
def test_recipes_that_cannot_be_compared(recipe_file: Path, override: str, named: str):
    with pytest.raises(FallowError, match=named) as error:
        tune(recipe_file, "ours", overrides=[override], threads=1)
    assert "\n" not in str(error.value)


def test_a_side_or_a_key_that_is_not_there(recipe_file: Path):
    with pytest.raises(FallowError, match="no side free"):
        tune(recipe_file, "free", threads=1)
    with pytest.raises(FallowError, match="nothing to try for baseline"):
        tune(recipe_file, "baseline", threads=1)
    sides = load_sides(recipe_file)
    with pytest.raises(FallowError, match=r"optimizer\.7\.lr is no key"):
        sides["ours"].with_settings({"optimizer.7.lr": 1.0}, tokens=1, seed=0)
    with pytest.raises(FallowError, match="did you mean batch"):
        sides["baseline"].with_settings({"batsh": 1}, tokens=1, seed=0)


def test_the_free_architecture_of_the_speedrun_may_be_compared(corpus: Corpus):
    folder = Path(__file__).parents[2] / "recipes"
    sides = load_sides(folder / "speedrun.toml")
    assert sides.keys() == {"baseline", "baseline_muon", "ours", "free"}
    assert check_models(sides, corpus.tokenizer) > 1e7
