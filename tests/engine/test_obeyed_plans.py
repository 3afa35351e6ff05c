"""A plan in the engine and in the PyTorch reference: the same parts rest, and a plan that changes nothing is dense."""

from __future__ import annotations

import inspect
import random
from pathlib import Path

import numpy as np
import pytest

from fallow.engine.engine import Engine
from fallow.engine.runner import ModelRunner
from fallow.engine.sampling import SamplingParams
from fallow.errors import FallowError
from fallow.models.checkpoint import open_checkpoint
from fallow.models.tokenizer import load_tokenizer
from fallow.plan import LayerRule, SparsityPlan

torch = pytest.importorskip("torch")


def pages(top: int, target: str | None = None, recent: int = 1, **further: float) -> LayerRule:
    numbers = {"sink_pages": 1, "recent_pages": recent, "top_pages": top}
    return LayerRule("top_pages", None, target, numbers | further)


CHOSEN = SparsityPlan(
    attention=tuple(pages(top, f"kv_head.{head}", context_pages=9) for head, top in enumerate((2, 1, 3)))
)


def logits(model: Path, tokens: np.ndarray, plan: SparsityPlan | None) -> np.ndarray:
    (found,) = logits_in_chunks(model, tokens, plan, (512,))
    return found


def logits_in_chunks(
    model: Path, tokens: np.ndarray, plan: SparsityPlan | None, chunks: tuple[int, ...]
) -> list[np.ndarray]:
    runner = ModelRunner(open_checkpoint(model), num_pages=32, plan=plan)
    try:
        return [runner.logits(tokens, chunk=chunk) for chunk in chunks]
    finally:
        runner.close()


class Reference:
    """The PyTorch reference of a model, and tokens that it reads."""

    def __init__(self, model: Path) -> None:
        from fallow.models.decoder_weights import load_decoder

        self._model = model
        self._tokens = np.array(load_tokenizer(model).encode(inspect.getsource(random)), np.int32)
        self._decoder = load_decoder(open_checkpoint(model), context=512)

    def _logits(self, plan: SparsityPlan, tokens: np.ndarray) -> torch.Tensor:
        self._decoder.obey(plan)
        with torch.no_grad():
            return self._decoder.logits(self._decoder(torch.from_numpy(tokens.astype(np.int64))[None]))[0]

    def divergences(self, plan: SparsityPlan, count: int, first: int) -> tuple[float, float]:
        """How far the engine under a plan and the dense reference are from the reference under it, in nats a token,
        after those of ``count`` tokens from ``first`` on."""
        tokens = self._tokens[:count]
        expected = self._logits(plan, tokens)

        def from_expected(other: torch.Tensor) -> float:
            p, q = (x[first:].log_softmax(-1) for x in (expected, other))
            return float((p.exp() * (p - q)).sum(-1).mean())

        engine = torch.from_numpy(logits(self._model, tokens, plan))
        return from_expected(engine), from_expected(self._logits(SparsityPlan.dense(), tokens))


@pytest.fixture(scope="module")
def reference(smollm2_gguf: Path) -> Reference:
    return Reference(smollm2_gguf)


def test_the_reference_and_the_engine_read_the_same_pages(reference: Reference) -> None:
    engine, dense = reference.divergences(CHOSEN, count=500, first=200)
    # Where rounding turns two pages around that are worth nearly the same, a little more than rounding is left.
    assert engine < 0.01
    assert dense > 0.05


def inputs(threshold: float, *targets: str) -> tuple[LayerRule, ...]:
    return tuple(LayerRule("threshold", None, target, {"threshold": threshold}) for target in targets)


def removed(*targets: str, layer: int | None = None) -> tuple[LayerRule, ...]:
    return tuple(LayerRule("removed", layer, target) for target in targets)


@pytest.mark.parametrize(
    "plan",
    [
        SparsityPlan(structure=removed("kv_head.1", "neurons.0", "neurons.47", "neurons.20", layer=17)),
        SparsityPlan(structure=(*removed("attention", layer=4), *removed("ffn", layer=3))),
        SparsityPlan(structure=removed("attention", "kv_head.0", layer=29)),
        SparsityPlan(structure=removed("kv_head.0", "kv_head.2", layer=29), attention=CHOSEN.attention),
        SparsityPlan(structure=removed("neurons.7", layer=5), ffn=(LayerRule("top_k", 5, parameters={"k": 300}),)),
    ],
    ids=["heads and neurons", "blocks", "the last attention", "heads that read pages", "neurons, of which some rest"],
)
def test_the_reference_and_the_engine_do_without_the_same_parts(reference: Reference, plan: SparsityPlan) -> None:
    engine, dense = reference.divergences(plan, count=200, first=20)
    assert dense > 0.02
    assert dense > 10 * engine


@pytest.mark.parametrize(
    "plan",
    [
        SparsityPlan(ffn=(LayerRule("threshold", parameters={"threshold": 0.1}),)),
        SparsityPlan(ffn=(LayerRule("top_k", parameters={"k": 500}),)),
        SparsityPlan(input=inputs(0.1, "o_proj")),
        SparsityPlan(ffn=(LayerRule("threshold", 3, parameters={"threshold": 0.2}),), input=inputs(0.1, "down_proj")),
    ],
    ids=["neurons", "so many neurons", "inputs of o_proj", "neurons and inputs of down_proj"],
)
def test_the_reference_and_the_engine_let_the_same_values_rest(reference: Reference, plan: SparsityPlan) -> None:
    engine, dense = reference.divergences(plan, count=200, first=20)
    # What lies near the threshold is on either side of it after rounding: that much is left.
    assert dense > 0.02
    assert dense > 3 * engine


def test_a_plan_that_lets_nothing_rest_gives_the_dense_bits(smollm2_gguf: Path) -> None:
    tokens = np.random.default_rng(4).integers(3, 49000, 60).astype(np.int32)
    dense = logits(smollm2_gguf, tokens, None)
    zeros = (LayerRule("threshold", parameters={"threshold": 0}),)
    every = (LayerRule("top_k", parameters={"k": 1536}),)
    of_inputs = inputs(0, "o_proj", "down_proj")
    for plan in (SparsityPlan(ffn=zeros), SparsityPlan(ffn=zeros, input=of_inputs), SparsityPlan(ffn=every)):
        for found in logits_in_chunks(smollm2_gguf, tokens, plan, (512, 7, 1)):
            assert np.array_equal(found, dense)


def test_a_plan_that_reads_all_pages_gives_the_dense_bits(smollm2_gguf: Path) -> None:
    tokens = np.random.default_rng(1).integers(3, 49000, 300).astype(np.int32)
    dense = logits(smollm2_gguf, tokens, None)
    for plan in (
        SparsityPlan.dense(),
        SparsityPlan(attention=(pages(9),)),
        SparsityPlan(attention=(pages(0, recent=10),)),
    ):
        assert np.array_equal(logits(smollm2_gguf, tokens, plan), dense)
    assert not np.array_equal(logits(smollm2_gguf, tokens, SparsityPlan(attention=(pages(1),))), dense)


def test_the_plan_beside_the_weights_is_obeyed(smollm2_gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").symlink_to(smollm2_gguf)
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=0)
    prompt = np.random.default_rng(2).integers(3, 49000, 300).tolist()

    def answer(plan: SparsityPlan | None = None) -> list[float]:
        with Engine(str(tmp_path), plan=plan) as engine:
            return [entry.logprob for entry in engine.generate([prompt], params)[0].outputs[0].logprobs]

    dense = answer()
    chosen = answer(CHOSEN)
    CHOSEN.save(tmp_path / "plan.json")
    assert answer() == chosen != dense
    assert answer(SparsityPlan.dense()) == dense
    SparsityPlan(attention=(pages(1, "kv_head.5"),)).save(tmp_path / "plan.json")
    with pytest.raises(FallowError, match=r"kv_head\.0 to kv_head\.2"):
        answer()
