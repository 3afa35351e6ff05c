"""Feed-forward networks neuron by neuron, for every instruction set: against numpy in float64, and a row by itself."""

from __future__ import annotations

import numpy as np
import pytest

from fallow import _native
from fallow.arrays import Float32, Float64

ISAS = _native.available_isas()
# rows, hidden, neurons, the share of gates above zero
CASES = [
    (1, 16, 1, 1.0),
    (1, 64, 40, 0.1),
    (3, 96, 100, 0.5),
    (5, 512, 333, 0.02),
    (40, 160, 47, 0.3),
    (4, 32, 64, 0.0),
]
ACTIVATIONS = {
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
}


def source(values: Float32) -> tuple[str, np.ndarray]:
    return "F32", np.ascontiguousarray(values).view(np.uint8).reshape(len(values), -1)


def rounded(values: Float32, precision: str) -> Float64:
    """As neurons keep a row: bfloat16, or 8-bit groups of 32 from their smallest to their largest value."""
    if precision == "bf16":
        bits = values.view(np.uint32).astype(np.uint64)
        return (
            (((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) << 16).astype(np.uint32).view(np.float32).astype(np.float64)
        )
    groups = values.reshape(len(values), -1, 32).astype(np.float64)
    low = groups.min(-1, keepdims=True)
    scale = (groups.max(-1, keepdims=True) - low) / 255
    codes = np.floor((groups - low) / np.where(scale > 0, scale, 1) + 0.5)
    return (codes * scale + low).reshape(values.shape)


class Network:
    def __init__(self, rows: int, hidden: int, neurons: int, share: float) -> None:
        draw = np.random.default_rng(rows * 1000 + hidden + neurons)
        self.up = draw.standard_normal((neurons, hidden), np.float32)
        self.down = draw.standard_normal((hidden, neurons), np.float32)
        self.x = draw.standard_normal((rows, hidden), np.float32)
        above = draw.random((rows, neurons)) < share
        self.gates = np.where(above, 1, -1).astype(np.float32) * draw.uniform(0.1, 2, above.shape).astype(np.float32)
        self.initial = draw.standard_normal((rows, hidden), np.float32)

    def run(self, isa: str, rows: slice = slice(None), **options: object) -> tuple[Float32, Float32]:
        arguments = (np.ascontiguousarray(part[rows]) for part in (self.x, self.gates))
        initial = np.ascontiguousarray(self.initial[rows])
        up = source(self.up) if options.pop("gated", True) else None
        neurons, out = _native.kernels.feed_forward(isa, up, source(self.down), *arguments, initial=initial, **options)
        return neurons, out


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("precision", ["bf16", "q8"])
@pytest.mark.parametrize(("activation", "threshold"), [("relu", 0.0), ("relu", 0.7), ("silu", 0.3), ("gelu_tanh", 0.1)])
@pytest.mark.parametrize("case", CASES)
def test_neurons_and_what_they_add(
    isa: str, precision: str, activation: str, threshold: float, case: tuple[int, int, int, float]
) -> None:
    if precision == "q8" and case[1] % 32:
        pytest.skip("8-bit groups are of 32 columns")
    network = Network(*case)
    neurons, out = network.run(isa, precision=precision, activation=activation, threshold=threshold)
    activated = ACTIVATIONS[activation](network.gates.astype(np.float64))
    if threshold:
        assert np.abs(np.abs(activated) - threshold).min() > 1e-5, "the case does not hang on a rounding"
    at_work = np.abs(activated) > threshold
    expected = np.where(at_work, activated * (network.x @ rounded(network.up, precision).T), 0)
    np.testing.assert_allclose(neurons, expected, rtol=1e-4, atol=2e-2 if precision == "q8" else 1e-4)
    np.testing.assert_array_equal(neurons == 0, ~at_work)
    added = expected @ rounded(np.ascontiguousarray(network.down.T), precision)
    np.testing.assert_allclose(out, network.initial + added, rtol=1e-3, atol=5e-2 if precision == "q8" else 2e-3)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("precision", ["bf16", "q8"])
def test_without_a_gate_values_beyond_the_threshold_are_spread(isa: str, precision: str) -> None:
    network = Network(6, 64, 90, 0.5)
    neurons, out = network.run(isa, gated=False, precision=precision, activation="relu", threshold=0.9)
    np.testing.assert_array_equal(neurons, network.gates)
    values = np.where(np.abs(network.gates) > 0.9, network.gates, 0).astype(np.float64)
    expected = network.initial + values @ rounded(np.ascontiguousarray(network.down.T), precision)
    np.testing.assert_allclose(out, expected, rtol=1e-3, atol=5e-2 if precision == "q8" else 1e-3)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("precision", ["bf16", "q8"])
def test_a_row_is_the_same_bits_alone(isa: str, precision: str) -> None:
    network = Network(11, 128, 200, 0.2)
    options = {"precision": precision, "activation": "relu", "threshold": 0.0}
    together = network.run(isa, **options)
    for row in range(11):
        alone = network.run(isa, slice(row, row + 1), **options)
        for part, whole in zip(alone, together, strict=True):
            np.testing.assert_array_equal(part[0], whole[row])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("precision", "threshold"), [("bf16", 0.0), ("bf16", 3.0), ("q8", 0.0)])
@pytest.mark.parametrize(("rows", "hidden", "neurons"), [(1, 32, 1), (1, 64, 40), (4, 512, 333), (40, 160, 47)])
def test_rounded_gates_tell_which_exact_ones_are_computed(  # noqa: PLR0917
    isa: str, precision: str, threshold: float, rows: int, hidden: int, neurons: int
) -> None:
    network = Network(rows, hidden, neurons, 0.5)
    weights = np.random.default_rng(neurons).standard_normal((neurons, hidden), np.float32)
    exact = network.x @ rounded(weights, precision).T
    steps = np.abs(network.x.reshape(rows, -1, 32)).max(-1, keepdims=True) / 127  # as hidden states are rounded
    codes = np.rint(network.x.reshape(rows, -1, 32) / steps) * steps
    gates = (codes.reshape(rows, -1) @ rounded(weights, "q8").T).astype(np.float32)
    network.gates = gates
    found, out = network.run(isa, precision=precision, activation="relu", threshold=threshold, gate=source(weights))
    expected = np.where(exact > threshold, exact, 0) * (network.x @ rounded(network.up, precision).T)
    sure = np.abs(exact - threshold) > 1e-4
    np.testing.assert_allclose(found[sure], expected[sure], rtol=1e-3, atol=5e-2 if precision == "q8" else 1e-3)
    added = found.astype(np.float64) @ rounded(np.ascontiguousarray(network.down.T), precision)
    np.testing.assert_allclose(out, network.initial + added, rtol=1e-3, atol=5e-1 if precision == "q8" else 5e-3)
    alone = network.run(
        isa, slice(rows - 1, rows), precision=precision, activation="relu", threshold=threshold, gate=source(weights)
    )
    np.testing.assert_array_equal(alone[0][0], found[-1])
    np.testing.assert_array_equal(alone[1][0], out[-1])


@pytest.mark.parametrize("isa", ISAS)
def test_what_rounded_gates_leave_no_doubt_about_rests(isa: str) -> None:
    network = Network(3, 64, 50, 0.5)
    gate = np.abs(np.random.default_rng(0).standard_normal((50, 64), np.float32))
    network.x = np.abs(network.x)  # every exact gate is above zero
    network.gates = np.where(np.arange(50) % 2, -50, 50).astype(np.float32)[None].repeat(3, 0)
    neurons, _ = network.run(isa, precision="bf16", activation="relu", threshold=0.0, gate=source(gate))
    assert (neurons[:, 1::2] == 0).all()
    assert (neurons[:, ::2] != 0).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rounded_gates", [False, True])
def test_no_number_does_not_rest(isa: str, rounded_gates: bool) -> None:
    network = Network(2, 32, 20, 0.5)
    network.gates[1, 7] = np.nan
    options = {}
    if rounded_gates:
        network.x[1, 3] = np.nan
        options = {"gate": source(np.ones((20, 32), np.float32))}
    neurons, out = network.run(isa, precision="bf16", activation="relu", threshold=0.0, **options)
    assert np.isnan(neurons[1, 7])
    assert np.isnan(out[1]).all()
    assert np.isfinite(out[0]).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"precision": "q4"}, "q8 or bf16"),
        ({"hidden": 24}, "multiples of 16"),
        ({"hidden": 48, "precision": "q8"}, "multiples of 32"),
        ({"ups": 19}, "differ in neurons"),
        ({"short": True}, "fewer bytes"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, object], message: str) -> None:
    hidden = change.get("hidden", 32)
    network = Network(1, int(str(hidden)), 20, 0.5)
    up, down = source(network.up[: change.get("ups", 20)]), source(network.down)
    if change.get("short"):
        down = "F32", np.ascontiguousarray(down[1][:, :-4])
    with pytest.raises(ValueError, match=message):
        _native.kernels.feed_forward(
            "scalar", up, down, network.x, network.gates, precision=change.get("precision", "bf16"), activation="relu",
            threshold=0.0, initial=network.initial,
        )  # fmt: skip
