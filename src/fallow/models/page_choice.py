"""Attention that reads some pages of the KV cache, in PyTorch: what the native kernels are held against.

A page stands for its keys by the mean and the variance of each dimension. Were they drawn from a normal distribution,
the mean of ``exp(q k)`` over them would be ``exp(q mean + q^2 variance / 2)``: so much of a head's attention is
expected there. The pages with the most, summed over the heads that share the keys, are read. To choose by a summary of
a page is the idea of Quest (arXiv 2406.10774), whose minima and maxima of keys need more pages for the same error.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from fallow.models.resting import PageRule

PAGE_SIZE = 32  # tokens, as in the native core
_QUERIES = 256  # at once


def page_masses(q: Tensor, k: Tensor, positions: Tensor, ends: tuple[int, int], scale: float) -> tuple[Tensor, Tensor]:
    """How much attention a query is expected to pay to a page, summed over the heads that share its keys, ``[batch,
    kv_heads, queries, pages]``, below 0 where a page is not up for choice; and which pages are read anyway, bool
    ``[queries, pages]``.

    ``q [batch, heads, queries, head_dim]`` at ``positions`` (int64 ``[queries]``), ``k [batch, kv_heads, tokens,
    head_dim]``; ``ends`` are the ``sink_pages`` and ``recent_pages`` of a ``PageRule``. Summaries and what faces them
    are rounded to bfloat16, as they are kept.
    """
    batch, kv_heads, tokens, dim = k.shape
    pages = tokens // PAGE_SIZE  # full ones
    number = torch.arange(-(-tokens // PAGE_SIZE), device=q.device)
    own = positions[:, None] // PAGE_SIZE
    always = ((number < ends[0]) | (number > own - ends[1])) & (number <= own)
    candidates = ~always & (number <= own)  # [queries, pages]
    keys = k[:, :, : pages * PAGE_SIZE].float().reshape(batch, kv_heads, pages, PAGE_SIZE, dim)
    variance, mean = torch.var_mean(keys, 3, correction=0)
    grouped = q.float().reshape(batch, kv_heads, -1, q.shape[2], dim)  # [batch, kv_heads, group, queries, head_dim]
    squares = (0.5 * scale * grouped.square()).bfloat16().float()
    expected = grouped @ mean.bfloat16().float().mT[:, :, None] + squares @ variance.bfloat16().float().mT[:, :, None]
    expected = F.pad(expected * scale, (0, len(number) - pages), value=float("-inf"))
    expected = expected.masked_fill(~candidates, float("-inf"))
    return expected.softmax(-1).sum(2).masked_fill(~candidates, -1.0), always


@torch.no_grad()
def chosen_pages(q: Tensor, k: Tensor, rule: PageRule, scale: float, first: int = 0) -> Tensor:
    """Which pages each query reads, bool ``[batch, kv_heads, queries, pages]``; the first query is the token ``first``.

    ``q`` and ``k`` as ``page_masses`` has them. The choice has no gradient.
    """
    positions = torch.arange(first, first + q.shape[2], device=q.device)
    masses, always = page_masses(q, k, positions, (rule.sink_pages, rule.recent_pages), scale)
    best = masses.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)  # each page's place
    return always | ((best < _top_pages(rule, positions)[..., None]) & (masses >= 0))


def _top_pages(rule: PageRule, positions: Tensor) -> Tensor:
    """How many pages beside the ends the query at each position reads, int64 ``[kv_heads, queries]``."""
    top = torch.tensor(rule.top_pages, device=positions.device)[:, None]
    pages, ends = positions // PAGE_SIZE + 1, rule.sink_pages + rule.recent_pages
    if rule.context_pages is None:
        return top.expand(-1, len(positions))
    more = (ends + top) * pages // rule.context_pages - ends
    return torch.where(pages > rule.context_pages, more, top)


def attention_to_chosen_pages(
    q: Tensor, k: Tensor, v: Tensor, rule: PageRule, scale: float, *, mask: Tensor | None = None
) -> Tensor:
    """Causal attention ``[batch, heads, tokens, head_dim]`` of all tokens to the pages that each one chooses, and there
    to what ``mask`` (bool ``[batch or 1, 1, tokens, tokens]``; True: may be seen) leaves."""
    tokens, group = q.shape[2], q.shape[1] // k.shape[1]
    outs = []
    for first in range(0, tokens, _QUERIES):
        part = q[:, :, first : first + _QUERIES]
        end = first + part.shape[2]
        chosen = chosen_pages(part, k[:, :, :end], rule, scale, first)
        seen = chosen.repeat_interleave(PAGE_SIZE, -1)[..., :end].repeat_interleave(group, 1)
        seen = seen & (_causal(part.shape[2], end, first, q.device) if mask is None else mask[:, :, first:end, :end])
        outs.append(
            F.scaled_dot_product_attention(
                part, k[:, :, :end], v[:, :, :end], attn_mask=seen, scale=scale, enable_gqa=group > 1
            )
        )
    return torch.cat(outs, 2)


def _causal(queries: int, keys: int, first: int, device: torch.device) -> Tensor:
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(first)
