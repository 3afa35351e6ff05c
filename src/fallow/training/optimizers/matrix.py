"""What optimizers of matrices have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from fallow.errors import FallowError


class MatrixOptimizer(torch.optim.Optimizer):
    """``update`` is what a subclass has to say. Raises ``FallowError`` for a parameter that it cannot take."""

    takes_shards = False  # whether parameters may be ``DTensor``

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        name = type(self).__name__
        for parameter in self.param_groups[-1]["params"]:
            if parameter.ndim != 2:
                raise FallowError(
                    f"{name} takes matrices, but a parameter has the shape {list(parameter.shape)}: give it to AdamW."
                )
            if isinstance(parameter, DTensor) and not self.takes_shards:
                raise FallowError(
                    f"{name} projects whole matrices, but FSDP2 has cut them into shards: "
                    "use adamw, muon or scale, or train in one process."
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self.update(group)
        return loss

    def update(self, group: dict[str, Any]) -> None:
        """Update the parameters of a group that have a gradient."""
        raise NotImplementedError
