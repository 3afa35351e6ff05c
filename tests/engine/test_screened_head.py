"""A head that is screened chooses the tokens of the whole head, in any company."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fallow.arrays import Float32
from fallow.engine.batch import SAMPLING_DTYPE, StepBatch
from fallow.engine.program import TILE_ROWS
from fallow.engine.runner import ModelRunner
from fallow.models.checkpoint import open_checkpoint
from fallow.models.decoder import Decoder
from fallow.models.decoder_weights import load_decoder
from fallow.models.head_screen import DIRECTIONS, HeadScreen, mean_products
from fallow.models.tensors import Checkpoint
from fallow.plan import LayerRule, SparsityPlan

torch = pytest.importorskip("torch")


def screened(candidates: int) -> SparsityPlan:
    return SparsityPlan(head=(LayerRule("screen", parameters={"rank": DIRECTIONS, "candidates": candidates}),))


def hidden_states(decoder: Decoder, tokens: Sequence[Sequence[int]]) -> Iterator[Float32]:
    with torch.no_grad():
        for row in tokens:
            yield decoder(torch.tensor(row)[None])[0].numpy()


def random_rows(vocab_size: int, rows: int, length: int, seed: int) -> list[list[int]]:
    return np.random.default_rng(seed).integers(3, vocab_size, (rows, length)).tolist()


class Model:
    """A checkpoint with a screen of its head, and runners of it."""

    def __init__(self, path: Path) -> None:
        self.checkpoint: Checkpoint = open_checkpoint(path)
        self.decoder = load_decoder(self.checkpoint, context=256)
        self.vocab_size = self.checkpoint.config.vocab_size
        self.trials = 24 if self.vocab_size < 1000 else 6
        texts = random_rows(self.vocab_size, 12, 128, 1)
        self.screen = HeadScreen.fit(mean_products(hidden_states(self.decoder, texts)), self.checkpoint.head)

    def runner(self, plan: SparsityPlan | None, threads: int = 2) -> ModelRunner:
        return ModelRunner(
            self.checkpoint, threads=threads, num_pages=64, max_step_tokens=64, max_step_sequences=16, plan=plan,
            head_screen=self.screen,
        )  # fmt: skip


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf: Path) -> Model:
    return Model(smollm2_gguf)


@pytest.fixture(scope="module", params=["llama", "qwen3", "gemma3", "smollm2"])
def model(request: pytest.FixtureRequest, tiny_checkpoints: dict[str, Path]) -> Model:
    if request.param == "smollm2":
        return request.getfixturevalue("smollm2")
    return Model(tiny_checkpoints[request.param])


def step(runner: ModelRunner, prompts: Sequence[Sequence[int]], sampling: np.ndarray) -> Any:
    """A token after each prompt."""
    offsets = np.cumsum([0, *map(len, prompts)]).astype(np.int32)
    pages = np.arange(4 * len(prompts), dtype=np.int32).reshape(len(prompts), 4)
    tokens = np.concatenate(prompts).astype(np.int32)
    starts = np.zeros(len(prompts), np.int32)
    return runner.step(StepBatch(tokens, offsets, starts, pages, offsets[1:] - 1, sampling))


def parameters(count: int, **values: Any) -> np.ndarray:
    sampling = np.zeros(count, SAMPLING_DTYPE)
    sampling["top_p"], sampling["repetition_penalty"], sampling["logprobs"] = 1, 1, -1
    for name, value in values.items():
        sampling[name] = value
    return sampling


KINDS: list[dict[str, float]] = [
    {},
    {"temperature": 0.7, "top_k": 5},
    {"temperature": 1.0, "top_k": 40, "min_p": 0.05},
    {"temperature": 1.3, "min_p": 0.02},
    {"temperature": 0.8, "top_p": 0.9},
    {"temperature": 1.0, "logprobs": 3},
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_tokens_of_the_whole_head(model: Model, kind: dict[str, float]) -> None:
    dense, sparse = model.runner(None), model.runner(screened(32 if model.vocab_size < 1000 else 768))
    draw = random.Random(4)
    for number in range(model.trials):
        rows, length = draw.randrange(1, 9), draw.randrange(1, 8)
        prompts = random_rows(model.vocab_size, rows, length, number)
        sampling = parameters(len(prompts), seed=number, draw=np.arange(len(prompts)), **kind)
        if kind.get("logprobs"):  # draws from all tokens are other ones with a screen: below
            sampling["temperature"] = 0
        expected, found = step(dense, prompts, sampling), step(sparse, prompts, sampling)
        np.testing.assert_array_equal(found.tokens, expected.tokens)
        np.testing.assert_array_equal(found.logprobs, expected.logprobs)
    rows, tiles, _ = sparse.head_counts
    assert (rows > 0) == (kind.get("top_p", 1) == 1 and not kind.get("logprobs"))
    if model.vocab_size > 1000 and not kind:
        assert tiles / rows < 0.1 * model.vocab_size / TILE_ROWS
    dense.close()
    sparse.close()


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_a_draw_from_all_tokens_is_the_same_whichever_logits_are_computed(model: Model, temperature: float) -> None:
    """A step that is asked for log-probabilities computes the whole head."""
    runner = model.runner(screened(32 if model.vocab_size < 1000 else 768))
    many = 8
    for number in range(model.trials // 2):
        prompts = random_rows(model.vocab_size, many, 7, number)
        sampling = parameters(many, seed=number, draw=np.arange(many), temperature=temperature)
        together = step(runner, prompts, sampling).tokens
        before = runner.head_counts[0]
        alone = [step(runner, [prompt], sampling[i : i + 1]).tokens[0] for i, prompt in enumerate(prompts)]
        assert runner.head_counts[0] == before + many
        np.testing.assert_array_equal(alone, together)
        sampling["logprobs"] = 0
        np.testing.assert_array_equal(step(runner, prompts, sampling).tokens, together)
    runner.close()


def test_draws_follow_the_distribution(tiny_checkpoints: dict[str, Path]) -> None:
    """Chi-square over a vocabulary of 320, of which the screen computes 32 tokens at once."""
    model = Model(tiny_checkpoints["llama"])
    dense, runner = model.runner(None, 1), model.runner(screened(32), 1)
    prompt = random_rows(model.vocab_size, 1, 6, 0)
    temperature = 0.2
    logits = dense.logits(prompt[0])[-1].astype(np.float64) / temperature
    expected = np.exp(logits - logits.max())
    expected /= expected.sum()
    draws, counts = 12000, np.zeros(model.vocab_size)
    rows = 8
    for first in range(0, draws, rows):
        sampling = parameters(rows, seed=11, draw=np.arange(first, first + rows), temperature=temperature)
        np.add.at(counts, step(runner, prompt * rows, sampling).tokens, 1)
    assert runner.head_counts[0] == draws
    often = expected * draws >= 8
    assert 10 < often.sum() < 300  # neither one token nor all
    observed = np.append(counts[often], counts[~often].sum())
    mean = np.append(expected[often], expected[~often].sum()) * draws
    statistic = float(((observed - mean) ** 2 / np.maximum(mean, 1e-9)).sum())
    degrees = len(mean) - 1
    assert statistic < degrees + 4 * np.sqrt(2 * degrees)


def test_the_same_tokens_with_any_number_of_threads(model: Model) -> None:
    prompts = random_rows(model.vocab_size, 3, 9, 5)
    sampling = parameters(3, seed=3, draw=np.arange(3), temperature=[0.0, 0.8, 1.0], top_k=[0, 9, 0])
    found = []
    for threads in (1, 2, 3):
        runner = model.runner(screened(64), threads)
        found.append(step(runner, prompts, sampling).tokens.tolist())
        runner.close()
    assert found[0] == found[1] == found[2]


def test_what_is_computed_is_what_the_reference_computes(smollm2: Model) -> None:
    candidates = 512
    runner = smollm2.runner(screened(candidates))
    agreed = []
    prompts = random_rows(smollm2.vocab_size, 6, 8, 0)
    hidden = np.stack([states[-1] for states in hidden_states(smollm2.decoder, prompts)])
    expected = smollm2.screen.shortlist(hidden, smollm2.checkpoint.head, candidates, tile=TILE_ROWS)
    for prompt, tiles in zip(prompts, expected, strict=True):
        token = int(step(runner, [prompt], parameters(1)).tokens[0])
        computed = set(runner.head_tiles(0, shortlist=True))
        assert computed <= set(runner.head_tiles(0))
        assert token // TILE_ROWS in runner.head_tiles(0)
        agreed.append(len(computed & set(tiles.tolist())) / len(tiles))
    assert np.mean(agreed) > 0.9  # the rest is rounding at the edge of the shortlist
    runner.close()
