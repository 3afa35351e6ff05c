"""Whole runs of a tiny recipe: to the end, killed, stopped, gone wrong; and what comes out of them."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fallow.errors import FallowError
from fallow.models.checkpoint import open_checkpoint
from fallow.models.decoder_weights import load_decoder
from fallow.training.loop import StepReport
from fallow.training.recipe import load_recipe
from fallow.training.run import train
from fallow.training.sample import greedy_tokens

STEPS = 30
KILLED = """
import os, signal, sys
from fallow.training.run import train
def on_step(report):
    if report.step == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
train(sys.argv[1], out=sys.argv[2], on_step=on_step)
"""


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def weights(folder: Path) -> dict[str, bytes]:
    return {name: tensor.read().tobytes() for name, tensor in open_checkpoint(folder / "model").tensors.items()}


def test_a_run_learns_and_leaves_its_journal_and_model(recipe_file: Path, tmp_path: Path):
    reports: list[StepReport] = []
    result = train(recipe_file, out=tmp_path / "run", on_step=reports.append)
    assert (result.step, result.steps, result.tokens, result.stopped) == (STEPS, STEPS, 7680, None)
    assert [report.step for report in reports] == list(range(1, STEPS + 1))
    assert reports[-1].loss < 0.8 * reports[0].loss
    assert [report.step for report in reports if report.validation] == [10, 20, 30]
    assert result.validation == reports[-1].validation
    assert 0 < result.validation.bits_per_byte < reports[9].validation.bits_per_byte
    assert all(report.joules > 0 and report.tokens_per_s > 0 and report.mfu > 0 for report in reports)
    assert losses(tmp_path / "run") == [report.loss for report in reports]
    assert any((tmp_path / "run" / "tensorboard").iterdir())
    assert result.model == tmp_path / "run" / "model"


def test_bags_of_tokens_and_then_tokens(recipe_file: Path, tmp_path: Path):
    recipe = load_recipe(recipe_file, ["superposition.bag=4", "superposition.share=0.4", "train.tokens=16896"])
    reports: list[StepReport] = []
    result = train(recipe, out=tmp_path / "run", on_step=reports.append)
    assert (result.steps, result.tokens) == (STEPS, 12 * 4 * 256 + 18 * 256)
    tokens = [report.tokens for report in reports]
    assert [b - a for a, b in zip([0, *tokens], tokens, strict=False)] == [4 * 256] * 12 + [256] * 18
    assert reports[11].loss < 0.95 * reports[0].loss
    assert reports[-1].loss < 0.8 * reports[12].loss
    micro = train(
        recipe.model_copy(update={"train": recipe.train.model_copy(update={"micro_batch": 3})}), out=tmp_path / "micro"
    )
    assert losses(micro.folder) == pytest.approx(losses(result.folder), rel=2e-3)


@pytest.mark.slow  # one kill is always tried, below, and of other runs in test_fused_runs, test_lora and test_distil
@pytest.mark.parametrize("kind", ["bf16", "fp32", "bags"])
def test_killed_at_random_steps_it_goes_on_to_the_same_bits(recipe_file: Path, tmp_path: Path, kind: str):
    if kind == "bags":
        bags = "[superposition]\nbag = 2\nshare = 0.5\n"
        recipe_file.write_text(recipe_file.read_text().replace("7680", "11520") + bags)
    else:
        recipe_file.write_text(recipe_file.read_text().replace('"fp32"', f'"{kind}"'))
    whole = train(recipe_file, out=tmp_path / "whole")
    draw = random.Random(5)
    for attempt in range(2):
        folder = tmp_path / f"killed-{attempt}"
        for step in sorted(draw.sample(range(1, STEPS), 2)):
            command = [sys.executable, "-c", KILLED, str(recipe_file), str(folder), str(step)]
            assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
        notes: list[str] = []
        train(recipe_file, out=folder, on_note=notes.append)
        assert losses(folder) == losses(whole.folder)
        assert weights(folder) == weights(whole.folder)


def test_a_checkpoint_cut_short_is_passed_over(recipe_file: Path, tmp_path: Path):
    whole = train(recipe_file, out=tmp_path / "whole")
    command = [sys.executable, "-c", KILLED, str(recipe_file), str(tmp_path / "cut"), "22"]
    subprocess.run(command, check=False)
    newest = sorted((tmp_path / "cut" / "checkpoints").glob("step-*"))[-1]
    data = next(newest.glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:100])
    notes: list[str] = []
    train(recipe_file, out=tmp_path / "cut", on_note=notes.append)
    assert str(newest) in notes[0]
    assert losses(tmp_path / "cut") == losses(whole.folder)
    assert weights(tmp_path / "cut") == weights(whole.folder)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_after_the_step_with_a_checkpoint(recipe_file: Path, tmp_path: Path, number: int):
    whole = train(recipe_file, out=tmp_path / "whole")

    def on_step(report: StepReport) -> None:
        if report.step == 7:
            os.kill(os.getpid(), number)

    stopped = train(recipe_file, out=tmp_path / "run", on_step=on_step)
    assert (stopped.step, stopped.stopped, stopped.model) == (7, number, None)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    train(recipe_file, out=tmp_path / "run")
    assert losses(tmp_path / "run") == losses(whole.folder)
    assert weights(tmp_path / "run") == weights(whole.folder)


def test_accumulated_micro_batches_are_the_batch(recipe_file: Path, tmp_path: Path):
    whole = train(recipe_file, out=tmp_path / "whole")
    recipe = load_recipe(recipe_file, ["train.micro_batch=3"])
    train(recipe, out=tmp_path / "micro")
    assert losses(tmp_path / "micro") == pytest.approx(losses(whole.folder), rel=2e-3)


def test_options_that_change_no_loss(recipe_file: Path, tmp_path: Path):
    whole = train(recipe_file, out=tmp_path / "whole")
    for override in ("train.checkpoint_activations=true", "report.evaluate_every=0", "train.ema=0.9"):
        train(load_recipe(recipe_file, [override]), out=tmp_path / override)
        assert losses(tmp_path / override) == pytest.approx(losses(whole.folder), rel=1e-6), override


def test_no_compiler_is_a_sentence(recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(FallowError, match=r"there is no no-such-compiler here: install one, .* set train\.compile to"):
        train(load_recipe(recipe_file, ["train.compile=true"]), out=tmp_path / "run")


@pytest.mark.slow
def test_compiled_it_is_the_same_run_but_for_rounding(recipe_file: Path, tmp_path: Path):
    longer = ["data.context=160", "train.precision=bf16", "report.evaluate_tokens=1280"]  # more than a block of keys
    eager = train(load_recipe(recipe_file, longer), out=tmp_path / "eager")
    compiled = train(load_recipe(recipe_file, [*longer, "train.compile=true"]), out=tmp_path / "compiled")
    assert losses(compiled.folder) == pytest.approx(losses(eager.folder), abs=0.05)
    assert weights(compiled.folder).keys() == weights(eager.folder).keys()


def test_a_loss_that_is_no_number_stops_with_the_step_and_the_place(recipe_file: Path, tmp_path: Path):
    recipe = load_recipe(recipe_file, ["train.clip=1.0"])
    recipe = recipe.model_copy(update={"optimizer": tuple(o.model_copy(update={"lr": 1e30}) for o in recipe.optimizer)})
    with pytest.raises(FallowError, match=r"^At step \d+ the loss"):
        train(recipe, out=tmp_path / "run")


def test_a_rollback_goes_on_with_other_text(recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from fallow.training.watch import LossWatch

    good = LossWatch.complaint
    bad_steps = iter([12])
    bad = next(bad_steps)
    seen = [0]

    def complaint(self: LossWatch, loss: float, norm: float) -> str | None:
        seen[0] += 1
        return "the loss is nan" if seen[0] == bad else good(self, loss, norm)

    monkeypatch.setattr(LossWatch, "complaint", complaint)
    notes: list[str] = []
    recipe = load_recipe(recipe_file, ["train.on_bad_step=rollback"])
    result = train(recipe, out=tmp_path / "run", on_note=notes.append)
    assert result.step == STEPS
    assert any("back to step 10, with other text" in note for note in notes)


def test_a_folder_of_another_recipe_is_left_alone(recipe_file: Path, tmp_path: Path):
    train(load_recipe(recipe_file, ["train.tokens=2560"]), out=tmp_path / "run")
    before = losses(tmp_path / "run")
    with pytest.raises(FallowError, match=r"another train\.tokens"):
        train(recipe_file, out=tmp_path / "run")
    assert losses(tmp_path / "run") == before
    assert train(recipe_file, out=tmp_path / "run", fresh=True).step == STEPS


def test_two_processes_do_not_train_in_one_folder(recipe_file: Path, tmp_path: Path):
    script = KILLED.replace("os.kill(os.getpid(), signal.SIGKILL)", "print('here', flush=True); sys.stdin.read()")
    command = [sys.executable, "-c", script, str(recipe_file), str(tmp_path / "run"), "2"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "here\n"
        with pytest.raises(FallowError, match="Another process trains in"):
            train(recipe_file, out=tmp_path / "run")
        other.kill()


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("model.heads=3", "heads"),
        ("model.key_value_heads=4", "key_value_heads"),
        ("model.value_embedding_layers=[2]", "value_embedding_layers"),
        ("model.activation=relu2 model.active_share=0.1", "relu2 has none"),
        ("rest.l1=0.1", "those of silu never are"),
        ("data.context=100000", "fewer than one window"),
        ("data.train=/nowhere", "/nowhere"),
        ("data.vocab_size=50000", "too little text"),
    ],
)
def test_what_cannot_be_trained_is_a_sentence(recipe_file: Path, tmp_path: Path, override: str, named: str):
    with pytest.raises(FallowError, match=named) as error:
        train(load_recipe(recipe_file, override.split()), out=tmp_path / "run")
    assert "\n" not in str(error.value)


VARIANTS = {
    "llama": ["model.qk_norm=false"],
    "qwen3": [],
    "reglu": ["model.activation=reglu"],
    "relu2": ["model.activation=relu2", "model.logit_softcap=15.0"],
    "top_k": ["model.activation=reglu", "model.active_share=0.2"],
    "own": [
        "model.value_embedding_layers=[1]",
        "model.residual_mixes=true",
        "model.tie_embeddings=false",
        "model.key_value_heads=1",
    ],
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_exported_folder_is_the_model_everywhere(recipe_file: Path, tmp_path: Path, variant: str):
    import transformers

    from fallow.engine.engine import Engine
    from fallow.engine.sampling import SamplingParams

    result = train(load_recipe(recipe_file, VARIANTS[variant]), out=tmp_path / "run")
    decoder = load_decoder(open_checkpoint(result.model))
    with Engine(str(result.model)) as engine:
        prompt = engine.tokenizer.encode("the field lies")
        params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
        answer = engine.generate([prompt], params)[0].outputs[0].token_ids
    assert answer == greedy_tokens(decoder, prompt, 12)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        result.model, trust_remote_code=True, dtype=torch.float32
    )
    ids = torch.tensor([prompt])
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, decoder.logits(decoder(ids)), rtol=1e-4, atol=1e-4)
    assert transformers.AutoTokenizer.from_pretrained(result.model)("the field lies")["input_ids"] == prompt
