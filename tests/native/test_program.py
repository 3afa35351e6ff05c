"""Operations of a program against float64 arithmetic: embeddings at a column, mixes with a buffer that is kept, soft
caps, thresholds; for every instruction set, with any number of rows and threads."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import pytest

from fallow import _native

ISAS = _native.available_isas()
VOCABULARY = 50
PAGES = 8
Source = tuple[str, np.ndarray]


def new_program(isa: str, threads: int = 1) -> _native.Program:
    return _native.Program(
        threads=threads, isa=isa, num_heads=2, num_kv_heads=1, head_dim=16, num_layers=1, max_tokens=250,
        max_sequences=1, max_logit_rows=250, num_pages=PAGES, max_positions=250,
    )  # fmt: skip


def random_table(rng: np.random.Generator, width: int) -> tuple[Source, np.ndarray]:
    """A table as the bytes of a file, and its values."""
    values = rng.standard_normal((VOCABULARY, width), dtype=np.float32)
    source = ("F32", values.view(np.uint8))
    return source, _native.kernels.unpack([source], width).astype(np.float64)


def run(program: _native.Program, tokens: np.ndarray, x: int, width: int, softcap: float | None = None) -> np.ndarray:
    """Finishes the program with what is in ``x``, and gives that of every token."""
    out = program.buffer(width)
    program.gather(x, out)
    if softcap is not None:
        program.soft_cap(out, softcap)
    program.finish(out)
    pages = np.arange(PAGES, dtype=np.int32)[None]
    rows = np.arange(len(tokens), dtype=np.int32)
    program.run(tokens, np.array([0, len(tokens)], np.int32), np.zeros(1, np.int32), pages, rows)
    return program.logits(len(tokens))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize(("width", "part", "column"), [(1, 1, 0), (40, 7, 3), (96, 64, 32), (130, 33, 97)])
def test_embeddings_at_a_column(isa: str, add: bool, width: int, part: int, column: int) -> None:
    rng = np.random.default_rng(width)
    (whole, whole_values), (narrow, narrow_values) = random_table(rng, width), random_table(rng, part)
    tokens = rng.integers(0, VOCABULARY, 250).astype(np.int32)
    expected = whole_values[tokens]
    chosen = slice(column, column + part)
    expected[:, chosen] = expected[:, chosen] * add + 0.75 * narrow_values[tokens]
    for threads, rows in [(1, 1), (1, 250), (2, 5), (2, 250), (3, 19)]:
        program = new_program(isa, threads)
        x = program.buffer(width)
        program.embed(program.weights([whole], width), x)
        program.embed(program.weights([narrow], part), x, 0.75, column=column, add=add)
        np.testing.assert_allclose(run(program, tokens[:rows], x, width), expected[:rows], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("width", [1, 16, 47, 576])
def test_a_mix_finds_the_first_buffer_after_attention(isa: str, width: int) -> None:
    rng = np.random.default_rng(width)
    (begin, begin_values), (later, later_values) = random_table(rng, width), random_table(rng, width)
    tokens = rng.integers(0, VOCABULARY, 250).astype(np.int32)
    expected = 1.25 * later_values[tokens] - 0.375 * begin_values[tokens]
    results = []
    for threads, rows in [(1, 250), (1, 3), (2, 250), (3, 40)]:
        program = new_program(isa, threads)
        first, x, attended = program.buffer(width), program.buffer(width), program.buffer(32)
        program.embed(program.weights([begin], width), first)
        program.mix(first, first, x, keep=0.5, again=0.5)
        program.attention(attended, layer=0, window=0, scale=1.0)
        program.embed(program.weights([later], width), x)
        program.mix(x, first, x, keep=1.25, again=-0.375)
        results.append(run(program, tokens[:rows], x, width))
        np.testing.assert_allclose(results[-1], expected[:rows], rtol=1e-5, atol=1e-6)
        assert np.array_equal(results[-1], results[0][:rows])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("width", "cap"), [(1, 30.0), (16, 0.5), (31, 1.0), (33, 2.0), (320, 15.0)])
def test_soft_capped_logits(isa: str, width: int, cap: float) -> None:
    rng = np.random.default_rng(width)
    table, values = random_table(rng, width)
    tokens = rng.integers(0, VOCABULARY, 250).astype(np.int32)
    expected = cap * np.tanh(values[tokens] / cap)
    results = []
    for threads, rows in [(1, 250), (1, 1), (2, 7), (3, 19), (3, 250)]:
        program = new_program(isa, threads)
        x = program.buffer(width)
        program.embed(program.weights([table], width), x)
        results.append(run(program, tokens[:rows], x, width, cap))
        np.testing.assert_allclose(results[-1], expected[:rows], atol=1e-6 * cap)
        assert np.array_equal(results[-1], results[0][:rows])


@pytest.mark.parametrize("isa", ISAS)
def test_kernels_on_random_shapes(isa: str) -> None:
    rng = np.random.default_rng(0)
    for rows, width in [(1, 1), (3, 15), (2, 16), (5, 17), (4, 64), (2, 577)]:
        x, first = (rng.standard_normal((rows, width), dtype=np.float32) * 20 for _ in range(2))
        keep, again = rng.standard_normal(2)
        mixed = np.float32(keep) * x.astype(np.float64) + np.float32(again) * first.astype(np.float64)
        np.testing.assert_allclose(_native.kernels.mix(isa, x, first, keep=keep, again=again), mixed, atol=3e-5)
        for cap in (1e-3, 1.0, 30.0, 1e4):
            capped = cap * np.tanh(x.astype(np.float64) / cap)
            np.testing.assert_allclose(_native.kernels.soft_cap(isa, x, cap), capped, atol=1e-6 * cap)
        wide = x.astype(np.float64)
        for quantile in (-1.0, 0.0, 2.0):
            above = np.maximum(wide - (wide.mean(1) + quantile * wide.std(1))[:, None], 0)
            np.testing.assert_allclose(_native.kernels.above_threshold(isa, x, quantile), above, atol=3e-5)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("width", "quantile"), [(1, 1.0), (16, -0.5), (31, 0.0), (75, 1.4), (320, 1.28)])
def test_what_lies_above_a_rows_threshold(isa: str, width: int, quantile: float) -> None:
    rng = np.random.default_rng(width)
    table, values = random_table(rng, width)
    tokens = rng.integers(0, VOCABULARY, 250).astype(np.int32)
    rows_of = values[tokens].astype(np.float64)
    threshold = rows_of.mean(1) + quantile * rows_of.std(1)
    expected = np.maximum(rows_of - threshold[:, None], 0)
    results = []
    for threads, rows in [(1, 250), (1, 1), (2, 7), (3, 19), (3, 250)]:
        program = new_program(isa, threads)
        x = program.buffer(width)
        program.embed(program.weights([table], width), x)
        program.above_threshold(x, quantile)
        results.append(run(program, tokens[:rows], x, width))
        np.testing.assert_allclose(results[-1], expected[:rows], atol=3e-6)
        assert np.array_equal(results[-1], results[0][:rows])
    if width > 100:
        assert (results[0] > 0).mean() == pytest.approx(1 - NormalDist().cdf(quantile), abs=0.02)


ACTIVATIONS = {
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("width", [1, 15, 16, 17, 100, 577])
def test_the_largest_of_a_row(isa: str, activation: str, width: int) -> None:
    rng = np.random.default_rng(width)
    table, values = random_table(rng, width)
    tokens = rng.integers(0, VOCABULARY, 250).astype(np.int32)
    for count in {0, 1, width // 3, width - 1, width, width + 5}:
        wide = values[tokens]
        sizes = np.abs(ACTIVATIONS[activation](wide.astype(np.float64)))
        ranked = np.sort(sizes, axis=1)[:, ::-1]
        least = ranked[:, count : count + 1] if count < width else np.full((250, 1), -1.0)
        expected = np.where(sizes <= least, 0, wide)
        sure = np.abs(sizes - least) > 1e-6 if count < width else np.full(wide.shape, True)
        results = []
        for threads, rows in [(1, 250), (1, 1), (3, 19), (2, 250)]:
            program = new_program(isa, threads)
            x = program.buffer(width)
            program.embed(program.weights([table], width), x)
            program.keep_largest(x, count, activation=activation)
            results.append(run(program, tokens[:rows], x, width))
            assert ((results[-1] == expected[:rows].astype(np.float32)) | ~sure[:rows]).all()
            assert np.array_equal(results[-1], results[0][:rows])


@pytest.mark.parametrize("isa", ISAS)
def test_equals_of_the_last_that_is_kept_go_with_it(isa: str) -> None:
    x = np.array([[3.0, -2.0, 2.0, 1.0, 0.0, 5.0, 2.0]], np.float32)
    for count, kept in ((1, [5]), (2, [3, 5]), (3, [3, 5]), (4, [3, 2, 5, 2]), (6, [3, 2, 1, 5, 2])):
        found = _native.kernels.keep_largest(isa, x, count, activation="relu")[0]
        assert found[found != 0].tolist() == kept
    x[0, 2] = np.nan
    assert np.isnan(_native.kernels.keep_largest(isa, x, 2, activation="relu")[0, 2])


@pytest.mark.parametrize("isa", ISAS)
def test_what_is_no_number_stays_so(isa: str) -> None:
    x = np.array([[np.inf, -np.inf, 1e30, -1e30, 0.0, np.nan]], np.float32)
    capped = _native.kernels.soft_cap(isa, x, 30.0)
    np.testing.assert_allclose(capped, [[30.0, -30.0, 30.0, -30.0, 0.0, np.nan]], rtol=1e-6)
    ones = np.ones_like(x)
    gated = _native.kernels.gate(isa, x, ones, activation="relu")
    np.testing.assert_array_equal(gated, [[np.inf, 0.0, np.float32(1e30), 0.0, 0.0, np.nan]])
    for width in (6, 40):
        row = np.ones((1, width), np.float32)
        row[0, 3] = np.nan
        assert np.isnan(_native.kernels.above_threshold(isa, row, 1.0)).all()


def test_operations_that_do_not_fit_are_refused() -> None:
    rng = np.random.default_rng(0)
    table, _ = random_table(rng, 16)

    def refused(match: str, lay_out: object) -> None:
        program = new_program(ISAS[0])
        x, wider = program.buffer(16), program.buffer(20)
        assert callable(lay_out)
        lay_out(program, program.weights([table], 16), x, wider)
        with pytest.raises(ValueError, match=match):
            run(program, np.zeros(1, np.int32), x, 16)

    refused("embed: the buffer is too narrow", lambda p, w, x, wider: p.embed(w, wider, column=5, add=True))
    refused("embed: the buffer is too narrow", lambda p, w, x, wider: p.embed(w, wider, column=-1))
    refused("embed: the buffer is too narrow", lambda p, w, x, wider: p.embed(w, x, column=2**31 - 1))
    refused("mix: buffers differ", lambda p, w, x, wider: p.mix(x, wider, wider, keep=1.0, again=1.0))
    refused("mix: buffers differ", lambda p, w, x, wider: p.mix(wider, wider, x, keep=1.0, again=1.0))
    for cap in (0.0, -1.0, float("nan"), float("inf")):
        refused("the cap must be positive", lambda p, w, x, wider, cap=cap: p.soft_cap(x, cap))
    refused("values must be at least 0", lambda p, w, x, wider: p.keep_largest(x, -1, activation="relu"))
    refused("the quantile must be finite", lambda p, w, x, wider: p.above_threshold(x, float("nan")))
    program = new_program(ISAS[0])
    x = program.buffer(16)
    with pytest.raises(ValueError, match="activation tanh is not known"):
        program.gate(x, x, x, activation="tanh")
