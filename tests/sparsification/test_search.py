"""The price of the next plan: after a few the cost is within the budget, whatever it is of a price."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest

from fallow.sparsification.search import next_price

ALLOWED = 0.01
COSTS: dict[str, Callable[[float], float]] = {
    "what it says": lambda price: price,
    "three times that": lambda price: 3 * price,
    "a quarter": lambda price: price / 4,
    "hardly less for a lower price": lambda price: 0.0098 * (price / ALLOWED) ** 0.15 + 0.0005,
    "more and more": lambda price: 2e4 * price**3,
    "less than nothing": lambda price: price - 0.004,
    "with noise": lambda price: 1.3 * price + 0.001 * math.sin(1e5 * price),
}


@pytest.mark.parametrize("cost", COSTS.values(), ids=COSTS)
def test_the_price_comes_to_the_budget(cost: Callable[[float], float]) -> None:
    tried = [(ALLOWED, cost(ALLOWED))]
    while not 0.85 * ALLOWED <= tried[-1][1] <= ALLOWED:
        assert len(tried) < 6
        tried.append(((price := next_price(tried, ALLOWED)), cost(price)))
        assert price > 0


def test_where_everything_costs_too_much_it_falls_faster_and_faster() -> None:
    tried = [(ALLOWED, 1.01 * ALLOWED)]
    for _ in range(11):
        tried.append((next_price(tried, ALLOWED), 1.01 * ALLOWED))
    falls = [later / earlier for (earlier, _), (later, _) in itertools.pairwise(tried)]
    assert falls == sorted(falls, reverse=True)
    assert tried[-1][0] < 1e-3 * ALLOWED
