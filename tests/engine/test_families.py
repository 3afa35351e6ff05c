"""Logits of a small random model of each family, saved as a folder, through the native engine and through PyTorch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fallow import _native
from fallow.engine.runner import ModelRunner
from fallow.models.checkpoint import open_checkpoint

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma3"]
# bfloat16 keeps 8 bits: activations, keys, values and probabilities are rounded to it, weights are in it already.
# The error of a logit, as a share of the logits' standard deviation.
TOLERANCE = 0.05


def transformers_logits(folder: Path, tokens: np.ndarray) -> np.ndarray:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return np.asarray(model(torch.from_numpy(tokens.astype(np.int64))[None]).logits[0].numpy())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("isa", _native.available_isas())
def test_logits_match_transformers(family: str, isa: str, tiny_checkpoints: dict[str, Path]) -> None:
    tokens = np.random.default_rng(FAMILIES.index(family)).integers(0, 320, 300)
    expected = transformers_logits(tiny_checkpoints[family], tokens)
    runner = ModelRunner(open_checkpoint(tiny_checkpoints[family]), num_pages=16, threads=2, isa=isa)
    result = runner.logits(tokens)
    error = np.sqrt(np.mean((result - expected) ** 2)) / expected.std()
    assert error < TOLERANCE
    # A wrong mask, rotation or norm changes late tokens more than early ones.
    assert np.sqrt(np.mean((result[200:] - expected[200:]) ** 2)) / expected.std() < TOLERANCE
    assert np.array_equal(runner.logits(tokens, chunk=1), result)
    assert np.array_equal(runner.logits(tokens, chunk=37), result)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision", ["q8", "q4"])
def test_quantised_floats_stay_close(family: str, precision: str, tiny_checkpoints: dict[str, Path]) -> None:
    tokens = np.random.default_rng(9).integers(0, 320, 64)
    expected = transformers_logits(tiny_checkpoints[family], tokens)
    runner = ModelRunner(open_checkpoint(tiny_checkpoints[family]), precision=precision, num_pages=16, threads=2)
    error = np.sqrt(np.mean((runner.logits(tokens) - expected) ** 2)) / expected.std()
    # Random weights have no redundancy: 4 bits cost a share of the signal that a trained model does not lose.
    assert error < (0.1 if precision == "q8" else 0.6)


def test_scores_are_the_log_softmax_of_the_logits(tiny_checkpoints: dict[str, Path]) -> None:
    tokens = np.random.default_rng(2).integers(0, 320, 150)
    runner = ModelRunner(open_checkpoint(tiny_checkpoints["llama"]), num_pages=16, threads=2)
    logits = runner.logits(tokens).astype(np.float64)
    log_softmax = (
        logits
        - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
        - logits.max(1, keepdims=True)
    )
    expected = log_softmax[np.arange(149), tokens[1:]]
    np.testing.assert_allclose(runner.score(tokens), expected, atol=1e-5)


@pytest.mark.parametrize("first", [1, 37, 38, 149, 150])
def test_the_last_rows_are_those_of_all(first: int, tiny_checkpoints: dict[str, Path]) -> None:
    tokens = np.random.default_rng().integers(0, 320, 150)
    runner = ModelRunner(open_checkpoint(tiny_checkpoints["llama"]), num_pages=16, threads=2)
    assert np.array_equal(runner.score(tokens, first=first, chunk=37), runner.score(tokens)[first - 1 :])
    if first < 150:
        rows = np.concatenate(list(runner.logit_blocks(tokens, first=first, chunk=37)))
        assert np.array_equal(rows, runner.logits(tokens)[first:])
