"""The decoder that a recipe asks for."""

from __future__ import annotations

import math

import torch

from fallow.errors import FallowError
from fallow.models.config import ModelConfig, RopeConfig
from fallow.models.decoder import Decoder
from fallow.models.tokenizer import Tokenizer
from fallow.training.recipe import ModelRecipe, Recipe

_ACTIVATIONS = {"swiglu": "silu", "geglu": "gelu_tanh", "reglu": "relu", "relu2": "relu2"}
_EPS = 1e-6


def config_of(recipe: ModelRecipe, tokenizer: Tokenizer, context: int) -> ModelConfig:
    """Raises ``FallowError`` where sizes do not fit together."""
    if recipe.hidden_size % recipe.heads or recipe.hidden_size // recipe.heads % 2:
        raise FallowError(
            f"model.hidden_size is {recipe.hidden_size}, which {recipe.heads} heads cannot share: "
            "use a number of heads that divides it into even parts."
        )
    key_value_heads = recipe.key_value_heads or recipe.heads
    if recipe.heads % key_value_heads:
        raise FallowError(f"model.key_value_heads is {key_value_heads}: it must divide the {recipe.heads} heads.")
    beyond = [layer for layer in recipe.value_embedding_layers if not 0 <= layer < recipe.layers]
    if beyond:
        raise FallowError(f"model.value_embedding_layers has {beyond[0]}: layers go from 0 to {recipe.layers - 1}.")
    if recipe.active_share is not None and recipe.activation == "relu2":
        raise FallowError("model.active_share thresholds gates, and relu2 has none: use reglu, swiglu or geglu.")
    head_dim = recipe.hidden_size // recipe.heads
    return ModelConfig(
        architecture="fallow",
        vocab_size=tokenizer.vocab_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=key_value_heads,
        head_dim=head_dim,
        max_position_embeddings=context,
        rms_norm_eps=_EPS,
        rope=RopeConfig(theta=recipe.rope_theta, rotary_dim=head_dim),
        attention_scale=1.0 / math.sqrt(head_dim),
        tie_word_embeddings=recipe.tie_embeddings,
        layer_windows=(None,) * recipe.layers,
        hidden_act=_ACTIVATIONS[recipe.activation],
        qk_norm=recipe.qk_norm,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_ids=tuple(sorted(tokenizer.eos_token_ids)),
        gated_mlp=recipe.activation != "relu2",
        value_embedding_layers=recipe.value_embedding_layers,
        residual_mixes=recipe.residual_mixes,
        logit_softcap=recipe.logit_softcap,
        active_share=recipe.active_share,
    )


def new_decoder(recipe: Recipe, tokenizer: Tokenizer) -> Decoder:
    """A decoder with random weights, the same for the same seed; parameters are float32."""
    config = config_of(recipe.model, tokenizer, recipe.data.context)
    compute = torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32
    decoder = Decoder(config, compute=compute)
    generator = torch.Generator().manual_seed(recipe.train.seed)
    decoder.initialise(generator, zero_outputs=recipe.model.zero_outputs)
    return decoder
