"""GGUF files for tests, written by the ``gguf`` package out of a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from fallow.models.checkpoint import open_checkpoint
from fallow.models.dequantize import dequantize

_MODEL = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
_OWN = {"attention_post_norm": "post_attention_norm", "ffn_norm": "ffn_norm", "ffn_post_norm": "post_ffw_norm"}
_HF = {
    "attention_norm": "input_layernorm",
    "gate_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "down_proj": "mlp.down_proj",
}


def interleaved(rows: npt.NDArray[Any], heads: int) -> npt.NDArray[Any]:
    """The order of rows in which llama.cpp's converter writes the queries and keys of the Llama family."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def write_gguf(
    path: Path,
    folder: Path,
    kind: gguf.GGMLQuantizationType,
    *,
    metadata: Mapping[str, Any] | None = None,
    tensors: Mapping[str, npt.NDArray[np.float32]] | None = None,
) -> None:
    """The model of ``folder`` with its matrices stored as ``kind``.

    ``metadata`` adds or replaces keys of the architecture; ``tensors`` are added as they are.
    """
    source = open_checkpoint(folder)
    config = source.config
    name = "llama" if config.architecture == "mistral" else config.architecture
    architecture = next(arch for arch, text in gguf.MODEL_ARCH_NAMES.items() if text == name)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, name)
    values: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": config.rope.theta,
    }
    for key, value in (values | dict(metadata or {})).items():
        _add(writer, f"{name}.{key}", value)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    for tensor in source.tensors.values():
        stem = tensor.name.removesuffix(".bias")
        part, data = stem.rpartition(".")[2], dequantize(tensor)
        if name == "llama" and part in ("q_proj", "k_proj"):
            data = interleaved(data, data.shape[0] // config.head_dim)
        if stem in _MODEL:
            target = _MODEL[stem]
        elif part in _OWN:
            target = f"blk.{stem.split('.')[1]}.{_OWN[part]}"
        else:
            target = str(names.get_name(f"model.layers.{stem.split('.')[1]}.{_HF.get(part, f'self_attn.{part}')}"))
        store = kind if data.ndim == 2 else gguf.GGMLQuantizationType.F32
        suffix = "bias" if tensor.name.endswith(".bias") else "weight"
        writer.add_tensor(f"{target}.{suffix}", gguf.quants.quantize(data, store), raw_dtype=store)
    for key, added in (tensors or {}).items():
        writer.add_tensor(key, added)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
