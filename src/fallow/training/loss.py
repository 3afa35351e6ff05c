"""Losses from hidden states, a block of tokens at a time: the logits of all of them never exist at once.

The gradient of a block is taken as soon as its logits are there, so the backward pass has nothing left to compute (the
idea of Liger Kernel, arXiv 2410.10989, section 3.2, and of Cut Cross-Entropy, arXiv 2411.09009).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

_P = ParamSpec("_P")
_T = TypeVar("_T")
_BLOCK = 1024  # tokens whose logits exist at once, and fewer where these would be more numbers than
_LOGITS = 1 << 24
_ROWS = 1 << 13  # of the head whose gradient is summed up at once

BlockLoss = Callable[[Tensor, slice, bool], tuple[Tensor, Tensor]]
"""From the logits of a block, which tokens these are, and whether a gradient is needed: the summed loss (float32) and
the gradient of the logits, in their type."""


def blockwise(hidden: Tensor, head: Tensor, loss: BlockLoss, *, block: int | None = None) -> Tensor:
    """The sum of ``loss`` over blocks of ``block`` tokens of ``hidden [tokens, hidden]`` with the logits that ``head
    [vocab, hidden]`` gives them. Products are computed in the type of ``hidden``. The gradient can be taken once."""
    block = block or max(min(_BLOCK, _LOGITS // head.shape[0]), 1)
    total: Tensor = _Blockwise.apply(hidden, head, loss, block)  # type: ignore[no-untyped-call]
    return total


def cross_entropy(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    *,
    softcap: float | None = None,
    block: int | None = None,
    compiled: bool = False,
) -> Tensor:
    """The summed negative log-likelihood (nats, float32) of ``targets``.

    ``hidden [tokens, hidden]``, ``head [vocab, hidden]``, ``targets`` int64 ``[tokens]``, or ``[tokens, n]`` where each
    token has several; a target below 0 does not count. Products are computed in the type of ``hidden``, the rest in
    float32. ``softcap`` is that of ``Decoder``, ``block`` the tokens of a block. What is done to the logits of a block
    can be ``compiled``: one pass over them instead of ten. The gradient can be taken once.
    """
    compute = compiled_once(_block) if compiled else _block
    targets = targets.view(len(hidden), -1)

    def of_block(logits: Tensor, part: slice, needs_gradient: bool) -> tuple[Tensor, Tensor]:
        return compute(logits, targets[part], softcap, needs_gradient)

    return blockwise(hidden, head, of_block, block=block)


@cache
def compiled_once(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """``function`` as PyTorch compiles it, the same one for all who ask."""
    return torch.compile(function)


class _Blockwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, loss_of: BlockLoss, block: int) -> Tensor:
        weights = head.to(hidden.dtype)
        loss = hidden.new_zeros((), dtype=torch.float32)
        hidden_gradient = torch.empty_like(hidden) if hidden.requires_grad else None
        head_gradient = torch.zeros_like(head, dtype=torch.float32) if head.requires_grad else None
        needs_gradient = hidden.requires_grad or head.requires_grad
        for start in range(0, hidden.shape[0], block):
            tokens = slice(start, start + block)
            part = hidden[tokens]
            part_loss, gradient = loss_of(part @ weights.T, tokens, needs_gradient)
            loss += part_loss
            if hidden_gradient is not None:
                torch.mm(gradient, weights, out=hidden_gradient[tokens])
            if head_gradient is not None:
                for rows in range(0, head.shape[0], _ROWS):  # sums of two types take a copy of the summand
                    head_gradient[rows : rows + _ROWS] += gradient[:, rows : rows + _ROWS].T @ part
        ctx.save_for_backward(hidden_gradient, head_gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden, head = (None if gradient is None else gradient.mul_(scale) for gradient in ctx.saved_tensors)
        return hidden, head, None, None


def _block(logits: Tensor, targets: Tensor, softcap: float | None, needs_gradient: bool) -> tuple[Tensor, Tensor]:
    """The summed loss of a block and the gradient of its logits, in the type of ``logits``; ``targets [tokens, n]``."""
    wide = logits.float()
    if softcap is not None:
        capped = torch.tanh(wide / softcap)
        wide = softcap * capped
    counts = targets >= 0
    chosen = targets.clamp_min(0)
    normaliser = wide.logsumexp(-1, keepdim=True)
    loss = torch.where(counts, normaliser - wide.gather(-1, chosen), 0.0).sum()
    if not needs_gradient:
        return loss, logits
    gradient = wide.sub_(normaliser).exp_().mul_(counts.sum(-1, keepdim=True))
    if torch.compiler.is_compiling():  # comparisons become part of the one pass, a scatter does not
        places = torch.arange(wide.shape[-1], device=wide.device)
        for column in targets.unbind(-1):  # what does not count is no place
            gradient = gradient - (places == column[:, None]).to(gradient.dtype)
    else:
        gradient.scatter_add_(-1, chosen, -counts.to(gradient.dtype))
    if softcap is not None:
        gradient *= 1 - capped.square()
    return loss, gradient.to(logits.dtype)
