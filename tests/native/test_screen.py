"""What the screened head is made of: approximate logits, for every instruction set against numpy, and the noise under
which the largest logit is a draw."""

from __future__ import annotations

import numpy as np
import pytest

from fallow import _native
from fallow.arrays import Float32, Float64

ISAS = _native.available_isas()
DIRECTIONS = _native.screen_directions
STEP = 1 / 24


def bf16(x: Float32) -> Float32:
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    return (((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) << 16).astype(np.uint32).view(np.float32)


def rounded(x: Float32, group: int) -> Float64:
    """As activations are: 8-bit codes of groups, symmetric."""
    groups = x.reshape(len(x), -1, group).astype(np.float64)
    scale = np.maximum(np.abs(groups).max(-1, keepdims=True), 1e-30) / 127
    return (np.rint(groups / scale) * scale).reshape(x.shape)


def looked_up(x: Float32, signs: Float64) -> Float64:
    """Products with signs, of which the sums of four columns are rounded to at most 31 steps."""
    fours = x.reshape(len(x), 1, -1, 4).astype(np.float64)
    step = np.maximum(np.abs(fours).sum(-1).max(-1, keepdims=True), 1e-30) / 31
    sums = (fours * signs.reshape(1, len(signs), -1, 4)).sum(-1)
    found: Float64 = (np.rint(sums / step) * step).sum(-1)
    return found


SHAPES = [(1, 1, 32), (1, 16, 64), (1, 171, 96), (3, 47, 96), (7, 320, 576), (13, 33, 160), (2, 18, 4160)]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("rows", "vocabulary", "hidden"), SHAPES)
def test_screened_logits(isa: str, rows: int, vocabulary: int, hidden: int) -> None:
    draw = np.random.default_rng()
    along = draw.normal(0, 1, (vocabulary, DIRECTIONS)).astype(np.float32)
    rest = draw.normal(0, 0.1, (vocabulary, hidden)).astype(np.float32)
    signs = _native.Signs(vocabulary, hidden)
    half = vocabulary // 2
    for part in (slice(half, None), slice(0, half)):
        signs.put_rows(part.start, along[part], rest[part], np.ones(len(along[part]), np.float32))
    x, y = (
        draw.normal(0, 3, (rows, DIRECTIONS)).astype(np.float32),
        draw.normal(0, 1, (rows, hidden)).astype(np.float32),
    )
    codes = np.clip(np.rint(along.astype(np.float64) / STEP), -128, 127) * STEP
    scales = bf16(np.abs(rest.astype(np.float64)).mean(1).astype(np.float32))
    expected = rounded(x, DIRECTIONS) @ codes.T + looked_up(y, np.where(rest > 0, 1.0, -1.0)) * scales
    found = _native.kernels.screen(isa, signs, x, y)
    # A quotient that lies at half a step may be rounded either way.
    np.testing.assert_allclose(found, expected, atol=0.01 * np.abs(expected).max())
    for row in range(rows):
        alone = _native.kernels.screen(isa, signs, x[row : row + 1], y[row : row + 1])
        assert np.array_equal(alone[0], found[row])


@pytest.mark.parametrize("isa", ISAS)
def test_sums_of_signs_that_are_all_as_large_as_can_be(isa: str) -> None:
    hidden = 8192
    signs = _native.Signs(2, hidden)
    rest = np.full((2, hidden), [[1], [-1]], np.float32)
    signs.put_rows(0, np.zeros((2, DIRECTIONS), np.float32), rest, np.ones(2, np.float32))
    found = _native.kernels.screen(isa, signs, np.zeros((1, DIRECTIONS), np.float32), np.ones((1, hidden), np.float32))
    np.testing.assert_allclose(found, [[hidden, -hidden]], rtol=1e-6)


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_has_the_same_bits(isa: str) -> None:
    draw = np.random.default_rng()
    signs = _native.Signs(50, 128)
    along, rest = (draw.normal(0, 1, (50, count)).astype(np.float32) for count in (DIRECTIONS, 128))
    signs.put_rows(0, along, rest, np.ones(50, np.float32))
    x, y = np.zeros((4, DIRECTIONS), np.float32), draw.normal(0, 1, (4, 128)).astype(np.float32)
    found, scalar = (_native.kernels.screen(name, signs, x, y) for name in (isa, "scalar"))
    assert np.array_equal(found, scalar)


@pytest.mark.parametrize("isa", ISAS)
def test_what_is_no_number_stays_so(isa: str) -> None:
    signs = _native.Signs(16, 32)
    signs.put_rows(0, np.ones((16, DIRECTIONS), np.float32), np.ones((16, 32), np.float32), np.ones(16, np.float32))
    for value in (np.nan, np.inf):
        y = np.zeros((1, 32), np.float32)
        y[0, 5] = value
        found = _native.kernels.screen(isa, signs, np.zeros((1, DIRECTIONS), np.float32), y)
        assert not np.isfinite(found).any()


def test_codes_beyond_their_range_are_cut_off() -> None:
    signs = _native.Signs(2, 32)
    along = np.full((2, DIRECTIONS), 50, np.float32) * np.array([[1], [-1]], np.float32)
    signs.put_rows(0, along, np.zeros((2, 32), np.float32), np.ones(2, np.float32))
    x = np.full((1, DIRECTIONS), 127, np.float32)
    found = _native.kernels.screen("scalar", signs, x, np.zeros((1, 32), np.float32))
    np.testing.assert_allclose(found, [[127 * DIRECTIONS * 127 * STEP, -128 * DIRECTIONS * 127 * STEP]], rtol=1e-6)


def test_rows_that_do_not_fit_are_refused() -> None:
    signs = _native.Signs(20, 64)
    rows = (np.zeros((3, DIRECTIONS), np.float32), np.zeros((3, 64), np.float32), np.ones(3, np.float32))
    for first in (-1, 18, 2**31 - 1):
        with pytest.raises(ValueError, match="fewer rows"):
            signs.put_rows(first, *rows)
    with pytest.raises(ValueError, match="not those of the same rows"):
        signs.put_rows(0, rows[0], rows[1][:2], rows[2])
    with pytest.raises(ValueError, match="multiples of 32"):
        _native.Signs(20, 48)
    with pytest.raises(ValueError, match="needs rows"):
        _native.Signs(0, 64)


def noise(count: int, seed: int, draw: int, isa: str = ISAS[0]) -> Float32:
    found: Float32 = _native.kernels.noise(isa, count, seed=seed, draw=draw)
    return found


def test_noise_has_a_gumbel_distribution() -> None:
    draw = np.random.default_rng()
    count = 1 << 20
    sample = np.sort(noise(count, int(draw.integers(2**63)), int(draw.integers(2**63))).astype(np.float64))
    distance = np.abs(np.exp(-np.exp(-sample)) - (np.arange(count) + 0.5) / count).max()
    assert distance < 2.5 / np.sqrt(count)  # Kolmogorov and Smirnov: beyond it once in 130,000 times
    assert sample[-1] > 9
    assert np.isfinite(sample).all()


def test_noise_of_other_draws_and_neighbours_is_independent() -> None:
    count = 1 << 16
    rows = [noise(count, seed, draw) for seed, draw in [(0, 0), (0, 1), (1, 0), (2**64 - 1, 5)]]
    bound = 5 / np.sqrt(count)
    assert np.all(np.abs(np.corrcoef(rows) - np.eye(len(rows))) < bound)
    for row in rows:
        for step in (1, 2, 16, 49152 % count):
            assert abs(np.corrcoef(row[:-step], row[step:])[0, 1]) < bound


@pytest.mark.parametrize("isa", ISAS)
def test_noise_of_a_token_is_its_own(isa: str) -> None:
    whole = noise(1000, 7, 3, isa)
    np.testing.assert_allclose(whole, noise(1000, 7, 3, "scalar"), rtol=1e-5, atol=3e-6)
    assert np.array_equal(noise(17, 7, 3, isa), whole[:17])
