"""Muon: momentum, orthogonalised (Jordan et al. 2024, kellerjordan.github.io/posts/muon, with its Nesterov momentum).

Options: the variance step of NorMuon (arXiv 2510.05491, algorithm 1), and cautious weight decay (arXiv 2510.12402,
algorithm 1), which decays only what the update does not move away from zero.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from fallow.training.optimizers.matrix import MatrixOptimizer
from fallow.training.optimizers.orthogonal import orthogonalised
from fallow.training.optimizers.shards import gathered, own_part, part_of

_RMS = 0.2  # of an update with lr 1, about that of AdamW's (Moonlight, arXiv 2502.16982, section 2.2)


class Muon(MatrixOptimizer):
    """For matrices of hidden layers only; embeddings, heads and vectors want another optimizer.

    An update has a root mean square of about ``0.2 * lr`` whatever the matrix's shape, so a rate that suits AdamW does.
    ``variance`` is the decay rate of NorMuon's second moments of rows, None for plain Muon; ``iterations`` (3 to 5)
    are those of ``orthogonalised``. Matrices of one shape are orthogonalised together; sharded ones are gathered, and
    every process orthogonalises all of them.
    """

    takes_shards = True

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        cautious: bool = False,
        variance: float | None = None,
        iterations: int = 5,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "cautious": cautious,
            "variance": variance,
            "iterations": iterations,
        }
        super().__init__(params, defaults)

    def update(self, group: dict[str, Any]) -> None:
        alike: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
        for parameter in group["params"]:
            if parameter.grad is not None:
                alike[tuple(parameter.shape)].append(parameter)
        for parameters in alike.values():
            self._update_alike(parameters, group)

    def _update_alike(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        moments = [own_part(self._moment(p, "momentum", p)) for p in parameters]
        gradients = [own_part(p.grad) for p in parameters if p.grad is not None]
        torch._foreach_lerp_(moments, gradients, 1 - group["momentum"])
        nesterov = torch._foreach_lerp(gradients, moments, group["momentum"])
        whole = torch.stack([gathered(part, p) for part, p in zip(nesterov, parameters, strict=True)])
        updates = orthogonalised(whole, group["iterations"])  # [matrices, rows, columns]
        if group["variance"] is None:
            updates *= _RMS * max(updates.shape[1:]) ** 0.5  # Moonlight, equation 4
        else:
            updates = self._normalised(updates, parameters, group["variance"])
        lr, decay = group["lr"], group["weight_decay"]
        for parameter, matrix in zip(parameters, updates, strict=True):
            weights, update = own_part(parameter), part_of(matrix, parameter)
            if decay and group["cautious"]:
                weights.addcmul_(weights, (update * weights >= 0).type_as(weights), value=-lr * decay)
            elif decay:
                weights.mul_(1 - lr * decay)
            weights.add_(update, alpha=-lr)

    def _normalised(self, updates: Tensor, parameters: list[Tensor], decay: float) -> Tensor:
        """Rows divided by the root of the running mean of their squares, the whole brought to a fixed size."""
        means = updates.square().mean(-1, keepdim=True)  # [matrices, rows, 1]
        moments = [self._moment(p, "variance", mean) for p, mean in zip(parameters, means, strict=True)]
        torch._foreach_lerp_(moments, list(means), 1 - decay)
        updates = updates / (torch.stack(moments).sqrt() + 1e-8)
        size = updates.norm(dim=(1, 2), keepdim=True).clamp_min(1e-12)
        updates *= _RMS * updates[0].numel() ** 0.5 / size
        return updates

    def _moment(self, parameter: Tensor, name: str, like: Tensor) -> Tensor:
        state = self.state[parameter]
        if name not in state:
            state[name] = torch.zeros_like(like)
        found: Tensor = state[name]
        return found
