"""The axis ``structure``: how many heads, and how many neurons, are taken out of each layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from fallow.arrays import Float64, Int64
from fallow.models.config import ModelConfig
from fallow.models.info import held_bytes
from fallow.models.structure import NEURON_GROUP, NEURONS
from fallow.models.tensors import Checkpoint
from fallow.plan import KV_HEAD, LayerRule
from fallow.sparsification.choices import LayerChoices, Rules
from fallow.sparsification.removal_prices import Removals

Part = Literal["heads", "neurons"]
_COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
"""How many groups of neurons are tried, and all."""
_MATRICES: dict[Part, tuple[str, ...]] = {
    "heads": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "neurons": ("gate_proj", "up_proj", "down_proj"),
}
_BLOCKS: dict[Part, str] = {"heads": "attention", "neurons": "ffn"}
_TARGETS: dict[Part, str] = {"heads": KV_HEAD, "neurons": NEURONS}


@dataclass(frozen=True)
class RemovalChoices(LayerChoices):
    """Of each layer so many of the first parts in ``order [layers, parts]`` go as ``counts`` says for each choice."""

    part: Part
    counts: tuple[int, ...]
    order: Int64

    @staticmethod
    def of(
        part: Part, checkpoint: Checkpoint, precision: str, removals: Removals, sensitivities: Float64
    ) -> RemovalChoices:
        """``sensitivities [layers of the model + 1]`` are nats of an error before each layer. What a step spares is
        weights: keys and values that it need not read either are not counted."""
        layers = tuple(range(checkpoint.config.num_hidden_layers))
        parts = removals.order.shape[1]
        counts = (*(count for count in _COUNTS if count < parts), parts, 0)
        tensors = checkpoint.tensors
        sizes = np.array(
            [
                sum(
                    held_bytes(tensors[name], precision, is_head=False)
                    for name in (f"layers.{layer}.{matrix}" for matrix in _MATRICES[part])
                    if name in tensors
                )
                for layer in layers
            ],
            np.float64,
        )
        rests = sizes[:, None] * np.array(counts) / parts
        errors = np.hstack((removals.errors, np.zeros((len(layers), 1))))[:, np.array(counts) - 1]
        prices = errors * sensitivities[np.array(layers) + (part == "neurons"), None]
        return RemovalChoices(sizes[:, None] - rests, rests, prices, layers, part, counts, removals.order)

    @property
    def what(self) -> str:
        return "attention's weights" if self.part == "heads" else "feed-forward weights"

    def rules(self, chosen: Int64) -> Rules:
        rules: list[LayerRule] = []
        for layer, choice in zip(self.layers, chosen.tolist(), strict=True):
            gone = self.order[layer, : self.counts[choice]]
            if len(gone) == self.order.shape[1]:
                rules.append(LayerRule("removed", layer, _BLOCKS[self.part]))
            else:
                rules += [LayerRule("removed", layer, f"{_TARGETS[self.part]}{number}") for number in sorted(gone)]
        return {"structure": tuple(rules)} if rules else {}


def can_be_removed(config: ModelConfig) -> tuple[Part, ...]:
    """Of which parts some can be taken out of a layer."""
    whole_groups = config.intermediate_size % NEURON_GROUP == 0 and config.gate_quantile is None
    return ("heads", "neurons") if whole_groups else ("heads",)
