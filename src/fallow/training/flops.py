"""How much arithmetic a training step is, and how much of it this machine could do."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from fallow.models.config import ModelConfig
from fallow.models.decoder import Decoder

_SIZES = {"cpu": 1024, "cuda": 8192}  # of the matrices: the fewest rows that are near the most that is reached
_SECONDS = 0.3


def flops_per_token(decoder: Decoder, context: int, *, forward_only: bool = False) -> int:
    """Floating-point operations of a training step for each token: 6 for each weight of a product, 4 where it is
    frozen, and attention's 12 layers x width x context (PaLM, arXiv 2204.02311, appendix B), halved as half of it is
    masked; of a forward pass alone a third of that. Embeddings that are only looked up count nothing."""
    config: ModelConfig = decoder.config
    products: list[Tensor] = [p for name, p in decoder.named_parameters() if p.ndim == 2 and "embed" not in name]
    products += [] if decoder.lm_head is not None else [decoder.head]
    width = config.num_attention_heads * config.head_dim
    attention = 6 * config.num_hidden_layers * width * context
    if forward_only:
        return sum(2 * p.numel() for p in products) + attention // 3
    return sum((6 if p.requires_grad else 4) * p.numel() for p in products) + attention


def peak_flops(dtype: torch.dtype, device: torch.device) -> float:
    """Floating-point operations a second of a large matrix product on ``device``, measured now."""
    size = _SIZES[device.type]
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    float((a @ b)[0, 0])  # what is loaded once
    best, started = float("inf"), time.perf_counter()
    while time.perf_counter() - started < _SECONDS:
        begin = time.perf_counter()
        float((a @ b)[0, 0])  # a GPU's product is done when it is read
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best
