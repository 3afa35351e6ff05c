"""Tables of rotary position embeddings (RoFormer, arXiv 2104.09864) with the scalings that checkpoints ask for."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from fallow.arrays import Float32, Float64
from fallow.errors import ModelFileError
from fallow.models.config import RopeConfig


def rope_table(rope: RopeConfig, positions: int) -> Float32:
    """Cosines, then sines, of every position: float32 ``[positions, rotary_dim]``.

    Raises ``ModelFileError`` where the scaling is unknown or lacks a number.
    """
    frequencies, factor = _frequencies(rope, positions)
    if rope.frequency_factors is not None:
        if len(rope.frequency_factors) != frequencies.size:
            raise ModelFileError(
                f"RoPE has {frequencies.size} frequencies but {len(rope.frequency_factors)} factors for them."
            )
        frequencies = frequencies / np.asarray(rope.frequency_factors, np.float64)
    # Angles in float32, as the models were trained with.
    angles = np.arange(positions, dtype=np.float32)[:, None] * frequencies.astype(np.float32)[None, :]
    return np.concatenate([np.cos(angles) * factor, np.sin(angles) * factor], axis=1).astype(np.float32)


def longest_context(rope: RopeConfig, max_position_embeddings: int) -> int:
    """Positions for which a table that does not depend on the sequence's length is exact.

    Dynamic scaling changes with the length beyond the original context, which a cache of rotated keys cannot follow.
    """
    if rope.scaling == "dynamic":
        return int(_number(rope, "original_max_position_embeddings", max_position_embeddings))
    return max_position_embeddings


def _frequencies(rope: RopeConfig, positions: int) -> tuple[Float64, float]:
    base = rope.theta ** -(np.arange(0, rope.rotary_dim, 2, dtype=np.float64) / rope.rotary_dim)
    scalings: dict[str, Callable[[], tuple[Float64, float]]] = {
        "none": lambda: (base, 1.0),
        "dynamic": lambda: (base, 1.0),
        "linear": lambda: (base / _number(rope, "factor"), 1.0),
        "llama3": lambda: (_llama3(rope, base), 1.0),
        "yarn": lambda: _yarn(rope, base),
        "longrope": lambda: _longrope(rope, base, positions),
    }
    if rope.scaling not in scalings:
        raise ModelFileError(f"RoPE scaling {rope.scaling!r} is not supported: use one of {', '.join(scalings)}.")
    return scalings[rope.scaling]()


def _number(rope: RopeConfig, name: str, default: float | None = None) -> float:
    value = rope.parameters.get(name, default)
    if not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise ModelFileError(f"RoPE scaling {rope.scaling!r} needs a positive {name} in config.json.")
    return float(value)


def _llama3(rope: RopeConfig, base: Float64) -> Float64:
    """Llama 3.1: long wavelengths are stretched, short ones kept, those between blended."""
    original = _number(rope, "original_max_position_embeddings")
    low, high = _number(rope, "low_freq_factor"), _number(rope, "high_freq_factor")
    factor = _number(rope, "factor")
    smooth = np.clip((original * base / (2 * math.pi) - low) / (high - low), 0.0, 1.0)
    return (1 - smooth) * base / factor + smooth * base


def _yarn(rope: RopeConfig, base: Float64) -> tuple[Float64, float]:
    """YaRN (arXiv 2309.00071, section 3.2 and 3.4): by-parts interpolation and a temperature on the logits."""
    factor = _number(rope, "factor")
    original = _number(rope, "original_max_position_embeddings")
    dim = rope.rotary_dim

    def dimension_of(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low = max(math.floor(dimension_of(_number(rope, "beta_fast", 32.0))), 0)
    high = min(math.ceil(dimension_of(_number(rope, "beta_slow", 1.0))), dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / max(high - low, 0.001), 0.0, 1.0)
    frequencies = base / factor * ramp + base * (1 - ramp)

    def magnitude(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    attention = rope.parameters.get("attention_factor")
    if isinstance(attention, int | float):
        return frequencies, float(attention)
    mscale, mscale_all = rope.parameters.get("mscale"), rope.parameters.get("mscale_all_dim")
    if isinstance(mscale, int | float) and isinstance(mscale_all, int | float) and mscale and mscale_all:
        return frequencies, magnitude(mscale) / magnitude(mscale_all)
    return frequencies, magnitude(1.0)


def _longrope(rope: RopeConfig, base: Float64, positions: int) -> tuple[Float64, float]:
    """LongRoPE (arXiv 2402.13753): searched factors a frequency, one set for short and one for long contexts."""
    original = _number(rope, "original_max_position_embeddings")
    name = "long_factor" if positions > original else "short_factor"
    factors = rope.parameters.get(name)
    if not isinstance(factors, list) or len(factors) != base.size:
        raise ModelFileError(f"RoPE scaling 'longrope' needs {base.size} numbers in {name}.")
    factor = _number(rope, "factor", max(positions / original, 1.0))
    attention = rope.parameters.get("attention_factor")
    if not isinstance(attention, int | float):
        attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return base / np.asarray(factors, np.float64), float(attention)
