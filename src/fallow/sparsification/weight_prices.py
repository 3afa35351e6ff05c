"""What it costs in quality that small inputs of linear layers rest, or neurons with small gates, for every share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fallow.arrays import Float64
from fallow.models.decoder import Decoder, Layer
from fallow.sparsification.partial_reads import SHARES
from fallow.sparsification.stream_error import late_tokens, relative_error, stream_size

PARTS = ("o_proj", "down_proj", "neurons")
"""Inputs of two linear layers (TEAL, arXiv 2408.14690), and neurons by their gates (CATS, arXiv 2404.08763)."""


@dataclass(frozen=True)
class WeightErrors:
    """Float64 ``[layers, len(PARTS), len(SHARES)]`` each. ``thresholds``: below them rests about that share, in truth
    ``resting`` of the tokens that were looked at; ``errors``: the square of the relative error that the residual stream
    gets after the block where everything else is dense. Networks without gates have no neurons that rest: infinite
    errors."""

    thresholds: Float64
    resting: Float64
    errors: Float64


@torch.no_grad()
def weight_errors(
    decoder: Decoder,
    windows: Sequence[Sequence[int]],
    *,
    progress: Callable[[str, int, int | None], None] = lambda what, done, total: None,
) -> WeightErrors:
    """Thresholds are quantiles over the first window, the others are means over tokens in the second half of each."""
    shape = (len(decoder.layers), len(PARTS), len(SHARES))
    found = WeightErrors(np.zeros(shape), np.zeros(shape), np.zeros(shape))
    watched = [_Watched(layer) for layer in decoder.layers if isinstance(layer, Layer)]
    done = 0

    def look(index: int, layer: Layer, arguments: tuple[Any, ...], output: Tensor) -> None:
        nonlocal done
        for part, values in enumerate(watched[index].parts(arguments[0], output)):
            if values is None:
                found.errors[index, part] = np.inf
                continue
            if not done // len(watched):
                shares = torch.tensor(SHARES)
                found.thresholds[index, part] = torch.quantile(values.sizes.flatten(), shares).double().numpy()
            for i, threshold in enumerate(found.thresholds[index, part]):
                rests = values.sizes <= threshold
                found.resting[index, part, i] += float(rests.double().mean()) / len(windows)
                found.errors[index, part, i] += values.error(rests) / len(windows)
        done += 1
        progress("pricing weights", done, len(watched) * len(windows))

    hooks = [layer.register_forward_hook(partial(look, index)) for index, layer in enumerate(decoder.layers)]
    hooks += [hook for layer in watched for hook in layer.hooks]
    try:
        for window in windows:
            decoder(torch.tensor([list(window)]))
    finally:
        for hook in hooks:
            hook.remove()
    return found


@dataclass(frozen=True)
class _Values:
    """What goes into a linear layer, ``[tokens, width]``, of which ``sizes`` says what may rest. ``project`` is what
    comes of it, ``dense`` of all of it ``[tokens, hidden]``, in a residual stream of ``stream_size [tokens]``."""

    inputs: Tensor
    sizes: Tensor
    project: Callable[[Tensor], Tensor]
    dense: Tensor
    stream_size: Tensor

    def error(self, rests: Tensor) -> float:
        return relative_error(self.project(self.inputs.masked_fill(rests, 0)) - self.dense, self.stream_size)


class _Watched:
    """A layer, of which is kept what goes into its linear layers."""

    def __init__(self, layer: Layer) -> None:
        self._layer = layer
        self._seen: dict[str, Tensor] = {}
        self.hooks = [
            module.register_forward_pre_hook(partial(self._keep, name))
            for name, module in (("o_proj", layer.o_proj), ("down_proj", layer.down_proj))
        ]
        if layer.gate_proj is not None:
            self.hooks.append(layer.gate_proj.register_forward_hook(self._keep_gates))

    def _keep(self, name: str, module: torch.nn.Module, arguments: tuple[Tensor, ...]) -> None:
        self._seen[name] = arguments[0][0]

    def _keep_gates(self, module: torch.nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        self._seen["gates"] = output[0]

    def parts(self, x: Tensor, output: Tensor) -> list[_Values | None]:
        """Of some tokens of a pass, in the order of ``PARTS``; ``x`` and ``output`` are ``[1, tokens, hidden]``."""
        layer, chosen = self._layer, late_tokens(x.shape[1])
        seen = {name: values[chosen] for name, values in self._seen.items()}
        self._seen.clear()

        def attend(values: Tensor) -> Tensor:
            out: Tensor = layer.attention_post_norm(layer.o_proj(values))
            return out

        def feed(values: Tensor) -> Tensor:
            out: Tensor = layer.ffn_post_norm(layer.down_proj(values))
            return out

        attended, neurons = seen["o_proj"], seen["down_proj"]
        added = attend(attended)
        of_attention = _Values(attended, attended.abs(), attend, added, stream_size(x[0, chosen] + added))
        of_network = _Values(neurons, neurons.abs(), feed, feed(neurons), stream_size(output[0, chosen]))
        by_gates = None
        if "gates" in seen and layer.gate_quantile is None:
            by_gates = replace(of_network, sizes=layer.activation(seen["gates"]).abs())
        return [of_attention, of_network, by_gates]
