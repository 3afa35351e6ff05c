"""Orthogonalised matrices against singular value decompositions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_problems import random_matrices

from fallow.training.optimizers.orthogonal import POLAR_EXPRESS, SAFETY, orthogonalised

SHAPES = [(16, 48), (48, 16), (32, 32), (1, 20)]


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_are_near_one(shape: tuple[int, int]) -> None:
    values = torch.linalg.svdvals(orthogonalised(torch.stack(random_matrices(shape, 3))))
    assert values.min() > 0.8
    assert values.max() < 1.2


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_vectors_stay(shape: tuple[int, int]) -> None:
    (matrix,) = random_matrices(shape, 1)
    left, _, right = np.linalg.svd(matrix.numpy(), full_matrices=False)
    error = orthogonalised(matrix).numpy() - left @ right
    assert np.linalg.norm(error) < 0.15 * np.linalg.norm(left @ right)
    inside = left.T @ orthogonalised(matrix).numpy() @ right.T
    assert np.abs(inside - np.diag(np.diag(inside))).max() < 0.05  # bfloat16


@pytest.mark.parametrize(("iterations", "least"), [(5, 1e-3), (4, 1e-2), (3, 2e-2)])
def test_the_polynomials_bring_small_values_near_one(iterations: int, least: float) -> None:
    values = np.geomspace(least, 1, 10_000) / SAFETY
    for a, b, c in POLAR_EXPRESS[iterations]:
        values = a * values + b * values**3 + c * values**5
    assert len(POLAR_EXPRESS[iterations]) == iterations
    assert values.min() > 0.84
    assert values.max() < 1.15


@pytest.mark.parametrize("iterations", [3, 4])
def test_fewer_iterations_do_for_matrices_without_small_values(iterations: int) -> None:
    left, right = (torch.linalg.qr(matrix).Q for matrix in random_matrices((24, 24), 2))
    values = torch.linspace(1, 0.2, 24, dtype=torch.float64)
    found = orthogonalised(left @ torch.diag(values) @ right, iterations)
    assert torch.dist(found, left @ right) < 0.2 * torch.linalg.norm(left @ right)


def test_small_singular_values_grow_and_none_passes_one_by_far() -> None:
    left, right = (torch.linalg.qr(matrix).Q for matrix in random_matrices((24, 24), 2))
    values = torch.logspace(0, -3, 24, dtype=torch.float64)
    values = values / values.norm()
    found = torch.linalg.svdvals(orthogonalised(left @ torch.diag(values) @ right))
    assert found.max() < 1.2
    assert found.min() > 0.5


def test_the_size_of_a_matrix_does_not_matter() -> None:
    (matrix,) = random_matrices((12, 20), 1)
    assert torch.allclose(orthogonalised(matrix * 2.0**-12), orthogonalised(matrix), atol=0.02)


def test_zero_stays_zero_and_types_are_kept() -> None:
    zeros = torch.zeros(2, 4, 6)
    assert torch.equal(orthogonalised(zeros), zeros)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        assert orthogonalised(torch.eye(4, dtype=dtype)).dtype == dtype
