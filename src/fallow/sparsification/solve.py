"""Which choice to make at each place of a model, so that as much as possible rests for a given price."""

from __future__ import annotations

import heapq

import numpy as np

from fallow.arrays import Float64, Int64


def choose(prices: Float64, costs: Float64, budget: float) -> Int64:
    """Of each place the number of its choice, int64 ``[places]``: a small sum of costs whose prices add up to no more
    than ``budget``.

    ``prices`` and ``costs`` are ``[places, choices]``; the last choice of each place is the dense one, of price 0. From
    there, again and again, the move that spares most cost for its price is made, as long as the budget lasts (the
    greedy way along the convex hulls of a multiple-choice knapsack, Sinha and Zoltners 1979): optimal where the budget
    is used up to the last move.
    """
    places, dense = prices.shape[0], prices.shape[1] - 1
    chosen = np.full(places, dense)
    spent = 0.0
    moves: list[tuple[float, int, int]] = []  # price for a unit of cost, place, choice
    for place in range(places):
        _push_best(moves, place, dense, prices, costs)
    while moves:
        _, place, choice = heapq.heappop(moves)
        more = prices[place, choice] - prices[place, chosen[place]]
        if spent + more > budget:
            continue
        spent += more
        chosen[place] = choice
        _push_best(moves, place, choice, prices, costs)
    return chosen


def _push_best(moves: list[tuple[float, int, int]], place: int, at: int, prices: Float64, costs: Float64) -> None:
    """Of what can be chosen at ``place`` for less cost than ``at``, what has the least price for what it spares."""
    spared = costs[place, at] - costs[place]
    cheaper = np.flatnonzero(spared > 0)
    if len(cheaper) == 0:
        return
    rates = (prices[place, cheaper] - prices[place, at]) / spared[cheaper]
    best = int(np.argmin(rates))
    heapq.heappush(moves, (float(rates[best]), place, int(cheaper[best])))
