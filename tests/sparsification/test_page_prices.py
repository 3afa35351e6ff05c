"""Prices of pages against plans that are obeyed, and the sensitivity of layers against errors that are put in."""

from __future__ import annotations

import inspect
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fallow.models.checkpoint import open_checkpoint
from fallow.models.decoder import Decoder
from fallow.models.decoder_weights import load_decoder
from fallow.models.tokenizer import load_tokenizer
from fallow.plan import LayerRule, SparsityPlan
from fallow.sparsification.choices import Load
from fallow.sparsification.kinds import Kinds
from fallow.sparsification.page_prices import COUNTS, RECENT_PAGES, SINK_PAGES, page_errors
from fallow.sparsification.sensitivity import sensitivities
from fallow.sparsification.text import Question

TOKENS = 512
SOME = torch.tensor([300, 410, 509])


@pytest.fixture(scope="module")
def decoder(smollm2_gguf: Path) -> Decoder:
    return load_decoder(open_checkpoint(smollm2_gguf), context=TOKENS).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def window(smollm2_gguf: Path) -> list[int]:
    return load_tokenizer(smollm2_gguf).encode(inspect.getsource(random))[:TOKENS]


def streams(decoder: Decoder, window: list[int]) -> list[Tensor]:
    """After the attention of each layer, ``[tokens, hidden]``."""
    found: list[Tensor] = []
    hooks = [layer.ffn_norm.register_forward_pre_hook(lambda m, a: found.append(a[0][0])) for layer in decoder.layers]
    with torch.no_grad():
        decoder(torch.tensor([window]))
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("place", [(0, 1, 0), (0, 1, 2), (7, 0, 1), (29, 2, 3)])  # layer, KV head, pages
def test_an_error_is_that_of_the_plan(
    decoder: Decoder, window: list[int], page_table: Tensor, table_of_some: Tensor, place: tuple[int, int, int]
) -> None:
    layer, head, count = place
    everything = 1 << 20
    numbers = {"sink_pages": SINK_PAGES, "recent_pages": RECENT_PAGES, "context_pages": TOKENS // 32}
    rules = tuple(
        LayerRule("top_pages", layer, f"kv_head.{h}", numbers | {"top_pages": count if h == head else everything})
        for h in range(3)
    )
    dense = streams(decoder, window)[layer]
    decoder.obey(SparsityPlan(attention=rules))
    try:
        sparse = streams(decoder, window)[layer]
    finally:
        decoder.obey(SparsityPlan.dense())
    late = torch.linspace(TOKENS // 2, TOKENS - 1, min(256, TOKENS // 2)).long()
    for queries, table in ((late, page_table), (SOME, table_of_some)):
        error = (sparse - dense)[queries].square().sum(-1) / dense[queries].square().sum(-1)
        assert float(table[layer, head, COUNTS.index(count)]) == pytest.approx(float(error.mean()), rel=2e-3)


@pytest.fixture(scope="module")
def page_table(decoder: Decoder, window: list[int]) -> Tensor:
    return page_errors(decoder, [window])


@pytest.fixture(scope="module")
def table_of_some(decoder: Decoder, window: list[int]) -> Tensor:
    return page_errors(decoder, [window], [SOME])


def test_pages_cost_what_text_and_answers_lose(decoder: Decoder, window: list[int], smollm2_gguf: Path) -> None:
    window = window[:320]
    question = Question(window[:-3], window[-3:])
    assert question.tokens == window
    kinds = Kinds(open_checkpoint(smollm2_gguf), Load(1, len(window)), "auto", 2, pages=True, in_parts=[], removed=())
    alone, with_answer = (
        kinds.priced(decoder, [window], some, lambda what, done, total: None)[0] for some in ([], [question])
    )
    weights = sensitivities(decoder, [window], torch.Generator().manual_seed(0))[:-1, None, None]
    answer = (weights * page_errors(decoder, [window], [torch.arange(len(window) - 4, len(window) - 1)])).numpy()
    expected = 0.8 * alone.prices[:, :-1] + 0.2 * answer.reshape(-1, len(COUNTS))
    np.testing.assert_allclose(with_answer.prices[:, :-1], expected, rtol=1e-9)
    assert (with_answer.prices[:, 0] > 1.05 * alone.prices[:, 0]).any()


def test_more_pages_cost_less_and_all_cost_nothing(page_table: Tensor) -> None:
    totals = page_table.sum((0, 1))
    assert (totals.diff() <= 0).all()
    assert totals[0] > 1e-3
    assert float(page_table[..., COUNTS.index(16)].max()) < 1e-9  # with the ends, more than there are


def test_sensitivity_foretells_the_divergence_of_an_error(decoder: Decoder, window: list[int]) -> None:
    weights = sensitivities(decoder, [window], torch.Generator().manual_seed(1))
    size = 0.02
    tokens = torch.tensor([window])
    with torch.no_grad():
        dense = decoder.logits(decoder(tokens))[0].log_softmax(-1)
        for layer in (3, 15, 28):
            generator = torch.Generator().manual_seed(layer)

            def disturb(
                module: object, arguments: tuple[Tensor, ...], generator: torch.Generator = generator
            ) -> tuple[Tensor, ...]:
                x = arguments[0]
                noise = torch.randn(x.shape, generator=generator)
                noise[:, :64] = 0  # the first token's stream is huge, and all others attend to it
                noise *= size * x.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True).clamp_min(1e-9)
                return (x + noise, *arguments[1:])

            hook = decoder.layers[layer].register_forward_pre_hook(disturb)
            other = decoder.logits(decoder(tokens))[0].log_softmax(-1)
            hook.remove()
            divergence = float((dense.exp() * (dense - other)).sum(-1)[64:].mean())
            assert divergence == pytest.approx(float(weights[layer]) * size**2, rel=0.25)
