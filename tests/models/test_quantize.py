"""What is lost by quantising, against plain rounding and against ggml's own rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest

from fallow.errors import ModelFileError
from fallow.models.dequantize import dequantize_rows
from fallow.models.quantize import quantize_q4_0, quantize_q4_1, quantize_q8_0
from fallow.models.tensors import TensorType

Floats = npt.NDArray[np.float32]
Quantise = Callable[..., npt.NDArray[np.uint8]]
KINDS: dict[str, Quantise] = {"Q8_0": quantize_q8_0, "Q4_0": quantize_q4_0, "Q4_1": quantize_q4_1}


def restored(kind: str, values: Floats, **more: Any) -> Floats:
    return dequantize_rows(KINDS[kind](values, **more), TensorType[kind])


def by_ggml(kind: str, values: Floats) -> Floats:
    store = gguf.GGMLQuantizationType[kind]
    return np.asarray(gguf.quants.dequantize(gguf.quants.quantize(values, store), store), np.float32)


def block_errors(values: Floats, approximation: Floats) -> npt.NDArray[np.float64]:
    return ((values.astype(np.float64) - approximation) ** 2).reshape(-1, 32).sum(axis=1)


def matrices() -> dict[str, Floats]:
    rng = np.random.default_rng(0)
    gaussian = rng.standard_normal((300, 576)).astype(np.float32)
    return {
        "gaussian": gaussian * np.float32(0.05),
        "heavy tails": (gaussian**3).astype(np.float32),
        "outliers": np.where(rng.random(gaussian.shape) < 0.01, 20 * gaussian, gaussian).astype(np.float32),
        "far from zero": gaussian * np.float32(0.01) + np.float32(7),
        "one sided": np.abs(gaussian),
        "tiny": gaussian * np.float32(1e-6),
        "scales of all sizes": (gaussian * np.exp(rng.uniform(-12, 8, (300, 1)))).astype(np.float32),
    }


@pytest.mark.parametrize("name", matrices())
@pytest.mark.parametrize("kind", KINDS)
def test_no_block_is_worse_than_by_ggmls_rule(kind: str, name: str) -> None:
    values = matrices()[name]
    ours = block_errors(values, restored(kind, values))
    theirs = block_errors(values, by_ggml(kind, values))
    # The slack is what float32 sums of 32 squares can be off by.
    assert np.all(ours <= theirs * (1 + 1e-4) + 1e-12 * (values.reshape(-1, 32).astype(np.float64) ** 2).sum(axis=1))


@pytest.mark.parametrize(("kind", "at_most"), [("Q8_0", 1.0), ("Q4_0", 0.90), ("Q4_1", 0.81)])
def test_the_search_pays_on_gaussian_rows(kind: str, at_most: float) -> None:
    values = matrices()["gaussian"]
    plain = block_errors(values, by_ggml(kind, values)).sum()
    assert block_errors(values, restored(kind, values)).sum() < at_most * plain


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1"])
def test_importance_moves_the_error_to_where_it_matters_less(kind: str) -> None:
    values = matrices()["gaussian"]
    importance = np.random.default_rng(1).gamma(0.5, 3.0, 576).astype(np.float32)
    importance[:64] = 0.0

    def weighted(approximation: Floats) -> float:
        return float((importance * (values - approximation) ** 2).sum())

    assert weighted(restored(kind, values, importance=importance)) < 0.9 * weighted(restored(kind, values))
    # Columns that nothing meets are still quantised sensibly.
    assert np.abs(values[:, :64] - restored(kind, values, importance=importance)[:, :64]).max() < 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_that_the_blocks_hold_stay(kind: str) -> None:
    rng = np.random.default_rng(2)
    # A power of two as the scale and all codes in use: the only best answer is the one it came from.
    low, high = {"Q8_0": (-127, 127), "Q4_0": (-8, 7), "Q4_1": (0, 15)}[kind]
    codes = rng.integers(low, high + 1, (64, 96)).astype(np.float32)
    codes[:, ::32], codes[:, 1::32] = low, high
    shift = np.float32(0.375 if kind == "Q4_1" else 0.0)
    values = codes * np.float32(2**-5) + shift
    assert np.array_equal(restored(kind, values), values)


@pytest.mark.parametrize("kind", KINDS)
def test_constant_and_zero_blocks(kind: str) -> None:
    values = np.zeros((2, 64), np.float32)
    values[1] = -0.25
    assert np.array_equal(restored(kind, values)[0], values[0])
    assert np.abs(restored(kind, values)[1] + 0.25).max() < 0.002


@pytest.mark.parametrize("kind", KINDS)
def test_rows_do_not_depend_on_their_neighbours(kind: str) -> None:
    values = matrices()["gaussian"]
    whole = KINDS[kind](values)
    assert whole.shape == (300, 18 * TensorType[kind].block_bytes)
    for rows in (slice(0, 1), slice(50, 171)):
        assert np.array_equal(KINDS[kind](values[rows]), whole[rows])
    assert np.array_equal(KINDS[kind](np.asfortranarray(values)), whole)
    assert KINDS[kind](values[:0]).shape == (0, whole.shape[1])


@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_quantised(kind: str) -> None:
    with pytest.raises(ModelFileError, match="40 columns cannot be quantised in groups of 32"):
        KINDS[kind](np.zeros((2, 40), np.float32))
    for bad in (np.nan, np.inf, -np.inf, 3e38):
        values = np.zeros((40, 64), np.float32)
        values[39, 63] = bad
        with pytest.raises(ModelFileError, match="infinite, not numbers, or too large"):
            KINDS[kind](values)


def test_importance_must_fit() -> None:
    values = np.zeros((2, 64), np.float32)
    for bad in (np.ones(32, np.float32), np.full(64, -1, np.float32), np.full(64, np.nan, np.float32)):
        with pytest.raises(ValueError, match="importance must be 64"):
            quantize_q4_0(values, bad)
