"""GaLore: Adam in the gradient's leading subspace (arXiv 2403.03507, algorithms 1 and 2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from fallow.training.optimizers.adam import adam_direction, adam_state
from fallow.training.optimizers.matrix import MatrixOptimizer
from fallow.training.optimizers.seeds import seeded

_OVERSAMPLING, _POWER_ITERATIONS = 8, 2


class GaLore(MatrixOptimizer):
    """The projector is onto the ``rank`` leading singular vectors of the shorter side, of the gradient that is there
    every ``refresh`` steps; the moments stay when it changes. ``scale`` multiplies updates (alpha, 0.25 in the paper).
    """

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: float,
        rank: int,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        scale: float = 0.25,
        refresh: int = 200,
        seed: int = 0,
    ) -> None:
        defaults = {
            "lr": lr,
            "rank": rank,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "scale": scale,
            "refresh": refresh,
            "seed": seed,
        }
        super().__init__(params, defaults)

    def update(self, group: dict[str, Any]) -> None:
        lr = group["lr"]
        for index, parameter in enumerate(group["params"]):
            if parameter.grad is None:
                continue
            tall = parameter.shape[0] > parameter.shape[1]
            gradient = parameter.grad.mT if tall else parameter.grad  # [short, long]
            rank = min(group["rank"], gradient.shape[0])
            state = self.state[parameter]
            if not state:
                state |= adam_state(gradient.new_empty(rank, gradient.shape[1]))
                state["projector"] = gradient.new_zeros(gradient.shape[0], rank)
            if not state["step"] and not gradient.any():
                continue  # outputs that begin at zero: a projector of nothing would stay for ``refresh`` steps
            refreshes, since = divmod(state["step"], group["refresh"])
            if not since:
                generator = seeded(group["seed"] + index, refreshes, gradient.device)
                state["projector"] = leading_left_vectors(gradient, rank, generator)
            projector = state["projector"]
            direction = adam_direction(projector.mT @ gradient, state, group["betas"], group["eps"])
            update = projector @ direction
            parameter.mul_(1 - lr * group["weight_decay"])
            parameter.add_(update.mT if tall else update, alpha=-lr * group["scale"])


def leading_left_vectors(matrix: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    """The first left singular vectors ``[rows, rank]`` of a matrix that is no taller than wide, by subspace iteration
    from random vectors (Halko, Martinsson and Tropp, arXiv 0909.4061, algorithms 4.4 and 5.1)."""
    rows, columns = matrix.shape
    wide = matrix if matrix.dtype == torch.float64 else matrix.float()
    width = min(rank + _OVERSAMPLING, rows)
    start = torch.randn(columns, width, generator=generator, dtype=wide.dtype, device=wide.device)
    basis = torch.linalg.qr(wide @ start).Q  # [rows, width]
    for _ in range(_POWER_ITERATIONS):
        other = torch.linalg.qr(wide.mT @ basis).Q  # [columns, width]
        basis = torch.linalg.qr(wide @ other).Q
    turn = torch.linalg.svd(basis.mT @ wide, full_matrices=False).U  # [width, width]
    vectors: Tensor = (basis @ turn)[:, :rank].to(matrix.dtype, memory_format=torch.contiguous_format)
    return vectors
