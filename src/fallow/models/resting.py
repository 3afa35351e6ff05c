"""What a plan says about one model: its rules as numbers, layer by layer, checked against the model's shape."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from fallow.errors import FallowError, ModelFileError
from fallow.models.config import ModelConfig
from fallow.models.head_screen import DIRECTIONS, SIGN_GROUP
from fallow.models.structure import Kept, kept_parts
from fallow.plan import AXES, KV_HEAD, LayerRule, SparsityPlan

INPUTS = ("o_proj", "down_proj")
"""Linear layers whose inputs can rest: those that are not normalised, so that small ones are small."""
_LANES = 16  # the engine computes hidden states so many at a time


@dataclass(frozen=True)
class PageRule:
    """Which pages of the KV cache a query of a layer reads: the first ``sink_pages``, the last ``recent_pages`` (its
    own is one of them), and for each KV head as many of those between as ``top_pages`` says. So it is where there are
    up to ``context_pages``, and where there are more, as many more are read in proportion; None: however many there
    are."""

    sink_pages: int
    recent_pages: int
    top_pages: tuple[int, ...]
    context_pages: int | None = None


@dataclass(frozen=True)
class Resting:
    """What rests in a layer. ``pages``: None where all are read. ``neurons``: those of the feed-forward network rest
    whose activated gate (without a gate: whose value) is not beyond it; None where all work. ``most_neurons``: of these
    so many work, the largest. ``inputs``: those of a linear layer of this name rest that are not beyond its threshold.
    ``kept``: what is left of it at all.
    """

    pages: PageRule | None = None
    neurons: float | None = None
    most_neurons: int | None = None
    inputs: Mapping[str, float] = field(default_factory=dict)
    kept: Kept = field(default_factory=Kept)


@dataclass(frozen=True)
class ScreenRule:
    """How the head is screened: of the tokens that look most likely, ``candidates`` are computed at once, and further
    ones where the choice needs them."""

    candidates: int


def resting(plan: SparsityPlan, config: ModelConfig) -> list[Resting]:
    """Of each layer what rests; rules for what is taken out are void. Raises ``ModelFileError`` where the plan does not
    fit the model, ``FallowError`` where it has a rule that cannot be run with it."""
    for axis in AXES:
        for rule in plan.rules(axis):
            if rule.layer is not None and rule.layer >= config.num_hidden_layers:
                raise ModelFileError(
                    f"The plan has a rule for layer {rule.layer}, but the model has {config.num_hidden_layers} layers."
                )
    rules = _page_rules(plan, config), _neuron_rules(plan, config), _input_thresholds(plan, config)
    layers = zip(*rules, kept_parts(plan, config), strict=True)
    return [_of_what_is_kept(Resting(pages, *neurons, inputs, kept)) for pages, neurons, inputs, kept in layers]


def screen_rule(plan: SparsityPlan, config: ModelConfig) -> ScreenRule | None:
    """How the head is screened; None where it is not. It changes no logits that are asked for; a token is the
    one that the whole head would choose, but for rare errors of the screen. Raises as ``resting`` does."""
    rules = plan.rules("head")
    if not rules:
        return None
    if len(rules) > 1 or rules[0].layer is not None or rules[0].target is not None:
        raise ModelFileError("The plan's axis head must have one rule, without a layer or a target.")
    rank, candidates = (_whole(None, rules[0], name) for name in ("rank", "candidates"))
    if rank != DIRECTIONS:
        raise FallowError(
            f"The plan screens the head with a rank of {rank}, but this version of fallow has screens of {DIRECTIONS}: "
            "make the plan again."
        )
    if candidates < 1:
        raise ModelFileError("The plan's candidates of the head are 0: at least 1 token is computed.")
    if config.hidden_size % SIGN_GROUP:
        raise FallowError(
            f"The plan screens the head, but the hidden size is {config.hidden_size}, which must be a multiple of "
            f"{SIGN_GROUP} for that: use the model without the plan."
        )
    return ScreenRule(candidates)


def _of_what_is_kept(rests: Resting) -> Resting:
    inputs = dict(rests.inputs)
    if rests.kept.kv_heads == ():
        inputs.pop("o_proj", None)
        rests = replace(rests, pages=None, inputs=inputs)
    if rests.kept.neurons == ():
        inputs.pop("down_proj", None)
        rests = replace(rests, neurons=None, most_neurons=None, inputs=inputs)
    return rests


def _neuron_rules(plan: SparsityPlan, config: ModelConfig) -> list[tuple[float | None, int | None]]:
    """Of each layer the threshold of neurons and how many work at most. A rule without a layer is for all layers.
    ``zeros``: what is zero rests; ``threshold``: what is not beyond it; ``top_k``: all but the ``k`` largest, and where
    the last of these has equals that are not among them, it and they too."""
    found: list[tuple[float | None, int | None]] = [(None, None)] * config.num_hidden_layers
    for rule in plan.rules("ffn"):
        _check_neuron_rule(rule, config)
        for layer in rule.layers(config.num_hidden_layers):
            if found[layer] != (None, None):
                raise ModelFileError(f"The plan has two rules for the neurons of layer {layer}.")
            most = _whole(layer, rule, "k") if rule.rule == "top_k" else None
            found[layer] = float(rule.parameters.get("threshold", 0.0)), most
    return found


def _input_thresholds(plan: SparsityPlan, config: ModelConfig) -> list[dict[str, float]]:
    """A rule without a layer is for all layers; its target is one of ``INPUTS``."""
    found: list[dict[str, float]] = [{} for _ in range(config.num_hidden_layers)]
    for rule in plan.rules("input"):
        if rule.target not in INPUTS:
            raise FallowError(
                f"The plan's axis input has the target {rule.target!r}, but this version of fallow can let the inputs "
                f"of {' and '.join(INPUTS)} rest: use the model without the plan."
            )
        for layer in rule.layers(config.num_hidden_layers):
            if rule.target in found[layer]:
                raise ModelFileError(f"The plan has two rules for the inputs of layer {layer}, {rule.target}.")
            found[layer][rule.target] = float(rule.parameters["threshold"])
    return found


def _check_neuron_rule(rule: LayerRule, config: ModelConfig) -> None:
    if rule.target is not None:
        raise ModelFileError(f"The plan's axis ffn has the target {rule.target!r}: its rules have none.")
    if rule.rule == "zeros" and config.hidden_act not in ("relu", "relu2") and config.gate_quantile is None:
        raise ModelFileError(
            f"The plan lets neurons rest that are zero, but the model's activation is {config.hidden_act}, which "
            "leaves none at zero: use the rule threshold."
        )
    obstacle = obstacle_to_resting_neurons(config)
    if obstacle is not None:
        raise FallowError(f"The plan lets neurons rest, but {obstacle}: use the model without the plan.")


def obstacle_to_resting_neurons(config: ModelConfig) -> str | None:
    """Why no neurons of a model can rest in this version, as the end of a sentence; None where they can."""
    if config.mlp_bias or config.post_norms:
        what = "biases" if config.mlp_bias else "a norm after them"
        return f"this version of fallow cannot do it where feed-forward networks have {what}"
    if config.hidden_size % _LANES:
        return f"its hidden size is {config.hidden_size}, which must be a multiple of {_LANES} for that"
    return None


def _page_rules(plan: SparsityPlan, config: ModelConfig) -> list[PageRule | None]:
    """A rule without a layer is for all layers, one without a target for all KV heads; the target of one is
    ``kv_head.0`` and so on."""
    heads = config.num_key_value_heads
    found: list[dict[int, LayerRule]] = [{} for _ in range(config.num_hidden_layers)]
    for rule in plan.rules("attention"):
        for layer in rule.layers(config.num_hidden_layers):
            for head in _kv_heads(rule, heads):
                if head in found[layer]:
                    raise ModelFileError(f"The plan has two rules for the attention of layer {layer}, KV head {head}.")
                found[layer][head] = rule
    return [_page_rule(layer, rules, heads) for layer, rules in enumerate(found)]


def _kv_heads(rule: LayerRule, count: int) -> range:
    if rule.target is None:
        return range(count)
    number = rule.numbered(KV_HEAD, count)
    if number is None:
        raise ModelFileError(
            f"The plan's axis attention has the target {rule.target!r}: use {KV_HEAD}0 to {KV_HEAD}{count - 1}."
        )
    return range(number, number + 1)


def _page_rule(layer: int, rules: dict[int, LayerRule], heads: int) -> PageRule | None:
    if not rules:
        return None
    if len(rules) < heads:
        missing = next(head for head in range(heads) if head not in rules)
        raise ModelFileError(f"The plan has no rule for the attention of layer {layer}, KV head {missing}.")
    found = {
        PageRule(
            _whole(layer, rule, "sink_pages"),
            _whole(layer, rule, "recent_pages"),
            (),
            _whole(layer, rule, "context_pages") if "context_pages" in rule.parameters else None,
        )
        for rule in rules.values()
    }
    if len(found) > 1:
        raise ModelFileError(
            f"The KV heads of layer {layer} must have the same sink_pages, recent_pages and context_pages in the plan."
        )
    (shared,) = found
    if shared.recent_pages < 1:
        raise ModelFileError(f"The plan's recent_pages of layer {layer} is 0: a query's own page is always read.")
    if shared.context_pages == 0:
        raise ModelFileError(f"The plan's context_pages of layer {layer} is 0: a context has one page at least.")
    return replace(shared, top_pages=tuple(_whole(layer, rules[head], "top_pages") for head in range(heads)))


def _whole(layer: int | None, rule: LayerRule, name: str) -> int:
    number = rule.parameters[name]
    if number != int(number) or number >= 2**31:
        where = "the head" if layer is None else f"layer {layer}"
        raise ModelFileError(f"The plan's {name} of {where} is {number}: it must be a whole number below 2^31.")
    return int(number)
