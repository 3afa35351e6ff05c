"""Cross-entropy from hidden states, a block of tokens at a time: the logits of all of them never exist at once.

The gradient of a block is taken as soon as its logits are there, so the backward pass has nothing left to compute (the
idea of Liger Kernel, arXiv 2410.10989, section 3.2, and of Cut Cross-Entropy, arXiv 2411.09009).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

BLOCK = 1024  # tokens whose logits exist at once


def cross_entropy(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    *,
    softcap: float | None = None,
    block: int = BLOCK,
    compiled: bool = False,
) -> Tensor:
    """The summed negative log-likelihood (nats, float32) of ``targets``.

    ``hidden [tokens, hidden]``, ``head [vocab, hidden]``, ``targets`` int64 ``[tokens]``; a target below 0 does not
    count. Products are computed in the type of ``hidden``, the rest in float32. ``softcap`` is that of ``Decoder``.
    What is done to the logits of a block can be ``compiled``: one pass over them instead of ten.
    """
    compute = _compiled_block() if compiled else _block
    loss: Tensor = _BlockwiseCrossEntropy.apply(hidden, head, targets, softcap, block, compute)  # type: ignore[no-untyped-call]
    return loss


_Compute = Callable[[Tensor, Tensor, float | None, bool], tuple[Tensor, Tensor]]


@cache
def _compiled_block() -> _Compute:
    return torch.compile(_block)


class _BlockwiseCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917  PyTorch passes arguments by position
        ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, softcap: float | None, block: int, compute: _Compute
    ) -> Tensor:
        weights = head.to(hidden.dtype)
        needs_gradient = hidden.requires_grad or head.requires_grad
        loss = hidden.new_zeros((), dtype=torch.float32)
        hidden_gradient = torch.empty_like(hidden) if needs_gradient else None
        head_gradient = torch.zeros_like(head, dtype=torch.float32) if needs_gradient else None
        for start in range(0, hidden.shape[0], block):
            part = hidden[start : start + block]
            part_loss, gradient = compute(part @ weights.T, targets[start : start + block], softcap, needs_gradient)
            loss += part_loss
            if hidden_gradient is not None and head_gradient is not None:
                torch.mm(gradient, weights, out=hidden_gradient[start : start + block])
                head_gradient += gradient.T @ part
        ctx.save_for_backward(hidden_gradient, head_gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        hidden_gradient, head_gradient = ctx.saved_tensors
        return hidden_gradient * scale, head_gradient * scale, None, None, None, None


def _block(logits: Tensor, targets: Tensor, softcap: float | None, needs_gradient: bool) -> tuple[Tensor, Tensor]:
    """The summed loss of a block and the gradient of its logits, in the type of ``logits``."""
    wide = logits.float()
    if softcap is not None:
        capped = torch.tanh(wide / softcap)
        wide = softcap * capped
    counts = targets >= 0
    chosen = targets.clamp_min(0)[:, None]
    normaliser = wide.logsumexp(-1, keepdim=True)
    loss = torch.where(counts, (normaliser - wide.gather(-1, chosen))[:, 0], 0.0).sum()
    if not needs_gradient:
        return loss, logits
    gradient = torch.exp(wide - normaliser)
    if torch.compiler.is_compiling():  # a comparison becomes part of the one pass, a scatter does not
        gradient = gradient - (torch.arange(wide.shape[-1], device=wide.device) == chosen).to(gradient.dtype)
    else:
        gradient.scatter_add_(-1, chosen, torch.full_like(chosen, -1, dtype=gradient.dtype))
    if softcap is not None:
        gradient = gradient * (1 - capped.square())
    return loss, torch.where(counts[:, None], gradient, 0.0).to(logits.dtype)
