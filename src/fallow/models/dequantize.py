"""The numbers that the bytes of each storage type stand for (ggml's block layouts), in float32: the reference."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fallow.arrays import Bytes, Float32
from fallow.models.tensors import RawTensor, TensorType


def dequantize(raw: RawTensor) -> Float32:
    """The tensor as float32, in its shape. Raises ``ModelFileError`` where its file ends too early."""
    return dequantize_rows(raw.read(), raw.type).reshape(raw.shape)


def dequantize_rows(rows: Bytes, type: TensorType) -> Float32:
    """uint8 ``[rows, bytes per row]`` → float32 ``[rows, columns]``."""
    blocks = np.ascontiguousarray(rows).reshape(-1, type.block_bytes)
    # Infinities and NaN in a damaged file are the numbers that its bytes stand for.
    with np.errstate(invalid="ignore", over="ignore"):
        return _DECODERS[type](blocks).reshape(len(rows), -1)


def _f32(blocks: Bytes) -> Float32:
    return blocks.view("<f4").astype(np.float32, copy=False)


def _f16(blocks: Bytes) -> Float32:
    return blocks.view("<f2").astype(np.float32)


def _bf16(blocks: Bytes) -> Float32:
    return (blocks.view("<u2").astype(np.uint32) << 16).view(np.float32)


def _nibbles(packed: Bytes) -> Bytes:
    """``[..., n]`` bytes → ``[..., 2 n]`` codes from 0 to 15: all low halves, then all high halves."""
    return np.concatenate([packed & 15, packed >> 4], axis=-1)


def _q4_0(blocks: Bytes) -> Float32:
    codes = _nibbles(blocks[:, 2:]).astype(np.float32) - np.float32(8)
    return _f16(blocks[:, :2].copy()) * codes


def _q4_1(blocks: Bytes) -> Float32:
    scale, minimum = _f16(blocks[:, :2].copy()), _f16(blocks[:, 2:4].copy())
    return scale * _nibbles(blocks[:, 4:]).astype(np.float32) + minimum


def _five_bits(high: Bytes, low: Bytes) -> Float32:
    """Codes from 0 to 31: the fifth bits ``[n, 4]`` in order, the others as in Q4."""
    fifth = np.unpackbits(high, axis=1, bitorder="little")
    return (_nibbles(low) | (fifth << 4)).astype(np.float32)


def _q5_0(blocks: Bytes) -> Float32:
    return _f16(blocks[:, :2].copy()) * (_five_bits(blocks[:, 2:6], blocks[:, 6:]) - np.float32(16))


def _q5_1(blocks: Bytes) -> Float32:
    scale, minimum = _f16(blocks[:, :2].copy()), _f16(blocks[:, 2:4].copy())
    return scale * _five_bits(blocks[:, 4:8], blocks[:, 8:]) + minimum


def _q8_0(blocks: Bytes) -> Float32:
    return _f16(blocks[:, :2].copy()) * blocks[:, 2:].view(np.int8).astype(np.float32)


def _k_scales(packed: Bytes) -> tuple[Float32, Float32]:
    """The 6-bit scales and minima of 8 groups, packed in 12 bytes: float32 ``[n, 8, 1]`` each."""
    first, second, last = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([first & 63, (last & 15) | ((first >> 6) << 4)], axis=1)
    minima = np.concatenate([second & 63, (last >> 4) | ((second >> 6) << 4)], axis=1)
    return scales.astype(np.float32)[:, :, None], minima.astype(np.float32)[:, :, None]


def _k_values(blocks: Bytes, codes: Bytes) -> Float32:
    """Q4_K and Q5_K: scale and minimum of a block, of each of its groups, and the codes ``[n, 8, 32]``."""
    scale, minimum = _f16(blocks[:, :2].copy())[:, :, None], _f16(blocks[:, 2:4].copy())[:, :, None]
    scales, minima = _k_scales(blocks[:, 4:16])
    return (scale * scales) * codes.astype(np.float32) - minimum * minima


def _q4_k(blocks: Bytes) -> Float32:
    return _k_values(blocks, _nibbles(blocks[:, 16:].reshape(-1, 4, 32)).reshape(-1, 8, 32))


def _q5_k(blocks: Bytes) -> Float32:
    low = _nibbles(blocks[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    fifth = (blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None]) & np.uint8(1)
    return _k_values(blocks, low | (fifth << np.uint8(4)))


def _q6_k(blocks: Bytes) -> Float32:
    low = _nibbles(blocks[:, :128].reshape(-1, 2, 64)).reshape(-1, 2, 4, 32)
    high = (blocks[:, 128:192].reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None]) & 3
    codes = (low | (high << 4)).reshape(-1, 16, 16).astype(np.float32) - np.float32(32)
    scales = blocks[:, 192:208].view(np.int8).astype(np.float32)[:, :, None]
    return (_f16(blocks[:, 208:].copy())[:, :, None] * scales) * codes


_DECODERS: dict[TensorType, Callable[[Bytes], Float32]] = {
    TensorType.F32: _f32,
    TensorType.F16: _f16,
    TensorType.BF16: _bf16,
    TensorType.Q4_0: _q4_0,
    TensorType.Q4_1: _q4_1,
    TensorType.Q5_0: _q5_0,
    TensorType.Q5_1: _q5_1,
    TensorType.Q8_0: _q8_0,
    TensorType.Q4_K: _q4_k,
    TensorType.Q5_K: _q5_k,
    TensorType.Q6_K: _q6_k,
}
