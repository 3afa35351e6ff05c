"""Pages of the KV cache that a query chooses, for every instruction set: the choice and the attention to it against the
PyTorch reference, and a query by itself."""

from __future__ import annotations

import numpy as np
import pytest

from fallow import _native
from fallow.models.config import RopeConfig
from fallow.models.resting import PageRule
from fallow.models.rope import rope_table

torch = pytest.importorskip("torch")
ISAS = _native.available_isas()
# tokens, queries, heads, kv heads, head_dim, rule
CASES = [
    (40, 40, 2, 1, 16, PageRule(0, 1, (0,))),
    (320, 60, 4, 2, 8, PageRule(0, 1, (3, 1))),
    (900, 33, 9, 3, 64, PageRule(1, 2, (4, 0, 9))),
    (700, 1, 9, 3, 64, PageRule(2, 3, (5, 5, 40))),
    (600, 20, 4, 4, 80, PageRule(1, 1, (2, 3, 4, 5))),
    (1100, 9, 8, 1, 128, PageRule(30, 2, (3,))),
    (900, 33, 9, 3, 64, PageRule(1, 2, (4, 0, 9), 13)),
    (700, 130, 2, 1, 16, PageRule(0, 1, (2,), 20)),
    (300, 9, 4, 2, 8, PageRule(2, 3, (1, 2**31 - 1), 1)),
]


def attend(
    isa: str, qkv: np.ndarray, shape: tuple[int, int, int], queries: int, rule: PageRule
) -> tuple[np.ndarray, np.ndarray]:
    """The result, and which pages were read."""
    heads, kv_heads, dim = shape
    table = rope_table(RopeConfig(theta=10000.0, rotary_dim=dim), len(qkv))
    return _native.kernels.attention(
        isa, qkv, table, num_heads=heads, num_kv_heads=kv_heads, head_dim=dim, rotary_dim=dim, queries=queries,
        window=0, scale=dim**-0.5, sink_pages=rule.sink_pages, recent_pages=rule.recent_pages,
        top_pages=list(rule.top_pages), context_pages=rule.context_pages,
    )  # fmt: skip


def rotated(qkv: np.ndarray, shape: tuple[int, int, int]) -> list[torch.Tensor]:
    """Queries, keys and values as they are kept, float32 ``[1, heads, tokens, head_dim]``."""
    heads, kv_heads, dim = shape
    x = torch.from_numpy(qkv.astype(np.float64)).view(len(qkv), heads + 2 * kv_heads, dim)
    angles = torch.from_numpy(rope_table(RopeConfig(theta=10000.0, rotary_dim=dim), len(qkv)).astype(np.float64))
    cosine, sine = angles[:, None, : dim // 2], angles[:, None, dim // 2 :]
    a, b = x[:, : heads + kv_heads].chunk(2, -1)
    turned = torch.cat([a * cosine - b * sine, b * cosine + a * sine], -1)
    parts = (turned[:, :heads], turned[:, heads:], x[:, heads + kv_heads :])
    return [part.bfloat16().float().transpose(0, 1)[None] for part in parts]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", CASES)
def test_the_choice_and_the_attention_of_pytorch(isa: str, case: tuple[int, int, int, int, int, PageRule]) -> None:
    from fallow.models.page_choice import attention_to_chosen_pages, chosen_pages

    tokens, queries, heads, kv_heads, dim, rule = case
    shape = heads, kv_heads, dim
    rng = np.random.default_rng(tokens + dim)
    qkv = rng.standard_normal((tokens, (heads + 2 * kv_heads) * dim), dtype=np.float32)
    size_of_page = rng.uniform(0.5, 2.0, -(-tokens // 32))
    qkv[:, heads * dim : (heads + kv_heads) * dim] *= np.repeat(size_of_page, 32)[:tokens, None]
    result, chosen = attend(isa, qkv, shape, queries, rule)
    q, k, v = rotated(qkv, shape)
    scale = dim**-0.5
    expected = chosen_pages(q[:, :, -queries:], k, rule, scale, tokens - queries)[0].transpose(0, 1).numpy()
    # Sums in another order may turn two pages around that are worth the same, in a few rows of many.
    same = (chosen == expected).all((1, 2))
    assert same.mean() > 0.95
    counts = chosen.sum(-1)
    assert (counts == expected.sum(-1)).all()
    out = attention_to_chosen_pages(q, k, v, rule, scale)[0, :, -queries:].transpose(0, 1).reshape(queries, -1).numpy()
    np.testing.assert_allclose(result[same], out[same], atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("isa", ISAS)
def test_a_query_chooses_and_reads_alone_what_it_does_among_others(isa: str) -> None:
    shape, tokens, rule = (9, 3, 64), 560, PageRule(1, 2, (3, 0, 5))
    qkv = np.random.default_rng(1).standard_normal((tokens, 15 * 64), dtype=np.float32)
    together, chosen = attend(isa, qkv, shape, 60, rule)
    for row in range(60):
        end = tokens - 60 + row + 1
        alone, chosen_alone = attend(isa, qkv[:end], shape, 1, rule)
        assert np.array_equal(chosen_alone[0], chosen[row, :, : chosen_alone.shape[-1]])
        assert np.array_equal(alone[0], together[row])


@pytest.mark.parametrize("isa", ISAS)
def test_where_all_pages_are_read_the_bits_are_the_dense_ones(isa: str) -> None:
    shape, tokens = (9, 3, 64), 560
    qkv = np.random.default_rng(2).standard_normal((tokens, 15 * 64), dtype=np.float32)
    dense, _ = attend(isa, qkv, shape, 60, PageRule(0, 1, ()))
    for rule in (PageRule(1, 2, (15, 15, 15)), PageRule(20, 1, (0, 0, 0)), PageRule(0, 18, (0, 0, 0))):
        everything, chosen = attend(isa, qkv, shape, 60, rule)
        assert chosen[-1].all()
        assert np.array_equal(everything, dense)


@pytest.mark.parametrize("isa", ISAS)
def test_beyond_its_context_a_rule_reads_more_in_proportion(isa: str) -> None:
    shape, tokens = (4, 2, 16), 32 * 24
    qkv = np.random.default_rng(4).standard_normal((tokens, 8 * 16), dtype=np.float32)
    _, chosen = attend(isa, qkv, shape, tokens, PageRule(1, 2, (1, 4), 8))
    pages = np.arange(tokens) // 32 + 1
    for head, reads in enumerate((4, 7)):
        expected = np.minimum(np.where(pages > 8, reads * pages // 8, reads), pages)
        assert (chosen[:, head].sum(-1) == expected).all()
        assert expected[-1] == 3 * reads


@pytest.mark.parametrize("isa", ISAS)
def test_keys_that_are_no_numbers_change_no_count(isa: str) -> None:
    shape, tokens, rule = (4, 2, 16), 400, PageRule(0, 1, (2, 2))
    qkv = np.random.default_rng(3).standard_normal((tokens, 8 * 16), dtype=np.float32)
    qkv[70, :] = np.nan
    _, chosen = attend(isa, qkv, shape, 5, rule)
    assert (chosen.sum(-1) == 3).all()
