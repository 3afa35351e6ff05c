"""What the screened head is made of: approximate logits, for every instruction set against numpy, and the noise under
which the largest logit is a draw."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from fallow import _native
from fallow.arrays import Float32, Float64

ISAS = _native.available_isas()
DIRECTIONS = _native.screen_directions
LOOKS = 2
STEP = 1 / 24


def bf16(x: Float32) -> Float32:
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    return (((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) << 16).astype(np.uint32).view(np.float32)


def looked_up(x: Float32, signs: Float64) -> Float64:
    """Products with signs, of which the sums of four columns are rounded to at most 31 steps."""
    fours = x.reshape(len(x), 1, -1, 4).astype(np.float64)
    step = np.maximum(np.abs(fours).sum(-1).max(-1, keepdims=True), 1e-30) / 31
    sums = (fours * signs.reshape(1, len(signs), -1, 4)).sum(-1)
    found: Float64 = (np.rint(sums / step) * step).sum(-1)
    return found


def positive(signs: Float32) -> np.ndarray:
    """Of each column the rows whose sign is positive."""
    return np.ascontiguousarray(signs.T > 0)


@dataclass
class Screen:
    """Random rows, and columns along random directions, some of them several times."""

    along: Float32
    signs: Float32
    scales: Float32
    directions: np.ndarray
    sizes: Float32
    first: int
    packed: _native.Signs

    @staticmethod
    def random(vocabulary: int, directions: int, columns: int) -> Screen:
        draw = np.random.default_rng()
        floats = [
            draw.normal(0, 1, (vocabulary, DIRECTIONS)), draw.choice([-1.0, 1.0], (vocabulary, columns)),
            draw.uniform(0.01, 1, vocabulary), draw.uniform(0.1, 1, columns),
        ]  # fmt: skip
        along, signs, scales, sizes = (values.astype(np.float32) for values in floats)
        chosen = draw.integers(0, directions, columns).astype(np.int32)
        first = 32 * int(draw.integers(1, columns // 32))
        packed = _native.Signs(vocabulary, directions, chosen, sizes, first_columns=first)
        half = vocabulary // 2
        for part in (slice(half, None), slice(0, half)):
            deviations = np.ones((LOOKS, len(along[part])), np.float32)
            packed.put_rows(part.start, along[part], positive(signs[part]), scales[part], deviations)
        return Screen(along, signs, scales, chosen, sizes, first, packed)

    def sums(self, x: Float32, columns: slice) -> Float64:
        """Products of activations with the signs of some columns."""
        along = x[:, self.directions[columns]] * self.sizes[columns]
        return looked_up(along, self.signs[:, columns].astype(np.float64))


SHAPES = [
    (1, 1, 4, 64), (1, 16, 64, 64), (1, 171, 70, 96), (3, 47, 96, 96), (7, 320, 576, 1056), (13, 33, 100, 160),
    (2, 18, 2048, 8256), (2, 8200, 16, 64),
]  # fmt: skip


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("rows", "vocabulary", "directions", "columns"), SHAPES)
def test_screened_logits(isa: str, rows: int, vocabulary: int, directions: int, columns: int) -> None:
    screen = Screen.random(vocabulary, directions, columns)
    x = np.random.default_rng().normal(0, 3, (rows, directions)).astype(np.float32)
    codes = np.clip(np.rint(screen.along.astype(np.float64) / STEP), -128, 127) * STEP
    first, further = (screen.sums(x, part) for part in (slice(screen.first), slice(screen.first, None)))
    expected = x[:, :DIRECTIONS] @ codes.T + first * bf16(screen.scales)
    expected = np.stack([expected, expected + further * bf16(screen.scales)])
    found = _native.kernels.screen(isa, screen.packed, x)
    # A quotient that lies at half a step may be rounded either way.
    np.testing.assert_allclose(found, expected, atol=0.01 * np.abs(expected).max())
    for row in range(rows):
        assert np.array_equal(_native.kernels.screen(isa, screen.packed, x[row : row + 1])[:, 0], found[:, row])


def ones_along(count: int, columns: int) -> tuple[_native.Signs, np.ndarray]:
    """``count`` rows without signs yet, of which every column is a direction after those in 8 bits, of size 1; the
    first look is at half of them."""
    directions = np.arange(DIRECTIONS, DIRECTIONS + columns, dtype=np.int32)
    sizes = np.ones(columns, np.float32)
    return _native.Signs(count, DIRECTIONS + columns, directions, sizes, first_columns=columns // 2), directions


def ones_of(count: int) -> Float32:
    """Deviations of ``count`` rows."""
    return np.ones((LOOKS, count), np.float32)


@pytest.mark.parametrize("isa", ISAS)
def test_sums_of_signs_that_are_all_as_large_as_can_be(isa: str) -> None:
    columns = 16384
    screen, directions = ones_along(2, columns)
    signs = np.full((2, columns), [[1], [-1]], np.float32)
    along = np.zeros((2, DIRECTIONS), np.float32)
    screen.put_rows(0, along, positive(signs), np.ones(2, np.float32), ones_of(2))
    x = np.zeros((1, DIRECTIONS + columns), np.float32)
    x[:, directions] = 1
    first, second = _native.kernels.screen(isa, screen, x)
    np.testing.assert_allclose(first, [[columns // 2, -columns // 2]], rtol=1e-6)
    np.testing.assert_allclose(second, [[columns, -columns]], rtol=1e-6)


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_has_the_same_bits_but_for_the_rounding_of_sums(isa: str) -> None:
    screen = Screen.random(50, 100, 128).packed
    x = np.random.default_rng().normal(0, 1, (4, 100)).astype(np.float32)
    x[:, :DIRECTIONS] = 0
    found, scalar = (_native.kernels.screen(name, screen, x) for name in (isa, "scalar"))
    assert np.array_equal(found[0], scalar[0])
    np.testing.assert_allclose(found[1], scalar[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("isa", ISAS)
def test_what_is_no_number_stays_so(isa: str) -> None:
    screen, directions = ones_along(16, 64)
    ones = np.ones(16, np.float32)
    screen.put_rows(0, np.ones((16, DIRECTIONS), np.float32), np.ones((64, 16), np.bool_), ones, ones_of(16))
    for value in (np.nan, np.inf):
        for look, direction in ((0, 0), (0, directions[5]), (1, directions[40])):
            x = np.zeros((1, DIRECTIONS + 64), np.float32)
            x[0, direction] = value
            assert not np.isfinite(_native.kernels.screen(isa, screen, x)[look:]).any()


@pytest.mark.parametrize("isa", ISAS)
def test_codes_beyond_their_range_are_cut_off(isa: str) -> None:
    screen, _ = ones_along(2, 64)
    along = np.full((2, DIRECTIONS), 50, np.float32) * np.array([[1], [-1]], np.float32)
    screen.put_rows(0, along, np.ones((64, 2), np.bool_), np.zeros(2, np.float32), ones_of(2))
    x = np.ones((1, DIRECTIONS + 64), np.float32)
    for found in _native.kernels.screen(isa, screen, x):
        np.testing.assert_allclose(found, [[DIRECTIONS * 127 * STEP, -128 * DIRECTIONS * STEP]], rtol=1e-6)


@pytest.mark.parametrize("isa", ISAS)
def test_the_places_of_the_largest(isa: str) -> None:
    draw = np.random.default_rng()
    for _ in range(200):
        count = int(draw.integers(1, 400))
        values = np.round(draw.normal(0, 2, count), int(draw.integers(0, 3))).astype(np.float32) + np.float32(0)
        wanted = int(draw.integers(0, count + 3))
        expected = np.sort(np.argsort(-values, kind="stable")[:wanted])
        np.testing.assert_array_equal(_native.kernels.list_largest(isa, values, wanted), expected)
    infinite = np.array([-np.inf, 3, np.inf, -np.inf, np.nan, 3], np.float32)
    assert _native.kernels.list_largest(isa, infinite, 3).tolist() == [1, 2, 4]
    assert _native.kernels.list_largest(isa, infinite, 9).tolist() == [0, 1, 2, 3, 4, 5]


def test_rows_and_columns_that_do_not_fit_are_refused() -> None:
    screen, directions = ones_along(20, 64)
    numbers = np.ones(3, np.float32)
    rows = (np.zeros((3, DIRECTIONS), np.float32), np.zeros((64, 3), np.bool_), numbers, ones_of(3))
    for first in (-1, 18, 2**31 - 1):
        with pytest.raises(ValueError, match="fewer rows"):
            screen.put_rows(first, *rows)
    for other in (
        (*rows[:3], ones_of(2)), (*rows[:3], ones_of(3)[:1]), (*rows[:2], numbers[:2], rows[3]),
        (rows[0], rows[1][:32], *rows[2:]),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="not those of the same rows"):
            screen.put_rows(0, *other)
    sizes = np.ones(64, np.float32)
    with pytest.raises(ValueError, match="multiples of 32"):
        _native.Signs(20, 68, directions[:48], sizes[:48], first_columns=32)
    for first in (-32, 0, 16, 64, 96):
        with pytest.raises(ValueError, match="each look of a screen needs columns in multiples of 32"):
            _native.Signs(20, 68, directions, sizes, first_columns=first)
    with pytest.raises(ValueError, match="needs rows"):
        _native.Signs(0, 68, directions, sizes, first_columns=32)
    with pytest.raises(ValueError, match="needs rows, directions"):
        _native.Signs(20, DIRECTIONS - 1, np.zeros(64, np.int32), sizes, first_columns=32)
    with pytest.raises(ValueError, match="not those of the same columns"):
        _native.Signs(20, 68, directions, sizes[:32], first_columns=32)
    for place in (-1, 68):
        with pytest.raises(ValueError, match="a direction that there is not"):
            _native.Signs(20, 68, np.full(64, place, np.int32), sizes, first_columns=32)


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
