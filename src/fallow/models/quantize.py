"""Float32 matrices → GGUF blocks of 32, scales chosen to lose least.

A block keeps its scale (and minimum) in float16. For 4 bits they are searched: each candidate range gives codes, the
codes give the least-squares scale in closed form, and the candidate with the smallest weighted squared error is kept.
The idea is that of ggml's ``make_qx_quants`` / ``make_qkx2_quants``; errors are compared after the rounding to float16,
so the result is never worse than rounding with the plain scale, block by block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from fallow.arrays import Bytes, Float32
from fallow.errors import ModelFileError

_GROUP = 32
_CHUNK_BLOCKS = 1024  # the working arrays of a chunk stay in the cache
_LARGEST = 65504.0  # of float16

# How much wider or narrower than the plain range the range of the codes is tried, in code steps.
_Q4_0_STEPS = (-1.6, -1.2, -0.9, -0.6, -0.3, 0.0, 0.3, 0.6, 0.9)
# Which part of the range is cut off below and above; a little less than nothing also wins at times.
_Q4_1_CUTS = (-0.02, 0.01, 0.04, 0.08)


def quantize_q8_0(values: Float32) -> Bytes:
    """float32 ``[rows, columns]`` → uint8 ``[rows, columns / 32 * 34]``: 8-bit codes with one scale a group of 32.

    Raises ``ModelFileError`` where the columns are not a multiple of 32 or a value is not finite.
    """
    return _quantize(values, None, 34, _q8_0)


def quantize_q4_0(values: Float32, importance: Float32 | None = None) -> Bytes:
    """float32 ``[rows, columns]`` → uint8 ``[rows, columns / 32 * 18]``: codes from -8 to 7 with a scale a group.

    ``importance [columns]`` weighs the squared errors: the second moments of the activations that meet the columns.
    Raises ``ModelFileError`` where the columns are not a multiple of 32 or a value is not finite.
    """
    return _quantize(values, importance, 18, _q4_0)


def quantize_q4_1(values: Float32, importance: Float32 | None = None) -> Bytes:
    """As ``quantize_q4_0``, with codes from 0 to 15, a scale and a minimum: uint8 ``[rows, columns / 32 * 20]``."""
    return _quantize(values, importance, 20, _q4_1)


def _quantize(
    values: Float32, importance: Float32 | None, block_bytes: int, encode: Callable[[Float32, Float32, Bytes], None]
) -> Bytes:
    rows, columns = values.shape
    if columns % _GROUP:
        raise ModelFileError(
            f"A matrix with {columns} columns cannot be quantised in groups of {_GROUP}: use the precision bf16."
        )
    groups = columns // _GROUP
    out = np.empty((rows * groups, block_bytes), np.uint8)
    weights = _weights(importance, columns)
    for first, last in _chunks(rows, groups):
        x = np.ascontiguousarray(values[first:last].reshape(-1, _GROUP).T, np.float32)  # [32, blocks]
        # A comparison with NaN is false, so this refuses it as well.
        if not np.abs(x).max(initial=0.0) <= _LARGEST * 7:
            raise ModelFileError("The model has weights that are infinite, not numbers, or too large to quantise.")
        encode(x, np.tile(weights, last - first), out[first * groups : last * groups])
    return out.reshape(rows, groups * block_bytes)


def _chunks(rows: int, groups: int) -> Iterator[tuple[int, int]]:
    step = max(1, _CHUNK_BLOCKS // max(groups, 1))
    for first in range(0, rows, step):
        yield first, min(first + step, rows)


def _weights(importance: Float32 | None, columns: int) -> Float32:
    """Weights of the columns, float32 ``[32, groups]``, none of them zero so that every group has a best scale."""
    if importance is None:
        return np.ones((_GROUP, columns // _GROUP), np.float32)
    if importance.shape != (columns,) or not np.all(np.isfinite(importance) & (importance >= 0)):
        raise ValueError(f"importance must be {columns} finite numbers, none below 0.")
    scaled = importance.astype(np.float64) / max(float(importance.mean()), 1e-30)
    return np.ascontiguousarray((scaled + 1e-6).astype(np.float32).reshape(-1, _GROUP).T)


def _half(x: Float32) -> Float32:
    """Rounded to float16, as the block will hold it."""
    return x.astype(np.float16).astype(np.float32)


def _inverse(x: Float32) -> Float32:
    """1 / x, and 0 where x is 0."""
    return np.divide(np.float32(1), x, out=np.zeros_like(x), where=x != 0)


def _q8_0(x: Float32, weights: Float32, out: Bytes) -> None:
    scale = _half(np.abs(x).max(axis=0) / np.float32(127))
    codes = np.clip(np.rint(x * _inverse(scale)), -127, 127).astype(np.int8)
    out[:, :2] = scale.astype(np.float16).view(np.uint8).reshape(-1, 2)
    out[:, 2:] = codes.T.view(np.uint8)


def _q4_0(x: Float32, weights: Float32, out: Bytes) -> None:
    """Candidates put the largest value at code -8 + step; least squares then moves the scale."""
    largest = np.take_along_axis(x, np.abs(x).argmax(axis=0)[None], axis=0)[0]
    weighted = weights * x
    codes, product = np.empty_like(x), np.empty_like(x)
    best_scale = _half(largest / np.float32(-8))
    best_error = np.full(largest.shape, np.inf, np.float32)

    def consider(scale: Float32, *, fit: bool) -> None:
        np.multiply(x, _inverse(scale), out=codes)
        np.clip(np.rint(codes, out=codes), -8, 7, out=codes)
        along = np.multiply(weighted, codes, out=product).sum(axis=0)
        np.multiply(codes, codes, out=codes)
        square = np.multiply(weights, codes, out=codes).sum(axis=0)
        if fit:
            scale = _half(along * _inverse(square))
        # The squared error without its constant part, the weighted square of x.
        error = scale * (scale * square - 2 * along)
        better = error < best_error
        np.copyto(best_error, error, where=better)
        np.copyto(best_scale, scale, where=better)

    consider(best_scale.copy(), fit=False)
    for step in _Q4_0_STEPS:
        consider(largest / np.float32(-8 - step), fit=True)
    consider(best_scale.copy(), fit=True)
    codes = np.clip(np.rint(x * _inverse(best_scale)), -8, 7) + np.float32(8)
    out[:, :2] = best_scale.astype(np.float16).view(np.uint8).reshape(-1, 2)
    out[:, 2:] = _packed(codes)


def _q4_1(x: Float32, weights: Float32, out: Bytes) -> None:
    """Candidates cut a part off the range below and above; least squares then moves scale and minimum."""
    low, high = x.min(axis=0), x.max(axis=0)
    # Around the middle of the range, so that the sums below do not cancel where all values are far from zero.
    middle = (low + high) * np.float32(0.5)
    centred = x - middle
    low, span = low - middle, high - low
    weighted = weights * centred
    total, first = weights.sum(axis=0), weighted.sum(axis=0)
    codes, product = np.empty_like(x), np.empty_like(x)
    best_scale, best_minimum = _half(span / np.float32(15)), _half(low + middle)
    best_error = np.full(span.shape, np.inf, np.float32)

    def consider(scale: Float32, minimum: Float32, *, fit: bool) -> None:
        """``minimum`` is relative to the middle."""
        np.multiply(np.subtract(centred, minimum, out=codes), _inverse(scale), out=codes)
        np.clip(np.rint(codes, out=codes), 0, 15, out=codes)
        along = np.multiply(weighted, codes, out=product).sum(axis=0)
        np.multiply(weights, codes, out=product)
        codes_sum = product.sum(axis=0)
        square = np.multiply(product, codes, out=product).sum(axis=0)
        if fit:
            determinant = _inverse(total * square - codes_sum * codes_sum)
            scale = _half((total * along - first * codes_sum) * determinant)
            rounded = _half((first - scale * codes_sum) / total + middle)
        else:
            rounded = _half(minimum + middle)
        minimum = rounded - middle
        error = scale * (scale * square - 2 * along + 2 * minimum * codes_sum) + minimum * (minimum * total - 2 * first)
        better = error < best_error
        np.copyto(best_error, error, where=better)
        np.copyto(best_scale, scale, where=better)
        np.copyto(best_minimum, rounded, where=better)

    consider(best_scale.copy(), best_minimum - middle, fit=False)
    for below in _Q4_1_CUTS:
        for above in _Q4_1_CUTS:
            consider(span * np.float32((1 - below - above) / 15), low + span * np.float32(below), fit=True)
    consider(best_scale.copy(), best_minimum - middle, fit=True)
    codes = np.clip(np.rint((x - best_minimum) * _inverse(best_scale)), 0, 15)
    out[:, :2] = best_scale.astype(np.float16).view(np.uint8).reshape(-1, 2)
    out[:, 2:4] = best_minimum.astype(np.float16).view(np.uint8).reshape(-1, 2)
    out[:, 4:] = _packed(codes)


def _packed(codes: Float32) -> Bytes:
    """Codes from 0 to 15, float32 ``[32, blocks]`` → uint8 ``[blocks, 16]``: the first half low, the second high."""
    whole = codes.astype(np.uint8)
    return np.ascontiguousarray((whole[:16] | (whole[16:] << 4)).T)
