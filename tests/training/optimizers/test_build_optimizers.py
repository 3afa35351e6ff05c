"""Which parameter gets which optimizer, and the sentence for every rule that cannot be followed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_problems import rule, tiny_decoder
from torch import Tensor

from fallow.errors import FallowError
from fallow.training.optimizers.apollo import Apollo, ApolloMini
from fallow.training.optimizers.build import build_optimizers, state_bytes
from fallow.training.optimizers.galore import GaLore
from fallow.training.optimizers.muon import Muon
from fallow.training.optimizers.scale import Scale

MATRICES = "layers.*_proj.weight"


def names(optimizer: torch.optim.Optimizer, parameters: dict[str, Tensor]) -> set[str]:
    own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return {name for name, parameter in parameters.items() if id(parameter) in own}


def test_the_first_rule_that_matches_wins() -> None:
    parameters = dict(tiny_decoder().named_parameters())
    rules = [rule("apollo", "*.1.down_proj.weight", rank=4), rule("muon", MATRICES), rule("adamw", "*")]
    apollo, muon, adamw = build_optimizers(parameters.items(), rules)
    assert names(apollo, parameters) == {"layers.1.down_proj.weight"}
    assert len(names(muon, parameters)) == 2 * 7 - 1
    assert names(apollo, parameters) | names(muon, parameters) | names(adamw, parameters) == set(parameters)
    assert "layers.1.value_embeddings.weight" in names(adamw, parameters)


def test_only_matrices_decay_and_rates_can_be_scheduled() -> None:
    rules = [rule("muon", MATRICES, lr=0.02, weight_decay=0.1), rule("adamw", "*", lr=0.01, weight_decay=0.2)]
    muon, adamw = build_optimizers(tiny_decoder().named_parameters(), rules)
    assert [group["weight_decay"] for group in muon.param_groups] == [0.1]
    decays = {parameter.ndim: group["weight_decay"] for group in adamw.param_groups for parameter in group["params"]}
    assert decays == {1: 0.0, 2: 0.2}
    assert {group["initial_lr"] for group in muon.param_groups} == {0.02}
    assert {group["initial_lr"] for group in adamw.param_groups} == {0.01}


@pytest.mark.parametrize(
    ("made", "kind", "options"),
    [
        (torch.optim.AdamW, "adamw", {"betas": (0.8, 0.9)}),
        (Muon, "muon", {"momentum": 0.9, "variance": 0.8, "cautious": True}),
        (Scale, "scale", {"momentum": 0.9}),
        (Apollo, "apollo", {"betas": (0.8, 0.9), "rank": 4}),
        (ApolloMini, "apollo-mini", {"betas": (0.8, 0.9)}),
        (GaLore, "galore", {"betas": (0.8, 0.9), "rank": 4}),
    ],
)
def test_hyperparameters_arrive(made: type, kind: str, options: dict[str, Any]) -> None:
    rules = [rule(kind, MATRICES, lr=0.03, weight_decay=0.1, **options), rule("adamw", "*")]
    optimizer = build_optimizers(tiny_decoder().named_parameters(), rules)[0]
    assert type(optimizer) is made
    for group in optimizer.param_groups:
        assert options.items() <= group.items()
        assert (group["lr"], group["weight_decay"]) == (0.03, 0.1)


def test_adamw_is_the_fused_one() -> None:
    (optimizer,) = build_optimizers(tiny_decoder().named_parameters(), [rule("adamw", "*")])
    assert all(group["fused"] for group in optimizer.param_groups)


@pytest.mark.parametrize("tied", [True, False])
def test_scale_knows_inputs_from_outputs(tied: bool) -> None:
    parameters = dict(tiny_decoder(tied=tied).named_parameters())
    rules = [rule("scale", "*embed*"), rule("scale", "*_proj.weight", "lm_head.weight"), rule("adamw", "*")]
    rules = rules if tied else [rule("scale", "lm_head.weight", momentum=0.9), *rules]
    outputs = {
        name: group["output_dim"]
        for optimizer in build_optimizers(parameters.items(), rules)[:-1]
        for group in optimizer.param_groups
        for name, parameter in parameters.items()
        if any(parameter is own for own in group["params"])
    }
    inputs = {name for name, dim in outputs.items() if dim == 1}
    assert inputs == {"layers.1.value_embeddings.weight"} | (set() if tied else {"embed_tokens.weight"})


def test_frozen_parameters_are_left_out() -> None:
    decoder = tiny_decoder()
    decoder.embed_tokens.weight.requires_grad_(False)
    rules = [rule("muon", MATRICES), rule("adamw", "*norm.weight", "*value_embeddings.weight")]
    optimizers = build_optimizers(decoder.named_parameters(), rules)
    assert all("embed_tokens.weight" not in names(o, dict(decoder.named_parameters())) for o in optimizers)


def test_state_bytes_counts_what_is_there() -> None:
    decoder = tiny_decoder()
    optimizers = build_optimizers(decoder.named_parameters(), [rule("muon", MATRICES), rule("adamw", "*")])
    assert state_bytes(optimizers) == 0
    for parameter in decoder.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for optimizer in optimizers:
        optimizer.step()
    matrices = sum(p.numel() for name, p in decoder.named_parameters() if "_proj" in name)
    others = [p.numel() for name, p in decoder.named_parameters() if "_proj" not in name]
    assert state_bytes(optimizers) == 4 * (matrices + 2 * sum(others) + len(others))  # AdamW's counters are tensors


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([], "No optimizer has a pattern that matches embed_tokens.weight: add one, or a rule with the pattern *."),
        ([rule("muon", MATRICES)], "matches embed_tokens.weight"),
        (
            [rule("adamw", "*"), rule("muon", "layer.*", MATRICES)],
            f"optimizer 2 (muon) gets no parameter: its patterns (layer.*, {MATRICES}) match none, or only such as",
        ),
        (
            [rule("adamw", "*", momentum=0.9)],
            "optimizer 1 (adamw) has no momentum: leave it out; it has lr, weight_decay, betas.",
        ),
        ([rule("adamw", "*", cautious=False)], "optimizer 1 (adamw) has no cautious"),
        ([rule("muon", MATRICES, betas=(0.9, 0.9)), rule("adamw", "*")], "optimizer 1 (muon) has no betas"),
        (
            [rule("muon", MATRICES, rank=4), rule("adamw", "*")],
            "has lr, weight_decay, momentum, variance, cautious, iterations.",
        ),
        ([rule("scale", MATRICES, rank=4), rule("adamw", "*")], "optimizer 1 (scale) has no rank"),
        ([rule("apollo", MATRICES, rank=4, variance=0.9), rule("adamw", "*")], "optimizer 1 (apollo) has no variance"),
        ([rule("apollo-mini", MATRICES, rank=4), rule("adamw", "*")], "optimizer 1 (apollo-mini) has no rank"),
        ([rule("apollo", MATRICES), rule("adamw", "*")], "optimizer 1 (apollo) needs rank"),
        ([rule("galore", MATRICES), rule("adamw", "*")], "optimizer 1 (galore) needs rank"),
        (
            [rule("adamw", "*", betas=(0.9, 1.0))],
            "optimizer 1 (adamw) has betas [0.9, 1.0]: both must be at least 0 and less than 1.",
        ),
        *(
            (
                [rule(kind, "*", **options)],
                f"optimizer 1 ({kind}) takes matrices, but layers.0.attention_norm.weight has the shape [32]: give it",
            )
            for kind, options in (
                ("muon", {}),
                ("scale", {}),
                ("apollo", {"rank": 4}),
                ("apollo-mini", {}),
                ("galore", {"rank": 4}),
            )
        ),
    ],
)
def test_a_mistake_is_one_sentence(rules: list[Any], message: str) -> None:
    with pytest.raises(FallowError) as caught:
        build_optimizers(tiny_decoder().named_parameters(), rules)
    assert message in str(caught.value)
    assert str(caught.value).endswith(".")
