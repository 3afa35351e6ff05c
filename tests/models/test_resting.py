"""A plan's rules against a model's shape: what fits becomes numbers, what does not a sentence."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fallow.errors import FallowError, ModelFileError
from fallow.models.checkpoint import open_checkpoint
from fallow.models.config import ModelConfig
from fallow.models.head_screen import DIRECTIONS
from fallow.models.resting import PageRule, Resting, ScreenRule, resting, screen_rule
from fallow.plan import LayerRule, SparsityPlan

NUMBERS = {"sink_pages": 1, "recent_pages": 2, "top_pages": 3}


@pytest.fixture
def config(tiny_checkpoints: dict[str, Path]) -> ModelConfig:
    config = open_checkpoint(tiny_checkpoints["llama"]).config
    assert config.num_hidden_layers >= 2
    assert config.num_key_value_heads == 2
    return config


def rule(layer: int | None = None, target: str | None = None, **changes: float) -> LayerRule:
    return LayerRule("top_pages", layer, target, NUMBERS | changes)


def test_rules_for_all_layers_for_one_and_for_a_head(config: ModelConfig) -> None:
    layers = config.num_hidden_layers
    assert resting(SparsityPlan.dense(), config) == [Resting()] * layers
    assert resting(SparsityPlan(attention=(rule(),)), config) == [Resting(PageRule(1, 2, (3, 3)))] * layers
    plan = SparsityPlan(attention=(rule(1, "kv_head.1", top_pages=7), rule(1, "kv_head.0")))
    assert resting(plan, config) == [Resting(), Resting(PageRule(1, 2, (3, 7))), *[Resting()] * (layers - 2)]
    grows = SparsityPlan(attention=(rule(context_pages=9),))
    assert resting(grows, config) == [Resting(PageRule(1, 2, (3, 3), 9))] * layers


def test_rules_for_neurons(config: ModelConfig) -> None:
    layers = config.num_hidden_layers
    relu = replace(config, hidden_act="relu")
    assert resting(SparsityPlan(ffn=(LayerRule("zeros"),)), relu) == [Resting(neurons=0.0)] * layers
    above = LayerRule("threshold", 1, parameters={"threshold": 0.25})
    plan = SparsityPlan(ffn=(above,), attention=(rule(0),))
    found = resting(plan, config)
    assert found[:2] == [Resting(PageRule(1, 2, (3, 3))), Resting(neurons=0.25)]


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([rule(99)], "layer 99, but the model has"),
        ([rule(0), rule(0)], "two rules for the attention of layer 0, KV head 0"),
        ([rule(), rule(1, "kv_head.1")], "two rules for the attention of layer 1, KV head 1"),
        ([rule(0, "kv_head.0")], "no rule for the attention of layer 0, KV head 1"),
        ([rule(0, "kv_head.2")], "kv_head.0 to kv_head.1"),
        ([rule(0, "kv_head.-1")], "kv_head.0 to kv_head.1"),
        ([rule(0, "kv_head.١")], "kv_head.0 to kv_head.1"),
        ([rule(0, "q_proj")], "kv_head.0 to kv_head.1"),
        ([rule(0, recent_pages=0)], "own page is always read"),
        ([rule(0, top_pages=1.5)], "top_pages of layer 0 is 1.5"),
        ([rule(0, top_pages=2.0**40)], "below 2"),
        ([rule(0, "kv_head.0"), rule(0, "kv_head.1", sink_pages=2)], "the same sink_pages, recent_pages and"),
        ([rule(0, "kv_head.0"), rule(0, "kv_head.1", context_pages=9)], "the same sink_pages, recent_pages and"),
        ([rule(0, context_pages=0)], "context_pages of layer 0 is 0"),
        ([rule(0, context_pages=2.5)], "context_pages of layer 0 is 2.5"),
    ],
)
def test_what_does_not_fit_is_a_sentence(config: ModelConfig, rules: list[LayerRule], message: str) -> None:
    with pytest.raises(FallowError) as error:
        resting(SparsityPlan(attention=tuple(rules)), config)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


ZEROS = LayerRule("zeros")


@pytest.mark.parametrize(
    ("rules", "changes", "message"),
    [
        ([ZEROS], {}, "activation is silu"),
        ([ZEROS, LayerRule("zeros", 1)], {"hidden_act": "relu"}, "two rules for the neurons of layer 1"),
        ([LayerRule("zeros", 99)], {"hidden_act": "relu"}, "layer 99, but the model has"),
        ([LayerRule("zeros", 0, "up_proj")], {"hidden_act": "relu"}, "target 'up_proj'"),
        ([LayerRule("top_k", 0, parameters={"k": 1.5})], {}, "k of layer 0 is 1.5"),
        ([LayerRule("top_k", 1, parameters={"k": 5}), LayerRule("top_k", parameters={"k": 5})], {}, "two rules for"),
        ([ZEROS], {"hidden_act": "relu", "mlp_bias": True}, "biases"),
        ([ZEROS], {"hidden_act": "relu", "post_norms": True}, "a norm after them"),
        ([ZEROS], {"hidden_act": "relu", "hidden_size": 72}, "hidden size is 72, which must be a multiple of 16"),
    ],
)
def test_neurons_that_cannot_rest_are_a_sentence(
    config: ModelConfig, rules: list[LayerRule], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(FallowError) as error:
        resting(SparsityPlan(ffn=tuple(rules)), replace(config, **changes))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_so_many_neurons_work(config: ModelConfig) -> None:
    rules = LayerRule("top_k", 1, parameters={"k": 5}), LayerRule("threshold", 0, parameters={"threshold": 0.5})
    found = resting(SparsityPlan(ffn=rules), config)
    assert found[:2] == [Resting(neurons=0.5), Resting(neurons=0.0, most_neurons=5)]
    assert all(layer == Resting() for layer in found[2:])


def screen(rank: float = DIRECTIONS, candidates: float = 64, **place: Any) -> LayerRule:
    return LayerRule("screen", parameters={"rank": rank, "candidates": candidates}, **place)


def test_a_head_is_screened(config: ModelConfig) -> None:
    assert screen_rule(SparsityPlan.dense(), config) is None
    assert screen_rule(SparsityPlan(head=(screen(),)), config) == ScreenRule(64)
    assert resting(SparsityPlan(head=(screen(),)), config) == [Resting()] * config.num_hidden_layers


@pytest.mark.parametrize(
    ("rules", "changes", "message"),
    [
        ([screen(), screen()], {}, "must have one rule"),
        ([screen(layer=0)], {}, "without a layer"),
        ([screen(target="lm_head")], {}, "without a layer or a target"),
        ([screen(rank=8)], {}, "a rank of 8"),
        ([screen(candidates=0)], {}, "candidates of the head are 0"),
        ([screen(candidates=1.5)], {}, "candidates of the head is 1.5"),
        ([screen(candidates=2**31)], {}, "below 2^31"),
        ([screen()], {"hidden_size": 48}, "multiple of 32"),
    ],
)
def test_heads_that_cannot_be_screened_are_a_sentence(
    config: ModelConfig, rules: list[LayerRule], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(FallowError) as error:
        screen_rule(SparsityPlan(head=tuple(rules)), replace(config, **changes))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_inputs_that_rest(config: ModelConfig) -> None:
    rules = (
        LayerRule("threshold", None, "o_proj", {"threshold": 0.1}),
        LayerRule("threshold", 1, "down_proj", {"threshold": 0.2}),
    )
    found = [dict(layer.inputs) for layer in resting(SparsityPlan(input=rules), config)]
    assert found[:2] == [{"o_proj": 0.1}, {"o_proj": 0.1, "down_proj": 0.2}]
    with pytest.raises(ModelFileError, match="two rules for the inputs of layer 0, o_proj"):
        resting(SparsityPlan(input=(*rules, LayerRule("threshold", 0, "o_proj", {"threshold": 0.3}))), config)
    for target in ("q_proj", None):
        with pytest.raises(FallowError, match="o_proj and down_proj"):
            resting(SparsityPlan(input=(LayerRule("threshold", 0, target, {"threshold": 0.1}),)), config)
