"""What a plan says about one model: its rules as numbers, layer by layer, checked against the model's shape."""

from __future__ import annotations

from dataclasses import dataclass

from fallow.errors import ModelFileError
from fallow.models.config import ModelConfig
from fallow.plan import LayerRule, SparsityPlan

AXES = ("attention",)
"""What the reference and the engine can let rest."""
_KV_HEAD = "kv_head."


@dataclass(frozen=True)
class PageRule:
    """Which pages of the KV cache a query of a layer reads: the first ``sink_pages``, the last ``recent_pages`` (its
    own is one of them), and for each KV head as many of those between as ``top_pages`` says."""

    sink_pages: int
    recent_pages: int
    top_pages: tuple[int, ...]


def page_rules(plan: SparsityPlan, config: ModelConfig) -> list[PageRule | None]:
    """Of each layer its rule on the axis ``attention``; None where it reads all pages.

    A rule without a layer is for all layers, one without a target for all KV heads; the target of one is
    ``kv_head.0`` and so on. Raises ``ModelFileError`` where the plan does not fit the model, ``FallowError`` where it
    has another axis.
    """
    plan.require_axes(AXES)
    layers, heads = config.num_hidden_layers, config.num_key_value_heads
    found: list[dict[int, LayerRule]] = [{} for _ in range(layers)]
    for rule in plan.rules("attention"):
        if rule.layer is not None and rule.layer >= layers:
            raise ModelFileError(f"The plan has a rule for layer {rule.layer}, but the model has {layers} layers.")
        for layer in range(layers) if rule.layer is None else (rule.layer,):
            for head in _kv_heads(rule, heads):
                if head in found[layer]:
                    raise ModelFileError(f"The plan has two rules for the attention of layer {layer}, KV head {head}.")
                found[layer][head] = rule
    return [_page_rule(layer, rules, heads) for layer, rules in enumerate(found)]


def _kv_heads(rule: LayerRule, count: int) -> range:
    if rule.target is None:
        return range(count)
    number = rule.target.removeprefix(_KV_HEAD)
    if not rule.target.startswith(_KV_HEAD) or not (number.isascii() and number.isdigit()) or int(number) >= count:
        raise ModelFileError(
            f"The plan's axis attention has the target {rule.target!r}: use {_KV_HEAD}0 to {_KV_HEAD}{count - 1}."
        )
    return range(int(number), int(number) + 1)


def _page_rule(layer: int, rules: dict[int, LayerRule], heads: int) -> PageRule | None:
    if not rules:
        return None
    if len(rules) < heads:
        missing = next(head for head in range(heads) if head not in rules)
        raise ModelFileError(f"The plan has no rule for the attention of layer {layer}, KV head {missing}.")
    ends = {tuple(_whole(layer, rule, name) for name in ("sink_pages", "recent_pages")) for rule in rules.values()}
    if len(ends) > 1:
        raise ModelFileError(
            f"The KV heads of layer {layer} must have the same sink_pages and recent_pages in the plan."
        )
    ((sink_pages, recent_pages),) = ends
    if recent_pages < 1:
        raise ModelFileError(f"The plan's recent_pages of layer {layer} is 0: a query's own page is always read.")
    return PageRule(sink_pages, recent_pages, tuple(_whole(layer, rules[head], "top_pages") for head in range(heads)))


def _whole(layer: int, rule: LayerRule, name: str) -> int:
    number = rule.parameters[name]
    if number != int(number) or number >= 2**31:
        raise ModelFileError(f"The plan's {name} of layer {layer} is {number}: it must be a whole number below 2^31.")
    return int(number)
