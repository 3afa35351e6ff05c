"""GaLore: Adam in the gradient's leading subspace (arXiv 2403.03507, algorithms 1 and 2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from fallow.training.optimizers.adam import adam_direction
from fallow.training.optimizers.projected import ProjectedAdam
from fallow.training.optimizers.seeds import seeded

_OVERSAMPLING, _POWER_ITERATIONS = 8, 2


class GaLore(ProjectedAdam):
    """The projector is onto the leading singular vectors of the gradient that is there every ``refresh`` steps; the
    moments stay when it changes. The paper's ``scale`` is 0.25."""

    def __init__(self, params: ParamsT, *, lr: float, rank: int, scale: float = 0.25, **options: Any) -> None:
        super().__init__(params, lr=lr, rank=rank, scale=scale, **options)

    def new_state(self, gradient: Tensor, rank: int) -> dict[str, Any]:
        return super().new_state(gradient, rank) | {"projector": gradient.new_zeros(len(gradient), rank)}

    def direction(self, gradient: Tensor, state: dict[str, Any], group: dict[str, Any], seed: int) -> Tensor | None:
        if not state["step"] and not gradient.any():
            return None  # outputs that begin at zero: a projector of nothing would stay for ``refresh`` steps
        refreshes, since = divmod(state["step"], group["refresh"])
        if not since:
            generator = seeded(seed, refreshes, gradient.device)
            state["projector"] = leading_left_vectors(gradient, state["projector"].shape[1], generator)
        projector = state["projector"]
        direction: Tensor = projector @ adam_direction(projector.mT @ gradient, state, group["betas"], group["eps"])
        return direction


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
