"""SCALE: stochastic gradient descent, each column brought to one size (arXiv 2506.16659, algorithm 1)."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.optimizer import ParamsT

from fallow.training.optimizers.matrix import MatrixOptimizer


class Scale(MatrixOptimizer):
    """A column of the paper is what one output sees of all inputs; here it gets a root mean square of 1, as in the
    authors' code, so that rates are like Adam's.

    ``output_dim`` is the dimension that numbers outputs: 0 for ``[outputs, inputs]`` of a linear layer or a head, 1 for
    an embedding ``[tokens, hidden]``. ``momentum`` is for the last layer, 0.9 in the paper; elsewhere it is 0 and there
    is no state.
    """

    takes_shards = True

    def __init__(
        self, params: ParamsT, *, lr: float, momentum: float = 0.0, weight_decay: float = 0.0, output_dim: int = 0
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "output_dim": output_dim}
        super().__init__(params, defaults)

    def update(self, group: dict[str, Any]) -> None:
        lr, momentum = group["lr"], group["momentum"]
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            direction = parameter.grad
            state = self.state[parameter]  # torch.distributed.checkpoint wants one to be there, were it empty
            if momentum:
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                direction = state["momentum"].mul_(momentum).add_(parameter.grad, alpha=1 - momentum)
            size = direction.square().mean(1 - group["output_dim"], keepdim=True).sqrt().clamp_min(1e-8)
            parameter.mul_(1 - lr * group["weight_decay"]).add_(direction / size, alpha=-lr)
