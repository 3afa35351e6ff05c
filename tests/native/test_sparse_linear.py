"""Linears of which a part is read, by rows or by columns, against the dense ones: the same bits."""

from __future__ import annotations

import numpy as np
import pytest
from test_linear import ISAS, random_source, reference_weights

from fallow import _native

KINDS = ["Q4_0", "Q4_1", "Q4_K"]
# rows of activations, columns, rows of weights; few, some and more than a register tile or a block holds
SHAPES = [(1, 256, 32), (2, 512, 48), (3, 768, 160), (7, 256, 272), (13, 512, 16), (70, 256, 144)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_another_layout_holds_the_same_weights(kind: str, layout: str, asymmetric: bool) -> None:
    source = random_source(np.random.default_rng(3), kind, 144, 512)
    tiles, other = (
        _native.kernels.unpack([source], 512, layout=name, asymmetric=asymmetric) for name in ("tiles", layout)
    )
    np.testing.assert_array_equal(other, tiles)
    np.testing.assert_allclose(other, reference_weights(source), atol=2.0**-8 * np.abs(tiles).max())


@pytest.mark.parametrize("kind", [*KINDS, "Q8_0", "Q6_K", "BF16"])
def test_packed_by_any_number_of_threads_sources_lie_one_below_the_other(kind: str) -> None:
    """Rows of a block share bytes where they lie by columns, and blocks begin anywhere in a source."""
    rng = np.random.default_rng(7)
    sources = [random_source(rng, kind, rows, 512) for rows in (1, 200, 16, 300)]
    expected = np.concatenate([_native.kernels.unpack([source], 512) for source in sources])
    for layout in ("tiles", "rows", "columns") if kind in KINDS else ("tiles",):
        for threads in (1, 2, 3, 9):
            found = _native.kernels.unpack(sources, 512, layout=layout, threads=threads)
            np.testing.assert_array_equal(found, expected)
    pair = [random_source(rng, kind, 336, 512) for _ in range(2)]
    tiles = [_native.kernels.unpack([source], 512).reshape(-1, 16, 512) for source in pair]
    for threads in (1, 2, 5):
        found = _native.kernels.unpack(pair, 512, interleave=True, threads=threads)
        np.testing.assert_array_equal(found, np.stack(tiles, 1).reshape(-1, 512))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", ["silu", "relu", "gelu_tanh"])
def test_rows_at_work_are_those_of_the_gated_linear(isa: str, kind: str, activation: str) -> None:
    rng = np.random.default_rng([ord(c) for c in isa + kind])
    for rows, columns, outputs in SHAPES:
        up, gates_of = random_source(rng, kind, outputs, columns), random_source(rng, kind, outputs, columns)
        x = rng.standard_normal((rows, columns), dtype=np.float32)
        zeros = np.zeros((rows, outputs), np.float32)
        gates = _native.kernels.linear(isa, [gates_of], x, initial=zeros)
        epilogue = {"silu": "silu_gate", "relu": "relu_gate", "gelu_tanh": "gelu_gate"}[activation]
        dense = _native.kernels.linear(isa, [gates_of, up], x, interleave=True, epilogue=epilogue, initial=zeros)
        activated = _native.kernels.gate(isa, gates, np.ones_like(gates), activation=activation)
        for threshold in (0.0, float(np.quantile(np.abs(activated), 0.6)), float(np.abs(activated).max())):
            found = _native.kernels.linear(
                isa,
                [up],
                x,
                layout="rows",
                gates=gates,
                activation=activation,
                threshold=threshold,
                initial=np.full_like(zeros, 7.0),
            )
            np.testing.assert_array_equal(found, np.where(np.abs(activated) > threshold, dense, 0))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("at_work", [0.0, 0.02, 0.5, 1.0])
@pytest.mark.parametrize("epilogue", ["store", "add"])
def test_columns_at_work_give_the_dense_bits(isa: str, kind: str, at_work: float, epilogue: str) -> None:
    rng = np.random.default_rng([ord(c) for c in isa + kind])
    for rows, columns, outputs in SHAPES:
        source = random_source(rng, kind, outputs, columns)
        x = rng.standard_normal((rows, columns), dtype=np.float32) * (rng.random((rows, columns)) < at_work)
        if rows in (2, 7):  # one by one, and as a tile
            x[0, 5], x[0, 64:96], x[1, 40] = np.nan, np.nan, np.inf
        initial = rng.standard_normal((rows, outputs), dtype=np.float32)
        options = {"epilogue": epilogue, "initial": initial}
        dense = _native.kernels.linear(isa, [source], x.astype(np.float32), **options)
        sparse = _native.kernels.linear(isa, [source], x.astype(np.float32), layout="columns", **options)
        np.testing.assert_array_equal(sparse, dense)


def test_gates_that_are_no_numbers_work() -> None:
    rng = np.random.default_rng(5)
    up = random_source(rng, "Q4_1", 32, 256)
    x = rng.standard_normal((1, 256), dtype=np.float32)
    gates = np.zeros((1, 32), np.float32)
    gates[0, 3] = np.nan
    found = _native.kernels.linear(ISAS[0], [up], x, layout="rows", gates=gates, threshold=0.1, initial=gates)
    assert np.isnan(found[0, 3])
    assert (np.delete(found, 3) == 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "rows"}, "chosen by gates"),
        ({"layout": "columns", "precision": "q8"}, "only 4-bit"),
        ({"layout": "columns", "gates": np.zeros((1, 32), np.float32)}, "chosen by gates"),
        ({"layout": "diagonals"}, "not known"),
    ],
)
def test_layouts_that_cannot_be_are_refused(options: dict[str, object], message: str) -> None:
    source = random_source(np.random.default_rng(0), "Q4_0", 32, 256)
    x, zeros = np.zeros((1, 256), np.float32), np.zeros((1, 32), np.float32)
    with pytest.raises(ValueError, match=message):
        _native.kernels.linear(ISAS[0], [source], x, initial=zeros, **options)
