"""Adapters through peft: only they are trained and kept, and they leave as what peft and the engine load."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_train_run import KILLED, losses, weights
from test_tuning import RECIPE

from fallow.engine.engine import Engine
from fallow.engine.sampling import SamplingParams
from fallow.errors import FallowError
from fallow.models.checkpoint import open_checkpoint
from fallow.models.decoder_weights import load_decoder
from fallow.models.tokenizer import load_tokenizer
from fallow.training.recipe import load_recipe
from fallow.training.run import train
from fallow.training.sample import greedy_tokens

peft = pytest.importorskip("peft")
LORA = "[lora]\nrank = 4\ntargets = [{targets}]\n"


@pytest.fixture
def start(tiny_checkpoints: dict[str, Path], tmp_path: Path) -> Path:
    """A model that a test may change."""
    return Path(shutil.copytree(tiny_checkpoints["qwen3"], tmp_path / "start"))


@pytest.fixture
def lora_file(start: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FALLOW_HOME", str(text.parent / "home"))
    path = tmp_path / "lora.toml"
    recipe = RECIPE.format(start=start, text=text).replace("lr = 0.002", "lr = 0.02")
    path.write_text(recipe + LORA.format(targets='"*_proj"'), encoding="utf-8")
    return path


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_adapters_learn_and_leave_as_peft_and_as_a_whole_model(
    lora_file: Path, start: Path, tmp_path: Path, precision: str
):
    result = train(load_recipe(lora_file, [f"train.precision={precision}"]), out=tmp_path / "run")
    assert losses(result.folder)[-1] < 0.95 * losses(result.folder)[0]
    decoder = load_decoder(open_checkpoint(result.model))
    base = transformers.AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "run" / "adapter")
    prompt = load_tokenizer(start).encode("the field lies fallow")
    ids = torch.tensor([prompt])
    with torch.no_grad():
        theirs, ours = adapted(ids).logits, decoder.logits(decoder(ids))
        assert (theirs - ours).abs().max() < 0.02 * theirs.abs().max()  # the merged weights are rounded to bfloat16
        with adapted.disable_adapter():
            assert (adapted(ids).logits - ours).abs().max() > 0.1 * theirs.abs().max()
    with Engine(str(result.model)) as engine:
        params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
        assert engine.generate([prompt], params)[0].outputs[0].token_ids == greedy_tokens(decoder, prompt, 8)


def test_checkpoints_hold_adapters_alone(lora_file: Path, start: Path, tmp_path: Path):
    folder = train(load_recipe(lora_file, ["lora.targets=['layers.*.q_proj']"]), out=tmp_path / "run").folder
    size = sum(file.stat().st_size for file in (folder / "checkpoints" / "step-00000010").iterdir())
    assert size < 100_000 < (start / "model.safetensors").stat().st_size
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert {tuple(tensor.shape) for tensor in adapter.values()} == {(4, 64), (128, 4)}
    assert len(adapter) == 2 * 3


@pytest.mark.parametrize("fused", [False, True])
def test_killed_it_goes_on_to_the_same_bits(lora_file: Path, tmp_path: Path, fused: bool):
    text = lora_file.read_text().replace("rank = 4", "rank = 4\ndropout = 0.2")
    lora_file.write_text(
        text.replace("[train]", "[train]\nfused_update = true\nclip = 0.0\nema = 0.9") if fused else text
    )
    whole = train(lora_file, out=tmp_path / "whole")
    command = [sys.executable, "-c", KILLED, str(lora_file), str(tmp_path / "killed"), "7"]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    train(lora_file, out=tmp_path / "killed")
    assert losses(tmp_path / "killed") == losses(whole.folder)
    assert weights(tmp_path / "killed") == weights(whole.folder)


def test_a_changed_base_is_refused(lora_file: Path, start: Path, tmp_path: Path):
    command = [
        sys.executable,
        "-c",
        KILLED,
        str(lora_file),
        str(tmp_path / "run"),
        "9",
    ]  # the first checkpoint is there
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    tensors = load_file(start / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, start / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        FallowError, match=rf"step-0000000[48] belongs to another model than {start}, which has changed"
    ):
        train(lora_file, out=tmp_path / "run")


def test_mistakes_are_a_sentence(lora_file: Path, recipe_file: Path, tmp_path: Path):
    with pytest.raises(
        FallowError, match=r"lora\.targets \(lm_head\) matches no linear layer .* called layers\.0\.q_proj"
    ):
        train(load_recipe(lora_file, ["lora.targets=['lm_head']"]), out=tmp_path / "run")
    with pytest.raises(FallowError, match=r"\[lora\] adapts a model that exists: say which with model\.start\."):
        load_recipe(recipe_file, ["lora.rank=4"])
