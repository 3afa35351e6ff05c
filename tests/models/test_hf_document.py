"""Configurations written as ``config.json``, and what no family of ``transformers`` can say."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf_files import write_gguf

from fallow.errors import FallowError
from fallow.models.checkpoint import open_checkpoint
from fallow.models.config import RopeConfig
from fallow.models.decoder_weights import load_decoder
from fallow.models.hf_config import config_from_hf
from fallow.models.hf_document import hf_document
from fallow.models.rope import rope_table
from fallow.models.tokenizer import Tokenizer
from fallow.training.model import config_of
from fallow.training.recipe import ModelRecipe

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3")
LONG = {"short_factor": [1.0] * 8, "long_factor": [1.5] * 8, "original_max_position_embeddings": 64, "factor": 8.0}
SCALINGS = {
    "linear": {"factor": 2.0},
    "llama3": {
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"factor": 4.0, "beta_fast": 16.0, "original_max_position_embeddings": 64},
    "longrope": LONG,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_written_is_read_again(tiny_checkpoints: dict[str, Path], family: str):
    config = open_checkpoint(tiny_checkpoints[family]).config
    assert config_from_hf(json.loads(json.dumps(hf_document(config))), "here") == config


@pytest.mark.parametrize("head_dim", [8, 24, 48, 80, 96, 128])
def test_every_size_of_a_head_can_be_written(head_dim: int):
    words = {"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}
    tokenizer = Tokenizer(words, bos_token_id=None, eos_token_ids=())
    config = config_of(ModelRecipe(hidden_size=2 * head_dim, heads=2), tokenizer, 64)
    written = config_from_hf(json.loads(json.dumps(hf_document(config))), "here")
    assert written.attention_scale == config.attention_scale


@pytest.mark.parametrize("kind", SCALINGS)
def test_stretched_positions(tiny_checkpoints: dict[str, Path], kind: str):
    config = open_checkpoint(tiny_checkpoints["llama"]).config
    config = replace(config, rope=RopeConfig(500.0, 16, kind, SCALINGS[kind]))
    document = hf_document(config)
    assert config_from_hf(document, "here") == config
    theirs = transformers.LlamaConfig.from_dict(document)
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(theirs)
    cosine, sine = rotary(torch.zeros(1, 40, 1), torch.arange(40)[None])
    table = rope_table(config.rope, 40)  # [positions, cosines and sines]
    np.testing.assert_allclose(np.concatenate([cosine[0, :, :8], sine[0, :, :8]], 1), table, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_gguf_file_says_the_same_as_a_folder(tiny_checkpoints: dict[str, Path], tmp_path: Path, family: str):
    folder = tiny_checkpoints[family]
    windows = {"attention.sliding_window": 24} if family in ("mistral", "gemma3") else {}
    factors = np.linspace(1, 4, 8, dtype=np.float32)
    added = {"rope_freqs.weight": factors} if family == "llama" else {}
    write_gguf(tmp_path / "a.gguf", folder, gguf.GGMLQuantizationType.F32, metadata=windows, tensors=added)
    checkpoint = open_checkpoint(tmp_path / "a.gguf")
    document = hf_document(checkpoint.config, "float32")
    kinds = {"gemma3": "gemma3_text"}
    assert document["model_type"] == kinds.get(family, family)
    decoder = load_decoder(checkpoint)
    read = replace(config_from_hf(document, "here"), architecture=checkpoint.config.architecture)
    again = type(decoder)(read)
    again.load_state_dict(decoder.state_dict())
    tokens = torch.randint(3, 300, (1, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(decoder(tokens), again(tokens))


def test_what_no_family_can_say_is_refused(tiny_checkpoints: dict[str, Path]):
    config = open_checkpoint(tiny_checkpoints["llama"]).config
    stretched = RopeConfig(1e4, 16, "linear", {"factor": 2.0}, frequency_factors=(1.0,) * 8)
    for changes, named in (
        ({"attention_bias": True}, "attention_out_bias"),
        ({"layer_windows": (None, 24, None)}, "layer_windows"),
        ({"rope": stretched}, "rope"),
    ):
        with pytest.raises(FallowError, match=rf"^This model cannot be written as a Hugging Face folder: its {named}"):
            hf_document(replace(config, **changes))
