"""The screen of a head: that it comes near the logits and comes back from its file, and which files are refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fallow.arrays import Float32
from fallow.errors import FallowError, ModelFileError
from fallow.models import head_screen
from fallow.models.head_screen import (
    DIRECTIONS,
    LOOKS,
    SCREEN_FILE,
    HeadScreen,
    first_sign_columns,
    mean_products,
    row_blocks,
    sign_columns,
)
from fallow.models.tensors import RawTensor, TensorType

VOCABULARY, HIDDEN = 5000, 64


def tensor(values: Float32) -> RawTensor:
    data = np.ascontiguousarray(values).view(np.uint8)
    return RawTensor("lm_head", TensorType.F32, values.shape, lambda: data)


@pytest.fixture(scope="module")
def head() -> Float32:
    draw = np.random.default_rng(0)
    return (draw.standard_normal((VOCABULARY, HIDDEN)) * np.linspace(0.5, 1.5, HIDDEN)).astype(np.float32)


def hidden_states(count: int, seed: int) -> Float32:
    """With a few large columns, as models have them."""
    draw = np.random.default_rng(seed)
    states = draw.standard_normal((count, HIDDEN)) @ np.diag(np.linspace(2, 0.2, HIDDEN)) + 3
    states[:, :2] *= 10
    return states.astype(np.float32)


@pytest.fixture(scope="module")
def screen(head: Float32) -> HeadScreen:
    return HeadScreen.fit(mean_products([hidden_states(300, 1), hidden_states(50, 2)]), tensor(head))


def test_the_mean_of_products_whatever_the_blocks() -> None:
    states = hidden_states(97, 3)
    whole = states.T.astype(np.float64) @ states / 97
    np.testing.assert_allclose(mean_products([states[:5], states[5:]]), whole, rtol=1e-6)


def test_a_product_is_the_same_in_the_basis(screen: HeadScreen, head: Float32) -> None:
    np.testing.assert_allclose(screen.projection @ screen.directions, np.eye(HIDDEN), atol=1e-3)
    turned = head @ screen.directions
    np.testing.assert_allclose(np.sqrt((turned**2).mean(0)), 1, rtol=1e-2)
    states = hidden_states(9, 4)
    np.testing.assert_allclose((states @ screen.projection.T) @ turned.T, states @ head.T, rtol=1e-3, atol=1e-2)


def test_its_errors_are_as_large_as_it_says(screen: HeadScreen, head: Float32) -> None:
    states = hidden_states(400, 5)
    seen = np.linalg.eigvalsh(mean_products([states]))
    allowed = max(head_screen._UNSEEN_VARIANCE * np.median(seen), head_screen._LEAST_VARIANCE * seen.mean())
    states += np.random.default_rng(6).normal(0, allowed**0.5, states.shape).astype(np.float32)
    sizes = []
    for look in range(LOOKS):
        errors = states @ head.T - screen.logits(states, tensor(head), look=look)
        sizes.append(np.abs(errors).mean() / np.abs(states @ head.T - (states @ head.T).mean()).mean())
        ratio = np.sqrt((errors.astype(np.float64) ** 2).mean(0)) / screen.deviations[look]
        assert 0.9 < ratio.mean() < 1.2  # the text that it knows was short
        assert ratio.std() < 0.15
    assert sizes[1] < 0.6 * sizes[0] < 0.12


def test_the_shortlist_holds_the_largest(screen: HeadScreen, head: Float32) -> None:
    states = hidden_states(60, 6)
    largest = (states @ head.T).argmax(1)
    found = screen.shortlist(states, tensor(head), 480, tile=16)
    assert all(len(tiles) == 30 and (np.diff(tiles) > 0).all() for tiles in found)
    assert np.mean([token // 16 in tiles for token, tiles in zip(largest, found, strict=True)]) > 0.95
    every = screen.shortlist(states[:1], tensor(head), VOCABULARY, tile=16)
    assert every[0].tolist() == list(range(-(-VOCABULARY // 16)))


def test_each_sign_of_a_direction_is_that_of_what_the_ones_before_leave(screen: HeadScreen, head: Float32) -> None:
    rows = head[:100]
    columns, codes = screen.columns, screen.codes(rows)
    turned = rows @ screen.directions
    np.testing.assert_allclose(codes.along, turned[:, :DIRECTIONS], rtol=1e-5)
    assert len(columns.directions) == sign_columns(HIDDEN) == len(codes.positive)
    others, units = turned[:, DIRECTIONS:].astype(np.float64), screen.units[DIRECTIONS:].astype(np.float64)
    left = others / np.sqrt((others**2 @ units**2) / (units**2).sum())[:, None]
    kept = np.zeros_like(left)
    for direction in range(DIRECTIONS, HIDDEN):
        of_it = np.flatnonzero(columns.directions == direction)
        assert sorted(columns.ranks[of_it]) == list(range(len(of_it)))
        for column in of_it[np.argsort(columns.ranks[of_it])]:
            change = np.where(left[:, direction - DIRECTIONS] > 0, 1, -1) * columns.sizes[column]
            np.testing.assert_array_equal(codes.positive[column], change > 0)
            left[:, direction - DIRECTIONS] -= change
            kept[:, direction - DIRECTIONS] += change
    error = ((kept * codes.scales[:, None] - others) * units) ** 2
    for scale in (0.98, 1.02):
        other = ((kept * codes.scales[:, None] * scale - others) * units) ** 2
        assert (error.sum(1) < other.sum(1)).all()


def test_what_varies_most_has_most_signs(screen: HeadScreen) -> None:
    counts = np.bincount(screen.columns.directions, minlength=HIDDEN)
    assert (counts[:DIRECTIONS] == 0).all()
    order = np.argsort(-screen.units[DIRECTIONS:])
    assert (np.diff(counts[DIRECTIONS:][order]) <= 0).all()
    assert counts.max() > 1
    columns = screen.columns
    worth = (screen.units[columns.directions] ** (2 * head_screen._EVENNESS)) * columns.sizes**2
    assert columns.first == first_sign_columns(HIDDEN)
    assert worth[: columns.first].mean() > 2 * worth[columns.first :].mean()
    for direction in range(DIRECTIONS, HIDDEN):  # what comes before a sign is known when it is looked at
        places = np.flatnonzero(columns.directions == direction)
        looks = places[np.argsort(columns.ranks[places])] >= columns.first
        assert (np.diff(looks.astype(int)) >= 0).all()


def test_a_row_of_zeros_stays_so(screen: HeadScreen) -> None:
    codes = screen.codes(np.zeros((3, HIDDEN), np.float32))
    assert not codes.along.any()
    assert not codes.scales.any()


def test_blocks_are_the_rows(head: Float32) -> None:
    blocks = list(row_blocks(tensor(head)))
    assert len(blocks) > 1
    assert np.array_equal(np.concatenate(blocks), head)


def test_it_comes_back_from_its_file(screen: HeadScreen, tmp_path: Path) -> None:
    screen.save(tmp_path)
    found = HeadScreen.load(tmp_path / SCREEN_FILE, vocab_size=VOCABULARY, hidden_size=HIDDEN)
    for field in fields(HeadScreen):
        assert np.array_equal(getattr(found, field.name), getattr(screen, field.name))


def changed(name: str, change: Callable[[Float32], Any]) -> Callable[[HeadScreen], HeadScreen]:
    return lambda screen: replace(screen, **{name: change(getattr(screen, name).copy())})


def put(value: float) -> Callable[[Float32], Float32]:
    def change(array: Float32) -> Float32:
        array.reshape(-1)[-1] = value
        return array

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed("deviations", lambda x: x[:, :-1]), f"deviations must be [{LOOKS}, {VOCABULARY}]"),
        (changed("deviations", lambda x: x[1]), f"deviations must be [{LOOKS}, {VOCABULARY}]"),
        (changed("projection", lambda x: x[:-1]), f"projection must be [{HIDDEN}, {HIDDEN}]"),
        (changed("projection", lambda x: x.astype(np.float16)), "of F32"),
        (changed("projection", np.zeros_like), "projection is no basis"),
        (changed("deviations", put(0.0)), "deviations has values"),
        (changed("deviations", put(-1.0)), "deviations has values"),
        (changed("units", lambda x: x[:-1]), f"units must be [{HIDDEN}]"),
        (changed("units", put(0.0)), "units has values"),
        (changed("units", put(np.inf)), "units has values"),
        (changed("units", put(1e30)), "units has values"),
        (changed("units", put(1e-30)), "units has values"),
        (changed("projection", put(np.nan)), "projection has values"),
        (changed("projection", put(np.inf)), "projection has values"),
    ],
)
def test_other_files_are_refused(
    screen: HeadScreen, tmp_path: Path, change: Callable[[HeadScreen], HeadScreen], message: str
) -> None:
    change(screen).save(tmp_path)
    with pytest.raises(ModelFileError) as error:
        HeadScreen.load(tmp_path / SCREEN_FILE, vocab_size=VOCABULARY, hidden_size=HIDDEN)
    assert message in str(error.value)


def test_a_file_that_is_not_there_or_lacks_a_part_is_a_sentence(screen: HeadScreen, tmp_path: Path) -> None:
    with pytest.raises(FallowError, match="make the plan again"):
        HeadScreen.load(tmp_path / SCREEN_FILE, vocab_size=VOCABULARY, hidden_size=HIDDEN)
    screen.save(tmp_path)
    arrays = load_file(tmp_path / SCREEN_FILE)
    del arrays["deviations"]
    save_file(arrays, tmp_path / SCREEN_FILE)
    with pytest.raises(FallowError, match="deviations must be"):
        HeadScreen.load(tmp_path / SCREEN_FILE, vocab_size=VOCABULARY, hidden_size=HIDDEN)
