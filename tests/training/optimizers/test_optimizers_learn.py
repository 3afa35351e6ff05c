"""Every optimizer lowers a loss, and leaves the global random state alone."""

from __future__ import annotations

import pytest
import torch
from small_problems import MATRIX_RULES, random_matrices, rule, rules_of, tiny_decoder, train
from torch import nn

from fallow.training.optimizers.build import build_optimizers


@pytest.mark.parametrize("zero_outputs", [False, True])
@pytest.mark.parametrize("name", MATRIX_RULES)
def test_a_tiny_decoder_learns(name: str, zero_outputs: bool) -> None:
    decoder = tiny_decoder(zero_outputs=zero_outputs)
    optimizers = build_optimizers(decoder.named_parameters(), rules_of(name))
    others = {n: p.detach().clone() for n, p in decoder.named_parameters()}
    random_state = torch.get_rng_state()
    losses = train(decoder, optimizers, range(60))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert sum(losses[-5:]) / 5 < 0.75 * losses[0]
    for name_, parameter in decoder.named_parameters():
        assert parameter.isfinite().all(), name_
        assert not torch.equal(parameter, others[name_]), name_


@pytest.mark.parametrize("name", MATRIX_RULES)
def test_a_regression_is_solved_better_and_better(name: str) -> None:
    target, start, inputs = (matrix.float() for matrix in random_matrices((16, 16), 3))
    weights = nn.Parameter(0.1 * start)
    (optimizer,) = build_optimizers([("w", weights)], [rule(name, "w", **(MATRIX_RULES[name] | {"weight_decay": 0.0}))])
    losses = []
    for _ in range(100):
        loss = (inputs @ (weights - target).T).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    assert losses[-1] < losses[50] < losses[0]
