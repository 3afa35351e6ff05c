"""Distillation: its loss against plain PyTorch, weights as files store them, and students that learn to bear a plan."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from gguf_files import write_gguf
from test_train_run import KILLED, losses, weights

from fallow.errors import FallowError
from fallow.models.checkpoint import open_checkpoint
from fallow.models.decoder_weights import load_decoder, parameter_name
from fallow.models.dequantize import dequantize
from fallow.models.rewrite import copy_model
from fallow.models.tokenizer import load_tokenizer
from fallow.plan import LayerRule, SparsityPlan
from fallow.training.distil import divergence
from fallow.training.recipe import Recipe, load_recipe
from fallow.training.run import train
from fallow.training.stored import StoredWeights

CONTEXT = 96  # tokens: three pages
RECIPE = """
name = "distil"
[model]
start = "{start}"
[distil]
teacher = "{start}"
plan = "{plan}"
[data]
train = "{text}"
tokenizer = "{tokenizer}"
context = 96
[train]
tokens = 11520
batch = 4
precision = "fp32"
compile = false
[[optimizer]]
kind = "adamw"
parameters = ["*"]
lr = 0.001
[report]
evaluate_every = 0
evaluate_tokens = 96
checkpoint_every = 5
tensorboard = false
"""
WORDS = ("the", "field", "lies", "fallow", "so", "that", "rest", "of", "land", "can", "bear", "grain", "year", "come")
TYPES = ("Q4_0", "Q4_1", "Q8_0", "F16")


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Under which the first layer reads two pages of three, and neurons work only where their gate is large."""
    pages = LayerRule("top_pages", 0, parameters={"sink_pages": 0, "recent_pages": 1, "top_pages": 1})
    neurons = LayerRule("threshold", parameters={"threshold": 0.3})
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    SparsityPlan(attention=(pages,), ffn=(neurons,)).save(path)
    return path


@pytest.fixture(scope="module")
def files(tiny_checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny Llama as GGUF files of several types."""
    folder = tmp_path_factory.mktemp("gguf")
    for name in (*TYPES, "Q5_0"):
        write_gguf(folder / f"{name}.gguf", tiny_checkpoints["llama"], gguf.GGMLQuantizationType[name])
    return {name: folder / f"{name}.gguf" for name in (*TYPES, "Q5_0")}


@pytest.fixture
def recipe(tiny_checkpoints, plan: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The recipe for a student, with overrides."""
    monkeypatch.setenv("FALLOW_HOME", str(text.parent / "home"))

    def made(start: Path, *overrides: str) -> Recipe:
        path = tmp_path / "distil.toml"
        tokenizer = tiny_checkpoints["llama"]
        path.write_text(RECIPE.format(start=start, plan=plan, text=text, tokenizer=tokenizer), encoding="utf-8")
        return load_recipe(path, overrides)

    return made


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("block", [None, 16, 50])
def test_the_loss_is_the_divergence_and_so_are_its_gradients(block: int | None, softcap: float | None):
    torch.manual_seed(1)
    hidden, head = torch.randn(50, 24, requires_grad=True), torch.randn(33, 24, requires_grad=True)
    known = torch.randn(50, 33) * 3
    counts = torch.rand(50) < 0.8
    loss = divergence(hidden, head, lambda part: known[part], counts, softcap=softcap, block=block) * 0.7
    logits = hidden @ head.T
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    each = F.kl_div(logits.log_softmax(-1), known.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    expected = each[counts].sum() * 0.7
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(
        torch.autograd.grad(loss, (hidden, head)), torch.autograd.grad(expected, (hidden, head)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_compiled_the_loss_is_the_same():
    torch.manual_seed(3)
    hidden, head = torch.randn(50, 24, requires_grad=True), torch.randn(33, 24, requires_grad=True)
    known, counts = torch.randn(50, 33), torch.rand(50) < 0.8
    results = []
    for compiled in (False, True):
        loss = divergence(hidden, head, lambda part: known[part], counts, softcap=5.0, block=16, compiled=compiled)
        results.append((loss.detach(), *torch.autograd.grad(loss, (hidden, head))))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-5)


def test_of_itself_a_model_differs_by_nothing():
    torch.manual_seed(2)
    hidden, head = torch.randn(20, 24, requires_grad=True), torch.randn(33, 24)
    loss = divergence(hidden, head, lambda part: hidden.detach()[part] @ head.T, torch.ones(20, dtype=torch.bool))
    assert abs(loss.item()) < 1e-4
    assert torch.autograd.grad(loss, hidden)[0].abs().max() < 1e-5


@pytest.mark.parametrize("kind", [*TYPES, "qwen3", "gemma3", "mistral"])
def test_what_is_computed_with_is_what_is_written(kind: str, files, tiny_checkpoints, tmp_path: Path):
    checkpoint = open_checkpoint(files[kind] if kind in files else tiny_checkpoints[kind])
    decoder = load_decoder(checkpoint)
    stored = StoredWeights(decoder, checkpoint)
    parameters = dict(decoder.named_parameters())
    untouched = stored.to_bytes(parameters)
    assert {tensor.name for tensor in stored.frozen} == set(checkpoint.tensors) - set(untouched)
    assert all(name.endswith("norm") for name in set(checkpoint.tensors) - set(untouched))
    for name, data in untouched.items():
        np.testing.assert_array_equal(data, checkpoint.tensors[name].read(), err_msg=name)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    masters = {name: parameter.clone() for name, parameter in parameters.items()}
    copy_model(checkpoint, stored.to_bytes(parameters), tmp_path)
    after = open_checkpoint(tmp_path)
    assert after.config == checkpoint.config
    with stored.in_place():
        for name, tensor in after.tensors.items():
            parameter = parameters[parameter_name(name)]
            assert torch.equal(parameter, torch.from_numpy(dequantize(tensor))), name
            assert (tensor.type, tensor.shape) == (checkpoint.tensors[name].type, checkpoint.tensors[name].shape)
    before = checkpoint.tensors
    changed = [name for name in before if not np.array_equal(after.tensors[name].read(), before[name].read())]
    assert set(changed) == set(untouched)
    assert all(torch.equal(parameter, masters[name]) for name, parameter in parameters.items())


def test_gradients_are_those_of_the_rounded_weights(files):
    checkpoint = open_checkpoint(files["Q4_1"])
    decoder, rounded = load_decoder(checkpoint), load_decoder(checkpoint)
    stored = StoredWeights(decoder, checkpoint)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(0.02)
    with stored.in_place():
        rounded.load_state_dict(decoder.state_dict())
    tokens = torch.arange(40)[None]
    for model in (decoder, rounded):
        with stored.in_place():
            model.logits(model(tokens)).square().mean().backward()
    for one, other in zip(decoder.parameters(), rounded.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


def divergence_on(model: Path, teacher: Path, plan: SparsityPlan, tokens: torch.Tensor) -> float:
    """Nats a token from ``teacher`` to ``model`` under ``plan``."""
    student, dense = load_decoder(open_checkpoint(model)), load_decoder(open_checkpoint(teacher))
    student.obey(plan)
    with torch.no_grad():
        ours, theirs = (it.logits(it(tokens)).log_softmax(-1).flatten(0, 1) for it in (student, dense))
    return float(F.kl_div(ours, theirs, reduction="batchmean", log_target=True))


@pytest.mark.parametrize("kind", ["Q8_0", "mistral"])
def test_a_student_learns_to_bear_a_plan(kind: str, files, tiny_checkpoints, recipe, tmp_path: Path):
    start = files.get(kind) or tiny_checkpoints[kind]
    rules = SparsityPlan(ffn=(LayerRule("threshold", parameters={"threshold": 0.3}),))
    rules.save(tmp_path / "ffn.json")
    options = (f"distil.plan={tmp_path / 'ffn.json'}", "train.tokens=30720", "report.checkpoint_every=0")
    result = train(recipe(start, *options), out=tmp_path / "run")
    found = losses(result.folder)
    draw = random.Random(7)
    tokenizer = load_tokenizer(tiny_checkpoints["llama"])
    tokens = torch.tensor([tokenizer.encode(" ".join(draw.choices(WORDS, k=99)))[:CONTEXT] for _ in range(8)])
    before, after = (divergence_on(model, start, rules, tokens) for model in (start, result.model))
    assert sum(found[-5:]) < 0.8 * sum(found[:5])
    assert after < 0.7 * before
    assert SparsityPlan.load(result.model / "plan.json") == rules
    # Beside the tensors' bytes nothing has changed.
    if kind in files:
        before, after = start.read_bytes(), (result.model / start.name).read_bytes()
        place = min(tensor.place.offset for tensor in open_checkpoint(start).tensors.values())
        assert len(after) == len(before)
        assert after[:place] == before[:place]
    else:
        same = sorted(file.name for file in start.iterdir() if file.suffix != ".safetensors")
        assert all((result.model / name).read_bytes() == (start / name).read_bytes() for name in same)


@pytest.mark.parametrize("kind", ["plain", "everything"])
def test_killed_it_goes_on_to_the_same_bits(kind: str, files, recipe, tmp_path: Path):
    recipe(files["Q4_1"])
    path = tmp_path / "distil.toml"
    if kind == "everything":
        more = "micro_batch = 3\nema = 0.9\ncheckpoint_activations = true\nclip = 0.5"
        path.write_text(path.read_text().replace("[train]", f"[train]\n{more}"))
    whole = train(path, out=tmp_path / "whole")
    command = [sys.executable, "-c", KILLED, str(path), str(tmp_path / "killed"), "17"]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    train(path, out=tmp_path / "killed")
    assert losses(tmp_path / "killed") == losses(whole.folder)
    assert weights(tmp_path / "killed") == weights(whole.folder)


def test_parts_of_a_batch_have_the_gradient_of_the_whole(files, recipe, tmp_path: Path):
    options = ("train.tokens=1920", "report.checkpoint_every=0")
    whole = train(recipe(files["Q8_0"], *options), out=tmp_path / "whole")
    parts = train(recipe(files["Q8_0"], *options, "train.micro_batch=1"), out=tmp_path / "parts")
    assert losses(parts.folder) == pytest.approx(losses(whole.folder), rel=1e-4)


@pytest.mark.slow
def test_compiled_it_is_the_same_run_but_for_rounding(files, recipe, tmp_path: Path):
    """Of the compiled layers each has a threshold of its own; the first chooses pages and is not compiled."""
    pages = LayerRule("top_pages", 0, parameters={"sink_pages": 0, "recent_pages": 1, "top_pages": 1})
    neurons = [LayerRule("threshold", layer, parameters={"threshold": 0.1 + 0.2 * layer}) for layer in range(3)]
    SparsityPlan(attention=(pages,), ffn=tuple(neurons)).save(tmp_path / "plan.json")
    options = (f"distil.plan={tmp_path / 'plan.json'}", "train.tokens=1920", "report.checkpoint_every=0")
    eager = train(recipe(files["Q8_0"], *options), out=tmp_path / "eager")
    compiled = train(recipe(files["Q8_0"], *options, "train.compile=true"), out=tmp_path / "compiled")
    assert losses(compiled.folder) == pytest.approx(losses(eager.folder), rel=1e-3)


def test_another_plan_or_teacher_is_another_run(files, recipe, plan: Path, tmp_path: Path):
    own = tmp_path / "own.json"
    own.write_bytes(plan.read_bytes())
    made = recipe(files["Q8_0"], f"distil.plan={own}", "train.tokens=1920")
    train(made, out=tmp_path / "run")
    SparsityPlan.dense().save(own)
    with pytest.raises(FallowError, match=r"step-00000005 belongs to .* another teacher than .* or another plan"):
        train(made, out=tmp_path / "run")


def test_what_does_not_go_together_is_a_sentence(files, tiny_checkpoints, recipe, recipe_file: Path, tmp_path: Path):
    start = files["Q4_1"]
    for override, sentence in {
        "lora.rank=4": "[distil] trains the model's own weights: leave [lora] out.",
        "superposition.bag=2": "[distil] compares models token by token: leave [superposition] out.",
        "train.fused_update=true": "set train.fused_update to false",
        "distil.teachers=x": "distil.teachers is not known: did you mean teacher?",
    }.items():
        with pytest.raises(FallowError) as error:
            recipe(start, override)
        assert sentence in str(error.value)
        assert "\n" not in str(error.value)
    with pytest.raises(FallowError, match=r"\[distil\] trains a model that exists: say which with model\.start\."):
        load_recipe(recipe_file, [f"distil.teacher={start}"])
    missing = tmp_path / "nothing.json"
    many = tmp_path / "many.json"
    SparsityPlan(ffn=(LayerRule("threshold", 7, parameters={"threshold": 1.0}),)).save(many)
    for override, sentence in {
        "distil.teacher=/nowhere": "/nowhere does not exist",
        f"distil.teacher={_with_more_words(tiny_checkpoints['llama'], tmp_path)}": "take a teacher with the same",
        f"distil.plan={missing}": f"The plan {missing} cannot be read",
        f"distil.plan={many}": "The plan has a rule for layer 7, but the model has 3 layers",
    }.items():
        with pytest.raises(FallowError) as error:
            train(recipe(start, override), out=tmp_path / "run")
        assert sentence in str(error.value)
        assert "\n" not in str(error.value)
    with pytest.raises(FallowError, match=r"are stored as Q5_0, in which they cannot be trained: use a file with Q4_0"):
        train(recipe(files["Q5_0"]), out=tmp_path / "run")


def _with_more_words(folder: Path, parent: Path) -> Path:
    """The same model, whose words are called otherwise."""
    other = parent / "other"
    shutil.copytree(folder, other)
    document = json.loads((other / "tokenizer.json").read_text())
    vocabulary = document["model"]["vocab"]
    first, second = [piece for piece, number in vocabulary.items() if number in (100, 101)]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(document))
    return other


def test_what_cannot_be_trained_as_it_is_stored_stays(tiny_checkpoints, recipe, tmp_path: Path):
    """Gemma's norms hold one less than what multiplies."""
    notes: list[str] = []
    start = tiny_checkpoints["gemma3"]
    pages = LayerRule("top_pages", parameters={"sink_pages": 0, "recent_pages": 1, "top_pages": 0})
    SparsityPlan(attention=(pages,)).save(tmp_path / "pages.json")
    made = recipe(start, f"data.tokenizer={start}", f"distil.plan={tmp_path / 'pages.json'}", "train.tokens=768")
    result = train(made, out=tmp_path / "run", on_note=notes.append)
    assert "stay as they are" in notes[0]
    before, after = open_checkpoint(start).tensors, open_checkpoint(result.model).tensors
    same = {name for name in before if np.array_equal(before[name].read(), after[name].read())}
    assert same == {name for name in before if name.endswith("norm")}
