"""Causal attention by blocks of keys against PyTorch's in float64, with its gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from fallow.models.attention import BLOCK, blocks_are_faster, causal_attention


@pytest.mark.parametrize("tokens", [2, BLOCK, BLOCK + 1, 3 * BLOCK - 7])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.bfloat16, 2e-2)])
def test_it_is_causal_attention(tokens: int, dtype: torch.dtype, tolerance: float):
    generator = torch.Generator().manual_seed(tokens)
    # As the decoder has them: [batch, tokens, heads, head_dim], seen the other way round.
    given = torch.randn(4, 2, tokens, 3, 16, generator=generator).to(dtype).transpose(2, 3)
    upstream = given[3]
    results = []
    for kind, attention in (
        (dtype, lambda q, k, v: causal_attention(q, k, v, 0.3)),
        (torch.float64, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)),
    ):
        q, k, v = (x.to(kind).requires_grad_() for x in given[:3])
        out = attention(q, k, v)
        assert out.dtype == kind
        results.append((out.detach(), *torch.autograd.grad(out, (q, k, v), upstream.to(kind))))
    for ours, reference in zip(*results, strict=True):
        assert (ours.double() - reference).norm() <= tolerance * reference.norm() + 1e-9


def test_it_is_for_compiled_code_only():
    assert not blocks_are_faster(torch.zeros(1, 1, 2 * BLOCK, 16, dtype=torch.bfloat16))
