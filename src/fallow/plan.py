"""The sparsity plan: layer by layer, what may rest and by which rule. One small JSON file beside the weights."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fallow.errors import FallowError, ModelFileError
from fallow.files import replacing

VERSION = 1
FILE_NAME = "plan.json"
MAX_PLAN_BYTES = 16 << 20
MAX_LAYERS = 4096

# For each axis: its rules, and the numbers that a rule needs;
RULES: dict[str, dict[str, tuple[str, ...]]] = {
    "ffn": {"zeros": (), "threshold": ("threshold",), "top_k": ("k",)},
    "input": {"threshold": ("threshold",)},
    "attention": {"top_pages": ("sink_pages", "recent_pages", "top_pages")},
    "head": {"screen": ("rank", "candidates")},
    "structure": {"removed": ()},
}
# and those that a rule may have beside them.
_FURTHER = {"top_pages": ("context_pages",)}
AXES = tuple(RULES)
KV_HEAD = "kv_head."
"""With a number: what a target calls a KV head."""


@dataclass(frozen=True)
class LayerRule:
    """What may rest in one layer (``layer=None``: in the model as a whole) and by which rule.

    ``target`` names a part of the layer (``o_proj``, ``kv_head.0``) where the axis has several. ``parameters`` are the
    rule's numbers.
    """

    rule: str
    layer: int | None = None
    target: str | None = None
    parameters: Mapping[str, float] = field(default_factory=dict)

    def layers(self, count: int) -> range:
        """Of a model with ``count`` layers those that the rule is for."""
        return range(count) if self.layer is None else range(self.layer, self.layer + 1)

    def numbered(self, prefix: str, count: int) -> int | None:
        """Where ``target`` is ``prefix`` and a number below ``count``, that number."""
        target = self.target or ""
        number = target.removeprefix(prefix)
        is_number = target.startswith(prefix) and number.isascii() and number.isdigit()
        return int(number) if is_number and int(number) < count else None


@dataclass(frozen=True)
class SparsityPlan:
    """What may rest. An axis is the rules of its layers; ``None`` or no rules: nothing rests on it.

    ``provenance`` says where the plan comes from (what made it, from which data, at which budget), for people.
    Raises ``ModelFileError`` where a rule is unknown or a number is missing or not finite.
    """

    ffn: tuple[LayerRule, ...] | None = None
    input: tuple[LayerRule, ...] | None = None
    attention: tuple[LayerRule, ...] | None = None
    head: tuple[LayerRule, ...] | None = None
    structure: tuple[LayerRule, ...] | None = None
    provenance: Mapping[str, str] = field(default_factory=dict)
    version: int = VERSION

    def __post_init__(self) -> None:
        if self.version != VERSION:
            raise ModelFileError(f"The plan has version {self.version!r}, but this fallow reads version {VERSION}.")
        for axis in AXES:
            for rule in self.rules(axis):
                _check_rule(axis, rule)

    @staticmethod
    def dense() -> SparsityPlan:
        """The plan under which nothing rests."""
        return SparsityPlan()

    def rules(self, axis: str) -> tuple[LayerRule, ...]:
        """The rules of one of ``AXES``."""
        rules: tuple[LayerRule, ...] | None = getattr(self, axis)
        return rules or ()

    @property
    def is_dense(self) -> bool:
        return not any(self.rules(axis) for axis in AXES)

    @property
    def summary(self) -> str | None:
        """What may rest, in a few words; None where nothing may."""
        parts = []
        for axis in AXES:
            rules = self.rules(axis)
            layers = {rule.layer for rule in rules}
            where = "all layers" if None in layers else f"{len(layers)} layer{'s' * (len(layers) != 1)}"
            name = axis if axis == "head" else f"{axis} in {where}"
            parts += [name] if rules else []
        return ", ".join(parts) or None

    def to_json(self) -> dict[str, Any]:
        axes = {axis: [_rule_json(rule) for rule in self.rules(axis)] for axis in AXES if self.rules(axis)}
        return {"version": self.version, **axes, "provenance": dict(self.provenance)}

    @staticmethod
    def from_json(value: object) -> SparsityPlan:
        """Raises ``ModelFileError`` with the reason where ``value`` is not a plan."""
        if not isinstance(value, dict):
            raise ModelFileError("A plan must be a JSON object.")
        unknown = sorted(set(value) - {"version", "provenance", *AXES})
        if unknown:
            raise ModelFileError(f"The plan has the unknown field {unknown[0]!r}: a newer fallow may know it.")
        provenance = value.get("provenance", {})
        if not isinstance(provenance, dict) or not all(isinstance(v, str) for v in provenance.values()):
            raise ModelFileError("The plan's provenance must be an object of strings.")
        axes = {axis: _rules_from_json(axis, value[axis]) for axis in AXES if value.get(axis) is not None}
        return SparsityPlan(**axes, provenance=provenance, version=value.get("version", 0))

    def save(self, path: str | Path) -> None:
        """Write the plan; the file is complete or not there."""
        with replacing(Path(path)) as file:
            file.write(json.dumps(self.to_json(), indent=1).encode() + b"\n")

    @staticmethod
    def beside(model: Path) -> SparsityPlan | None:
        """The plan in a model's folder, None where there is none. Raises as ``load`` does."""
        path = model / FILE_NAME
        return SparsityPlan.load(path) if path.is_file() else None

    @staticmethod
    def load(path: str | Path) -> SparsityPlan:
        """Raises ``ModelFileError`` with the path and the reason where the file is not a plan."""
        path = Path(path)
        try:
            with path.open("rb") as file:
                data = file.read(MAX_PLAN_BYTES + 1)
            if len(data) > MAX_PLAN_BYTES:
                raise ModelFileError(f"it has more than {MAX_PLAN_BYTES} bytes")
            return SparsityPlan.from_json(json.loads(data))
        except OSError as error:
            raise ModelFileError(f"The plan {path} cannot be read: {error.strerror}.") from error
        except (ValueError, RecursionError) as error:
            reason = str(error).rstrip(".") if isinstance(error, FallowError) else "it is not JSON"
            raise ModelFileError(f"The plan {path} cannot be used: {reason}.") from error


def _rule_json(rule: LayerRule) -> dict[str, Any]:
    places = {"layer": rule.layer, "target": rule.target}
    return {"rule": rule.rule, **{k: v for k, v in places.items() if v is not None}, **rule.parameters}


def _rules_from_json(axis: str, value: object) -> tuple[LayerRule, ...]:
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise ModelFileError(f"The plan's axis {axis} must be a list of objects, one a layer.")
    return tuple(
        LayerRule(
            rule=item.get("rule"),
            layer=item.get("layer"),
            target=item.get("target"),
            parameters={k: v for k, v in item.items() if k not in ("rule", "layer", "target")},
        )
        for item in value
    )


def _check_rule(axis: str, rule: LayerRule) -> None:
    where = f"The plan's axis {axis}" + (f", layer {rule.layer!r}," if rule.layer is not None else "")
    if not isinstance(rule.rule, str) or rule.rule not in RULES[axis]:
        raise ModelFileError(f"{where} has the rule {rule.rule!r}: use one of {', '.join(RULES[axis])}.")
    if rule.layer is not None and (type(rule.layer) is not int or not 0 <= rule.layer < MAX_LAYERS):
        raise ModelFileError(f"{where} must name its layer by a number from 0 to {MAX_LAYERS - 1}.")
    if rule.target is not None and not isinstance(rule.target, str):
        raise ModelFileError(f"{where} must name its target by a string.")
    needed, further = set(RULES[axis][rule.rule]), _FURTHER.get(rule.rule, ())
    if set(rule.parameters) - set(further) != needed:
        raise ModelFileError(
            f"{where} needs {', '.join(sorted(needed)) or 'no numbers'} for the rule {rule.rule}, "
            f"but has {', '.join(sorted(map(str, rule.parameters))) or 'none'}."
        )
    for name, number in rule.parameters.items():
        if type(number) not in (int, float) or not math.isfinite(number) or number < 0:
            raise ModelFileError(f"{where} needs a number of at least 0 as {name}, not {number!r}.")
