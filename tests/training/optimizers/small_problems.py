"""Small things to optimise, and gradients given to an optimizer by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fallow.models.config import ModelConfig, RopeConfig
from fallow.models.decoder import Decoder
from fallow.training.loss import cross_entropy
from fallow.training.recipe import OptimizerRecipe

VOCABULARY = 61
# Rules for the matrices of layers, each under its kind where it does not name one; the rest is AdamW's.
MATRIX_RULES: dict[str, dict[str, Any]] = {
    "adamw": {"lr": 3e-3, "weight_decay": 0.1},
    "muon": {"lr": 1e-2, "weight_decay": 0.1},
    "normuon": {"kind": "muon", "lr": 1e-2, "weight_decay": 0.1, "variance": 0.95, "cautious": True},
    "scale": {"lr": 2e-3},
    "scale-momentum": {"kind": "scale", "lr": 2e-3, "momentum": 0.9},
    "apollo": {"lr": 1e-2, "rank": 8},
    "apollo-mini": {"lr": 3e-3},
    "galore": {"lr": 1e-2, "rank": 8},
}


def rule(kind: str, /, *parameters: str, **options: Any) -> OptimizerRecipe:
    return OptimizerRecipe.model_validate({"kind": kind, "parameters": parameters, "lr": 1e-3} | options)


def rules_of(name: str) -> list[OptimizerRecipe]:
    return [rule(name, "layers.*_proj.weight", **MATRIX_RULES[name]), rule("adamw", "*", lr=3e-3)]


def random_matrices(shape: tuple[int, int], count: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(count, *shape, generator=generator, dtype=torch.float64))


def trained(optimizer: Optimizer, gradients: Sequence[Tensor]) -> Tensor:
    """The one parameter of ``optimizer`` after a step with each gradient."""
    (parameter,) = optimizer.param_groups[0]["params"]
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    result: Tensor = parameter.detach()
    return result


def tiny_decoder(*, tied: bool = True, zero_outputs: bool = False) -> Decoder:
    decoder = Decoder(
        ModelConfig(
            architecture="fallow",
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            max_position_embeddings=64,
            rms_norm_eps=1e-6,
            rope=RopeConfig(rotary_dim=16),
            attention_scale=0.25,
            tie_word_embeddings=tied,
            layer_windows=(None, None),
            value_embedding_layers=(1,),
        )
    )
    decoder.initialise(torch.Generator().manual_seed(1), zero_outputs=zero_outputs)
    return decoder


def backward(decoder: nn.Module, step: int) -> float:
    """Leaves the gradient of the mean loss of a batch that ``step`` decides: counting on, from a random start."""
    assert isinstance(decoder, Decoder)
    starts = torch.randint(VOCABULARY, (4, 1), generator=torch.Generator().manual_seed(step))
    tokens = (starts + torch.arange(17)) % VOCABULARY  # [sequences, tokens + 1]
    hidden = decoder(tokens[:, :-1]).flatten(0, 1)
    loss = cross_entropy(hidden, decoder.head, tokens[:, 1:].flatten()) / hidden.shape[0]
    loss.backward()
    return float(loss.detach())


def train(decoder: Decoder, optimizers: Sequence[Optimizer], steps: range) -> list[float]:
    losses = []
    for step in steps:
        losses.append(backward(decoder, step))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return losses
