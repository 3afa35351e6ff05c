"""The solver against all choices that there are."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from fallow.sparsification.solve import choose


def random_problem(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Places whose prices fall as costs rise, a little unevenly, down to the dense choice at no price."""
    rng = np.random.default_rng(seed)
    costs = np.sort(rng.uniform(1, 10, (4, 5)), 1)
    prices = np.sort(rng.exponential(1, (4, 5)), 1)[:, ::-1].copy()
    prices[:, -1] = 0
    return prices, costs


@pytest.mark.parametrize("seed", range(30))
def test_it_keeps_to_the_budget_and_comes_near_the_best(seed: int) -> None:
    prices, costs = random_problem(seed)
    rows = np.arange(4)
    combinations = np.array(list(itertools.product(range(5), repeat=4)))
    sums = prices[rows, combinations].sum(1), costs[rows, combinations].sum(1)
    for budget in (0.0, 0.3, 1.0, 3.0, 100.0):
        chosen = choose(prices, costs, budget)
        assert prices[rows, chosen].sum() <= budget
        best = sums[1][sums[0] <= budget].min()
        cost = costs[rows, chosen].sum()
        # No further from the best than one place, made as cheap as it can be.
        assert best <= cost <= best + (costs[:, -1] - costs[:, 0]).max()
    assert (choose(prices, costs, 0.0) == 4).all()
    assert (costs[rows, choose(prices, costs, 100.0)] == costs.min(1)).all()


def test_more_budget_never_costs_more() -> None:
    prices, costs = random_problem(99)
    found = [costs[np.arange(4), choose(prices, costs, budget)].sum() for budget in np.linspace(0, 8, 40)]
    assert (np.diff(found) <= 1e-9).sum() >= 36
    assert found[-1] < found[0]
