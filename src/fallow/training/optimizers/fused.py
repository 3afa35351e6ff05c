"""Updates in the backward pass: a gradient is used as soon as it is there and freed, so all of them never exist at once
(LOMO, arXiv 2306.09782)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from fallow.errors import FallowError


def attach_fused_updates(
    optimizers: Sequence[Optimizer], *, clip: float | None, micro_batches: int
) -> list[RemovableHandle]:
    """From now on ``backward`` updates every parameter of ``optimizers`` and leaves ``grad`` None; gradients that are
    there are dropped. Learning rates must be set before it, and a step cannot be taken back after it. ``remove`` of the
    handles ends it; states stay in ``optimizers``.

    Results are the same, but for Muon's last bits: it has one matrix at a time here, not all of a shape together.
    Raises ``FallowError`` for what needs all gradients at once: clipping by their norm (``clip``), a step of more than
    one micro-batch, shards (FSDP2), several devices (whose backward passes run side by side).
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
    handles: list[RemovableHandle] = []
    for optimizer, parameter in parameters:
        parameter.grad = None
        handles.append(parameter.register_post_accumulate_grad_hook(partial(_update, optimizer)))
    return handles


def _update(optimizer: Optimizer, parameter: Tensor) -> None:
    optimizer.step()  # of this parameter alone: no other has a gradient
    parameter.grad = None


def _reason_against(parameters: list[Tensor], clip: float | None, micro_batches: int) -> str | None:
    if clip is not None:
        return "clipping needs the norm of all gradients at once; turn one of the two off"
    if micro_batches > 1:
        return f"gradients of {micro_batches} micro-batches would have to be kept; make micro_batch as large as batch"
    if any(isinstance(parameter, DTensor) for parameter in parameters):
        return "sharded parameters (FSDP2) are not supported; train in one process"
    if len({parameter.device for parameter in parameters}) > 1:
        return "parameters are on several devices; put them on one"
    return None
