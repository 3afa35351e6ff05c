"""GGUF metadata → ``ModelConfig``. The keys are those of the GGUF specification, ``{architecture}.*``."""

from __future__ import annotations

import math

import numpy as np

from fallow.errors import ModelFileError
from fallow.models import fields as limits
from fallow.models.config import ModelConfig, RopeConfig
from fallow.models.fields import Fields
from fallow.models.gguf import GgufFile
from fallow.models.tensors import TensorType

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3")
ROPE_FACTORS = "rope_freqs.weight"
GEMMA3_LOCAL_THETA = 10_000.0
GEMMA3_PATTERN = 6  # five layers with a window, then one without
GEMMA3_27B_LAYERS = 62


def config_from_gguf(file: GgufFile) -> ModelConfig:
    """Raises ``ModelFileError`` where a key is missing, makes no sense, or asks for what is not supported."""
    where = f"the metadata of {file.path}"
    architecture = Fields(file.metadata, where).text("general.architecture", "")
    if architecture not in ARCHITECTURES:
        raise ModelFileError(
            f"{file.path} is of the architecture {architecture[:40]!r}, which is not supported: "
            f"use one of {', '.join(ARCHITECTURES)}."
        )
    prefix = architecture + "."
    fields = Fields(
        {key.removeprefix(prefix): value for key, value in file.metadata.items() if key.startswith(prefix)},
        f"{prefix}* in {where}",
    )
    _refuse_unsupported(file, fields)
    hidden_size = fields.integer("embedding_length", high=limits.MAX_HIDDEN_SIZE)
    layers = fields.integer("block_count", high=limits.MAX_LAYERS)
    heads = fields.integer("attention.head_count", high=limits.MAX_HEADS)
    context = fields.integer("context_length", high=limits.MAX_CONTEXT)
    gemma = architecture == "gemma3"
    head_dim = limits.head_dim(fields, "attention.key_length", hidden_size, heads)
    if fields.integer("attention.value_length", head_dim, high=limits.MAX_HEAD_DIM) != head_dim:
        raise fields.wrong("attention.value_length", f"the same as attention.key_length, {head_dim}")
    if fields.integer("rope.dimension_count", head_dim, high=limits.MAX_HEAD_DIM) != head_dim:
        raise fields.wrong("rope.dimension_count", f"the size of a head, {head_dim}")
    embeddings = file.tensors.get("token_embd.weight")
    if embeddings is None or len(embeddings.shape) != 2:
        raise ModelFileError(f"The tensor token_embd.weight is missing in {file.path}, or is not a matrix.")
    vocab_size = embeddings.shape[0]
    if vocab_size > limits.MAX_VOCAB_SIZE:
        raise ModelFileError(f"{file.path} has {vocab_size} embeddings, more than {limits.MAX_VOCAB_SIZE}.")
    # Gemma 3 27B alone scales by what its hidden size would give a head; the file has no key for that.
    scaled_by = hidden_size // heads if gemma and layers == GEMMA3_27B_LAYERS else head_dim
    tokens = Fields(file.metadata, where)
    ends = [_token_id(tokens, f"tokenizer.ggml.{name}_token_id", vocab_size) for name in ("eos", "eot", "eom")]
    return ModelConfig(
        architecture=architecture,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=fields.integer("feed_forward_length", high=limits.MAX_INTERMEDIATE_SIZE),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=limits.key_value_heads(fields, "attention.head_count_kv", heads),
        head_dim=head_dim,
        max_position_embeddings=context,
        rms_norm_eps=fields.number("attention.layer_norm_rms_epsilon", high=1.0),
        rope=_rope(file, fields, head_dim, context, 1_000_000.0 if gemma else 10_000.0),
        rope_local=_local_rope(fields, head_dim) if gemma else None,
        attention_scale=1.0 / math.sqrt(scaled_by),
        tie_word_embeddings="output.weight" not in file.tensors,
        layer_windows=_windows(fields, layers, GEMMA3_PATTERN if gemma else 1),
        hidden_act="gelu_tanh" if gemma else "silu",
        attention_bias="blk.0.attn_q.bias" in file.tensors,
        attention_out_bias="blk.0.attn_output.bias" in file.tensors,
        mlp_bias="blk.0.ffn_down.bias" in file.tensors,
        qk_norm=architecture in ("qwen3", "gemma3"),
        post_norms=gemma,
        embedding_scale=math.sqrt(hidden_size) if gemma else 1.0,
        bos_token_id=_token_id(tokens, "tokenizer.ggml.bos_token_id", vocab_size),
        eos_token_ids=tuple(dict.fromkeys(end for end in ends if end is not None)),
    )


def _refuse_unsupported(file: GgufFile, fields: Fields) -> None:
    if file.metadata.get("split.count", 1) not in (0, 1):
        raise ModelFileError(f"{file.path} is one part of several: join them with llama-gguf-split --merge.")
    fields.refuse("expert_count", "a mixture of experts")
    fields.refuse("attn_logit_softcapping", "a soft cap on attention logits")
    fields.refuse("final_logit_softcapping", "a soft cap on logits")
    fields.refuse("attention.clamp_kqv", "clamped queries, keys and values")
    fields.refuse("attention.temperature_length", "attention that changes with the position")
    if not fields.values.get("attention.causal", True):
        raise ModelFileError(f"{file.path} is not causal: it is an encoder, which cannot generate.")


def _rope(file: GgufFile, fields: Fields, head_dim: int, context: int, theta: float) -> RopeConfig:
    theta = fields.number("rope.freq_base", theta, low=1.0, high=limits.MAX_THETA)
    # Files without a scaling type are linear where they have a factor; a factor of 0 means none.
    kind = fields.text("rope.scaling.type", "linear")
    name = "rope.scaling.factor" if "rope.scaling.factor" in fields else "rope.scale_linear"
    factor = fields.factor(name) if fields.values.get(name) else 1.0
    parameters: dict[str, float | int | list[float]] = {}
    if kind not in ("none", "linear", "yarn"):
        raise fields.wrong("rope.scaling.type", "none, linear or yarn")
    if factor == 1.0 or kind == "none":
        kind = "none"
    elif kind == "linear":
        parameters["factor"] = factor
    else:
        original = fields.integer("rope.scaling.original_context_length", context, low=2, high=limits.MAX_CONTEXT)
        parameters |= {"factor": factor, "original_max_position_embeddings": original}
        for gguf_name, name in (("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")):
            beta = fields.factor(f"rope.scaling.{gguf_name}", None)
            if beta is not None:
                parameters[name] = beta
        if fields.values.get("rope.scaling.attn_factor"):
            # The file's number multiplies YaRN's own factor, where Hugging Face's replaces it.
            own = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
            parameters["attention_factor"] = own * fields.factor("rope.scaling.attn_factor")
    return RopeConfig(
        theta=theta,
        rotary_dim=head_dim,
        scaling=kind,
        parameters=parameters,
        frequency_factors=_frequency_factors(file, head_dim // 2),
    )


def _local_rope(fields: Fields, head_dim: int) -> RopeConfig:
    theta = fields.number("rope.freq_base_swa", GEMMA3_LOCAL_THETA, low=1.0, high=limits.MAX_THETA)
    return RopeConfig(theta=theta, rotary_dim=head_dim)


def _frequency_factors(file: GgufFile, count: int) -> tuple[float, ...] | None:
    tensor = file.tensors.get(ROPE_FACTORS)
    if tensor is None:
        return None
    if tensor.type is not TensorType.F32 or tensor.shape != (count,):
        raise ModelFileError(f"The tensor {ROPE_FACTORS} in {file.path} must hold {count} numbers in F32.")
    factors = tensor.read().view("<f4").reshape(-1)
    if not np.all((factors >= limits.MIN_FACTOR) & (factors <= limits.MAX_FACTOR)):
        raise ModelFileError(f"The tensor {ROPE_FACTORS} in {file.path} holds numbers that make no sense.")
    return tuple(factors.tolist())


def _windows(fields: Fields, layers: int, pattern: int) -> tuple[int | None, ...]:
    window = fields.integer("attention.sliding_window", None, low=0, high=limits.MAX_CONTEXT)
    if not window:
        return (None,) * layers
    key = "attention.sliding_window_pattern"
    value = fields.values.get(key)
    if isinstance(value, list):
        if len(value) != layers or not all(isinstance(local, bool) for local in value):
            raise fields.wrong(key, f"true or false for each of {layers} layers")
        return tuple(window if local else None for local in value)
    pattern = fields.integer(key, pattern, high=limits.MAX_LAYERS)
    # In a pattern of n, each n-th layer sees everything; a pattern of 1 is none.
    return tuple(None if pattern > 1 and (i + 1) % pattern == 0 else window for i in range(layers))


def _token_id(fields: Fields, key: str, vocab_size: int) -> int | None:
    if fields.values.get(key) in (0xFFFFFFFF, -1):
        return None
    return fields.integer(key, None, low=0, high=vocab_size - 1)
