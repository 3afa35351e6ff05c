"""Tuning of models that exist: every family, in and out of its own format, and what does not fit together."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf_files import write_gguf
from test_train_run import losses

from fallow.engine.engine import Engine
from fallow.engine.sampling import SamplingParams
from fallow.errors import FallowError
from fallow.models.checkpoint import open_checkpoint
from fallow.models.decoder_weights import load_decoder
from fallow.models.dequantize import dequantize
from fallow.models.tokenizer import load_tokenizer
from fallow.training.recipe import Recipe, load_recipe
from fallow.training.run import train
from fallow.training.sample import greedy_tokens

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma3"]
RECIPE = """
name = "tune"
[model]
start = "{start}"
[data]
train = "{text}"
context = 32
[train]
tokens = 1280
batch = 4
precision = "fp32"
compile = false
[[optimizer]]
kind = "adamw"
parameters = ["*"]
lr = 0.002
[report]
evaluate_every = 0
evaluate_tokens = 256
checkpoint_every = 4
"""


@pytest.fixture
def tuning(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The recipe that tunes a model, with overrides."""
    monkeypatch.setenv("FALLOW_HOME", str(text.parent / "home"))

    def recipe(start: Path, *overrides: str) -> Recipe:
        path = tmp_path / "tune.toml"
        path.write_text(RECIPE.format(start=start, text=text), encoding="utf-8")
        return load_recipe(path, overrides)

    return recipe


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_is_tuned_and_stays_of_its_family(tiny_checkpoints, tuning, tmp_path: Path, family: str):
    start = tiny_checkpoints[family]
    result = train(tuning(start), out=tmp_path / "run")
    assert losses(result.folder)[-1] < 0.9 * losses(result.folder)[0]
    before, after = open_checkpoint(start), open_checkpoint(result.model)
    assert after.config == before.config
    theirs = transformers.AutoModelForCausalLM.from_pretrained(result.model, dtype=torch.float32)
    assert type(theirs) is type(transformers.AutoModelForCausalLM.from_pretrained(start))
    decoder = load_decoder(after)
    prompt = load_tokenizer(result.model).encode("the field lies fallow, so that", allow_special=False)
    ids = torch.tensor([prompt])
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, decoder.logits(decoder(ids)), rtol=1e-4, atol=1e-4)
    with Engine(str(result.model)) as engine:
        params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
        assert engine.generate([prompt], params)[0].outputs[0].token_ids == greedy_tokens(decoder, prompt, 8)
    names = ("tokenizer.json", "tokenizer_config.json")
    assert all((result.model / name).read_bytes() == (start / name).read_bytes() for name in names)


def test_a_gguf_file_becomes_a_folder_of_its_family(tiny_checkpoints, tuning, tmp_path: Path):
    folder = tiny_checkpoints["llama"]
    write_gguf(tmp_path / "start.gguf", folder, gguf.GGMLQuantizationType.Q8_0)
    result = train(tuning(tmp_path / "start.gguf", f"data.tokenizer={folder}"), out=tmp_path / "run")
    assert losses(result.folder)[-1] < 0.9 * losses(result.folder)[0]
    decoder = load_decoder(open_checkpoint(result.model))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(result.model, dtype=torch.float32)
    assert type(theirs).__name__ == "LlamaForCausalLM"
    ids = torch.randint(3, 300, (1, 24), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, decoder.logits(decoder(ids)), rtol=1e-4, atol=1e-4)
    messages = [{"role": "user", "content": "Why does it rest?"}]
    tokenizer = transformers.AutoTokenizer.from_pretrained(result.model)
    ours = load_tokenizer(folder).apply_chat_template(messages)
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == ours


def test_weights_that_are_not_updated_come_back_as_they_were(tiny_checkpoints, tuning, tmp_path: Path):
    start = tiny_checkpoints["gemma3"]
    recipe = tuning(start)
    still = tuple(rule.model_copy(update={"lr": 1e-30}) for rule in recipe.optimizer)
    result = train(recipe.model_copy(update={"optimizer": still}), out=tmp_path / "run")
    after = open_checkpoint(result.model).tensors
    for name, tensor in open_checkpoint(start).tensors.items():
        np.testing.assert_array_equal(dequantize(after[name]), dequantize(tensor), err_msg=name)


def test_what_does_not_fit_the_model_is_a_sentence(tiny_checkpoints, tuning, text: Path, tmp_path: Path):
    start = tiny_checkpoints["llama"]
    with pytest.raises(FallowError, match=r"model\.start brings its own layers: leave layers out\.$"):
        tuning(start, "model.layers=2")
    other = train(tuning(start, "train.tokens=128"), out=tmp_path / "other").model
    document = json.loads((other / "tokenizer.json").read_text())
    vocabulary = document["model"]["vocab"]
    first, second = [piece for piece, number in vocabulary.items() if number in (100, 101)]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(document))
    for override, sentence in {
        "data.context=1000": f"data.context is 1000, but {start} sees 512 tokens: use as many at most.",
        f"data.tokenizer={other}": f"data.tokenizer is {other}, whose tokens are not those that {start} was trained",
        "model.start=/nowhere": "/nowhere does not exist",
    }.items():
        with pytest.raises(FallowError) as error:
            train(tuning(start, override), out=tmp_path / "run")
        assert str(error.value).startswith(sentence)
        assert "\n" not in str(error.value)
    rows = document["added_tokens"]
    rows.append(rows[0] | {"id": 320, "content": "beyond", "special": False})
    (other / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(FallowError, match=r"can give the token 320 \('beyond'\), but the model has only 320 tokens"):
        train(tuning(other), out=tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()
