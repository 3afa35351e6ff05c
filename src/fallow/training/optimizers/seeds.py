"""Random numbers that can be had again from two integers."""

from __future__ import annotations

import numpy as np
import torch


def seeded(seed: int, draw: int, device: torch.device) -> torch.Generator:
    """The generator of drawing number ``draw`` from ``seed``; neighbouring seeds and drawings are independent."""
    return torch.Generator(device).manual_seed(draw_of(seed, draw))


def draw_of(seed: int, draw: int) -> int:
    """The seed of that generator: 32 bits, which is all that PyTorch's CPU generator uses."""
    return int(np.random.SeedSequence((seed, draw)).generate_state(1)[0])
