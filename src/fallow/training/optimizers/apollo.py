"""APOLLO and APOLLO-Mini: Adam's scaling, estimated in a small random space (arXiv 2412.05270, algorithm 1)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from fallow.training.optimizers.adam import adam_direction
from fallow.training.optimizers.projected import ProjectedAdam
from fallow.training.optimizers.seeds import seeded

_GROWTH = 1.01  # of an update's norm from one step to the next, at most (equation 4)


class Apollo(ProjectedAdam):
    """The raw gradient, each channel of the longer side times how much Adam would have scaled it.

    Adam's moments are those of the gradient's projection onto random directions, which are not kept: they are drawn
    again from a seed.
    """

    _channels = True  # a factor each; APOLLO-Mini has one for the matrix

    def new_state(self, gradient: Tensor, rank: int) -> dict[str, Any]:
        return super().new_state(gradient, rank) | {"norm": gradient.new_zeros(())}

    def direction(self, gradient: Tensor, state: dict[str, Any], group: dict[str, Any], seed: int) -> Tensor:
        rank = len(state["exp_avg"])
        generator = seeded(seed, state["step"] // group["refresh"], gradient.device)
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
