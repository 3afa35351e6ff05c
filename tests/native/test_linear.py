"""Linear kernels of every instruction set against float64 arithmetic on the same packed weights."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants

from fallow import _native

ISAS = _native.available_isas()
QUANTISED = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"]
SHAPES = [
    (1, 256, 16),
    (2, 256, 48),
    (3, 512, 40),
    (5, 768, 33),
    (6, 256, 32),
    (7, 512, 64),
    (8, 256, 31),
    (13, 1536, 96),
    (25, 256, 1),
]


def random_source(rng: np.random.Generator, kind: str, rows: int, columns: int) -> tuple[str, np.ndarray]:
    """Random weights of a storage type as the bytes of a file."""
    block, size = quants.GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    if kind in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "BF16", "F16", "F32"):
        values = rng.standard_normal((rows, columns), dtype=np.float32)
        return kind, quants.quantize(values, GGMLQuantizationType[kind]).view(np.uint8).reshape(rows, -1)
    data = rng.integers(0, 256, (rows, columns // block, size), dtype=np.uint8)
    scale = np.abs(rng.standard_normal((rows, columns // block, 2))).astype(np.float16) * np.float16(0.05)
    if kind == "Q6_K":
        data[..., -2:] = scale[..., :1].view(np.uint8)
    else:
        data[..., :4] = scale.view(np.uint8)
    return kind, data.reshape(rows, -1)


def reference_weights(source: tuple[str, np.ndarray]) -> np.ndarray:
    return quants.dequantize(source[1], GGMLQuantizationType[source[0]]).astype(np.float64)


@pytest.mark.parametrize("kind", [*QUANTISED, "F32", "F16", "BF16"])
def test_packing_keeps_the_values_of_the_file(kind: str) -> None:
    rng = np.random.default_rng(len(kind))
    source = random_source(rng, kind, 37, 512)
    unpacked = _native.kernels.unpack([source], 512)
    reference = reference_weights(source)
    # Offsets and floats are rounded to bfloat16, everything else is exact.
    rounding = 0.0 if kind in ("Q4_0", "Q5_0", "Q8_0", "Q6_K", "BF16") else 2.0**-8
    assert np.all(np.abs(unpacked - reference) <= rounding * np.abs(reference).max() + 1e-6)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", QUANTISED)
@pytest.mark.parametrize("asymmetric", [False, True])
def test_quantised_linear_is_within_the_activations_rounding(isa: str, kind: str, asymmetric: bool) -> None:
    rng = np.random.default_rng([ord(c) for c in isa + kind])
    for rows, columns, outputs in SHAPES:
        source = random_source(rng, kind, outputs, columns)
        x = rng.standard_normal((rows, columns), dtype=np.float32) + (3.0 if asymmetric else 0.0)
        x = x.astype(np.float32)
        initial = np.zeros((rows, outputs), np.float32)
        result = _native.kernels.linear(isa, [source], x, asymmetric=asymmetric, initial=initial)
        weights = _native.kernels.unpack([source], columns).astype(np.float64)
        # Codes of 8 bits: an error of half a step an activation, the sums of which grow like a random walk.
        step = np.abs(x).max() / 127
        bound = 6 * 0.5 * step * np.sqrt((weights**2).sum(axis=1)) + 2.0**-8 * np.abs(x).mean() * np.abs(weights).sum(
            axis=1
        )
        assert np.all(np.abs(result - x.astype(np.float64) @ weights.T) <= bound[None, :] + 1e-5)


@pytest.mark.parametrize("kind", [*QUANTISED, "BF16"])
@pytest.mark.parametrize("precision", ["own", "q8", "bf16"])
def test_instruction_sets_agree(kind: str, precision: str) -> None:
    rng = np.random.default_rng(7)
    for rows, columns, outputs in SHAPES:
        source = random_source(rng, kind, outputs, columns)
        x = rng.standard_normal((rows, columns), dtype=np.float32)
        initial = rng.standard_normal((rows, outputs), dtype=np.float32)
        results = [
            _native.kernels.linear(isa, [source], x, precision=precision, epilogue="add", initial=initial)
            for isa in ISAS
        ]
        for other in results[:-1]:
            np.testing.assert_allclose(other, results[-1], rtol=2e-5, atol=2e-4 * np.abs(results[-1]).max())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("precision", ["own", "q8", "bf16"])
def test_a_row_does_not_depend_on_the_others(isa: str, precision: str) -> None:
    rng = np.random.default_rng(3)
    source = random_source(rng, "Q4_1", 96, 576)
    x = rng.standard_normal((40, 576), dtype=np.float32)
    initial = np.zeros((40, 96), np.float32)
    together = _native.kernels.linear(isa, [source], x, precision=precision, initial=initial)
    for rows in (1, 2, 3, 5, 6, 7, 8, 11, 12, 13):
        part = _native.kernels.linear(isa, [source], x[:rows], precision=precision, initial=initial[:rows])
        assert np.array_equal(part, together[:rows])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("epilogue", "activation"), [("silu_gate", "silu"), ("gelu_gate", "gelu_tanh"), ("relu_gate", "relu")]
)
def test_gated_epilogue_equals_the_separate_operations(isa: str, epilogue: str, activation: str) -> None:
    rng = np.random.default_rng(11)
    gate, up = (random_source(rng, "Q8_0", 64, 256) for _ in range(2))
    x = rng.standard_normal((9, 256), dtype=np.float32)
    empty = np.zeros((9, 64), np.float32)
    fused = _native.kernels.linear(isa, [gate, up], x, interleave=True, epilogue=epilogue, initial=empty)
    parts = [_native.kernels.linear(isa, [source], x, initial=empty) for source in (gate, up)]
    assert np.array_equal(fused, _native.kernels.gate(isa, *parts, activation=activation))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0", "BF16"])
def test_relu2_epilogue_squares_what_is_positive(isa: str, kind: str) -> None:
    rng = np.random.default_rng(13)
    for rows, columns, outputs in SHAPES:
        source = random_source(rng, kind, outputs, columns)
        x = rng.standard_normal((rows, columns), dtype=np.float32)
        initial = rng.standard_normal((rows, outputs), dtype=np.float32)  # what is there does not matter
        squared = _native.kernels.linear(isa, [source], x, epilogue="relu2", initial=initial)
        stored = _native.kernels.linear(isa, [source], x, initial=initial)
        np.testing.assert_allclose(squared, np.maximum(stored.astype(np.float64), 0.0) ** 2, rtol=1e-7)
        assert (squared == 0).any() or outputs < 4


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("epilogue", ["relu2", "relu_gate"])
def test_relu_epilogues_match_float64(isa: str, epilogue: str) -> None:
    rng = np.random.default_rng(17)
    for rows, columns, outputs in [(1, 64, 16), (4, 96, 48), (9, 255, 32), (13, 33, 80)]:
        sources = [random_source(rng, "BF16", outputs, columns) for _ in range(1 if epilogue == "relu2" else 2)]
        x = (rng.integers(-64, 65, (rows, columns)) / 16).astype(np.float32)  # exact in bfloat16
        first, *rest = (x.astype(np.float64) @ reference_weights(source).T for source in sources)
        expected = np.maximum(first, 0.0) * (rest[0] if rest else np.maximum(first, 0.0))
        initial = np.zeros((rows, outputs), np.float32)
        result = _native.kernels.linear(isa, sources, x, interleave=bool(rest), epilogue=epilogue, initial=initial)
        np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("isa", ISAS)
def test_bf16_linear_matches_pytorch(isa: str) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(5)
    for rows, columns, outputs in [(1, 7, 3), (4, 64, 48), (9, 255, 17)]:
        weights = torch.from_numpy(rng.standard_normal((outputs, columns), dtype=np.float32)).bfloat16()
        x = torch.from_numpy(rng.standard_normal((rows, columns), dtype=np.float32))
        source = ("BF16", weights.view(torch.int16).numpy().view(np.uint8).reshape(outputs, -1))
        result = _native.kernels.linear(isa, [source], x.numpy(), initial=np.zeros((rows, outputs), np.float32))
        expected = x.bfloat16().double() @ weights.double().T
        np.testing.assert_allclose(result, expected.numpy(), rtol=1e-4, atol=1e-4)


def test_bad_shapes_are_refused() -> None:
    rng = np.random.default_rng(0)
    source = random_source(rng, "Q4_1", 32, 64)
    with pytest.raises(ValueError, match="multiples of 32"):
        _native.kernels.unpack([source], 65)
    with pytest.raises(ValueError, match="fewer bytes"):
        _native.kernels.unpack([source], 96)
    with pytest.raises(ValueError, match="not supported"):
        _native.kernels.unpack([("Q2_K", source[1])], 64)
    with pytest.raises(ValueError, match="interleaved"):
        _native.kernels.unpack([source], 64, interleave=True)
