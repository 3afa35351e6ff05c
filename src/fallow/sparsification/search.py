"""From prices to a plan that was measured: choose for a price, measure what it costs in truth, correct the price."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fallow.arrays import Int64
from fallow.plan import SparsityPlan
from fallow.sparsification.choices import Choices, stacked, together, unstacked
from fallow.sparsification.judge import Judge
from fallow.sparsification.solve import choose

_TRIES, _MOST_TRIES = 6, 12  # more than six while all that was measured costs too much
_CLOSE = 0.85  # of the budget: near enough
_CAUTION = 0.9  # of the price that would be right if prices were, and again for every plan that cost too much


@dataclass(frozen=True)
class Point:
    """A plan that was measured: ``resting`` is the share of what it chooses from (keys, values, weights) that rests, in
    bytes. ``speedup`` is predicted from what a step reads, ``price`` is what the plan should have cost (nats a token).
    """

    resting: float
    perplexity_ratio: float
    speedup: float
    plan: SparsityPlan
    price: float

    def to_json(self) -> dict[str, float]:
        return {"resting": self.resting, "perplexity_ratio": self.perplexity_ratio, "speedup": self.speedup}


@dataclass(frozen=True)
class Menu:
    """All that can be chosen; a step of decoding reads ``dense`` bytes where nothing rests, and ``spared`` fewer where
    the head is screened."""

    kinds: tuple[Choices, ...]
    dense: float
    spared: float

    def choose(self, price: float) -> list[Int64]:
        """Of each kind the choices that together cost no more than ``price`` (nats a token)."""
        prices, read = ([getattr(kind, name) for kind in self.kinds] for name in ("prices", "read"))
        return unstacked(choose(stacked(prices), stacked(read), price), read)

    def speedup(self, chosen: Sequence[Int64]) -> float:
        return self.dense / (
            self.dense - self.spared - sum(k.spared(c) for k, c in zip(self.kinds, chosen, strict=True))
        )

    def resting(self, chosen: Sequence[Int64]) -> float:
        total = sum(kind.bytes for kind in self.kinds)
        return sum(k.at_rest(c) for k, c in zip(self.kinds, chosen, strict=True)) / total

    def plan(self, chosen: Sequence[Int64], start: SparsityPlan) -> SparsityPlan:
        """``start`` with the rules of what was chosen."""
        axes: dict[str, Any] = together(kind.rules(c) for kind, c in zip(self.kinds, chosen, strict=True))
        return replace(start, **axes)

    def describe(self, chosen: Sequence[Int64]) -> str:
        """How much rests, in words."""
        shares = [(kind, kind.at_rest(c) / kind.bytes) for kind, c in zip(self.kinds, chosen, strict=True)]
        parts = [f"{share:.1%} of the {kind.what}" for kind, share in shares if share > 0]
        return " and ".join(filter(None, (", ".join(parts[:-1]), *parts[-1:]))) or "nothing"


@dataclass(frozen=True)
class Search:
    """Plans on the base of ``start``, whose measured perplexity comes nearer and nearer to a budget: prices say which
    parts are cheap, but what all of them cost together is measured by the ``judge``."""

    judge: Judge
    menu: Menu
    start: SparsityPlan
    on_note: Callable[[str], None]

    def points(self, budget: float, price: float | None = None) -> list[Point]:
        """What was measured on the way; the first plan is that of ``price`` (nats a token; None: of the budget)."""
        allowed = math.log1p(budget)
        price = price or allowed
        points: list[Point] = []
        while True:
            chosen = self.menu.choose(price)
            plan, resting = self.menu.plan(chosen, self.start), self.menu.resting(chosen)
            excess = self.judge.nll(plan) - self.judge.dense_nll
            points.append(Point(resting, math.exp(excess), self.menu.speedup(chosen), plan, price))
            self.on_note(f"At rest: {self.menu.describe(chosen)}. Perplexity {math.expm1(excess):+.2%}.")
            is_last = len(points) >= (_TRIES if fastest(points, budget) else _MOST_TRIES)
            if _CLOSE * allowed <= excess <= allowed or resting == 0 or is_last:
                return points
            price = next_price([(point.price, math.log(point.perplexity_ratio)) for point in points], allowed)

    @property
    def nothing(self) -> Point:
        """The plan on which the others are based."""
        dense = [kind.dense for kind in self.menu.kinds]
        return Point(0.0, 1.0, self.menu.speedup(dense), self.start, 0.0)


def next_price(tried: Sequence[tuple[float, float]], allowed: float) -> float:
    """Where a plan may cost ``allowed`` after those of the prices ``tried``, with what they cost in truth. Between one
    that costs less and one that costs more in the middle, else in proportion."""
    below = max((price for price, cost in tried if cost <= allowed), default=0.0)
    above = min((price for price, cost in tried if cost > allowed and price > below), default=math.inf)
    if below > 0 and above < math.inf:
        return math.sqrt(below * above)
    price, cost = tried[-1]
    too_much = sum(cost > allowed for _, cost in tried)
    return price * _CAUTION ** max(too_much, 1) * min(max(allowed / max(cost, 1e-9), 0.25), 4.0)


def fastest(points: Sequence[Point], budget: float) -> Point | None:
    """Of what was measured within the budget."""
    within = [point for point in points if point.perplexity_ratio <= 1 + budget]
    return max(within, key=lambda point: point.speedup, default=None)
