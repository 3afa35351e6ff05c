"""Parts taken out of a model: the engine, which does not hold them, and the reference, in which they are zero."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from test_variants import SIZES, TOLERANCES, VARIANTS, error, logits_of, random_decoder, random_tokens, save

from fallow import _native
from fallow.engine.runner import ModelRunner
from fallow.models.checkpoint import open_checkpoint
from fallow.models.decoder_weights import load_decoder
from fallow.plan import LayerRule, SparsityPlan

torch = pytest.importorskip("torch")


def removed(layer: int, *targets: str) -> tuple[LayerRule, ...]:
    return tuple(LayerRule("removed", layer, target) for target in targets)


def parts(last: int) -> dict[str, SparsityPlan]:
    """Plans for a model whose last layer is ``last``, with two KV heads and 96 neurons or more."""
    return {
        "heads": SparsityPlan(structure=(*removed(0, "kv_head.0"), *removed(last, "kv_head.1"))),
        "neurons": SparsityPlan(structure=(*removed(0, "neurons.0"), *removed(last, "neurons.1", "neurons.2"))),
        "blocks": SparsityPlan(structure=(*removed(0, "ffn"), *removed(last, "attention"))),
        "a layer": SparsityPlan(structure=removed(last, "attention", "ffn")),
    }


@pytest.mark.parametrize("what", list(parts(1)))
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3"])
def test_families(family: str, what: str, tiny_checkpoints: dict[str, Path]) -> None:
    checkpoint = open_checkpoint(tiny_checkpoints[family])
    plan = parts(checkpoint.config.num_hidden_layers - 1)[what]
    decoder = load_decoder(checkpoint, context=128).eval()
    tokens = random_tokens(100)
    dense = logits_of(decoder, tokens)
    decoder.obey(plan)
    expected = logits_of(decoder, tokens)
    runner = ModelRunner(checkpoint, num_pages=4, threads=2, plan=plan)
    result = runner.logits(tokens)
    assert error(result, expected) < TOLERANCES["bf16"] < error(dense, expected)
    assert runner.weight_bytes < ModelRunner(checkpoint, num_pages=4, threads=2).weight_bytes


@pytest.mark.parametrize("what", list(parts(2)))
@pytest.mark.parametrize("variant", ["reglu", "all", "value_embeddings", "top_k"])
def test_variants_with_any_number_of_threads_and_rows(variant: str, what: str, tmp_path: Path) -> None:
    if (variant, what) == ("top_k", "neurons"):
        pytest.skip("statistical top-k needs all neurons")
    document, plan = SIZES | VARIANTS[variant], parts(2)[what]
    decoder = random_decoder(document)
    checkpoint = open_checkpoint(save(decoder, document, tmp_path))
    tokens = random_tokens(200)
    dense = logits_of(decoder, tokens)
    decoder.obey(plan)
    expected = logits_of(decoder, tokens)
    assert error(dense, expected) > TOLERANCES["bf16"]
    for isa in _native.available_isas():
        alone = ModelRunner(checkpoint, precision="bf16", threads=1, num_pages=8, isa=isa, plan=plan).logits(tokens)
        assert error(alone, expected) < TOLERANCES["bf16"]
        for threads, rows in [(1, 1), (2, 7), (3, 20), (2, 130)]:
            runner = ModelRunner(
                checkpoint, precision="bf16", threads=threads, num_pages=8, max_step_tokens=rows, isa=isa, plan=plan
            )
            np.testing.assert_array_equal(runner.logits(tokens, chunk=rows), alone)


EDGES = {
    "the first attention and the last network": (*removed(0, "attention"), *removed(2, "ffn")),
    "every block": tuple(LayerRule("removed", None, target) for target in ("attention", "ffn")),
}


@pytest.mark.parametrize("what", EDGES)
def test_edges_of_a_model(what: str, tmp_path: Path) -> None:
    document = SIZES | VARIANTS["swiglu"]
    decoder = random_decoder(document)
    plan = SparsityPlan(structure=EDGES[what])
    checkpoint = open_checkpoint(save(decoder, document, tmp_path))
    decoder.obey(plan)
    tokens = random_tokens(60)
    runner = ModelRunner(checkpoint, precision="bf16", num_pages=8, plan=plan)
    assert error(runner.logits(tokens), logits_of(decoder, tokens)) < TOLERANCES["bf16"]


def test_a_trace_has_the_numbers_of_the_whole_model(tmp_path: Path) -> None:
    document = SIZES | VARIANTS["swiglu"]
    decoder = random_decoder(document)
    checkpoint = open_checkpoint(save(decoder, document, tmp_path))
    plan = SparsityPlan(
        structure=(*removed(0, "kv_head.0", "neurons.1"), *removed(1, "attention"), *removed(2, "ffn", "neurons.0")),
        attention=(LayerRule("top_pages", parameters={"sink_pages": 1, "recent_pages": 1, "top_pages": 1}),),
        ffn=(LayerRule("threshold", parameters={"threshold": 0.4}),),
        input=tuple(LayerRule("threshold", None, name, {"threshold": 0.3}) for name in ("o_proj", "down_proj")),
    )
    tokens = random_tokens(150)
    runner = ModelRunner(checkpoint, precision="bf16", num_pages=8, threads=2, plan=plan)
    trace = runner.trace(tokens)
    decoder.obey(plan)
    seen: dict[tuple[str, int], np.ndarray] = {}
    for index, layer in enumerate(decoder.layers):
        for name in ("o_proj", "down_proj"):

            def keep(module: object, arguments: tuple[torch.Tensor], key: tuple[str, int] = (name, index)) -> None:
                seen[key] = arguments[0][0].numpy() != 0

            getattr(layer, name).register_forward_pre_hook(keep)
    with torch.no_grad():
        decoder(torch.from_numpy(tokens)[None])
    assert set(seen) == {("o_proj", 0), ("down_proj", 0), ("down_proj", 1), ("o_proj", 2)}
    assert trace.pages is not None
    assert trace.pages.layers == (0, 2)
    assert not trace.pages.counts[:, 0, 0].any()
    np.testing.assert_array_equal(trace.pages.counts[-1], [[0, 3], [3, 3]])
    assert trace.neurons is not None
    assert trace.neurons.layers == (0, 1)
    gone = slice(32, 64)
    assert not trace.neurons.unpacked()[:, 0, gone].any()
    # Of what goes into a layer's down projection neurons rest by their gates, and of those at work small products.
    at_work = trace.neurons.unpacked()
    for place, layer in enumerate(trace.neurons.layers):
        expected = seen["down_proj", layer]
        assert (expected & ~at_work[:, place]).mean() < 0.01
        assert (expected & ~np.roll(at_work[:, place], 1, axis=0)).mean() > 0.05
    assert trace.inputs is not None
    of_attention = trace.inputs.of("o_proj")
    assert of_attention.layers == (0, 2)
    for place, layer in enumerate(of_attention.layers):
        expected = seen["o_proj", layer]
        found = of_attention.unpacked()[:, place]
        assert (found != expected).mean() < 0.04  # rounding around the threshold, and pages that are worth the same
        assert (np.roll(found, 1, axis=0) != expected).mean() > 0.1
        assert 0.1 < expected.mean() < 0.9
    assert not of_attention.unpacked()[:, 0, :64].any()
