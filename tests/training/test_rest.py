"""Training to rest: the penalty against autograd on the sum written out, and the same however a batch is computed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fallow.data.windows import Batch
from fallow.models.config import ModelConfig, RopeConfig
from fallow.models.decoder import Decoder
from fallow.plan import SparsityPlan
from fallow.training.loss import cross_entropy
from fallow.training.recipe import RestRecipe, load_recipe
from fallow.training.rest import RestPenalty
from fallow.training.run import train

VOCAB = 40


CONFIG = ModelConfig(
    architecture="fallow",
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=16,
    rms_norm_eps=1e-6,
    rope=RopeConfig(rotary_dim=16),
    attention_scale=0.25,
    tie_word_embeddings=True,
    layer_windows=(None,) * 3,
    hidden_act="relu",
)


def decoder() -> Decoder:
    made = Decoder(CONFIG)
    made.initialise(torch.Generator().manual_seed(3))
    return made


def batch() -> Batch:
    tokens = torch.randint(0, VOCAB, (4, 17), generator=torch.Generator().manual_seed(4)).numpy()
    return Batch(inputs=tokens[:, :-1], targets=tokens[:, 1:])


def gradients(model: Decoder) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def loss_of(model: Decoder, data: Batch, part: slice) -> Tensor:
    """Of a part of the batch: its share of the mean."""
    hidden = model(torch.from_numpy(data.inputs[part]))
    targets = torch.from_numpy(data.targets[part]).flatten()
    return cross_entropy(hidden.flatten(0, 1), model.head, targets) / data.targets.size


def penalised(model: Decoder, *, l1: float = 0.3, micro_batch: int | None = None) -> tuple[float, dict[str, Tensor]]:
    penalty = RestPenalty(model, RestRecipe(l1=l1, full_share=0.0), steps=10)
    data = batch()
    penalty.prepare(5, data.inputs.size)
    size = micro_batch or len(data.inputs)
    losses = [loss_of(model, data, slice(first, first + size)) for first in range(0, len(data.inputs), size)]
    for loss in losses:
        loss.backward()
    return sum(float(loss.detach()) for loss in losses), gradients(model)


def written_out(l1: float = 0.3) -> tuple[float, dict[str, Tensor]]:
    """The loss and the gradient of loss + penalty, the neurons of each layer taken out by hand."""
    model, data = decoder(), batch()
    sums: list[Tensor] = []
    for projection in model.down_projections:
        projection.register_forward_pre_hook(lambda _, arguments: sums.append(arguments[0].abs().sum(-1).mean()))
    loss = loss_of(model, data, slice(None))
    (loss + l1 * torch.stack(sums).mean()).backward()
    return float(loss.detach()), gradients(model)


def assert_same(found: tuple[float, dict[str, Tensor]], expected: tuple[float, dict[str, Tensor]]) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_the_gradient_is_that_of_the_penalty_written_out() -> None:
    assert_same(penalised(decoder()), written_out())
    plain = written_out(l1=0.0)
    assert not torch.allclose(plain[1]["layers.0.gate_proj.weight"], written_out()[1]["layers.0.gate_proj.weight"])


def test_in_micro_batches_and_with_layers_computed_again() -> None:
    assert_same(penalised(decoder(), micro_batch=3), written_out())
    model = decoder()
    model.checkpoint_layers = True
    assert_same(penalised(model), written_out())


@pytest.mark.slow
def test_compiled() -> None:
    model = decoder()
    model.compile()
    assert_same(penalised(model), written_out())


def test_it_rises_between_the_two_shares() -> None:
    penalty = RestPenalty(decoder(), RestRecipe(l1=1.0, begin_share=0.2, full_share=0.6), steps=100)
    assert [penalty.factor(step) for step in (0, 19, 60, 99)] == [0, 0, 1, 1]
    assert penalty.factor(39) == pytest.approx(0.5, abs=0.02)


def test_neurons_come_to_rest(recipe_file: Path, tmp_path: Path) -> None:
    overrides = ["model.activation=reglu", "report.activity_tokens=256"]
    reports: dict[float, list] = {}
    for l1 in (0.0, 0.05):
        reports[l1] = []
        recipe = load_recipe(recipe_file, [*overrides, f"rest.l1={l1}"])
        result = train(recipe, out=tmp_path / str(l1), on_step=reports[l1].append)
        assert result.activity is not None
        assert result.model is not None
        plan = SparsityPlan.beside(result.model)  # what the engine obeys
        assert (plan or SparsityPlan.dense()) == result.activity.plan
    dense, resting = (reports[l1][-1].activity.resting for l1 in reports)
    assert resting > dense + 0.1
    assert reports[0.05][-1].loss < 0.9 * reports[0.05][0].loss
