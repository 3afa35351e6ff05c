"""Causal attention on a CPU in bfloat16, a block of keys at a time: half of the scores are never computed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

BLOCK = 128  # keys at once


def blocks_are_faster(q: Tensor) -> bool:
    """Where this attention takes half the time of PyTorch's: compiled, in bfloat16 on a CPU, and longer than a block.
    Elsewhere it gains nothing."""
    return torch.compiler.is_compiling() and q.is_cpu and q.dtype == torch.bfloat16 and q.shape[2] > BLOCK


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """``softmax(scale q k^T) v`` where a position sees itself and those before it.

    ``q``, ``k``, ``v`` are ``[batch, heads, tokens, head_dim]``, and so is the result. As FlashAttention does (arXiv
    2307.08691, algorithms 1 and 2), nothing quadratic is kept for the backward pass: scores are computed again.
    """
    out: Tensor = _CausalAttention.apply(q, k, v, scale)  # type: ignore[no-untyped-call]
    return out


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        shape, tokens = q.shape, q.shape[2]
        q, k, v = (x.reshape(-1, tokens, x.shape[3]) for x in (q, k, v))  # [sequences and heads, tokens, head_dim]
        outs, normalisers = [], []
        for start in range(0, tokens, BLOCK):
            rows = slice(start, min(start + BLOCK, tokens))
            scores = _scores(q[:, rows], k[:, : rows.stop], scale, start)
            normaliser = scores.logsumexp(-1, keepdim=True)
            outs.append(torch.bmm((scores - normaliser).exp().to(v.dtype), v[:, : rows.stop]))
            normalisers.append(normaliser)
        out = torch.cat(outs, 1)
        ctx.save_for_backward(q, k, v, out, torch.cat(normalisers, 1))
        ctx.scale = scale
        return out.view(shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out, normaliser = ctx.saved_tensors
        shape, tokens = gradient.shape, gradient.shape[2]
        gradient = gradient.reshape(out.shape)
        dot = (gradient.float() * out.float()).sum(-1, keepdim=True)  # [sequences and heads, tokens, 1]
        k_gradients, v_gradients = [], []
        q_gradient = torch.zeros_like(q, dtype=torch.float32)
        for start in range(0, tokens, BLOCK):
            keys = slice(start, min(start + BLOCK, tokens))
            scores = _scores(q[:, start:], k[:, keys], ctx.scale, 0)
            weights = (scores - normaliser[:, start:]).exp()
            change = torch.bmm(gradient[:, start:], v[:, keys].mT).float()
            change = ((change - dot[:, start:]) * weights * ctx.scale).to(q.dtype)
            v_gradients.append(torch.bmm(weights.to(v.dtype).mT, gradient[:, start:]))
            k_gradients.append(torch.bmm(change.mT, q[:, start:]))
            q_gradient[:, start:] += torch.bmm(change, k[:, keys])
        return (
            q_gradient.to(q.dtype).view(shape),
            torch.cat(k_gradients, 1).view(shape),
            torch.cat(v_gradients, 1).view(shape),
            None,
        )


def _scores(q: Tensor, k: Tensor, scale: float, offset: int) -> Tensor:
    """Float32 ``[.., rows, keys]``; the first row's position is ``offset`` keys after the first key's."""
    scores = torch.bmm(q, k.mT).float() * scale
    unseen = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu(offset + 1)
    return scores.masked_fill(unseen, float("-inf"))
