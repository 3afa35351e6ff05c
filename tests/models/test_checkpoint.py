"""Models on disk under one set of names: families, formats, and files that lack something."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf_files import interleaved, write_gguf
from safetensors.numpy import load_file, save_file

from fallow.errors import ModelFileError
from fallow.models.checkpoint import expected_shapes, open_checkpoint
from fallow.models.dequantize import dequantize
from fallow.models.tensors import TensorType

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3")
# Fields of a configuration that both formats state.
SAME = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim"),
    *("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "hidden_act", "attention_bias", "qk_norm"),
    *("post_norms", "tie_word_embeddings", "embedding_scale", "bos_token_id", "eos_token_ids"),
)


@pytest.fixture
def llama(tiny_checkpoints: dict[str, Path], tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(tiny_checkpoints["llama"], tmp_path / "llama"))


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_holds_what_transformers_loads(family: str, tiny_checkpoints: dict[str, Path]) -> None:
    import torch
    import transformers

    folder = tiny_checkpoints[family]
    checkpoint = open_checkpoint(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert checkpoint.format == "safetensors"
    assert checkpoint.config.architecture == family
    assert {name: t.shape for name, t in checkpoint.tensors.items()} == expected_shapes(checkpoint.config)
    reference = {name: p.detach().numpy() for name, p in model.named_parameters()}
    assert sum(t.elements for t in checkpoint.tensors.values()) == sum(p.size for p in reference.values())
    layer = model.model.layers[1]
    modules = {
        "embed_tokens": model.model.embed_tokens.weight,
        "norm": model.model.norm.weight,
        "layers.1.attention_norm": layer.input_layernorm.weight,
        "layers.1.k_proj": layer.self_attn.k_proj.weight,
        "layers.1.o_proj": layer.self_attn.o_proj.weight,
        "layers.1.gate_proj": layer.mlp.gate_proj.weight,
        "layers.1.down_proj": layer.mlp.down_proj.weight,
    }
    if family == "gemma3":
        modules["layers.1.attention_post_norm"] = layer.post_attention_layernorm.weight
        modules["layers.1.ffn_norm"] = layer.pre_feedforward_layernorm.weight
        modules["layers.1.ffn_post_norm"] = layer.post_feedforward_layernorm.weight
    else:
        modules["layers.1.ffn_norm"] = layer.post_attention_layernorm.weight
    if family in ("gemma3", "qwen3"):
        modules["layers.1.q_norm"] = layer.self_attn.q_norm.weight
    else:
        modules["lm_head"] = model.lm_head.weight
    if family == "qwen2":
        modules["layers.1.v_proj.bias"] = layer.self_attn.v_proj.bias
    for name, weight in modules.items():
        expected = weight.detach().numpy() + (1.0 if family == "gemma3" and name.endswith("norm") else 0.0)
        assert np.array_equal(dequantize(checkpoint.tensors[name]), expected.astype(np.float32)), name
    for tensor in checkpoint.tensors.values():
        assert tensor.read().shape == (tensor.shape[0] if len(tensor.shape) == 2 else 1, tensor.read().shape[1])
        assert tensor.read().nbytes == tensor.nbytes


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_1"])
def test_gguf_and_folder_agree(family: str, kind: str, tiny_checkpoints: dict[str, Path], tmp_path: Path) -> None:
    folder = tiny_checkpoints[family]
    write_gguf(tmp_path / "model.gguf", folder, gguf.GGMLQuantizationType[kind])
    ours, reference = open_checkpoint(tmp_path / "model.gguf"), open_checkpoint(folder)
    assert ours.format == "gguf"
    assert list(ours.tensors) == list(reference.tensors)
    for name, tensor in reference.tensors.items():
        values = dequantize(tensor)
        if values.ndim == 2:
            store = gguf.GGMLQuantizationType[kind]
            values = gguf.quants.dequantize(gguf.quants.quantize(values, store), store)
            assert ours.tensors[name].type is TensorType[kind]
        assert np.array_equal(dequantize(ours.tensors[name]), values), name
    for field in SAME:
        assert getattr(ours.config, field) == pytest.approx(getattr(reference.config, field)), field


def test_the_real_model(smollm2_gguf: Path, smollm2_reader: gguf.GGUFReader) -> None:
    checkpoint = open_checkpoint(smollm2_gguf)
    config = checkpoint.config
    assert (config.architecture, config.vocab_size, config.hidden_size) == ("llama", 49152, 576)
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (30, 9, 3)
    assert (config.head_dim, config.intermediate_size, config.max_position_embeddings) == (64, 1536, 8192)
    assert (config.rope.theta, config.rope.scaling, config.tie_word_embeddings) == (100_000.0, "none", True)
    assert sum(t.elements for t in checkpoint.tensors.values()) == 134_515_008
    reader = {t.name: t for t in smollm2_reader.tensors}
    for name, theirs in {"embed_tokens": "token_embd.weight", "layers.7.down_proj": "blk.7.ffn_down.weight"}.items():
        tensor = reader[theirs]
        assert np.array_equal(checkpoint.tensors[name].read(), tensor.data.reshape(tensor.shape[1], -1))
    tensor = reader["blk.3.attn_q.weight"]
    rows = interleaved(dequantize(checkpoint.tensors["layers.3.q_proj"]), 9)
    assert np.array_equal(rows, gguf.quants.dequantize(tensor.data, tensor.tensor_type))


def test_a_folder_with_one_gguf(tiny_checkpoints: dict[str, Path], tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", tiny_checkpoints["qwen3"], gguf.GGMLQuantizationType.F32)
    assert open_checkpoint(str(tmp_path)).path == tmp_path / "model.gguf"
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    assert open_checkpoint(tmp_path).format == "gguf"
    (tmp_path / "config.json").unlink()
    shutil.copy(tmp_path / "model.gguf", tmp_path / "other.gguf")
    with pytest.raises(ModelFileError, match="2 GGUF files"):
        open_checkpoint(tmp_path)


def test_places_without_a_model(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no model")
    (tmp_path / "empty").mkdir()
    for path, sentence in {
        tmp_path / "missing": "There is no model at",
        tmp_path / "file": "is not a GGUF file",
        tmp_path / "empty": "no config.json and no GGUF file",
        Path("/dev/null"): "is not a file",
    }.items():
        with pytest.raises(ModelFileError, match=sentence):
            open_checkpoint(path)


def test_a_named_pipe_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.gguf")
    with pytest.raises(ModelFileError, match="is not a file"):
        open_checkpoint(tmp_path / "model.gguf")


def test_missing_and_misshapen_tensors(llama: Path) -> None:
    index = json.loads((llama / "model.safetensors.index.json").read_text())
    name = "model.layers.2.mlp.up_proj.weight"
    shard = llama / index["weight_map"].pop(name)
    (llama / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelFileError, match=f"tensor '{name}' is missing"):
        open_checkpoint(llama)
    index["weight_map"][name] = shard.name
    (llama / "model.safetensors.index.json").write_text(json.dumps(index))
    tensors = load_file(shard)
    save_file(tensors | {name: np.ascontiguousarray(tensors[name].T)}, shard)
    with pytest.raises(ModelFileError, match=rf"'{name}' .* shape \[64, 160\], but .* \[160, 64\]"):
        open_checkpoint(llama)


def test_a_tensor_that_nobody_would_read(tiny_checkpoints: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_checkpoints["mistral"], tmp_path / "mistral"))
    tensors = load_file(folder / "model.safetensors")
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    save_file(tensors | buffer | {"visual.patch": np.ones(4, np.float32)}, folder / "model.safetensors")
    open_checkpoint(folder)
    save_file(tensors | {"model.layers.0.self_attn.sinks": np.ones(4, np.float32)}, folder / "model.safetensors")
    with pytest.raises(ModelFileError, match=r"'model.layers.0.self_attn.sinks', which a model of its kind does not"):
        open_checkpoint(folder)


def test_an_index_cannot_leave_its_folder(llama: Path) -> None:
    index = llama / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    outside = llama.parent / "outside.safetensors"
    shutil.copy(llama / next(iter(weight_map.values())), outside)
    for name in ("../outside.safetensors", str(outside), "..", "", "a\0b", "sub/x.safetensors"):
        edit(index, weight_map=weight_map | {"model.norm.weight": name})
        with pytest.raises(ModelFileError, match="not a file of its own folder"):
            open_checkpoint(llama)


def test_a_file_cut_short_after_it_was_opened(tiny_checkpoints: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, tiny_checkpoints["llama"], gguf.GGMLQuantizationType.F16)
    checkpoint = open_checkpoint(path)
    with path.open("rb+") as file:
        file.truncate(path.stat().st_size // 2)
    tensors = list(checkpoint.tensors.values())
    tensors[1].read()
    with pytest.raises(ModelFileError, match="cut short"):
        tensors[-1].read()


def test_gemma_with_vision_gives_its_text_part(tiny_checkpoints: dict[str, Path], tmp_path: Path) -> None:
    source = tiny_checkpoints["gemma3"]
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file as save_torch

    tensors = load_torch(source / "model.safetensors")
    text = json.loads((source / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "gemma3", "text_config": text, "vision_config": {"hidden_size": 8}})
    )
    reference = open_checkpoint(source)
    for prefix in ("language_model.model.", "model.language_model."):
        renamed = {name.replace("model.", prefix, 1): value for name, value in tensors.items()}
        vision = {"vision_tower.embeddings.weight": next(iter(tensors.values())).clone()}
        save_torch(renamed | vision, tmp_path / "model.safetensors")
        checkpoint = open_checkpoint(tmp_path)
        assert checkpoint.config == reference.config
        for name, tensor in reference.tensors.items():
            assert np.array_equal(checkpoint.tensors[name].read(), tensor.read()), name


def test_attention_biases_of_llama_are_reordered_with_their_rows(tmp_path: Path) -> None:
    import torch
    import transformers

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4}
    config = transformers.LlamaConfig(**sizes, num_hidden_layers=1, attention_bias=True, mlp_bias=True)
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model.save_pretrained(tmp_path / "hf")
    write_gguf(tmp_path / "model.gguf", tmp_path / "hf", gguf.GGMLQuantizationType.F32)
    ours, reference = open_checkpoint(tmp_path / "model.gguf"), open_checkpoint(tmp_path / "hf")
    assert reference.config.attention_out_bias
    assert reference.config.mlp_bias
    assert list(ours.tensors) == list(reference.tensors)
    for name, tensor in reference.tensors.items():
        assert np.array_equal(dequantize(ours.tensors[name]), dequantize(tensor)), name
