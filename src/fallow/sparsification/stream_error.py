"""Errors of the residual stream, as prices of several axes take them: at some tokens, relative to its size."""

from __future__ import annotations

import torch
from torch import Tensor

_TOKENS = 256  # of a window


def late_tokens(count: int) -> Tensor:
    """Positions in the second half of a window of ``count`` tokens, evenly spread."""
    return torch.linspace(count // 2, count - 1, min(_TOKENS, count // 2)).long()


def stream_size(stream: Tensor) -> Tensor:
    """The square of each token's size, ``[tokens]``, of ``stream [tokens, hidden]``."""
    return stream.square().sum(-1)


def relative_error(error: Tensor, size: Tensor) -> float:
    """The mean over tokens of the square of ``error [tokens, hidden]`` relative to ``size [tokens]``."""
    return float((stream_size(error) / size).double().mean())
