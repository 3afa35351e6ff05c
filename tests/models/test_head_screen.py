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
from fallow.models.head_screen import SCREEN_FILE, HeadScreen, mean_products, row_blocks
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
    turned = np.concatenate(screen.parts(head), 1)
    np.testing.assert_allclose(np.sqrt((turned**2).mean(0)), 1, rtol=1e-2)
    states = hidden_states(9, 4)
    np.testing.assert_allclose((states @ screen.projection.T) @ turned.T, states @ head.T, rtol=1e-3, atol=1e-2)


def test_its_errors_are_as_large_as_it_says(screen: HeadScreen, head: Float32) -> None:
    states = hidden_states(400, 5)
    errors = states @ head.T - screen.logits(states, tensor(head))
    assert np.abs(errors).mean() < 0.2 * np.abs(states @ head.T - (states @ head.T).mean()).mean()
    ratio = np.sqrt((errors.astype(np.float64) ** 2).mean(0)) / screen.deviations
    assert 0.9 < ratio.mean() < 1.2  # the text that it knows was short
    assert ratio.std() < 0.15


def test_the_shortlist_holds_the_largest(screen: HeadScreen, head: Float32) -> None:
    states = hidden_states(60, 6)
    largest = (states @ head.T).argmax(1)
    found = screen.shortlist(states, tensor(head), 480, tile=16)
    assert found.shape == (60, 30)
    assert (np.diff(found, axis=1) > 0).all()
    assert np.mean([token // 16 in tiles for token, tiles in zip(largest, found, strict=True)]) > 0.95
    every = screen.shortlist(states[:1], tensor(head), VOCABULARY, tile=16)
    assert every[0].tolist() == list(range(-(-VOCABULARY // 16)))


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
        (changed("deviations", lambda x: x[:-1]), f"deviations must be [{VOCABULARY}]"),
        (changed("projection", lambda x: x[:-1]), f"projection must be [{HIDDEN}, {HIDDEN}]"),
        (changed("projection", lambda x: x.astype(np.float16)), "of F32"),
        (changed("projection", np.zeros_like), "projection is no basis"),
        (changed("deviations", put(0.0)), "deviations has values"),
        (changed("deviations", put(-1.0)), "deviations has values"),
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
