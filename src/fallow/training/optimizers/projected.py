"""What APOLLO and GaLore have in common: Adam's moments in a space of few directions."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from fallow.training.optimizers.adam import adam_state
from fallow.training.optimizers.matrix import MatrixOptimizer


class ProjectedAdam(MatrixOptimizer):
    """Gradients are projected onto ``rank`` directions of a matrix's shorter side, and the projection is chosen anew
    every ``refresh`` steps. ``scale`` multiplies updates (alpha in both papers). ``direction`` is what a subclass has
    to say."""

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: float,
        rank: int,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        scale: float = 1.0,
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
        for index, parameter in enumerate(group["params"]):
            if parameter.grad is None:
                continue
            tall = parameter.shape[0] > parameter.shape[1]
            gradient = parameter.grad.mT if tall else parameter.grad  # [short, long]
            state = self.state[parameter]
            if not state:
                state |= self.new_state(gradient, min(group["rank"], len(gradient)))
            direction = self.direction(gradient, state, group, group["seed"] + index)
            if direction is not None:
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(direction.mT if tall else direction, alpha=-group["lr"] * group["scale"])

    def new_state(self, gradient: Tensor, rank: int) -> dict[str, Any]:
        """Before the first step: moments ``[rank, long]``."""
        return adam_state(gradient.new_empty(rank, gradient.shape[1]))

    def direction(self, gradient: Tensor, state: dict[str, Any], group: dict[str, Any], seed: int) -> Tensor | None:
        """What to go against, in the shape of ``gradient [short, long]``, and a step of ``state``; None: stay.
        ``seed`` is the matrix's own."""
        raise NotImplementedError
