"""Prices of heads and neurons that are taken out, against plans that are obeyed, and the rules that come of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_weight_prices import streams

from fallow.models.checkpoint import open_checkpoint
from fallow.models.decoder import Decoder
from fallow.plan import SparsityPlan
from fallow.sparsification.choices import Either
from fallow.sparsification.partial_reads import SHARES
from fallow.sparsification.removal_choices import RemovalChoices, can_be_removed
from fallow.sparsification.removal_prices import Removals, removal_errors
from fallow.sparsification.weight_choices import WeightChoices
from fallow.sparsification.weight_prices import PARTS, WeightErrors

ATTENTION, NETWORK = "o_proj", "down_proj"


@pytest.fixture(scope="module")
def found(decoder: Decoder, windows: list[list[int]]) -> tuple[Removals, Removals]:
    return removal_errors(decoder, windows)


def choices(model: Path, part: str, removals: Removals) -> RemovalChoices:
    return RemovalChoices.of(part, open_checkpoint(model), "auto", removals, np.ones(31))  # type: ignore[arg-type]


@pytest.mark.parametrize("place", [(0, "heads", 1), (13, "heads", 3), (5, "neurons", 4), (29, "neurons", 48)])
def test_an_error_is_that_of_the_plan(
    smollm2_gguf: Path,
    decoder: Decoder,
    windows: list[list[int]],
    found: tuple[Removals, Removals],
    place: tuple[int, str, int],
) -> None:
    layer, part, count = place
    removals = found[part == "neurons"]
    offered = choices(smollm2_gguf, part, removals)
    chosen = offered.dense
    chosen[layer] = offered.counts.index(count)
    plan = SparsityPlan(structure=offered.rules(chosen)["structure"])
    tokens = len(windows[0])
    queries = torch.linspace(tokens // 2, tokens - 1, tokens // 2).long()
    errors = []
    for window in windows:
        dense, inputs = streams(decoder, window, layer, ATTENTION if part == "heads" else NETWORK)
        if chosen[layer] == len(offered.counts) - 2:  # the block
            before = decoder.layers[layer]
            out = (before.o_proj if part == "heads" else before.down_proj)(inputs)
            sparse = dense - out
        else:
            decoder.obey(plan)
            try:
                sparse, _ = streams(decoder, window, layer, ATTENTION if part == "heads" else NETWORK)
            finally:
                decoder.obey(SparsityPlan.dense())
        error = (sparse - dense)[queries].square().sum(-1) / dense[queries].square().sum(-1)
        errors.append(float(error.mean()))
    assert float(removals.errors[layer, count - 1]) == pytest.approx(np.mean(errors), rel=1e-3)
    assert float(offered.prices[layer, chosen[layer]]) == removals.errors[layer, count - 1]


def test_the_cheapest_part_goes_first(found: tuple[Removals, Removals]) -> None:
    for removals, parts in zip(found, (3, 48), strict=True):
        assert removals.errors.shape == removals.order.shape == (30, parts)
        assert (np.sort(removals.order, -1) == np.arange(parts)).all()
        assert (removals.errors >= 0).all()
        assert (removals.errors[:, 0] < 0.5 * removals.errors[:, -1]).mean() > 0.9


def test_choices_are_what_is_spared_and_the_rules_for_it(smollm2_gguf: Path, found: tuple[Removals, Removals]) -> None:
    heads, neurons = choices(smollm2_gguf, "heads", found[0]), choices(smollm2_gguf, "neurons", found[1])
    assert heads.counts == (1, 2, 3, 0)
    assert neurons.counts[-2:] == (48, 0)
    bits = 5 / 8
    np.testing.assert_allclose(heads.read[:, -1], 576 * (2 * 576 + 2 * 192) * bits)
    np.testing.assert_allclose(heads.read[:, -2], 0)
    np.testing.assert_allclose(neurons.rests[:, 0], 3 * 576 * 32 * bits)
    np.testing.assert_allclose(neurons.read + neurons.rests, neurons.read[:, -1:].repeat(len(neurons.counts), 1))
    for kind in (heads, neurons):
        assert kind.rules(kind.dense) == {}
        assert kind.spared(kind.dense) == kind.at_rest(kind.dense) == 0
        assert (kind.prices[:, -1] == 0).all()
    chosen = heads.dense
    chosen[[2, 4]] = 0, 2
    (one, block) = heads.rules(chosen)["structure"]
    assert (one.layer, one.target) == (2, f"kv_head.{found[0].order[2, 0]}")
    assert (block.layer, block.target) == (4, "attention")


def test_a_layer_loses_parts_or_lets_them_rest(smollm2_gguf: Path, found: tuple[Removals, Removals]) -> None:
    checkpoint = open_checkpoint(smollm2_gguf)
    shape = 30, len(PARTS), len(SHARES)
    errors = WeightErrors(np.full(shape, 0.5), np.full(shape, 0.4), np.full(shape, 0.1))
    removals = choices(smollm2_gguf, "heads", found[0])
    inputs = WeightChoices.of(
        ("o_proj",), checkpoint, "auto", errors, np.ones(31), lambda layout, rows, columns: 1 - np.array(SHARES)
    )
    either = Either.of([removals, inputs])
    assert either.read.shape == either.rests.shape == either.prices.shape == (30, 3 + len(SHARES) + 1)
    np.testing.assert_allclose(either.read[:, :3], removals.read[:, :3])
    np.testing.assert_allclose(either.read[:, 3:-1], removals.bytes / 30 - inputs.spared(np.full(30, 2)) / 30)
    assert either.bytes == removals.bytes
    assert either.what == removals.what
    assert either.rules(either.dense) == {}
    chosen = either.dense
    chosen[[1, 2, 3]] = 2, 3 + 4, 0
    rules = either.rules(chosen)
    assert [(rule.layer, rule.rule) for rule in rules["structure"]] == [(1, "removed"), (3, "removed")]
    assert [(rule.layer, rule.target) for rule in rules["input"]] == [(2, "o_proj")]


def test_neurons_go_in_whole_groups(smollm2_gguf: Path) -> None:
    config = open_checkpoint(smollm2_gguf).config
    assert can_be_removed(config) == ("heads", "neurons")
    assert can_be_removed(replace(config, intermediate_size=1500)) == ("heads",)
    assert can_be_removed(replace(config, active_share=0.1)) == ("heads",)
