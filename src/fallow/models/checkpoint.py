"""Opens a model on disk, whatever its format, under one set of names and conventions (``fallow.models.tensors``)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np

from fallow.arrays import Bytes, Int64
from fallow.errors import ModelFileError
from fallow.models.config import ModelConfig
from fallow.models.dequantize import dequantize_rows
from fallow.models.gguf import GgufFile, GgufTensor
from fallow.models.gguf_config import ROPE_FACTORS, config_from_gguf
from fallow.models.hf_config import config_from_hf
from fallow.models.safetensors import SafetensorsTensor, has_safetensors, open_safetensors, read_json
from fallow.models.tensors import Checkpoint, Place, RawTensor, TensorType

Read = Callable[[], Bytes]

# Canonical names of the parts of a model and of a layer, and what the formats call them.
_GGUF_MODEL = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
_GGUF_LAYER = {
    "attention_norm": "attn_norm",
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "attention_post_norm": "post_attention_norm",
    "ffn_norm": "ffn_norm",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
    "ffn_post_norm": "post_ffw_norm",
}
_HF_LAYER = {
    "attention_norm": "input_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "value_embeddings": "self_attn.value_embeddings",
    "o_proj": "self_attn.o_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "gate_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "down_proj": "mlp.down_proj",
}
_HF_GEMMA_LAYER = {
    **_HF_LAYER,
    "attention_post_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_post_norm": "post_feedforward_layernorm",
}
# Where the text model sits in files of transformers 5, of Gemma 3 with vision, of causal models, of bare ones.
_HF_PREFIXES = ("model.language_model.", "language_model.model.", "model.", "")


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Opens a GGUF file, a folder with ``config.json`` and safetensors, or a folder that holds one GGUF file.

    Only headers are read here; each tensor reads its own bytes, and the files stay open as long as a tensor is there.
    Raises ``ModelFileError`` where there is no model, it is damaged, a tensor that its configuration needs is missing
    or of another shape, or it needs what is not supported.
    """
    path = Path(path)
    try:
        if path.is_dir():
            files = sorted(path.glob("*.gguf"))
            # Repositories of GGUF files often have a config.json too, without any safetensors.
            if (path / "config.json").exists() and (len(files) != 1 or has_safetensors(path)):
                return _open_folder(path)
            if len(files) != 1:
                found = f"{len(files)} GGUF files" if files else "no GGUF file"
                raise ModelFileError(
                    f"{path} has no config.json and {found}: name a GGUF file, or a folder with config.json and "
                    "safetensors."
                )
            path = files[0]
        elif not path.exists():
            raise ModelFileError(f"There is no model at {path}: name a GGUF file or a model folder.")
    except (OSError, ValueError) as error:
        if isinstance(error, ModelFileError):
            raise
        raise ModelFileError(f"{path} cannot be opened: {error}.") from error
    return _open_gguf(path)


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Canonical names and shapes of all tensors that a model of this configuration has."""
    hidden, inner = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    gate = {"gate_proj": (inner, hidden)} if config.gated_mlp else {}
    layer: dict[str, tuple[int, ...]] = {
        "attention_norm": (hidden,),
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, queries),
        "ffn_norm": (hidden,),
        **gate,
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
    }
    if config.qk_norm:
        layer |= {"q_norm": (config.head_dim,), "k_norm": (config.head_dim,)}
    if config.post_norms:
        layer |= {"attention_post_norm": (hidden,), "ffn_post_norm": (hidden,)}
    with_bias = ["q_proj", "k_proj", "v_proj"] * config.attention_bias + ["o_proj"] * config.attention_out_bias
    with_bias += [*gate, "up_proj", "down_proj"] * config.mlp_bias
    layer |= {f"{name}.bias": layer[name][:1] for name in with_bias}
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens": (config.vocab_size, hidden)}
    for i in range(config.num_hidden_layers):
        shapes |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
    shapes |= {f"layers.{i}.value_embeddings": (config.vocab_size, keys) for i in config.value_embedding_layers}
    if config.residual_mixes:
        shapes["residual_mixes"] = (config.num_hidden_layers, 2)
    shapes["norm"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head"] = (config.vocab_size, hidden)
    return shapes


def hf_tensor_names(config: ModelConfig, prefix: str = "model.") -> dict[str, str]:
    """Canonical names of all tensors that a model of this configuration has → those of a Hugging Face folder."""
    head = "language_model.lm_head" if prefix == "language_model.model." else "lm_head"
    model = {name: f"{prefix}{name}" for name in ("embed_tokens", "residual_mixes", "norm")} | {"lm_head": head}
    layer = _HF_GEMMA_LAYER if config.post_norms else _HF_LAYER
    return {name: _file_name(name, f"{prefix}layers", model, layer) for name in expected_shapes(config)}


def _open_gguf(path: Path) -> Checkpoint:
    file = GgufFile(path, texts=False)
    config = config_from_gguf(file)
    shapes = expected_shapes(config)
    names = {name: _file_name(name, "blk", _GGUF_MODEL, _GGUF_LAYER) for name in shapes}
    known = {*names.values(), ROPE_FACTORS}
    _check_names(names, file.tensors, (name for name in file.tensors if name not in known), path)
    tensors = {}
    for name, shape in shapes.items():
        tensor = file.tensors[names[name]]
        _check(path, tensor.name, tensor.type, tensor.shape, shape)
        order = _gguf_order(tensor, name, config)
        place = Place(path, tensor.offset, order)
        tensors[name] = RawTensor(name, tensor.type, shape, _ordered(tensor, order), place)
    return Checkpoint(path, "gguf", config, tensors)


def _gguf_order(tensor: GgufTensor, name: str, config: ModelConfig) -> Int64 | None:
    """The rows of a matrix, or the numbers of a vector, in the order that ours has; None where the file has it too."""
    projection = name.removesuffix(".bias").rpartition(".")[2]
    # llama.cpp's converter reorders these rows so that RoPE rotates neighbours; of this family only.
    if config.architecture != "llama" or projection not in ("q_proj", "k_proj"):
        return None
    return np.arange(tensor.shape[0]).reshape(-1, config.head_dim // 2, 2).swapaxes(1, 2).reshape(-1)


def _ordered(tensor: GgufTensor, order: Int64 | None) -> Read:
    if order is None:
        return tensor.read
    rows = 1 if len(tensor.shape) == 1 else len(order)
    return lambda: tensor.read().reshape(len(order), -1)[order].reshape(rows, -1)


def _open_folder(path: Path) -> Checkpoint:
    config = config_from_hf(read_json(path / "config.json"), str(path / "config.json"))
    stored = open_safetensors(path)
    shapes = expected_shapes(config)
    prefix = next((p for p in _HF_PREFIXES if f"{p}embed_tokens.weight" in stored), "model.")
    names = hf_tensor_names(config, prefix)
    known = set(names.values())
    # Older files carry the frequencies of RoPE, which are computed.
    parts = (f"{prefix}layers.", f"{prefix}residual_mixes")
    others = (n for n in stored if n not in known and n.startswith(parts) and "rotary_emb." not in n)
    _check_names(names, stored, others, path)
    tensors = {}
    for name, shape in shapes.items():
        tensor = stored[names[name]]
        _check(path, tensor.name, tensor.type, tensor.shape, shape)
        if config.architecture == "gemma3" and name.endswith("norm"):
            tensors[name] = RawTensor(name, TensorType.F32, shape, _plus_one(tensor))
        else:
            tensors[name] = RawTensor(name, tensor.type, shape, tensor.read, Place(tensor.file.path, tensor.offset))
    return Checkpoint(path, "safetensors", config, tensors)


def _plus_one(tensor: SafetensorsTensor) -> Read:
    """Gemma's norms multiply by one plus what Hugging Face files hold."""
    return lambda: (dequantize_rows(tensor.read(), tensor.type) + np.float32(1)).view(np.uint8)


def _file_name(name: str, layers: str, model: Mapping[str, str], layer: Mapping[str, str]) -> str:
    """What a format calls the tensor with a canonical name."""
    if name == "residual_mixes":
        return model[name]  # a parameter of the model itself, not the weight of a part
    stem, kind = (name.removesuffix(".bias"), "bias") if name.endswith(".bias") else (name, "weight")
    if not stem.startswith("layers."):
        return f"{model[stem]}.{kind}"
    _, index, part = stem.split(".")
    return f"{layers}.{index}.{layer[part]}.{kind}"


def _check_names(names: Mapping[str, str], stored: Mapping[str, object], others: Iterable[str], path: Path) -> None:
    """Every tensor that is needed is there; none is there that would change the model and that nobody would read."""
    for name in names.values():
        if name not in stored:
            raise ModelFileError(f"The tensor {name!r} is missing in {path}: the model is incomplete.")
    unknown = next(iter(others), None)
    if unknown is not None:
        raise ModelFileError(
            f"{path} has the tensor {unknown[:80]!r}, which a model of its kind does not have: it may be another kind."
        )


def _check(path: Path, name: str, type: TensorType, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if shape != expected:
        raise ModelFileError(
            f"The tensor {name!r} in {path} has the shape {list(shape)}, but its configuration needs {list(expected)}."
        )
    if len(shape) == 1 and not type.is_floating:
        raise ModelFileError(f"The tensor {name!r} in {path} is a vector stored as {type.name}: F32 is expected.")
