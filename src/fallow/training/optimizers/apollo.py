"""APOLLO and APOLLO-Mini: Adam's scaling, estimated in a small random space (arXiv 2412.05270, algorithm 1)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from fallow.training.optimizers.adam import adam_direction, adam_state
from fallow.training.optimizers.matrix import MatrixOptimizer
from fallow.training.optimizers.seeds import seeded

_GROWTH = 1.01  # of an update's norm from one step to the next, at most (equation 4)


class Apollo(MatrixOptimizer):
    """The raw gradient, each channel of the longer side times how much Adam would have scaled it.

    Adam's moments are those of the gradient's projection onto ``rank`` random directions of the shorter side. The
    projection is drawn anew every ``refresh`` steps and not kept: a seed is. ``scale`` multiplies updates (alpha).
    """

    _channels = True  # a factor each; APOLLO-Mini has one for the matrix

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
        lr = group["lr"]
        for index, parameter in enumerate(group["params"]):
            if parameter.grad is None:
                continue
            tall = parameter.shape[0] > parameter.shape[1]
            gradient = parameter.grad.mT if tall else parameter.grad  # [short, long]
            state = self.state[parameter]
            if not state:
                rank = min(group["rank"], gradient.shape[0])
                state |= adam_state(gradient.new_empty(rank, gradient.shape[1]))
                state |= {"seed": group["seed"] + index, "norm": gradient.new_zeros(())}
            update = self._scaled(gradient, state, group)
            parameter.mul_(1 - lr * group["weight_decay"])
            parameter.add_(update.mT if tall else update, alpha=-lr * group["scale"])

    def _scaled(self, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        rank = len(state["exp_avg"])
        generator = seeded(state["seed"], state["step"] // group["refresh"], gradient.device)
        projection = torch.randn(rank, len(gradient), generator=generator, dtype=gradient.dtype, device=gradient.device)
        reduced = (projection / math.sqrt(rank)) @ gradient  # [rank, long]
        direction = adam_direction(reduced, state, group["betas"], group["eps"])
        dim = 0 if self._channels else None
        norm = torch.linalg.vector_norm
        update = gradient * (norm(direction, dim=dim) / (norm(reduced, dim=dim) + 1e-8))
        return _limited(update, state)


class ApolloMini(Apollo):
    """APOLLO with rank 1 and one factor for the whole matrix (section 4.2)."""

    _channels = False

    def __init__(self, params: ParamsT, *, lr: float, **options: Any) -> None:
        super().__init__(params, lr=lr, rank=1, scale=math.sqrt(128), **options)


def _limited(update: Tensor, state: dict[str, Any]) -> Tensor:
    """The norm-growth limiter. An update of zero sets no limit: outputs that begin at zero have such gradients."""
    norm = torch.linalg.vector_norm(update)
    most = _GROWTH * state["norm"]
    factor = torch.where((most > 0) & (norm > most), most / norm, torch.ones_like(norm))
    state["norm"] = norm * factor
    return update * factor
