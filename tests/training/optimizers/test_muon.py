"""Muon against singular value decompositions in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from small_problems import random_matrices, trained
from torch import Tensor, nn

from fallow.errors import FallowError
from fallow.training.optimizers.build import state_bytes
from fallow.training.optimizers.muon import Muon

Array = npt.NDArray[np.float64]


def polar(matrix: Array) -> Array:
    left, _, right = np.linalg.svd(matrix, full_matrices=False)
    product: Array = left @ right
    return product


def exactly_orthogonalised(matrices: Tensor, iterations: int) -> Tensor:
    return torch.stack([torch.from_numpy(polar(matrix.numpy())) for matrix in matrices])


def reference(
    start: Tensor,
    gradients: list[Tensor],
    *,
    lr: float,
    momentum: float = 0.95,
    weight_decay: float = 0.0,
    cautious: bool = False,
    variance: float | None = None,
) -> Array:
    """Muon (Jordan 2024) with Moonlight's factor, or NorMuon's algorithm 1, row by row."""
    weights = start.numpy().copy()
    rows, columns = weights.shape
    mean, squares = np.zeros_like(weights), np.zeros(rows)
    for gradient in gradients:
        g = gradient.numpy()
        mean = momentum * mean + (1 - momentum) * g
        update = polar((1 - momentum) * g + momentum * mean)
        if variance is None:
            update = update * 0.2 * np.sqrt(max(rows, columns))
        else:
            for row in range(rows):
                squares[row] = variance * squares[row] + (1 - variance) * np.mean(update[row] ** 2)
                update[row] = update[row] / (np.sqrt(squares[row]) + 1e-8)
            update = update * 0.2 * np.sqrt(rows * columns) / np.linalg.norm(update)
        mask = (update * weights >= 0) if cautious else 1.0
        weights = weights - lr * weight_decay * mask * weights - lr * update
    return weights


@pytest.mark.parametrize("shape", [(12, 30), (30, 12)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.8, "weight_decay": 0.3},
        {"weight_decay": 0.3, "cautious": True},
        {"variance": 0.9},
        {"variance": 0.9, "weight_decay": 0.3, "cautious": True},
    ],
    ids=str,
)
def test_it_is_the_papers_update(
    shape: tuple[int, int], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    start, *gradients = random_matrices(shape, 6)
    expected = reference(start, gradients, lr=0.05, **options)
    found = trained(Muon([nn.Parameter(start.clone())], lr=0.05, **options), gradients).numpy()
    assert np.linalg.norm(found - expected) < 0.15 * np.linalg.norm(expected - start.numpy())
    monkeypatch.setattr("fallow.training.optimizers.muon.orthogonalised", exactly_orthogonalised)
    exact = trained(Muon([nn.Parameter(start.clone())], lr=0.05, **options), gradients).numpy()
    np.testing.assert_allclose(exact, expected, rtol=1e-6, atol=1e-9)


def test_it_agrees_with_pytorchs_muon_in_direction_and_size() -> None:
    start, *gradients = random_matrices((24, 36), 4)
    ours = trained(Muon([nn.Parameter(start.clone())], lr=0.05), gradients) - start
    theirs = torch.optim.Muon([nn.Parameter(start.clone())], lr=0.05, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    other = trained(theirs, gradients) - start
    assert torch.cosine_similarity(ours.flatten(), other.flatten(), dim=0) > 0.95
    assert 0.7 < ours.norm() / other.norm() < 1.4


@pytest.mark.parametrize("variance", [None, 0.95])
@pytest.mark.parametrize("shape", [(8, 64), (64, 8), (20, 20)])
def test_an_update_has_the_size_of_adamws(shape: tuple[int, int], variance: float | None) -> None:
    start, gradient = random_matrices(shape, 2)
    moved = trained(Muon([nn.Parameter(start.clone())], lr=1.0, variance=variance), [gradient]) - start
    assert moved.square().mean().sqrt() == pytest.approx(0.2, rel=0.15 if variance is None else 1e-3)


def test_the_variance_step_makes_rows_alike() -> None:
    start, gradient = random_matrices((40, 10), 2)
    gradient[:20] *= 100
    rows = (trained(Muon([nn.Parameter(start.clone())], lr=1.0, variance=0.9), [gradient]) - start).norm(dim=1)
    assert torch.allclose(rows, rows.mean().expand(40), rtol=1e-3)


def test_cautious_decay_leaves_what_moves_away_from_zero() -> None:
    start, gradient = random_matrices((10, 14), 2)
    update = start - trained(Muon([nn.Parameter(start.clone())], lr=1.0), [gradient])
    decayed = Muon([nn.Parameter(start.clone())], lr=1.0, weight_decay=0.25, cautious=True)
    lost = start - update - trained(decayed, [gradient])
    assert torch.allclose(lost, torch.where(update * start >= 0, 0.25 * start, 0.0))
    still = Muon([nn.Parameter(start.clone())], lr=1.0, weight_decay=0.25, cautious=True)
    assert torch.allclose(trained(still, [torch.zeros_like(start)]), 0.75 * start)


def test_matrices_of_one_shape_go_together() -> None:
    starts = random_matrices((9, 15), 3) + random_matrices((15, 9), 2)
    gradients = random_matrices((9, 15), 3, seed=1) + random_matrices((15, 9), 2, seed=1)
    parameters = [nn.Parameter(start.clone()) for start in starts]
    together = Muon(parameters, lr=0.1, variance=0.9)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    together.step()
    for parameter, start, gradient in zip(parameters, starts, gradients, strict=True):
        alone = trained(Muon([nn.Parameter(start.clone())], lr=0.1, variance=0.9), [gradient])
        assert torch.allclose(parameter, alone, atol=1e-3)


def test_state_is_a_moment_and_a_number_a_row() -> None:
    start, gradient = random_matrices((9, 15), 2)
    plain, normalised = (Muon([nn.Parameter(start.clone())], lr=0.1, variance=v) for v in (None, 0.9))
    trained(plain, [gradient])
    trained(normalised, [gradient])
    assert state_bytes([plain]) == 8 * 9 * 15
    assert state_bytes([normalised]) == 8 * 9 * (15 + 1)  # NorMuon, section 3.3


def test_a_vector_is_refused() -> None:
    with pytest.raises(FallowError, match=r"^Muon takes matrices, but a parameter has the shape \[3\]: give it to"):
        Muon([nn.Parameter(torch.zeros(3))], lr=0.1)
