"""Prices of small inputs and gates against plans that are obeyed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fallow.models.checkpoint import open_checkpoint
from fallow.models.decoder import Decoder
from fallow.plan import LayerRule, SparsityPlan
from fallow.sparsification.partial_reads import SHARES
from fallow.sparsification.weight_choices import WeightChoices, can_lie_in_parts
from fallow.sparsification.weight_prices import PARTS, WeightErrors, weight_errors


@pytest.fixture(scope="module")
def found(decoder: Decoder, windows: list[list[int]]) -> WeightErrors:
    return weight_errors(decoder, windows)


def streams(decoder: Decoder, window: list[int], layer: int, part: str) -> tuple[Tensor, Tensor]:
    """After the block that ``part`` is of, ``[tokens, hidden]``, and what goes into its last linear."""
    block = decoder.layers[layer]
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    hooks = [
        (block.o_proj if part == "o_proj" else block.down_proj).register_forward_pre_hook(
            lambda module, arguments: inputs.append(arguments[0][0])
        ),
        block.ffn_norm.register_forward_pre_hook(lambda module, arguments: outputs.append(arguments[0][0]))
        if part == "o_proj"
        else block.register_forward_hook(lambda module, arguments, output: outputs.append(output[0])),
    ]
    with torch.no_grad():
        decoder(torch.tensor([window]))
    for hook in hooks:
        hook.remove()
    return outputs[0], inputs[0]


@pytest.mark.parametrize("place", [(0, "o_proj", 3), (13, "down_proj", 4), (29, "neurons", 2)])  # layer, part, share
def test_an_error_is_that_of_the_plan(
    decoder: Decoder, windows: list[list[int]], found: WeightErrors, place: tuple[int, str, int]
) -> None:
    layer, part, share = place
    at = layer, PARTS.index(part), share
    threshold = {"threshold": float(found.thresholds[at])}
    if part == "neurons":
        plan = SparsityPlan(ffn=(LayerRule("threshold", layer, parameters=threshold),))
    else:
        plan = SparsityPlan(input=(LayerRule("threshold", layer, part, threshold),))
    tokens = len(windows[0])
    queries = torch.linspace(tokens // 2, tokens - 1, tokens // 2).long()
    errors, resting = [], []
    for window in windows:
        dense, before = streams(decoder, window, layer, part)
        decoder.obey(plan)
        try:
            sparse, inputs = streams(decoder, window, layer, part)
        finally:
            decoder.obey(SparsityPlan.dense())
        error = (sparse - dense)[queries].square().sum(-1) / dense[queries].square().sum(-1)
        errors.append(float(error.mean()))
        small = inputs[queries] == 0 if part == "neurons" else before[queries].abs() <= threshold["threshold"]
        resting.append(float(small.double().mean()))
    assert float(found.errors[at]) == pytest.approx(np.mean(errors), rel=1e-3)
    assert float(found.resting[at]) == pytest.approx(np.mean(resting), abs=1e-4)


def test_more_at_rest_costs_more(found: WeightErrors) -> None:
    for values in (found.thresholds, found.resting, found.errors):
        assert (np.diff(values, axis=-1) > 0).all()
    assert np.abs(found.resting - SHARES).max() < 0.1


def test_choices_are_what_is_spared_and_the_rules_for_it(smollm2_gguf: Path, found: WeightErrors) -> None:
    checkpoint = open_checkpoint(smollm2_gguf)
    asked = []

    def times(layout: str, out_features: int, in_features: int) -> np.ndarray:
        asked.append((layout, out_features, in_features))
        return 1 - np.array(SHARES) if layout == "rows" else np.ones(len(SHARES))

    sensitivities = np.arange(31.0)
    choices = WeightChoices.of(("down_proj", "neurons"), checkpoint, "auto", found, sensitivities, times)
    assert set(asked) == {("rows", 1536, 576), ("columns", 576, 1536)}
    assert choices.layers == tuple(range(30))
    assert (choices.rests[:, -1] == 0).all()
    assert (choices.prices[:, -1] == 0).all()
    count = len(SHARES)
    np.testing.assert_allclose(choices.prices[7, :count], 8 * found.errors[7, 1])
    np.testing.assert_allclose(choices.prices[7, count:-1], 8 * found.errors[7, 2])
    matrix = 1536 * 576 * 5 / 8
    np.testing.assert_allclose(choices.read[:, -1], 2 * matrix)
    np.testing.assert_allclose(choices.read[:, :count], 2 * matrix)  # as columns spare nothing
    rests = np.clip(found.resting[4, 2], SHARES[0], SHARES[-1])
    np.testing.assert_allclose(choices.read[4, count:-1], 2 * matrix - rests * matrix)
    np.testing.assert_allclose(choices.rests[4, count:-1], 2 * found.resting[4, 2] * matrix)
    chosen = choices.dense
    assert choices.rules(chosen) == {}
    chosen[3], chosen[9] = 2, count + 1
    rules = choices.rules(chosen)
    assert rules["input"] == (LayerRule("threshold", 3, "down_proj", {"threshold": found.thresholds[3, 1, 2]}),)
    assert rules["ffn"] == (LayerRule("threshold", 9, None, {"threshold": found.thresholds[9, 2, 1]}),)
    assert choices.spared(chosen) == pytest.approx(np.clip(found.resting[9, 2, 1], 0.2, 0.9) * matrix)


def test_only_4_bits_lie_in_parts(smollm2_gguf: Path, tiny_checkpoints: dict[str, Path]) -> None:
    four, floats = open_checkpoint(smollm2_gguf), open_checkpoint(tiny_checkpoints["llama"])
    for part in PARTS:
        assert can_lie_in_parts(four, "auto", 0, part)
        assert not can_lie_in_parts(four, "q8", 0, part)
        assert not can_lie_in_parts(floats, "auto", 0, part)
        assert can_lie_in_parts(floats, "q4", 0, part)
