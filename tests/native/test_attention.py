"""Attention over pages, RoPE and norms of every instruction set against PyTorch in float64."""

from __future__ import annotations

import numpy as np
import pytest

from fallow import _native
from fallow.models.config import RopeConfig
from fallow.models.rope import rope_table

torch = pytest.importorskip("torch")
ISAS = _native.available_isas()
# tokens, queries, heads, kv heads, head_dim, window
CASES = [
    (1, 1, 1, 1, 16, 0),
    (5, 3, 2, 2, 8, 0),
    (33, 33, 9, 3, 64, 0),
    (257, 1, 9, 3, 64, 0),
    (300, 40, 4, 2, 80, 0),
    (530, 25, 8, 1, 128, 0),
    (300, 50, 4, 4, 64, 37),
    (600, 5, 6, 2, 32, 256),
    (700, 3, 24, 1, 16, 1),
]


def rotate(x: torch.Tensor, table: np.ndarray, rotary_dim: int) -> torch.Tensor:
    half = rotary_dim // 2
    angles = torch.from_numpy(table.astype(np.float64))
    cosine, sine = angles[:, None, :half], angles[:, None, half:]
    a, b, rest = x[..., :half], x[..., half:rotary_dim], x[..., rotary_dim:]
    return torch.cat([a * cosine - b * sine, b * cosine + a * sine, rest], dim=-1)


def reference(
    qkv: np.ndarray, table: np.ndarray, case: tuple[int, int, int, int, int, int], scale: float
) -> np.ndarray:
    tokens, queries, heads, kv_heads, dim, window = case
    x = torch.from_numpy(qkv.astype(np.float64)).view(tokens, heads + 2 * kv_heads, dim)
    q = rotate(x[:, :heads], table[:tokens], table.shape[1]).bfloat16().double()
    k = rotate(x[:, heads : heads + kv_heads], table[:tokens], table.shape[1]).bfloat16().double()
    v = x[:, heads + kv_heads :].bfloat16().double()
    k, v = (t.repeat_interleave(heads // kv_heads, dim=1) for t in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q[-queries:], k) * scale
    position = torch.arange(tokens)
    seen = position[None, :] <= position[-queries:, None]
    if window:
        seen &= position[None, :] > position[-queries:, None] - window
    scores = scores.masked_fill(~seen, float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).reshape(queries, -1).numpy()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", CASES)
def test_attention_matches_pytorch(isa: str, case: tuple[int, int, int, int, int, int]) -> None:
    tokens, queries, heads, kv_heads, dim, window = case
    rng = np.random.default_rng(tokens)
    qkv = rng.standard_normal((tokens, (heads + 2 * kv_heads) * dim), dtype=np.float32)
    rotary_dim = dim // 2 if dim % 4 == 0 and dim < 64 else dim
    table = rope_table(RopeConfig(theta=10000.0, rotary_dim=rotary_dim), tokens)
    scale = dim**-0.5
    result, _ = _native.kernels.attention(
        isa, qkv, table, num_heads=heads, num_kv_heads=kv_heads, head_dim=dim, rotary_dim=rotary_dim, queries=queries,
        window=window, scale=scale,
    )  # fmt: skip
    # bfloat16 probabilities: eight bits of each, averaged over the keys.
    np.testing.assert_allclose(result, reference(qkv, table, case, scale), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("isa", ISAS)
def test_a_query_does_not_depend_on_the_others(isa: str) -> None:
    rng = np.random.default_rng(1)
    heads, kv_heads, dim, tokens = 9, 3, 64, 290
    table = rope_table(RopeConfig(theta=10000.0, rotary_dim=dim), tokens)
    qkv = rng.standard_normal((tokens, (heads + 2 * kv_heads) * dim), dtype=np.float32)
    shape = {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": dim, "rotary_dim": dim, "scale": 0.125}
    for window in (0, 100):
        together, _ = _native.kernels.attention(isa, qkv, table, queries=60, window=window, **shape)
        for row in range(60):
            end = tokens - 60 + row + 1
            alone, _ = _native.kernels.attention(isa, qkv[:end], table, queries=1, window=window, **shape)
            assert np.array_equal(alone[0], together[row])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("width", [1, 15, 16, 17, 64, 577])
def test_rms_norm_matches_pytorch(isa: str, width: int) -> None:
    rng = np.random.default_rng(width)
    x = rng.standard_normal((4, width), dtype=np.float32) * 3
    weight = rng.standard_normal(width, dtype=np.float32)
    expected = torch.nn.functional.rms_norm(torch.from_numpy(x), (width,), torch.from_numpy(weight), 1e-5).numpy()
    np.testing.assert_allclose(_native.kernels.rms_norm(isa, x, weight, 1e-5), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "relu"])
def test_gates_match_pytorch(isa: str, activation: str) -> None:
    x = np.concatenate([np.linspace(-120, 120, 2001), [0.0, -0.0, 1e-30]]).astype(np.float32)[None, :]
    up = np.random.default_rng(0).standard_normal(x.shape, dtype=np.float32)
    t = torch.from_numpy(x).double()
    functions = {
        "silu": torch.nn.functional.silu,
        "gelu_tanh": lambda t: torch.nn.functional.gelu(t, approximate="tanh"),
        "relu": torch.nn.functional.relu,
    }
    expected = functions[activation](t)
    result = _native.kernels.gate(isa, x, up, activation=activation)
    np.testing.assert_allclose(result, (expected * torch.from_numpy(up).double()).numpy(), rtol=3e-6, atol=3e-6)
