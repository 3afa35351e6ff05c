"""GaLore against algorithms 1 and 2 with exact decompositions, and against Adam where the two are one."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from small_problems import random_matrices, trained
from torch import Tensor, nn

from fallow.training.optimizers.build import state_bytes
from fallow.training.optimizers.galore import GaLore, leading_left_vectors

Array = npt.NDArray[np.float64]


def low_rank_matrices(shape: tuple[int, int], rank: int, count: int) -> list[Tensor]:
    """Of a rank that the random start catches whole, so that singular vectors are exact."""
    left, right = (random_matrices((side, rank), count, seed=side) for side in shape)
    return [a @ b.T for a, b in zip(left, right, strict=True)]


def reference(
    start: Tensor,
    gradients: list[Tensor],
    optimizer: GaLore,
    *,
    lr: float,
    rank: int,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 0.0,
    scale: float = 0.25,
    refresh: int = 200,
) -> Array:
    """A singular vector's sign is nobody's choice and the moments outlive it: it is taken from ``optimizer``, which is
    stepped along."""
    (parameter,) = optimizer.param_groups[0]["params"]
    tall = start.shape[0] > start.shape[1]
    weights = (start.T if tall else start).numpy().copy()
    mean, square = np.zeros((rank, weights.shape[1])), np.zeros((rank, weights.shape[1]))
    projector = np.zeros((len(weights), rank))
    for t, gradient in enumerate(gradients):
        trained(optimizer, [gradient])
        g = (gradient.T if tall else gradient).numpy()
        if t % refresh == 0:
            projector = np.linalg.svd(g)[0][:, :rank]
            theirs = optimizer.state[parameter]["projector"].numpy()
            for i in range(rank):
                projector[:, i] *= np.sign(projector[:, i] @ theirs[:, i])
        r = projector.T @ g
        mean = betas[0] * mean + (1 - betas[0]) * r
        square = betas[1] * square + (1 - betas[1]) * r * r
        adam = (mean / (1 - betas[0] ** (t + 1))) / (np.sqrt(square / (1 - betas[1] ** (t + 1))) + 1e-8)
        weights = weights - lr * weight_decay * weights - lr * scale * (projector @ adam)
    return weights.T if tall else weights


@pytest.mark.parametrize("shape", [(24, 60), (60, 24)])
@pytest.mark.parametrize(
    "options",
    [{"rank": 4}, {"rank": 4, "refresh": 3, "scale": 1.0, "weight_decay": 0.2, "betas": (0.8, 0.9)}],
    ids=str,
)
def test_it_is_the_papers_update(shape: tuple[int, int], options: dict[str, Any]) -> None:
    (start,) = random_matrices(shape, 1)
    gradients = low_rank_matrices(shape, 10, 8)
    optimizer = GaLore([nn.Parameter(start.clone())], lr=0.03, **options)
    expected = reference(start, gradients, optimizer, lr=0.03, **options)
    np.testing.assert_allclose(optimizer.param_groups[0]["params"][0].detach().numpy(), expected, rtol=1e-7)


def adam(start: Tensor, gradients: list[Tensor], **options: Any) -> Tensor:
    return trained(torch.optim.Adam([nn.Parameter(start.clone())], lr=0.03, **options), gradients)


def galore(start: Tensor, gradients: list[Tensor], **options: Any) -> Tensor:
    whole = {"rank": min(start.shape), "scale": 1.0} | options
    return trained(GaLore([nn.Parameter(start.clone())], lr=0.03, **whole), gradients)


def test_at_full_rank_it_is_adam_where_its_basis_is_that_of_the_weights() -> None:
    start, *gradients = random_matrices((1, 9), 6)
    torch.testing.assert_close(galore(start, gradients), adam(start, gradients))
    start, *gradients = random_matrices((5, 15), 6)
    gradients[0] = torch.zeros_like(start)  # orthogonal rows of different sizes: the basis is a permutation
    for row in range(5):
        gradients[0][row, 3 * row : 3 * row + 3] = float(1 + (row * 2) % 5)
    torch.testing.assert_close(galore(start, gradients), adam(start, gradients))


def test_at_full_rank_it_is_adam_where_adam_is_linear() -> None:
    """With an epsilon that outweighs the root, a rotation and its inverse cancel; without, they do not."""
    start, *gradients = random_matrices((6, 10), 6)
    options = {"eps": 1e9}
    moved, expected = galore(start, gradients, **options) - start, adam(start, gradients, **options) - start
    torch.testing.assert_close(moved * 1e9, expected * 1e9, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(galore(start, gradients), adam(start, gradients), rtol=1e-2)


def test_state_is_that_of_the_papers_table() -> None:
    short, long, rank = 6, 20, 3
    start, gradient = random_matrices((long, short), 2)
    optimizer = GaLore([nn.Parameter(start.clone())], lr=0.1, rank=rank)
    trained(optimizer, [gradient])
    assert state_bytes([optimizer]) == 8 * (short * rank + 2 * long * rank)  # table 1: mr + 2nr


def test_the_subspace_of_a_falling_spectrum_is_found() -> None:
    left, right = (torch.linalg.qr(matrix).Q for matrix in random_matrices((80, 80), 2))
    values = 0.8 ** torch.arange(80, dtype=torch.float64)
    matrix = (left * values @ right)[:60]
    exact = torch.linalg.svd(matrix).U[:, :10]
    found = leading_left_vectors(matrix, 10, torch.Generator().manual_seed(0))
    torch.testing.assert_close(found.T @ found, torch.eye(10, dtype=torch.float64))
    assert (exact @ exact.T - found @ found.T).norm() < 1e-3
    single = leading_left_vectors(matrix.float(), 10, torch.Generator().manual_seed(0))
    assert single.dtype == torch.float32
    assert (exact @ exact.T - (single @ single.T).double()).norm() < 1e-3


def test_the_projector_waits_for_a_gradient() -> None:
    start, gradient = random_matrices((6, 20), 2)
    optimizer = GaLore([nn.Parameter(start.clone())], lr=0.1, rank=2)
    assert torch.equal(trained(optimizer, [torch.zeros_like(start)] * 2), start)
    (state,) = optimizer.state.values()
    assert state["step"] == 0
    trained(optimizer, [gradient])
    exact = torch.linalg.svd(gradient).U[:, :2]
    torch.testing.assert_close((exact.T @ state["projector"]).abs(), torch.eye(2, dtype=torch.float64))
