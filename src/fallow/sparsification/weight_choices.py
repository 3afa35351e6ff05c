"""The axes ``input`` and ``ffn`` of models in 4 bits: columns of ``o_proj`` and ``down_proj`` that meet small inputs,
or neurons with small gates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fallow.arrays import Float64, Int64
from fallow.engine.program import TILE_ROWS
from fallow.models.info import engine_form, held_bytes
from fallow.models.resting import obstacle_to_resting_neurons
from fallow.models.tensors import Checkpoint, RawTensor
from fallow.plan import LayerRule
from fallow.sparsification.choices import LayerChoices, Load, Rules
from fallow.sparsification.partial_reads import SHARES, Layout
from fallow.sparsification.weight_prices import PARTS, WeightErrors

_MOST_SEQUENCES = 2  # of a step in which columns are skipped: with more of them all are read
_GROUPS = (("o_proj",), ("down_proj", "neurons"))  # of each one may rest in a layer
_READ: dict[str, tuple[tuple[str, Layout], ...]] = {
    "o_proj": (("o_proj", "columns"),),
    "down_proj": (("down_proj", "columns"),),
    "neurons": (("up_proj", "rows"), ("down_proj", "columns")),
}
"""Of which matrices a step reads a part."""
Times = Callable[[Layout, int, int], Float64]
"""As ``partial_times``: of a layout, of outputs and inputs."""


@dataclass(frozen=True)
class WeightChoices(LayerChoices):
    """In each of ``layers`` one of ``parts`` may rest, to one of ``SHARES``. ``thresholds [layers of the model,
    len(PARTS), len(SHARES)]``."""

    parts: tuple[str, ...]
    thresholds: Float64

    @staticmethod
    def of(  # noqa: PLR0917
        parts: Sequence[str],
        checkpoint: Checkpoint,
        precision: str,
        errors: WeightErrors,
        sensitivities: Float64,
        times: Times,
    ) -> WeightChoices:
        """In the layers whose matrices are held in 4 bits. ``sensitivities [layers of the model + 1]`` are nats of an
        error before each layer."""
        layers = _layers_in_parts(checkpoint, precision, parts)
        tables = np.zeros((3, len(layers), len(parts) * len(SHARES) + 1))  # read, rests, prices
        for place, layer in enumerate(layers):
            named = {name for part in parts for name, _ in _READ[part]}
            sizes = {name: held_bytes(_tensor(checkpoint, layer, name), precision, is_head=False) for name in named}
            tables[0, place] = sum(sizes.values())
            for i, part in enumerate(parts):
                at, number = slice(i * len(SHARES), (i + 1) * len(SHARES)), PARTS.index(part)
                if not can_lie_in_parts(checkpoint, precision, layer, part):
                    tables[2, place, at] = np.inf
                    continue
                shares = errors.resting[layer, number]
                for name, layout in _READ[part]:
                    relative = times(layout, *_tensor(checkpoint, layer, name).shape)
                    tables[0, place, at] -= sizes[name] * (1 - np.interp(shares, SHARES, relative))
                    tables[1, place, at] += sizes[name] * shares
                tables[2, place, at] = errors.errors[layer, number] * sensitivities[layer + (part != "o_proj")]
        read, rests, prices = tables
        return WeightChoices(read, rests, prices, tuple(layers), tuple(parts), errors.thresholds)

    @property
    def what(self) -> str:
        return "output projections" if self.parts == ("o_proj",) else "feed-forward networks"

    def rules(self, chosen: Int64) -> Rules:
        found: dict[str, list[LayerRule]] = {"ffn": [], "input": []}
        for layer, choice in zip(self.layers, chosen.tolist(), strict=True):
            if choice == self.read.shape[1] - 1:
                continue
            part, share = self.parts[choice // len(SHARES)], choice % len(SHARES)
            threshold = {"threshold": float(self.thresholds[layer, PARTS.index(part), share])}
            axis, target = ("ffn", None) if part == "neurons" else ("input", part)
            found[axis].append(LayerRule("threshold", layer, target, threshold))
        return {axis: tuple(rules) for axis, rules in found.items() if rules}


def groups_in_parts(checkpoint: Checkpoint, precision: str, load: Load) -> list[tuple[str, ...]]:
    """Of which weights a step of ``load`` can read a part, in any layer: groups of ``PARTS``."""
    if load.batch > _MOST_SEQUENCES:
        return []
    return [parts for parts in _GROUPS if _layers_in_parts(checkpoint, precision, parts)]


def _layers_in_parts(checkpoint: Checkpoint, precision: str, parts: Sequence[str]) -> list[int]:
    layers = range(checkpoint.config.num_hidden_layers)
    return [layer for layer in layers if any(can_lie_in_parts(checkpoint, precision, layer, part) for part in parts)]


def can_lie_in_parts(checkpoint: Checkpoint, precision: str, layer: int, part: str) -> bool:
    """Whether the engine can read what is at work of one of ``PARTS`` alone, to the dense network's bits."""
    config = checkpoint.config
    names = [name for name, _ in _READ[part]]
    if part == "neurons":
        fits = config.gated_mlp and config.gate_quantile is None and config.intermediate_size % TILE_ROWS == 0
        if not fits or obstacle_to_resting_neurons(config) is not None:
            return False
        names.append("gate_proj")
    return all(engine_form(_tensor(checkpoint, layer, name).type, precision).codes == 4 for name in names)


def _tensor(checkpoint: Checkpoint, layer: int, name: str) -> RawTensor:
    return checkpoint.tensors[f"layers.{layer}.{name}"]
