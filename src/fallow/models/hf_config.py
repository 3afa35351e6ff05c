"""``config.json`` of a Hugging Face folder → ``ModelConfig``, as ``transformers`` 4 and 5 write it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fallow.errors import ModelFileError
from fallow.models import fields as limits
from fallow.models.config import ModelConfig, RopeConfig
from fallow.models.fields import Fields

ARCHITECTURES = {
    "llama": "llama",
    "mistral": "mistral",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma3": "gemma3",
    "gemma3_text": "gemma3",
    "fallow": "fallow",
}

# Files written by transformers 4 leave out what is the default of their class: Gemma 3's published ones lack these.
_GEMMA3_DEFAULTS: dict[str, Any] = {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "sliding_window_pattern": 6,
    "tie_word_embeddings": True,
}
_QWEN3_DEFAULTS: dict[str, Any] = {"head_dim": 128}

_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}
_UNGATED_ACTIVATIONS = {"relu2": "relu2"}
_FULL, _SLIDING = "full_attention", "sliding_attention"


def config_from_hf(document: Mapping[str, Any], where: str) -> ModelConfig:
    """Raises ``ModelFileError`` where a field is missing, makes no sense, or asks for what is not supported.

    ``where`` names the document in messages.
    """
    fields = _text_fields(document, where)
    kind = fields.text("model_type", "")
    gemma = kind in ("gemma3", "gemma3_text")
    _refuse_unsupported(fields)
    hidden_size = fields.integer("hidden_size", high=limits.MAX_HIDDEN_SIZE)
    layers = fields.integer("num_hidden_layers", high=limits.MAX_LAYERS)
    heads = fields.integer("num_attention_heads", high=limits.MAX_HEADS)
    vocab_size = fields.integer("vocab_size", high=limits.MAX_VOCAB_SIZE)
    context = fields.integer("max_position_embeddings", high=limits.MAX_CONTEXT)
    head_dim = limits.head_dim(fields, "head_dim", hidden_size, heads)
    bias = kind == "qwen2" or (kind != "mistral" and fields.flag("attention_bias", False))
    rope, rope_local = _ropes(fields, head_dim, context, gemma)
    scalar = fields.factor("query_pre_attn_scalar") if gemma else head_dim
    gated = kind != "fallow" or fields.flag("gated_mlp", True)
    config = ModelConfig(
        architecture=ARCHITECTURES[kind],
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size", high=limits.MAX_INTERMEDIATE_SIZE),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=limits.key_value_heads(fields, "num_key_value_heads", heads),
        head_dim=head_dim,
        max_position_embeddings=context,
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6, high=1.0),
        rope=rope,
        rope_local=rope_local,
        attention_scale=1.0 / math.sqrt(scalar),
        tie_word_embeddings=fields.flag("tie_word_embeddings", False),
        layer_windows=_windows(fields, kind, layers),
        hidden_act=_activation(fields, "hidden_activation" if gemma else "hidden_act", gated),
        attention_bias=bias,
        attention_out_bias=bias and kind != "qwen2",
        mlp_bias=kind == "llama" and fields.flag("mlp_bias", False),
        qk_norm=gemma or kind == "qwen3",
        post_norms=gemma,
        embedding_scale=math.sqrt(hidden_size) if gemma else 1.0,
        bos_token_id=fields.integer("bos_token_id", None, low=0, high=vocab_size - 1),
        eos_token_ids=_ends(fields, vocab_size),
        gated_mlp=gated,
    )
    return _with_variants(config, fields) if kind == "fallow" else config


def _with_variants(config: ModelConfig, fields: Fields) -> ModelConfig:
    """What our own architecture may have that Llama's has not."""
    fields.refuse("attention_bias", "biases of attention")
    fields.refuse("mlp_bias", "biases of the feed-forward network")
    fields.refuse("sliding_window", "a sliding window")
    fields.refuse("layer_types", "layers of several types")
    return replace(
        config,
        qk_norm=fields.flag("qk_norm", False),
        value_embedding_layers=_layers(fields, "value_embedding_layers", config.num_hidden_layers),
        residual_mixes=fields.flag("residual_mixes", False),
        logit_softcap=fields.factor("logit_softcap", None),
        active_share=_active_share(fields, config.gated_mlp),
    )


def _text_fields(document: Mapping[str, Any], where: str) -> Fields:
    """The fields of the text model, with the defaults of its class where files leave them out."""
    kind = document.get("model_type")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        shown = repr(kind)[:60]
        raise ModelFileError(
            f"model_type in {where} is {shown}, which is not supported: use one of {', '.join(ARCHITECTURES)}."
        )
    if document.get("quantization_config"):
        raise ModelFileError(
            f"{where} describes weights that are quantised in a Hugging Face format, which is not supported: "
            "use the model's GGUF file, or its weights in F32, F16 or BF16."
        )
    if "gemma3" not in kind:
        defaults = _QWEN3_DEFAULTS if kind == "qwen3" else {}
        return Fields(defaults | _present(document), where)
    if kind == "gemma3" and document.get("text_config") is not None:
        outer = {name: document[name] for name in ("bos_token_id", "eos_token_id") if name in document}
        inner = Fields(document, where).nested("text_config").values
        tied = {name: document[name] for name in ("tie_word_embeddings",) if document.get(name) is not None}
        document = {**outer, **_present(inner), **tied, "model_type": kind}
        where = f"text_config in {where}"
    return Fields(_GEMMA3_DEFAULTS | _kept_nulls(document), where)


def _present(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _kept_nulls(values: Mapping[str, Any]) -> dict[str, Any]:
    """Without the nulls, but for the window: there null means that the model has none."""
    return {name: value for name, value in values.items() if value is not None or name == "sliding_window"}


def _refuse_unsupported(fields: Fields) -> None:
    fields.refuse("num_local_experts", "a mixture of experts")
    fields.refuse("num_experts", "a mixture of experts")
    fields.refuse("attn_logit_softcapping", "a soft cap on attention logits")
    fields.refuse("final_logit_softcapping", "a soft cap on logits")
    fields.refuse("use_bidirectional_attention", "attention to later tokens")
    if fields.number("partial_rotary_factor", 1.0, high=1.0) != 1.0:
        raise fields.wrong("partial_rotary_factor", "1")


def _activation(fields: Fields, name: str, gated: bool) -> str:
    known = _ACTIVATIONS if gated else _UNGATED_ACTIVATIONS
    value = fields.text(name, "silu")
    if value not in known:
        needed = ", ".join(known)
        raise fields.wrong(name, f"one of {needed}" if gated else f"{needed} where gated_mlp is false")
    return known[value]


def _active_share(fields: Fields, gated: bool) -> float | None:
    share = fields.number("active_share", None, high=1.0)
    if share is not None and (share == 1.0 or not gated):
        raise fields.wrong("active_share", "less than 1, with gated_mlp")
    return share


def _layers(fields: Fields, name: str, layers: int) -> tuple[int, ...]:
    """Distinct layers; none where the field is missing."""
    value = fields.values.get(name, [])
    known = isinstance(value, list) and all(type(i) is int and 0 <= i < layers for i in value)
    if not known or len(set(value)) < len(value):
        raise fields.wrong(name, f"a list of distinct layers from 0 to {layers - 1}")
    return tuple(value)


def _windows(fields: Fields, kind: str, layers: int) -> tuple[int | None, ...]:
    window = fields.integer("sliding_window", None, high=limits.MAX_CONTEXT)
    if kind in ("llama", "fallow") or (kind in ("qwen2", "qwen3") and not fields.flag("use_sliding_window", False)):
        window = None
    types = fields.values.get("layer_types")
    if types is not None and kind not in ("llama", "fallow"):
        if not isinstance(types, list) or len(types) != layers or not all(t in (_FULL, _SLIDING) for t in types):
            raise fields.wrong("layer_types", f"{_FULL} or {_SLIDING} for each of {layers} layers")
        if window is None and _SLIDING in types:
            raise fields.wrong("sliding_window", f"a number of tokens, as layer_types has {_SLIDING}")
        return tuple(window if t == _SLIDING else None for t in types)
    if window is None:
        return (None,) * layers
    if kind in ("qwen2", "qwen3"):
        first = fields.integer("max_window_layers", 28, low=0, high=limits.MAX_LAYERS)
        return tuple(window if i >= first else None for i in range(layers))
    if kind == "mistral":
        return (window,) * layers
    name = "_sliding_window_pattern" if "_sliding_window_pattern" in fields else "sliding_window_pattern"
    pattern = fields.integer(name, high=limits.MAX_LAYERS)
    return tuple(window if (i + 1) % pattern else None for i in range(layers))


def _ends(fields: Fields, vocab_size: int) -> tuple[int, ...]:
    value = fields.values.get("eos_token_id")
    ends = value if isinstance(value, list) else [] if value is None else [value]
    if len(ends) > 1024 or not all(type(end) is int and 0 <= end < vocab_size for end in ends):
        raise fields.wrong("eos_token_id", f"one or more token ids below {vocab_size}")
    return tuple(dict.fromkeys(ends))


def _ropes(fields: Fields, head_dim: int, context: int, gemma: bool) -> tuple[RopeConfig, RopeConfig | None]:
    """RoPE of all layers, and of the layers with a window where they have their own."""
    # transformers 5 writes rope_parameters, transformers 4 rope_theta and rope_scaling.
    given = fields.nested("rope_scaling" if fields.values.get("rope_scaling") else "rope_parameters")
    theta = fields.number("rope_theta", 10_000.0, low=1.0, high=limits.MAX_THETA)
    if not gemma:
        return _rope(fields, given, theta, head_dim, context), None
    local_theta = fields.number("rope_local_base_freq", low=1.0, high=limits.MAX_THETA)
    per_layer = _FULL in given or _SLIDING in given
    local = given.nested(_SLIDING) if per_layer else Fields({}, given.where)
    return (
        _rope(fields, given.nested(_FULL) if per_layer else given, theta, head_dim, context),
        _rope(fields, local, local_theta, head_dim, context),
    )


def _rope(fields: Fields, given: Fields, theta: float, head_dim: int, context: int) -> RopeConfig:
    """One RoPE, its parameters checked and completed as ``transformers.modeling_rope_utils`` does."""
    kind = given.text("rope_type", given.text("type", "default"))
    theta = given.number("rope_theta", theta, low=1.0, high=limits.MAX_THETA)
    if given.number("partial_rotary_factor", 1.0, high=1.0) != 1.0:
        raise given.wrong("partial_rotary_factor", "1")
    parameters: dict[str, float | int | list[float]] = {}
    if kind in ("llama3", "yarn", "longrope"):
        outer = fields.integer("original_max_position_embeddings", None, low=2, high=limits.MAX_CONTEXT)
        original = given.integer("original_max_position_embeddings", outer or context, low=2, high=limits.MAX_CONTEXT)
        parameters["original_max_position_embeddings"] = outer or original
    if kind in ("linear", "dynamic", "llama3"):
        parameters["factor"] = given.factor("factor")
    match kind:
        case "default" | "none":
            return RopeConfig(theta=theta, rotary_dim=head_dim)
        case "linear" | "dynamic":
            pass
        case "llama3":
            low = given.factor("low_freq_factor")
            high = given.number("high_freq_factor", low=low, high=limits.MAX_FACTOR)
            parameters |= {"low_freq_factor": low, "high_freq_factor": high}
        case "yarn" | "longrope":
            ratio = context / float(parameters["original_max_position_embeddings"])  # type: ignore[arg-type]
            parameters["factor"] = given.factor("factor", ratio)
            optional = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
            for name in optional if kind == "yarn" else optional[:1]:
                if given.values.get(name):
                    parameters[name] = given.factor(name)
            if kind == "longrope":
                parameters |= {name: given.factors(name, head_dim // 2) for name in ("short_factor", "long_factor")}
            elif not given.flag("truncate", True):
                raise given.wrong("truncate", "true")
        case _:
            raise given.wrong("rope_type", "default, linear, dynamic, yarn, llama3 or longrope")
    return RopeConfig(theta=theta, rotary_dim=head_dim, scaling=kind, parameters=parameters)
