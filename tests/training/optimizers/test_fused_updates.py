"""Updates inside the backward pass: the same results, no gradient left, and what is refused."""

from __future__ import annotations

import pytest
import torch
from small_problems import MATRIX_RULES, backward, rules_of, tiny_decoder, train
from torch import nn

from fallow.errors import FallowError
from fallow.training.optimizers.build import build_optimizers
from fallow.training.optimizers.fused import attach_fused_updates


@pytest.mark.parametrize("name", MATRIX_RULES)
def test_results_are_those_of_separate_steps(name: str) -> None:
    apart, fused = tiny_decoder(), tiny_decoder()
    steps = build_optimizers(apart.named_parameters(), rules_of(name))
    optimizers = build_optimizers(fused.named_parameters(), rules_of(name))
    handles = attach_fused_updates(optimizers, clip=None, micro_batches=1)
    exact = "muon" not in MATRIX_RULES[name].get("kind", name)
    for step in range(4):
        (expected,) = train(apart, steps, range(step, step + 1))
        loss = backward(fused, step)
        assert all(parameter.grad is None for parameter in fused.parameters())
        assert loss == (expected if exact else pytest.approx(expected, rel=1e-3))
    for (where, parameter), other in zip(apart.named_parameters(), fused.parameters(), strict=True):
        if exact:
            assert torch.equal(parameter, other), where
        else:
            torch.testing.assert_close(parameter, other, rtol=0.0, atol=2e-3)
    for handle in handles:
        handle.remove()
    backward(fused, 4)
    assert all(parameter.grad is not None for parameter in fused.parameters())


def test_gradients_never_exist_together() -> None:
    decoder = tiny_decoder()
    optimizers = build_optimizers(decoder.named_parameters(), rules_of("adamw"))
    backward(decoder, 0)  # gradients that are dropped
    attach_fused_updates(optimizers, clip=None, micro_batches=1)
    held: list[int] = []
    for parameter in decoder.parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda _: held.append(sum(p.grad is not None for p in decoder.parameters()))
        )
    backward(decoder, 1)
    assert held == [0] * len(list(decoder.parameters()))


def test_what_needs_all_gradients_is_refused() -> None:
    decoder = tiny_decoder()
    optimizers = build_optimizers(decoder.named_parameters(), rules_of("adamw"))
    with pytest.raises(FallowError, match="clipping needs the norm of all gradients at once; turn one of the two off"):
        attach_fused_updates(optimizers, clip=1.0, micro_batches=1)
    with pytest.raises(FallowError, match="gradients of 4 micro-batches would have to be kept; make micro_batch as"):
        attach_fused_updates(optimizers, clip=None, micro_batches=4)
    elsewhere = torch.optim.SGD([nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2, device="meta"))])
    with pytest.raises(FallowError, match="parameters are on several devices; put them on one"):
        attach_fused_updates([elsewhere], clip=None, micro_batches=1)
    backward(decoder, 0)
    assert all(parameter.grad is not None for parameter in decoder.parameters())  # nothing was attached
