"""What may rest where: the choices that there are at each place of a model, what they read, and what they cost."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fallow.arrays import Float64, Int64
from fallow.plan import LayerRule

Rules = Mapping[str, tuple[LayerRule, ...]]
"""Of each axis."""


@dataclass(frozen=True)
class Load:
    """What decoding is made fast for: ``batch`` sequences of ``context`` tokens each."""

    batch: int
    context: int


@dataclass(frozen=True)
class Choices(ABC):
    """Places of one kind, at each of which one of several choices is made; the last one is that nothing rests.

    All arrays are float64 ``[places, choices]``. ``read``: the bytes of a place that a step of decoding reads, or as
    many as take its time. ``rests``: those that it leaves unread. ``prices``: nats a token, zero for the last choice.
    """

    read: Float64
    rests: Float64
    prices: Float64

    @property
    @abstractmethod
    def what(self) -> str:
        """Of what a part rests."""

    @abstractmethod
    def rules(self, chosen: Int64) -> Rules:
        """Of a plan that makes the choices ``[places]``; no axis where nothing rests."""

    @property
    def dense(self) -> Int64:
        return np.full(len(self.read), self.read.shape[1] - 1)

    @property
    def bytes(self) -> float:
        """What all places read where nothing rests."""
        return float(self.read[:, -1].sum())

    def spared(self, chosen: Int64) -> float:
        """Bytes, or what takes as long."""
        return self.bytes - float(self.read[np.arange(len(chosen)), chosen].sum())

    def at_rest(self, chosen: Int64) -> float:
        """Bytes."""
        return float(self.rests[np.arange(len(chosen)), chosen].sum())


@dataclass(frozen=True)
class LayerChoices(Choices, ABC):
    """Whose places are ``layers``."""

    layers: tuple[int, ...]


@dataclass(frozen=True)
class Either(LayerChoices):
    """In each layer a choice of one of ``kinds``. What is read is counted as by the first of them, which has all layers
    and all that the others read."""

    kinds: tuple[LayerChoices, ...]

    @staticmethod
    def of(kinds: Sequence[LayerChoices]) -> Either:
        layers = kinds[0].layers
        tables = []
        for kind in kinds:
            width = kind.read.shape[1] - 1
            table = np.zeros((3, len(layers), width))  # spared, rests, prices
            table[2] = np.inf
            places = [layers.index(layer) for layer in kind.layers]
            table[:, places] = kind.read[:, -1:] - kind.read[:, :-1], kind.rests[:, :-1], kind.prices[:, :-1]
            tables.append(table)
        spared, rests, prices = np.pad(np.concatenate(tables, -1), [(0, 0), (0, 0), (0, 1)])
        return Either(kinds[0].read[:, -1:] - spared, rests, prices, layers, tuple(kinds))

    @property
    def what(self) -> str:
        return self.kinds[0].what

    def rules(self, chosen: Int64) -> Rules:
        found, first = [], 0
        for kind in self.kinds:
            own = chosen[[self.layers.index(layer) for layer in kind.layers]] - first
            width = kind.read.shape[1] - 1
            found.append(kind.rules(np.where((own >= 0) & (own < width), own, width)))
            first += width
        return together(found)


def together(found: Iterable[Rules]) -> dict[str, tuple[LayerRule, ...]]:
    """The rules of several kinds, axis by axis."""
    axes: dict[str, tuple[LayerRule, ...]] = {}
    for rules in found:
        for axis, own in rules.items():
            axes[axis] = axes.get(axis, ()) + own
    return axes


def stacked(tables: Sequence[Float64]) -> Float64:
    """Tables of places, one below the other. What has fewer choices gets further ones before its own, which are as its
    last one."""
    width = max(table.shape[1] for table in tables)
    return np.concatenate([np.hstack((np.tile(t[:, -1:], (1, width - t.shape[1])), t)) for t in tables])


def unstacked(chosen: Int64, tables: Sequence[Float64]) -> list[Int64]:
    """What was chosen of the stacked tables, table by table."""
    width = max(table.shape[1] for table in tables)
    parts = np.split(chosen, np.cumsum([len(table) for table in tables])[:-1])
    return [np.maximum(part - (width - table.shape[1]), 0) for part, table in zip(parts, tables, strict=True)]
