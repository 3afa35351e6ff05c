"""What is rounded to 8 bits is centred first, and the first token of a text by itself: against float64 arithmetic."""

from __future__ import annotations

import numpy as np
import pytest

from fallow import _native

ISAS = _native.available_isas()
VOCABULARY, WIDTH, OUT, PAGES, EPS = 50, 96, 80, 8, 1e-6
SINK = 0  # a token with one channel that drowns all others, as the first token of a text has in real models


def embeddings() -> np.ndarray:
    table = np.random.default_rng(1).standard_normal((VOCABULARY, WIDTH), dtype=np.float32)
    table[SINK] *= 0.1
    table[SINK, 5] = 40.0
    return table


def weights() -> tuple[tuple[str, np.ndarray], np.ndarray]:
    """A Q8_0 matrix as the bytes of a file, and its values ``[OUT, WIDTH]``."""
    rng = np.random.default_rng(2)
    codes = rng.integers(-127, 128, (OUT, WIDTH // 32, 32)).astype(np.int8)
    scales = rng.uniform(0.001, 0.01, (OUT, WIDTH // 32, 1)).astype(np.float16)
    blocks = np.concatenate([scales.view(np.uint8), codes.view(np.uint8)], axis=-1)
    values = codes.astype(np.float64) * scales.astype(np.float64)
    return ("Q8_0", np.ascontiguousarray(blocks).reshape(OUT, -1)), values.reshape(OUT, WIDTH)


class Norm:
    """Embeddings, a norm, a linear: ``gather_first`` puts the norm among the operations on logit rows only."""

    def __init__(self, isa: str, threads: int, *, gather_first: bool) -> None:
        self.program = _native.Program(
            threads=threads, isa=isa, num_heads=2, num_kv_heads=1, head_dim=16, num_layers=1, max_tokens=250,
            max_sequences=1, max_logit_rows=250, num_pages=PAGES, max_positions=250,
        )  # fmt: skip
        p = self.program
        x, gathered, out, logits = p.buffer(WIDTH), p.buffer(WIDTH), p.buffer(OUT), p.buffer(OUT)
        p.embed(p.weights([("F32", embeddings().view(np.uint8))], WIDTH), x)
        if gather_first:
            p.gather(x, gathered)
        matrix = p.weights([weights()[0]], WIDTH)
        rounded = p.activations_for(matrix)
        p.norm_quantise(gathered if gather_first else x, p.vector(np.ones(WIDTH, np.float32)), [rounded], EPS)
        p.linear(rounded, matrix, logits if gather_first else out)
        if not gather_first:
            p.gather(out, logits)
        p.finish(logits)

    def __call__(self, tokens: np.ndarray, rows: np.ndarray, start: int = 0) -> np.ndarray:
        pages = np.arange(PAGES, dtype=np.int32)[None]
        self.program.run(tokens, np.array([0, len(tokens)], np.int32), np.array([start], np.int32), pages, rows)
        return self.program.logits(len(rows))


def exact(tokens: np.ndarray) -> np.ndarray:
    x = embeddings()[tokens].astype(np.float64)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS) @ weights()[1].T


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("gather_first", [False, True])
def test_the_first_token_is_centred_by_itself(isa: str, gather_first: bool) -> None:
    rng = np.random.default_rng(3)
    calibration = rng.integers(1, VOCABULARY, 256).astype(np.int32)
    calibration[::32] = SINK  # eight texts of a page each
    tokens = rng.integers(1, VOCABULARY, 100).astype(np.int32)
    tokens[[0, 40]] = SINK
    rows = np.arange(100, dtype=np.int32)[::-1].copy()
    results = []
    for threads in (1, 2, 3):
        norm = Norm(isa, threads, gather_first=gather_first)
        before = np.abs(norm(tokens, rows) - exact(tokens[rows]))
        norm.program.centre(calibration)
        results.append(norm(tokens, rows))
        after = np.abs(results[-1] - exact(tokens[rows]))
        assert after[-1].max() < before[-1].max() / 50  # the first token: what all texts begin with is exact
        assert after.max() < 2 * before.max()  # the same token elsewhere is rounded as before
        assert after[1:50].mean() < 1.2 * before[1:50].mean()
        assert np.array_equal(results[-1], results[0])
        later = norm(tokens[40:60], np.arange(20, dtype=np.int32), start=40)
        assert np.array_equal(later, results[0][::-1][40:60])


@pytest.mark.parametrize("isa", ISAS)
def test_another_first_token_is_right_too(isa: str) -> None:
    norm = Norm(isa, 2, gather_first=False)
    calibration = np.full(256, SINK, np.int32)
    norm.program.centre(calibration)
    for token in range(1, VOCABULARY):
        tokens = np.array([token, SINK], np.int32)
        np.testing.assert_allclose(norm(tokens, np.arange(2, dtype=np.int32)), exact(tokens), atol=0.5)
