"""What it costs in quality that the heads of a layer read few pages of the KV cache, for every number of pages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from fallow.models.decoder import Decoder, Layer, Rope
from fallow.models.page_choice import PAGE_SIZE, page_masses
from fallow.sparsification.stream_error import late_tokens, relative_error, stream_size

COUNTS = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192)
"""How many pages are tried."""
SINK_PAGES, RECENT_PAGES = 1, 2
"""What every query reads: as many pages chosen by their summaries cost less than more recent ones."""


@torch.no_grad()
def page_errors(
    decoder: Decoder,
    windows: Sequence[Sequence[int]],
    queries: Sequence[Tensor] | None = None,
    *,
    progress: Callable[[str, int, int | None], None] = lambda what, done, total: None,
) -> Tensor:
    """The square of the relative error of the residual stream after attention where one KV head reads so many pages
    and all else is dense, float64 ``[layers, kv_heads, len(COUNTS)]``; zero in layers with a window of their own.

    The mean over the positions ``queries`` of each window, int64 ``[n]``; None: some in its second half.
    """
    queries = queries or [late_tokens(len(window)) for window in windows]
    config = decoder.config
    errors = torch.zeros(config.num_hidden_layers, config.num_key_value_heads, len(COUNTS), dtype=torch.float64)
    done = 0

    def look(index: int, at: Tensor, layer: Layer, arguments: tuple[Any, ...]) -> None:
        nonlocal done
        x, tokens, rope, _ = arguments
        if config.layer_windows[index] is None:
            errors[index] += _layer_errors(layer, x, tokens, rope, at)
        done += 1
        progress("pricing pages", done, len(decoder.layers) * len(windows))

    for window, at in zip(windows, queries, strict=True):
        hooks = [layer.register_forward_pre_hook(partial(look, i, at)) for i, layer in enumerate(decoder.layers)]
        try:
            decoder(torch.tensor([list(window)]))
        finally:
            for handle in hooks:
                handle.remove()
    return errors / len(windows)


def _layer_errors(layer: Layer, x: Tensor, tokens: Tensor, rope: Rope, queries: Tensor) -> Tensor:
    """``[kv_heads, len(COUNTS)]`` of one layer; ``x [1, tokens, hidden]``."""
    q, k, v = layer.queries_keys_values(layer.attention_norm(x), tokens, rope)
    kv_heads = k.shape[1]
    q = q[:, :, queries]
    masses, always = page_masses(q, k, queries, (SINK_PAGES, RECENT_PAGES), layer.attention_scale)
    heads = [
        _HeadPages(head, k[0, i], v[0, i], masses[0, i], always, queries, layer.attention_scale)
        for i, head in enumerate(q[0].reshape(kv_heads, -1, len(queries), layer.head_dim))
    ]
    exact = [head.reading_all() for head in heads]  # [queries, group * head_dim] each
    projected = layer.o_proj(torch.cat(exact, -1))
    dense = layer.attention_post_norm(projected)
    size = stream_size(x[0, queries] + dense)
    errors = torch.zeros(kv_heads, len(COUNTS), dtype=torch.float64)
    for i, (head, columns) in enumerate(zip(heads, layer.o_proj.weight.chunk(kv_heads, 1), strict=True)):
        for j, pages in enumerate(COUNTS):
            changed = F.linear(head.reading(pages) - exact[i], columns)
            errors[i, j] = relative_error(layer.attention_post_norm(projected + changed) - dense, size)
    return errors


class _HeadPages:
    """The attention of one KV head's queries, page by page, the pages up for choice in the order of their masses."""

    def __init__(  # noqa: PLR0917
        self, q: Tensor, k: Tensor, v: Tensor, masses: Tensor, always: Tensor, positions: Tensor, scale: float
    ) -> None:
        tokens, pages = k.shape[0], masses.shape[-1]
        later = torch.arange(tokens) > positions[:, None]
        attention = (q @ k.T * scale).masked_fill(later, float("-inf")).softmax(-1)  # [group, queries, tokens]
        short = pages * PAGE_SIZE - tokens
        by_page = F.pad(attention, (0, short)).view(*attention.shape[:2], pages, PAGE_SIZE)
        values = F.pad(v, (0, 0, 0, short)).view(pages, PAGE_SIZE, -1)
        sums = torch.einsum("gqpt,ptd->gqpd", by_page, values)
        parts = torch.cat((sums, by_page.sum(-1, keepdim=True)), -1)  # [group, queries, pages, head_dim + 1]
        self._always = torch.einsum("gqpd,qp->gqd", parts, always.float())
        self._all = parts.sum(2)
        best, ranked = (x[:, : max(COUNTS)] for x in masses.sort(dim=-1, descending=True, stable=True))
        chosen = parts.gather(2, ranked[None, :, :, None].expand(len(parts), -1, -1, parts.shape[-1]))
        self._chosen = (chosen * (best >= 0)[..., None]).cumsum(2)

    def reading(self, pages: int) -> Tensor:
        """What the heads attend to with so many pages, ``[queries, group * head_dim]``."""
        if pages == 0:
            return _divided(self._always)
        return _divided(self._always + self._chosen[:, :, min(pages, self._chosen.shape[2]) - 1])

    def reading_all(self) -> Tensor:
        return _divided(self._all)


def _divided(sums: Tensor) -> Tensor:
    return (sums[..., :-1] / sums[..., -1:]).transpose(0, 1).flatten(1)
