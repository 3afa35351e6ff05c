"""APOLLO and APOLLO-Mini against algorithm 1, channel by channel."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from small_problems import random_matrices, trained
from torch import Tensor, nn

from fallow.training.optimizers.apollo import Apollo, ApolloMini
from fallow.training.optimizers.build import state_bytes
from fallow.training.optimizers.seeds import seeded

Array = npt.NDArray[np.float64]


def projection(seed: int, draw: int, rank: int, rows: int) -> Array:
    generator = seeded(seed, draw, torch.device("cpu"))
    drawn: Array = torch.randn(rank, rows, generator=generator, dtype=torch.float64).numpy() / math.sqrt(rank)
    return drawn


def reference(
    start: Tensor,
    gradients: list[Tensor],
    *,
    lr: float,
    rank: int,
    mini: bool,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 0.0,
    scale: float = 1.0,
    refresh: int = 200,
    seed: int = 0,
) -> Array:
    tall = start.shape[0] > start.shape[1]
    weights = (start.T if tall else start).numpy().copy()
    rows, columns = weights.shape
    rank = min(rank, rows)
    mean, square = np.zeros((rank, columns)), np.zeros((rank, columns))
    before = 0.0
    for t, gradient in enumerate(gradients):
        g = (gradient.T if tall else gradient).numpy()
        r = projection(seed, t // refresh, rank, rows) @ g
        mean = betas[0] * mean + (1 - betas[0]) * r
        square = betas[1] * square + (1 - betas[1]) * r**2
        adam = (mean / (1 - betas[0] ** (t + 1))) / (np.sqrt(square / (1 - betas[1] ** (t + 1))) + 1e-8)
        if mini:
            update = g * (np.linalg.norm(adam) / np.linalg.norm(r))
        else:
            update = np.zeros_like(g)
            for j in range(columns):
                update[:, j] = g[:, j] * (np.linalg.norm(adam[:, j]) / np.linalg.norm(r[:, j]))
        size = float(np.linalg.norm(update))
        if before > 0 and size / before > 1.01:
            update = update / size * 1.01 * before
        before = float(np.linalg.norm(update))
        weights = weights - lr * scale * update - lr * weight_decay * weights
    return weights.T if tall else weights


@pytest.mark.parametrize("shape", [(6, 20), (20, 6)])
@pytest.mark.parametrize(
    "options",
    [
        {"rank": 3},
        {"rank": 3, "refresh": 3, "seed": 7, "weight_decay": 0.2, "betas": (0.8, 0.9), "scale": 2.0},
        {"rank": 50},
    ],
    ids=str,
)
def test_apollo_is_the_papers_update(shape: tuple[int, int], options: dict[str, Any]) -> None:
    start, *gradients = random_matrices(shape, 8)
    found = trained(Apollo([nn.Parameter(start.clone())], lr=0.03, **options), gradients)
    expected = reference(start, gradients, lr=0.03, mini=False, **options)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("shape", [(6, 20), (20, 6)])
def test_apollo_mini_is_the_papers_update(shape: tuple[int, int]) -> None:
    start, *gradients = random_matrices(shape, 8)
    found = trained(ApolloMini([nn.Parameter(start.clone())], lr=0.03, refresh=3), gradients)
    expected = reference(start, gradients, lr=0.03, mini=True, rank=1, scale=math.sqrt(128), refresh=3)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-7)


def test_state_is_that_of_the_papers_table() -> None:
    short, long = 6, 20
    start, gradient = random_matrices((long, short), 2)
    apollo, mini = Apollo([nn.Parameter(start.clone())], lr=0.1, rank=3), ApolloMini([nn.Parameter(start)], lr=0.1)
    for optimizer, rank in ((apollo, 3), (mini, 1)):
        (state,) = (trained(optimizer, [gradient]), *optimizer.state.values())[1:]
        assert state.keys() == {"exp_avg", "exp_avg_sq", "norm", "step"}
        assert state_bytes([optimizer]) == 8 * (2 * long * rank + 1)  # table 1 counts the seed as well: 2nr + 2


def test_projections_are_gaussian_and_change() -> None:
    drawn = np.stack([projection(seed, draw, 4, 500) for seed in range(4) for draw in range(4)])
    assert drawn.var() == pytest.approx(1 / 4, rel=0.05)
    assert abs(drawn.mean()) < 0.01
    correlations = np.corrcoef(drawn.reshape(16, -1)) - np.eye(16)
    assert np.abs(correlations).max() < 0.1
    assert np.array_equal(projection(3, 2, 4, 500), projection(3, 2, 4, 500))


def test_two_matrices_have_two_projections() -> None:
    start, gradient = random_matrices((6, 20), 2)
    parameters = [nn.Parameter(start.clone()), nn.Parameter(start.clone())]
    optimizer = Apollo(parameters, lr=0.1, rank=2)
    for parameter in parameters:
        parameter.grad = gradient.clone()
    optimizer.step()
    assert not torch.allclose(*parameters)


def test_updates_grow_by_a_hundredth_at_most() -> None:
    start, gradient = random_matrices((6, 20), 2)
    parameter = nn.Parameter(start.clone())
    optimizer = Apollo([parameter], lr=1.0, rank=3, betas=(0.0, 0.999))
    sizes = []
    for factor in (1.0, 1000.0, 1000.0):
        before = parameter.detach().clone()
        trained(optimizer, [factor * gradient])
        sizes.append(float((parameter.detach() - before).norm()))
    assert sizes[1] == pytest.approx(1.01 * sizes[0])
    assert sizes[2] == pytest.approx(1.01 * sizes[1])


def test_a_first_gradient_of_zero_sets_no_limit() -> None:
    start, gradient = random_matrices((6, 20), 2)
    optimizer = ApolloMini([nn.Parameter(start.clone())], lr=0.1)
    assert torch.equal(trained(optimizer, [torch.zeros_like(gradient)]), start)
    assert (trained(optimizer, [gradient]) - start).norm() > 0.1
