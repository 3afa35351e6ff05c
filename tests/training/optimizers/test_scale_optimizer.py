"""SCALE against its algorithm, column by column."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from small_problems import random_matrices, trained
from torch import Tensor, nn

from fallow.training.optimizers.build import state_bytes
from fallow.training.optimizers.scale import Scale


def reference(
    start: Tensor,
    gradients: list[Tensor],
    *,
    lr: float,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    output_dim: int = 0,
) -> npt.NDArray[np.float64]:
    """Algorithm 1 on ``[inputs, outputs]``, as the paper writes weights; columns of norm ``sqrt(inputs)``."""
    weights = (start.T if output_dim == 0 else start).numpy().copy()
    moment = np.zeros_like(weights)
    for gradient in gradients:
        g = (gradient.T if output_dim == 0 else gradient).numpy()
        moment = momentum * moment + (1 - momentum) * g
        weights = weights - lr * weight_decay * weights
        for column in range(weights.shape[1]):
            norm = np.sqrt(sum(value**2 for value in moment[:, column]))
            weights[:, column] -= lr * np.sqrt(len(weights)) * moment[:, column] / norm
    return weights.T if output_dim == 0 else weights


@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": 0.9}, {"output_dim": 1}, {"momentum": 0.8, "output_dim": 1, "weight_decay": 0.2}],
    ids=str,
)
def test_it_is_the_papers_update(options: dict[str, Any]) -> None:
    start, *gradients = random_matrices((7, 11), 6)
    found = trained(Scale([nn.Parameter(start.clone())], lr=0.03, **options), gradients)
    np.testing.assert_allclose(found.numpy(), reference(start, gradients, lr=0.03, **options), rtol=1e-10)


def test_state_is_one_moment_or_nothing() -> None:
    start, gradient = random_matrices((7, 11), 2)
    plain, last = (Scale([nn.Parameter(start.clone())], lr=0.1, momentum=momentum) for momentum in (0.0, 0.9))
    trained(plain, [gradient])
    trained(last, [gradient])
    assert state_bytes([plain]) == 0
    assert state_bytes([last]) == 8 * 7 * 11


def test_outputs_without_a_gradient_stay() -> None:
    start, gradient = random_matrices((4, 6), 2)
    gradient[1] = 0
    found = trained(Scale([nn.Parameter(start.clone())], lr=0.1), [gradient])
    assert torch.equal(found[1], start[1])
    assert found.isfinite().all()
