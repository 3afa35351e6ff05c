"""Each storage type against the ``gguf`` package's own reading of the same bytes."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from fallow.models.dequantize import dequantize, dequantize_rows
from fallow.models.tensors import RawTensor, TensorType

QUANTISED = [kind for kind in TensorType if kind.block_elements > 1]


@pytest.mark.parametrize("kind", TensorType, ids=lambda kind: kind.name)
def test_sizes_are_those_of_the_format(kind: TensorType) -> None:
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.name]] == (kind.block_elements, kind.block_bytes)


@pytest.mark.parametrize("kind", QUANTISED, ids=lambda kind: kind.name)
def test_random_blocks_have_the_same_bits(kind: TensorType) -> None:
    rng = np.random.default_rng(1)
    blocks = rng.integers(0, 256, (4000, kind.block_bytes), np.uint8)
    reference = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind.name])
    # Random bytes are sometimes an infinite scale, and infinity minus infinity has no one pattern of bits.
    finite = np.isfinite(reference).all(axis=1)
    assert finite.mean() > 0.8
    ours = dequantize_rows(blocks, kind)
    assert np.array_equal(ours[finite].view(np.uint32), reference[finite].view(np.uint32))


@pytest.mark.parametrize("kind", QUANTISED, ids=lambda kind: kind.name)
def test_rows_of_several_blocks_keep_their_order(kind: TensorType) -> None:
    rng = np.random.default_rng(2)
    rows = np.zeros((3, 4, kind.block_bytes), np.uint8)
    rows[..., :] = rng.integers(0, 60, rows.shape)  # float16 scales from such bytes are finite
    one_by_one = np.stack([dequantize_rows(row, kind).reshape(-1) for row in rows])
    whole = RawTensor("x", kind, (3, 4 * kind.block_elements), lambda: rows.reshape(3, -1))
    assert np.array_equal(dequantize(whole), one_by_one)
    assert len(np.unique(one_by_one)) > 16


def test_floats() -> None:
    values = np.array([[0.0, -0.0, 1.5, -3.25, 65504.0, 2.0**-20, np.inf]], np.float32)
    assert np.array_equal(dequantize_rows(values.view(np.uint8), TensorType.F32), values)
    assert np.array_equal(dequantize_rows(values.astype(np.float16).view(np.uint8), TensorType.F16), values)
    exact = values.copy()
    exact[0, 4] = 65536.0  # 65504 is no bfloat16
    halves = (exact.view(np.uint32) >> 16).astype(np.uint16)
    assert np.array_equal(dequantize_rows(halves.view(np.uint8), TensorType.BF16), exact)


def test_a_vector_keeps_its_shape() -> None:
    data = np.arange(5, dtype=np.float32)
    assert dequantize(RawTensor("x", TensorType.F32, (5,), lambda: data.view(np.uint8)[None])).tolist() == [
        0,
        1,
        2,
        3,
        4,
    ]
