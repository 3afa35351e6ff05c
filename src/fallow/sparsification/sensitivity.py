"""What an error in the residual stream costs in divergence, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fallow.models.decoder import Decoder

TOKENS = 1024  # of a window that are looked at
_FIRST = 64  # tokens that are left out: the first ones of a text are unlike all others


def sensitivities(decoder: Decoder, windows: Sequence[Sequence[int]], generator: torch.Generator) -> Tensor:
    """Nats of Kullback-Leibler divergence a token that an error in the residual stream before each layer costs, and
    before the last norm, for the square of its size relative to the stream, float64 ``[layers + 1]``.

    To second order the divergence is the error under the Fisher information, ``E[(g error)^2] / 2``, where ``g`` is the
    gradient of the log-likelihood of tokens that the model itself draws (Martens, arXiv 1412.1193, section 5). The
    error is taken to lie in no particular direction. Parameters need no gradients.
    """
    totals = torch.zeros(len(decoder.layers) + 1, dtype=torch.float64)
    count = 0
    for window in windows:
        streams = _streams(decoder, torch.tensor([list(window[:TOKENS])]), generator)
        for layer, stream in enumerate(streams):
            assert stream.grad is not None
            gradient, values = (x[0, _FIRST:].square().sum(-1).double() for x in (stream.grad, stream.detach()))
            totals[layer] += (gradient * values).sum() / (2 * stream.shape[-1])
        count += streams[0].shape[1] - _FIRST
    return totals / count


def _streams(decoder: Decoder, tokens: Tensor, generator: torch.Generator) -> list[Tensor]:
    """The residual stream before each layer and the last norm, with the gradient of the summed log-likelihood of tokens
    that are drawn."""
    streams: list[Tensor] = []

    def keep(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        stream = arguments[0]
        if not streams:
            stream = stream.detach().requires_grad_(True)
        stream.retain_grad()
        streams.append(stream)
        return (stream, *arguments[1:])

    hooks = [module.register_forward_pre_hook(keep) for module in (*decoder.layers, decoder.norm)]
    try:
        with torch.enable_grad():
            logits = decoder.logits(decoder(tokens))[0]
            drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)
            logits.log_softmax(-1).gather(1, drawn).sum().backward()  # type: ignore[no-untyped-call]
    finally:
        for hook in hooks:
            hook.remove()
    return streams
