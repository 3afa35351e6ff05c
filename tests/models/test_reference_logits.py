"""A decoder written down plainly from the contract of ``Checkpoint`` answers as ``transformers`` does.

This checks what a checkpoint says (names, orders of rows, norms, windows, RoPE, scales) without the engine.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from gguf_files import write_gguf

from fallow.models.checkpoint import open_checkpoint
from fallow.models.config import ModelConfig
from fallow.models.dequantize import dequantize
from fallow.models.rope import rope_table
from fallow.models.tensors import Checkpoint

Floats = npt.NDArray[np.float64]
TOKENS = 90  # more than any window of the tiny models, and than the original context of their RoPE


def logits(checkpoint: Checkpoint, tokens: npt.NDArray[Any]) -> Floats:
    """float64 ``[T, vocab]``."""
    config = checkpoint.config
    weights = {name: dequantize(tensor).astype(np.float64) for name, tensor in checkpoint.tensors.items()}

    def norm(x: Floats, name: str) -> Floats:
        return np.asarray(x / np.sqrt((x * x).mean(-1, keepdims=True) + config.rms_norm_eps) * weights[name])

    def linear(x: Floats, name: str) -> Floats:
        return np.asarray(x @ weights[name].T + weights.get(f"{name}.bias", 0.0))

    x: Floats = weights["embed_tokens"][tokens] * config.embedding_scale
    for i in range(config.num_hidden_layers):
        layer = f"layers.{i}."
        normed = norm(x, layer + "attention_norm")
        heads = [linear(normed, f"{layer}{part}_proj").reshape(len(tokens), -1, config.head_dim) for part in "qkv"]
        if config.qk_norm:
            heads[:2] = [norm(heads[0], layer + "q_norm"), norm(heads[1], layer + "k_norm")]
        branch = linear(attention(heads, i, config), layer + "o_proj")
        x = x + (norm(branch, layer + "attention_post_norm") if config.post_norms else branch)
        normed = norm(x, layer + "ffn_norm")
        branch = linear(
            activation(linear(normed, layer + "gate_proj"), config) * linear(normed, layer + "up_proj"),
            layer + "down_proj",
        )
        x = x + (norm(branch, layer + "ffn_post_norm") if config.post_norms else branch)
    return linear(norm(x, "norm"), "embed_tokens" if config.tie_word_embeddings else "lm_head")


def attention(heads: list[Floats], layer: int, config: ModelConfig) -> Floats:
    window = config.layer_windows[layer]
    rope = config.rope_local if window is not None and config.rope_local is not None else config.rope
    count = len(heads[0])
    cosines, sines = np.split(rope_table(rope, count)[:, None, :].astype(np.float64), 2, axis=-1)

    def rotate(x: Floats) -> Floats:
        first, second = np.split(x, 2, axis=-1)
        return np.concatenate([first * cosines - second * sines, second * cosines + first * sines], axis=-1)

    shared = config.num_attention_heads // config.num_key_value_heads
    queries, keys, values = rotate(heads[0]), np.repeat(rotate(heads[1]), shared, 1), np.repeat(heads[2], shared, 1)
    scores = np.einsum("qhd,khd->hqk", queries, keys) * config.attention_scale
    distance = np.arange(count)[:, None] - np.arange(count)
    scores[:, (distance < 0) | (distance >= (window or count))] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("hqk,khd->qhd", weights, values).reshape(count, -1)


def activation(x: Floats, config: ModelConfig) -> Floats:
    if config.hidden_act == "silu":
        return np.asarray(x / (1 + np.exp(-x)))
    return np.asarray(0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))))


@pytest.fixture(scope="module")
def tokens() -> npt.NDArray[Any]:
    return np.random.default_rng(0).integers(0, 320, TOKENS)


def by_transformers(folder: Path, tokens: npt.NDArray[Any], **config: Any) -> Floats:
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, **config).eval()
    with torch.no_grad():
        return np.asarray(model(torch.tensor(tokens)[None]).logits[0].numpy(), np.float64)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma3"])
def test_folders(family: str, tiny_checkpoints: dict[str, Path], tokens: npt.NDArray[Any]) -> None:
    reference = by_transformers(tiny_checkpoints[family], tokens)
    ours = logits(open_checkpoint(tiny_checkpoints[family]), tokens)
    assert reference.std() > 0.5
    # Angles of RoPE are float32 in both.
    assert np.abs(ours - reference).max() < 1e-4 * reference.std()


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3"])
def test_gguf(family: str, tiny_checkpoints: dict[str, Path], tokens: npt.NDArray[Any], tmp_path: Path) -> None:
    folder = tiny_checkpoints[family]
    config = open_checkpoint(folder).config
    window = next((window for window in config.layer_windows if window is not None), None)
    metadata: dict[str, Any] = {} if window is None else {"attention.sliding_window": window}
    if family == "qwen2":  # in the folder only the last layers have a window
        metadata["attention.sliding_window_pattern"] = [window is not None for window in config.layer_windows]
    tensors = {}
    if family == "llama":  # the converter writes Llama 3's scaling as factors of the frequencies
        plain = config.rope.theta ** -(np.arange(0, config.head_dim, 2) / config.head_dim)
        angles = rope_table(config.rope, 2)[1]
        tensors["rope_freqs.weight"] = (plain / np.arctan2(*np.split(angles, 2)[::-1])).astype(np.float32)
    write_gguf(tmp_path / "model.gguf", folder, gguf.GGMLQuantizationType.F32, metadata=metadata, tensors=tensors)
    ours, reference = open_checkpoint(tmp_path / "model.gguf"), by_transformers(folder, tokens)
    if family == "gemma3":  # a file cannot say the tiny model's query_pre_attn_scalar
        reference = by_transformers(folder, tokens, query_pre_attn_scalar=config.head_dim)
    assert np.abs(logits(ours, tokens) - reference).max() < 1e-4 * reference.std()


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 3.0},
        {"rope_type": "dynamic", "factor": 3.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 0.2, "beta_fast": 16},
        {"rope_type": "longrope", "original_max_position_embeddings": 64},
        {"rope_type": "longrope", "original_max_position_embeddings": 128, "attention_factor": 1.5},
    ],
)
def test_rope_kinds(
    rope: dict[str, Any], tiny_checkpoints: dict[str, Path], tokens: npt.NDArray[Any], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_checkpoints["llama"], tmp_path / "llama"))
    if rope["rope_type"] == "longrope":
        rope |= {"short_factor": [1 + i / 4 for i in range(8)], "long_factor": [2.0 + i for i in range(8)]}
    document = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(document | {"rope_parameters": rope | {"rope_theta": 1e4}}))
    reference = by_transformers(folder, tokens)
    assert np.abs(logits(open_checkpoint(folder), tokens) - reference).max() < 1e-4 * reference.std()
