"""GGUF files for tests, written by the ``gguf`` package out of a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
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


def write_gguf(path: Path, folder: Path, kind: gguf.GGMLQuantizationType, **metadata: Any) -> None:
    """The model of ``folder`` with its matrices stored as ``kind``; ``metadata`` adds integers of its architecture."""
    source = open_checkpoint(folder)
    config = source.config
    name = "llama" if config.architecture == "mistral" else config.architecture
    architecture = next(arch for arch, text in gguf.MODEL_ARCH_NAMES.items() if text == name)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, name)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope.theta)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    for key, value in metadata.items():
        writer.add_uint32(f"{name}.{key.replace('__', '.')}", value)
    for tensor in source.tensors.values():
        stem = tensor.name.removesuffix(".bias")
        part, values = stem.rpartition(".")[2], dequantize(tensor)
        if name == "llama" and part in ("q_proj", "k_proj"):
            values = interleaved(values, values.shape[0] // config.head_dim)
        if stem in _MODEL:
            target = _MODEL[stem]
        elif part in _OWN:
            target = f"blk.{stem.split('.')[1]}.{_OWN[part]}"
        else:
            target = str(names.get_name(f"model.layers.{stem.split('.')[1]}.{_HF.get(part, f'self_attn.{part}')}"))
        store = kind if values.ndim == 2 else gguf.GGMLQuantizationType.F32
        suffix = "bias" if tensor.name.endswith(".bias") else "weight"
        writer.add_tensor(f"{target}.{suffix}", gguf.quants.quantize(values, store), raw_dtype=store)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
