"""Learning rates and batch sizes over a run."""

from __future__ import annotations

import random

import pytest

from fallow.training.schedule import BatchSize, LearningRate


@pytest.mark.parametrize("kind", ["linear", "cosine", "wsd", "constant"])
def test_every_step_learns_and_the_ends_are_what_they_are_called(kind):
    rate = LearningRate(kind, 200, warmup=10, decay=40)
    factors = [rate.factor(step) for step in range(200)]
    assert all(0 < factor <= 1 for factor in factors)
    assert factors[0] < factors[5] < factors[9] <= 1
    assert factors[10] > 0.99
    if kind == "constant":
        assert factors[-1] == 1
    else:
        assert factors[-1] < 0.02
    if kind in ("wsd", "constant"):
        assert factors[10:160] == [1.0] * 150
    if kind == "linear":
        assert factors[104] == pytest.approx(0.5, abs=0.01)


def test_steps_of_bags_read_more_and_come_first():
    draw = random.Random(3)
    for _ in range(200):
        last, bag, share = draw.randrange(1, 40), draw.randrange(2, 9), draw.uniform(0.05, 0.95)
        sequences = draw.randrange(1, 4000)
        size, steps = BatchSize.superposed(sequences, last, bag, share)
        sizes = [size.at(step) for step in range(steps)]
        bags = [size.bag_at(step) for step in range(steps)]
        assert sizes == [last * bag for bag in bags]
        assert bags == sorted(bags, reverse=True)
        assert bags.count(bag) == round(share * steps)
        assert [size.before(step) for step in range(steps)] == [sum(sizes[:step]) for step in range(steps)]
        assert abs(sum(sizes) - sequences) <= 2 * last * bag


def test_batches_add_up_whatever_the_ramp():
    draw = random.Random(2)
    for _ in range(200):
        last = draw.randrange(1, 64)
        first, share = draw.choice([(0, 0.0), (draw.randrange(1, last + 1), draw.random())])
        sequences = draw.randrange(1, 4000)
        size, steps = BatchSize.planned(sequences, last, first, share)
        sizes = [size.at(step) for step in range(steps)]
        assert sizes == sorted(sizes)
        assert max(sizes) <= last
        assert [size.before(step) for step in range(steps)] == [sum(sizes[:step]) for step in range(steps)]
        assert sequences <= sum(sizes) or share > 0
        assert abs(sum(sizes) - sequences) <= max(2 * last, 0.1 * sequences)
