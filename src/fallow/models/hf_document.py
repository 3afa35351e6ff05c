"""``ModelConfig`` → ``config.json`` of a Hugging Face folder, for ``hf_config`` and ``transformers`` 4 and 5."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fallow.errors import FallowError, ModelFileError
from fallow.models.config import ModelConfig, RopeConfig
from fallow.models.hf_config import config_from_hf

MODELLING_FILE = "modeling_fallow.py"  # our own architecture, beside the weights of such a model
_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "fallow": "FallowForCausalLM",
}
_ACTIVATIONS = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu", "relu2": "relu2"}


def family_of(config: ModelConfig) -> str:
    """The ``model_type`` that a decoder is written as. One of our own without variants is a Llama or a Qwen3, and a
    Llama with a window (GGUF files have no other word for it) is a Mistral."""
    match config.architecture:
        case "gemma3":
            return "gemma3_text"
        case "llama":
            return "mistral" if any(config.layer_windows) else "llama"
        case "fallow":
            variants = config.value_embedding_layers or config.residual_mixes or config.logit_softcap
            if variants or config.active_share or not config.gated_mlp or config.hidden_act != "silu":
                return "fallow"
            return "qwen3" if config.qk_norm else "llama"
        case family:
            return family


def hf_document(config: ModelConfig, dtype: str = "bfloat16") -> dict[str, Any]:
    """``config.json`` of a model whose tensors have the type ``dtype``.

    Raises ``FallowError`` where no family that ``transformers`` has can say what the configuration does: of a GGUF file
    with an uncommon mix of biases, windows or RoPE.
    """
    family = family_of(config)
    gemma = family == "gemma3_text"
    document: dict[str, Any] = {
        "architectures": [_CLASSES[family]],
        "model_type": family,
        "dtype": dtype,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_activation" if gemma else "hidden_act": _ACTIVATIONS[config.hidden_act],
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids),
        "rope_theta": config.rope.theta,
        **_scaling(config),
        **_windows(config, family),
        **_own(config, family),
    }
    _check(config, document)
    return document


def _own(config: ModelConfig, family: str) -> dict[str, Any]:
    """What one family has and others have not."""
    match family:
        case "llama":
            return {"attention_bias": config.attention_bias, "mlp_bias": config.mlp_bias}
        case "qwen3":
            return {"attention_bias": config.attention_bias}
        case "gemma3_text":
            assert config.rope_local is not None, "every Gemma 3 has one"
            return {
                "attention_bias": config.attention_bias,
                "rope_local_base_freq": config.rope_local.theta,
                "query_pre_attn_scalar": round(config.attention_scale**-2),
            }
        case "fallow":
            module = MODELLING_FILE.removesuffix(".py")
            classes = {"AutoConfig": f"{module}.FallowConfig", "AutoModelForCausalLM": f"{module}.FallowForCausalLM"}
            return {
                "auto_map": classes,
                "qk_norm": config.qk_norm,
                "gated_mlp": config.gated_mlp,
                "value_embedding_layers": list(config.value_embedding_layers),
                "residual_mixes": config.residual_mixes,
                "logit_softcap": config.logit_softcap,
                "active_share": config.active_share,
            }
        case _:
            return {}


def _windows(config: ModelConfig, family: str) -> dict[str, Any]:
    sizes = {window for window in config.layer_windows if window is not None}
    window = min(sizes, default=None)
    if family == "mistral":
        return {"sliding_window": window}
    if family not in ("qwen2", "qwen3", "gemma3_text") or (window is None and family != "gemma3_text"):
        return {}
    types = ["full_attention" if each is None else "sliding_attention" for each in config.layer_windows]
    used = {} if family == "gemma3_text" else {"use_sliding_window": True}
    return {"sliding_window": window, "layer_types": types, **used}


def _scaling(config: ModelConfig) -> dict[str, Any]:
    """RoPE that is stretched. Factors of single frequencies, which GGUF files have, are a LongRoPE that has the same
    factors at every length."""
    rope: RopeConfig = config.rope
    if rope.frequency_factors is not None:
        factors = list(rope.frequency_factors)
        return {
            "rope_scaling": {
                "rope_type": "longrope",
                "rope_theta": rope.theta,
                "short_factor": factors,
                "long_factor": factors,
                "factor": 1.0,
                "attention_factor": 1.0,
                "original_max_position_embeddings": config.max_position_embeddings,
            }
        }
    if rope.scaling == "none":
        return {}
    return {"rope_scaling": {"rope_type": rope.scaling, "rope_theta": rope.theta, **rope.parameters}}


def _check(config: ModelConfig, document: dict[str, Any]) -> None:
    """The document says what the configuration does."""
    try:
        read = config_from_hf(document, "config.json")
    except ModelFileError as error:
        raise FallowError(f"This model cannot be written as a Hugging Face folder: {error}") from error
    expected = replace(config, architecture=read.architecture)
    if config.rope.frequency_factors is not None and config.rope.scaling == "none":
        expected = replace(expected, rope=read.rope)
    for name, value in expected.__dict__.items():
        if getattr(read, name) != value:
            raise FallowError(
                f"This model cannot be written as a Hugging Face folder: its {name} is {value!r:.80}, which the family "
                f"{document['model_type']} of transformers does not have."
            )
