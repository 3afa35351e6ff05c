"""The blockwise cross-entropy against PyTorch's own, loss and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from fallow.training.loss import cross_entropy


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize(("tokens", "vocab", "block"), [(1, 7, None), (50, 33, 16), (64, 100, 64), (65, 100, 64)])
def test_loss_and_gradients(tokens: int, vocab: int, block: int | None, softcap: float | None):
    torch.manual_seed(tokens * vocab)
    hidden = torch.randn(tokens, 24, dtype=torch.float32, requires_grad=True)
    head = torch.randn(vocab, 24, requires_grad=True)
    targets = torch.randint(0, vocab, (tokens,))
    targets[::3] = -1
    loss = cross_entropy(hidden, head, targets, softcap=softcap, block=block) * 0.7
    loss.backward()
    gradients = hidden.grad.clone(), head.grad.clone()
    hidden.grad = head.grad = None
    logits = hidden @ head.T
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    expected = F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum") * 0.7
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients[0], hidden.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradients[1], head.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_several_targets_of_a_token(softcap: float | None):
    torch.manual_seed(7)
    hidden, head = torch.randn(21, 24, requires_grad=True), torch.randn(33, 24, requires_grad=True)
    targets = torch.randint(0, 33, (21, 4))
    targets[::2, 3] = -1
    targets[5] = -1
    targets[6] = 12  # the same one four times
    together = cross_entropy(hidden, head, targets, softcap=softcap, block=8)
    gradients = torch.autograd.grad(together, (hidden, head))
    apart = sum(cross_entropy(hidden, head, column, softcap=softcap) for column in targets.unbind(1))
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-5)
    for one, other in zip(gradients, torch.autograd.grad(apart, (hidden, head)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(50,), (50, 3)])
def test_compiled_it_is_the_same(shape: tuple[int, ...]):
    torch.manual_seed(5)
    hidden, head = torch.randn(50, 24, requires_grad=True), torch.randn(33, 24, requires_grad=True)
    targets = torch.randint(0, 33, shape)
    targets[::3] = -1
    results = []
    for compiled in (False, True):
        loss = cross_entropy(hidden, head, targets, softcap=5.0, block=16, compiled=compiled)
        results.append((loss.detach(), *torch.autograd.grad(loss, (hidden, head))))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-5)


def test_no_target_counts():
    hidden = torch.randn(4, 8, requires_grad=True)
    head = torch.randn(5, 8, requires_grad=True)
    loss = cross_entropy(hidden, head, torch.full((4,), -1))
    loss.backward()
    assert loss.item() == 0.0
    assert not hidden.grad.any()
    assert not head.grad.any()


def test_bfloat16_products_and_float32_sums():
    torch.manual_seed(3)
    hidden, head = torch.randn(40, 64), torch.randn(90, 64)
    targets = torch.randint(0, 90, (40,))
    exact = F.cross_entropy(hidden.bfloat16().float() @ head.bfloat16().float().T, targets, reduction="sum")
    loss = cross_entropy(hidden.bfloat16(), head, targets)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=3e-3, atol=0.1)
