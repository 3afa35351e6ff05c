"""From the rules of a recipe to optimizers: which parameter gets which, and how much state that takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

from torch import Tensor
from torch.optim import AdamW, Optimizer

from fallow.errors import FallowError
from fallow.training.optimizers.apollo import Apollo, ApolloMini
from fallow.training.optimizers.galore import GaLore
from fallow.training.optimizers.muon import Muon
from fallow.training.optimizers.scale import Scale
from fallow.training.optimizers.shards import own_part
from fallow.training.recipe import OptimizerRecipe


@dataclass(frozen=True)
class _Kind:
    make: Callable[..., Optimizer]
    options: tuple[str, ...]  # of a rule, besides lr and weight_decay
    needed: tuple[str, ...] = ()
    matrices_only: bool = True


_KINDS = {
    "adamw": _Kind(partial(AdamW, fused=True), ("betas",), matrices_only=False),
    "muon": _Kind(Muon, ("momentum", "variance", "cautious", "iterations")),
    "scale": _Kind(Scale, ("momentum",)),
    "apollo": _Kind(Apollo, ("betas", "rank"), needed=("rank",)),
    "apollo-mini": _Kind(ApolloMini, ("betas",)),
    "galore": _Kind(GaLore, ("betas", "rank"), needed=("rank",)),
}
_OPTIONS = ("betas", "momentum", "rank", "variance", "cautious", "iterations")
_TABLES = ("embed_tokens.weight", "value_embeddings.weight")  # [tokens, hidden]: their rows are inputs
_HEAD = "lm_head.weight"


def build_optimizers(
    named_parameters: Iterable[tuple[str, Tensor]], rules: Sequence[OptimizerRecipe]
) -> list[Optimizer]:
    """One optimizer a rule, in order. A parameter goes to the first rule with a pattern (``fnmatch``: ``*`` matches
    dots too) that matches its name; one that needs no gradient goes nowhere.

    Only matrices decay. Every group has ``initial_lr``. Embeddings that are the head as well (no ``lm_head`` is there)
    are a head to SCALE. Raises ``FallowError`` for a parameter without a rule and for a rule that cannot be followed.
    """
    parameters = dict(named_parameters)
    tables = tuple(name for name in parameters if name.endswith(_TABLES))
    if not any(name.endswith(_HEAD) for name in parameters):
        tables = tuple(name for name in tables if not name.endswith(_TABLES[0]))
    chosen: list[dict[str, Tensor]] = [{} for _ in rules]
    for name, parameter in parameters.items():
        if not parameter.requires_grad:
            continue
        for rule, own in zip(rules, chosen, strict=True):
            if any(fnmatchcase(name, pattern) for pattern in rule.parameters):
                own[name] = parameter
                break
        else:
            raise FallowError(f"No optimizer has a pattern that matches {name}: add one, or a rule with the pattern *.")
    return [
        _build(f"optimizer {number} ({rule.kind})", rule, own, tables)
        for number, (rule, own) in enumerate(zip(rules, chosen, strict=True), 1)
    ]


def state_bytes(optimizers: Iterable[Optimizer]) -> int:
    """The bytes of all state tensors that this process holds."""
    values = (value for optimizer in optimizers for state in optimizer.state.values() for value in state.values())
    return sum(own_part(value).nbytes for value in values if isinstance(value, Tensor))


def _build(where: str, rule: OptimizerRecipe, parameters: dict[str, Tensor], tables: tuple[str, ...]) -> Optimizer:
    kind = _KINDS[rule.kind]
    options = {name: getattr(rule, name) for name in _OPTIONS if getattr(rule, name) is not None}
    for name in options:
        if name not in kind.options:
            raise FallowError(
                f"{where} has no {name}: leave it out; it has {', '.join(('lr', 'weight_decay', *kind.options))}."
            )
    for name in kind.needed:
        if name not in options:
            raise FallowError(f"{where} needs {name}: a quarter of hidden_size is usual.")
    if rule.betas is not None and not all(0 <= beta < 1 for beta in rule.betas):
        raise FallowError(f"{where} has betas {list(rule.betas)}: both must be at least 0 and less than 1.")
    if not parameters:
        raise FallowError(
            f"{where} gets no parameter: its patterns ({', '.join(rule.parameters)}) match none, "
            "or only such as an earlier rule has; correct them or leave the rule out."
        )
    if kind.matrices_only:
        for name, parameter in parameters.items():
            if parameter.ndim != 2:
                raise FallowError(
                    f"{where} takes matrices, but {name} has the shape {list(parameter.shape)}: "
                    "give it to adamw in an earlier rule."
                )
    optimizer = kind.make(_groups(rule, parameters, tables), lr=rule.lr, **options)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


def _groups(rule: OptimizerRecipe, parameters: dict[str, Tensor], tables: tuple[str, ...]) -> list[dict[str, Any]]:
    """Parameters by what differs among those of one rule."""
    groups: list[dict[str, Any]] = []
    for name, parameter in parameters.items():
        own: dict[str, Any] = {"weight_decay": rule.weight_decay if parameter.ndim > 1 else 0.0}
        if rule.kind == "scale":
            own["output_dim"] = 1 if name in tables else 0
        for group in groups:
            if own.items() <= group.items():
                group["params"].append(parameter)
                break
        else:
            groups.append({"params": [parameter], **own})
    return groups
