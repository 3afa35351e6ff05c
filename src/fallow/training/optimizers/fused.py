"""Updates in the backward pass: a gradient is used as soon as it is there and freed, so all of them never exist at once
(LOMO, arXiv 2306.09782)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from fallow.errors import FallowError


class FusedUpdates:
    """From now on ``backward`` updates every parameter of ``optimizers`` and leaves ``grad`` None; gradients that are
    there are dropped. Learning rates must be set before it, and a step cannot be taken back after it. ``remove`` ends
    it; states stay in ``optimizers``.

    A gradient that is not finite updates nothing, and neither do those that come after it in the same pass; parameters
    nearer the loss have had their updates by then.
    """

    def __init__(self, optimizers: Sequence[Optimizer], *, clip: float | None, micro_batches: int) -> None:
        """Results are the same as of separate steps, but for Muon's last bits: it has one matrix at a time here, not
        all of a shape together.

        Raises ``FallowError`` for what needs all gradients at once: clipping by their norm (``clip``), a step of more
        than one micro-batch, shards (FSDP2), several devices (whose backward passes run side by side).
        """
        parameters = [
            (optimizer, parameter)
            for optimizer in optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
        ]
        reason = _reason_against([parameter for _, parameter in parameters], clip, micro_batches)
        if reason is not None:
            raise FallowError(f"Updates cannot be fused into the backward pass: {reason}.")
        self._squares = 0.0
        self._bad: Tensor | None = None
        self._handles = []
        for optimizer, parameter in parameters:
            parameter.grad = None
            self._handles.append(parameter.register_post_accumulate_grad_hook(partial(self._update, optimizer)))

    def backward(self, loss: Tensor) -> tuple[float, Tensor | None]:
        """The norm of all gradients of ``loss``, and the first parameter whose gradient was not finite."""
        self._squares, self._bad = 0.0, None
        loss.backward()  # type: ignore[no-untyped-call]
        return math.sqrt(self._squares), self._bad

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _update(self, optimizer: Optimizer, parameter: Tensor) -> None:
        assert parameter.grad is not None
        norm = float(torch.linalg.vector_norm(parameter.grad))
        self._squares += norm * norm
        if self._bad is None and not math.isfinite(norm):
            self._bad = parameter
        if self._bad is None:
            optimizer.step()  # of this parameter alone: no other has a gradient
        parameter.grad = None


def _reason_against(parameters: list[Tensor], clip: float | None, micro_batches: int) -> str | None:
    if clip is not None:
        return "clipping needs the norm of all gradients at once; set train.clip to 0 or train.fused_update to false"
    if micro_batches > 1:
        return f"gradients of {micro_batches} micro-batches would have to be kept; make micro_batch as large as batch"
    if any(isinstance(parameter, DTensor) for parameter in parameters):
        return "sharded parameters (FSDP2) are not supported; train in one process"
    if len({parameter.device for parameter in parameters}) > 1:
        return "parameters are on several devices; put them on one"
    return None
