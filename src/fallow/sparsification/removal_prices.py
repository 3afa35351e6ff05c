"""What it costs in quality that heads or neurons of a layer are taken out of it, in any number."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fallow.arrays import Float64, Int64
from fallow.models.decoder import Decoder, Layer, RMSNorm
from fallow.models.structure import NEURON_GROUP
from fallow.sparsification.stream_error import late_tokens, stream_size

_TOKENS_AT_ONCE = 32


@dataclass(frozen=True)
class Removals:
    """Parts of each layer in the ``order [layers, parts]`` in which they go, and ``errors [layers, parts]``, float64:
    the square of the relative error that the residual stream gets after the block where the first, the first two and so
    on are taken out and everything else is dense."""

    order: Int64
    errors: Float64


@torch.no_grad()
def removal_errors(
    decoder: Decoder,
    windows: Sequence[Sequence[int]],
    *,
    progress: Callable[[str, int, int | None], None] = lambda what, done, total: None,
) -> tuple[Removals, Removals]:
    """Of KV heads with the queries that share them, and of groups of ``NEURON_GROUP`` neurons: means over tokens in the
    second half of each window.

    What parts add to the stream adds up, so the products of what any two of them add tell the error of every set. Next
    goes the part that adds least to it. A norm after the block counts as the factors that it has for the dense model.
    """
    config = decoder.config
    heads_width = config.num_attention_heads // config.num_key_value_heads * config.head_dim
    attentions, networks, hooks = [], [], []
    for layer in decoder.layers:
        assert isinstance(layer, Layer)
        attention = _Block(layer.o_proj.weight, layer.attention_post_norm, heads_width)
        network = _Block(layer.down_proj.weight, layer.ffn_post_norm, NEURON_GROUP)
        hooks += [
            layer.register_forward_pre_hook(attention.keep),
            layer.o_proj.register_forward_hook(attention.look),
            layer.ffn_norm.register_forward_pre_hook(network.keep),
            layer.down_proj.register_forward_hook(network.look),
        ]
        attentions.append(attention)
        networks.append(network)
    try:
        for done, window in enumerate(windows):
            progress("pricing removals", done, len(windows))
            decoder(torch.tensor([list(window)]))
    finally:
        for hook in hooks:
            hook.remove()
    heads, neurons = ([block.products / len(windows) for block in blocks] for blocks in (attentions, networks))
    return _in_order(heads), _in_order(neurons)


class _Block:
    """Attention or a feed-forward network, whose last matrix has ``weight [hidden, width]``, by parts of ``part_width``
    inputs each. ``products [parts, parts]`` are sums over windows of means over tokens: of what each two parts add to
    the stream, relative to its size after the block."""

    def __init__(self, weight: Tensor, norm: nn.Module, part_width: int) -> None:
        count = weight.shape[1] // part_width
        self._by_part = weight[:, : count * part_width].reshape(-1, count, part_width)  # [hidden, count, part_width]
        self._norm = norm
        self._stream = torch.empty(0)
        self.products: Float64 = np.zeros((count, count))

    def keep(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        """The stream before the block, ``[1, tokens, hidden]``."""
        self._stream = arguments[0]

    def look(self, module: nn.Module, arguments: tuple[Tensor, ...], out: Tensor) -> None:
        """At what goes into the last matrix and comes out of it, ``[1, tokens, ...]`` each."""
        chosen = late_tokens(out.shape[1])
        out = out[0, chosen]
        factor = torch.ones_like(out)
        if isinstance(self._norm, RMSNorm):
            factor = self._norm.weight * torch.rsqrt(out.square().mean(-1, keepdim=True) + self._norm.eps)
        share = factor / stream_size(self._stream[0, chosen] + factor * out).sqrt()[:, None]
        _, count, width = self._by_part.shape
        values = arguments[0][0, chosen, : count * width].reshape(-1, count, width)
        for first in range(0, len(chosen), _TOKENS_AT_ONCE):
            rows = slice(first, first + _TOKENS_AT_ONCE)
            added = torch.einsum("tcw,hcw->tch", values[rows], self._by_part) * share[rows, None]
            self.products += torch.einsum("tch,tdh->cd", added, added).double().numpy() / len(chosen)


def _in_order(products: Sequence[Float64]) -> Removals:
    """Of the products of each layer, ``[parts, parts]``."""
    layers, parts = len(products), len(products[0])
    order, errors = np.zeros((layers, parts), np.int64), np.zeros((layers, parts))
    for layer, of_two in enumerate(products):
        left = list(range(parts))
        total = 0.0
        more = of_two.diagonal().copy()  # than now, were this part taken out too
        for place in range(parts):
            part = left.pop(int(np.argmin(more[left])))
            total += more[part]
            more += 2 * of_two[part]
            order[layer, place], errors[layer, place] = part, max(total, 0.0)
    return Removals(order, errors)
