"""Updates inside the backward pass: the same results, no gradient left, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from small_problems import MATRIX_RULES, backward, rules_of, tiny_decoder, train
from torch import nn

from fallow.data.windows import Batch
from fallow.errors import FallowError
from fallow.models.decoder import Decoder
from fallow.training.optimizers.build import build_optimizers
from fallow.training.optimizers.fused import FusedUpdates
from fallow.training.step import Step
from fallow.training.watch import LossWatch


@pytest.mark.parametrize("name", MATRIX_RULES)
def test_results_are_those_of_separate_steps(name: str) -> None:
    apart, fused = tiny_decoder(), tiny_decoder()
    steps = build_optimizers(apart.named_parameters(), rules_of(name))
    optimizers = build_optimizers(fused.named_parameters(), rules_of(name))
    updates = FusedUpdates(optimizers, clip=None, micro_batches=1)
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
    updates.remove()
    backward(fused, 4)
    assert all(parameter.grad is not None for parameter in fused.parameters())


def test_gradients_never_exist_together() -> None:
    decoder = tiny_decoder()
    optimizers = build_optimizers(decoder.named_parameters(), rules_of("adamw"))
    backward(decoder, 0)  # gradients that are dropped
    FusedUpdates(optimizers, clip=None, micro_batches=1)
    held: list[int] = []
    for parameter in decoder.parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda _: held.append(sum(p.grad is not None for p in decoder.parameters()))
        )
    backward(decoder, 1)
    assert held == [0] * len(list(decoder.parameters()))


def counting(step: int) -> Batch:
    tokens = (torch.randint(61, (4, 1), generator=torch.Generator().manual_seed(step)) + torch.arange(17)) % 61
    return Batch(tokens[:, :-1].numpy(), tokens[:, 1:].numpy())


def fused_step(decoder: Decoder) -> Step:
    optimizers = build_optimizers(decoder.named_parameters(), rules_of("apollo-mini"))
    updates = FusedUpdates(optimizers, clip=None, micro_batches=1)
    return Step(decoder, optimizers, micro_batch=None, clip=None, fused=updates)


def changed(decoder: Decoder, before: Decoder) -> list[str]:
    pairs = zip(decoder.named_parameters(), before.parameters(), strict=True)
    return [name for (name, parameter), other in pairs if not torch.equal(parameter, other)]


def test_a_loss_that_leaps_changes_no_weight() -> None:
    decoder = tiny_decoder()
    step, before = fused_step(decoder), copy.deepcopy(decoder)
    taken = step.take(counting(0), LossWatch([1.0] * 20))
    assert taken.complaint is not None
    assert taken.complaint.startswith("the loss leapt to 4.")
    assert changed(decoder, before) == []
    assert step.take(counting(0), LossWatch()).complaint is None
    assert len(changed(decoder, before)) == len(list(decoder.parameters()))


def test_a_gradient_that_is_no_number_ends_the_updates_there() -> None:
    decoder = tiny_decoder()
    step, before = fused_step(decoder), copy.deepcopy(decoder)
    decoder.get_parameter("layers.1.o_proj.weight").register_hook(lambda gradient: gradient * float("nan"))
    taken = step.take(counting(0), LossWatch())
    assert taken.complaint is not None
    assert taken.complaint.endswith("but the norm of the gradient is nan, first in layers.1.o_proj.weight")
    nearer = {"norm.weight", "layers.1.ffn_norm.weight", *(f"layers.1.{n}_proj.weight" for n in ("gate", "up", "down"))}
    assert set(changed(decoder, before)) == nearer
    assert all(parameter.grad is None for parameter in decoder.parameters())


def test_what_needs_all_gradients_is_refused() -> None:
    decoder = tiny_decoder()
    optimizers = build_optimizers(decoder.named_parameters(), rules_of("adamw"))
    with pytest.raises(FallowError, match=r"clipping needs the norm of all gradients at once; set train\.clip to 0"):
        FusedUpdates(optimizers, clip=1.0, micro_batches=1)
    with pytest.raises(FallowError, match="gradients of 4 micro-batches would have to be kept; make micro_batch as"):
        FusedUpdates(optimizers, clip=None, micro_batches=4)
    elsewhere = torch.optim.SGD([nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2, device="meta"))])
    with pytest.raises(FallowError, match="parameters are on several devices; put them on one"):
        FusedUpdates([elsewhere], clip=None, micro_batches=1)
    backward(decoder, 0)
    assert all(parameter.grad is not None for parameter in decoder.parameters())  # nothing was attached
