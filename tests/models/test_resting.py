"""A plan's rules against a model's shape: what fits becomes numbers, what does not a sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from fallow.errors import FallowError
from fallow.models.checkpoint import open_checkpoint
from fallow.models.config import ModelConfig
from fallow.models.resting import PageRule, page_rules
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
    assert page_rules(SparsityPlan.dense(), config) == [None] * layers
    assert page_rules(SparsityPlan(attention=(rule(),)), config) == [PageRule(1, 2, (3, 3))] * layers
    plan = SparsityPlan(attention=(rule(1, "kv_head.1", top_pages=7), rule(1, "kv_head.0")))
    assert page_rules(plan, config) == [None, PageRule(1, 2, (3, 7)), *[None] * (layers - 2)]


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
        ([rule(0, "kv_head.0"), rule(0, "kv_head.1", sink_pages=2)], "the same sink_pages and recent_pages"),
    ],
)
def test_what_does_not_fit_is_a_sentence(config: ModelConfig, rules: list[LayerRule], message: str) -> None:
    with pytest.raises(FallowError) as error:
        page_rules(SparsityPlan(attention=tuple(rules)), config)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_an_axis_that_nothing_can_run_yet_is_refused(config: ModelConfig) -> None:
    with pytest.raises(FallowError, match="axis ffn"):
        page_rules(SparsityPlan(ffn=(LayerRule("zeros"),)), config)
