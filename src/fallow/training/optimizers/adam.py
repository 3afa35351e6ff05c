"""Adam's moments and the direction that they give (arXiv 1412.6980, algorithm 1), for optimizers with small ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def adam_state(like: Tensor) -> dict[str, Any]:
    """The state before the first step, under the names of ``torch.optim.AdamW``."""
    return {"step": 0, "exp_avg": torch.zeros_like(like), "exp_avg_sq": torch.zeros_like(like)}


def adam_direction(gradient: Tensor, state: dict[str, Any], betas: tuple[float, float], eps: float) -> Tensor:
    """The mean over the root of the mean square, both corrected for their bias; ``state`` is moved on by a step."""
    state["step"] += 1
    mean, square = state["exp_avg"], state["exp_avg_sq"]
    mean.lerp_(gradient, 1 - betas[0])
    square.mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
    root = (square / (1 - betas[1] ** state["step"])).sqrt_().add_(eps)
    direction: Tensor = (mean / (1 - betas[0] ** state["step"])).div_(root)
    return direction
