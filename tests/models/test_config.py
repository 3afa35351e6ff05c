"""config.json and GGUF metadata: what they say, what is refused, numbers that make no sense."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
from gguf_files import write_gguf

from fallow.errors import ModelFileError
from fallow.models.checkpoint import open_checkpoint
from fallow.models.config import ModelConfig
from fallow.models.hf_config import config_from_hf

# SmolLM2-135M's sizes, as transformers 4 wrote them.
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 4,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# What google/gemma-3-4b-it's file says, with fewer layers: all else is the default of its class.
GEMMA_VISION: dict[str, Any] = {
    "model_type": "gemma3",
    "architectures": ["Gemma3ForConditionalGeneration"],
    "eos_token_id": [1, 106],
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 13,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "vision_config": {"hidden_size": 1152},
}


# Our own architecture with everything that it may have.
FALLOW: dict[str, Any] = LLAMA | {
    "model_type": "fallow",
    "hidden_act": "relu2",
    "qk_norm": True,
    "gated_mlp": False,
    "value_embedding_layers": [3, 0],
    "residual_mixes": True,
    "logit_softcap": 15,
}


def read(document: dict[str, Any], **changes: Any) -> ModelConfig:
    return config_from_hf(document | changes, "config.json")


def refused(document: dict[str, Any], match: str, **changes: Any) -> None:
    with pytest.raises(ModelFileError, match=match):
        read(document, **changes)


def test_llama_of_transformers_4() -> None:
    config = read(LLAMA)
    assert (config.head_dim, config.attention_scale, config.num_key_value_heads) == (64, 0.125, 3)
    assert (config.rope.theta, config.rope.scaling, config.rope.rotary_dim) == (100_000.0, "none", 64)
    assert (config.bos_token_id, config.eos_token_ids, config.tie_word_embeddings) == (1, (2,), True)
    assert config.layer_windows == (None,) * 4
    assert {config.attention_bias, config.attention_out_bias, config.mlp_bias, config.qk_norm} == {False}
    biased = read(LLAMA, attention_bias=True, mlp_bias=True, eos_token_id=[2, 0, 2], sliding_window=5)
    assert (biased.attention_bias, biased.attention_out_bias, biased.mlp_bias) == (True, True, True)
    assert (biased.eos_token_ids, biased.layer_windows) == ((2, 0), (None,) * 4)
    assert read(LLAMA, num_key_value_heads=None, head_dim=None).num_key_value_heads == 9
    assert read(LLAMA, head_dim=32).attention_scale == 1 / math.sqrt(32)


def test_windows() -> None:
    mistral = LLAMA | {"model_type": "mistral", "sliding_window": 4096}
    assert read(mistral).layer_windows == (4096,) * 4
    assert read(mistral, sliding_window=None).layer_windows == (None,) * 4
    for kind in ("qwen2", "qwen3"):
        qwen = LLAMA | {"model_type": kind, "sliding_window": 32, "max_window_layers": 3}
        assert read(qwen).layer_windows == (None,) * 4
        assert read(qwen, use_sliding_window=True).layer_windows == (None, None, None, 32)
        types = ["sliding_attention", "full_attention"] * 2
        assert read(qwen, use_sliding_window=True, layer_types=types).layer_windows == (32, None, 32, None)
        refused(qwen, "sliding_window in config.json is", layer_types=types, sliding_window=None)
        refused(qwen, "layer_types in config.json", layer_types=types[:3])
        refused(qwen, "layer_types in config.json", layer_types=["linear_attention"] * 4)


def test_biases_and_norms_of_qwen() -> None:
    qwen2, qwen3 = read(LLAMA | {"model_type": "qwen2"}), read(LLAMA | {"model_type": "qwen3"})
    assert (qwen2.attention_bias, qwen2.attention_out_bias, qwen2.qk_norm, qwen2.head_dim) == (True, False, False, 64)
    assert (qwen3.attention_bias, qwen3.qk_norm, qwen3.head_dim) == (False, True, 128)
    biased = read(LLAMA | {"model_type": "qwen3"}, attention_bias=True)
    assert (biased.attention_bias, biased.attention_out_bias) == (True, True)


def test_variants_of_our_own() -> None:
    config = read(FALLOW)
    assert (config.architecture, config.hidden_act, config.gated_mlp) == ("fallow", "relu2", False)
    assert config.qk_norm
    assert (config.value_embedding_layers, config.residual_mixes, config.logit_softcap) == ((3, 0), True, 15.0)
    assert (config.head_dim, config.rope.theta, config.layer_windows) == (64, 100_000.0, (None,) * 4)
    llama = read(LLAMA)
    assert read(LLAMA, model_type="fallow") == replace(llama, architecture="fallow")
    absent = {"value_embedding_layers": None, "residual_mixes": False, "logit_softcap": None, "qk_norm": False}
    for name, expected in {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}.items():
        changed = read(FALLOW | absent, hidden_act=name, gated_mlp=True)
        assert changed == replace(llama, architecture="fallow", hidden_act=expected)
        assert read(LLAMA, hidden_act=name).hidden_act == expected  # as transformers has it
    sparse = read(LLAMA, model_type="fallow", active_share=0.1)
    assert sparse == replace(llama, architecture="fallow", active_share=0.1)
    assert sparse.gate_quantile == pytest.approx(1.2815515655)
    # What another architecture's file says about variants is not what we mean by them.
    assert read(FALLOW, model_type="llama", hidden_act="silu") == llama


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"hidden_act": "relu"}, "hidden_act in config.json is 'relu', but it must be relu2 where gated_mlp is false"),
        ({"hidden_act": None}, "hidden_act in config.json is None, but it must be relu2"),
        ({"gated_mlp": True}, "hidden_act in config.json is 'relu2', but it must be one of silu"),
        ({"gated_mlp": 1}, "gated_mlp in config.json is 1, but it must be true or false"),
        ({"qk_norm": "yes"}, "qk_norm .* true or false"),
        ({"residual_mixes": []}, "residual_mixes .* true or false"),
        ({"value_embedding_layers": [4]}, r"value_embedding_layers .* a list of distinct layers from 0 to 3"),
        ({"value_embedding_layers": [-1]}, "value_embedding_layers"),
        ({"value_embedding_layers": [1, 1]}, "value_embedding_layers"),
        ({"value_embedding_layers": [True]}, "value_embedding_layers"),
        ({"value_embedding_layers": [0.0]}, "value_embedding_layers"),
        ({"value_embedding_layers": [[0]]}, "value_embedding_layers"),
        ({"value_embedding_layers": 0}, "value_embedding_layers"),
        ({"logit_softcap": 0}, "logit_softcap .* must be a number above 1e-06"),
        ({"logit_softcap": -15.0}, "logit_softcap"),
        ({"logit_softcap": float("inf")}, "logit_softcap"),
        ({"logit_softcap": True}, "logit_softcap"),
        ({"active_share": 0.1}, "active_share .* less than 1, with gated_mlp"),
        ({"active_share": 1, "gated_mlp": True, "hidden_act": "relu"}, "active_share .* less than 1"),
        ({"active_share": 0.0}, "active_share .* a number above 0, at most 1"),
        ({"active_share": float("nan")}, "active_share"),
        ({"final_logit_softcapping": 30.0}, "a soft cap on logits"),
        ({"attention_bias": True}, "biases of attention"),
        ({"mlp_bias": True}, "biases of the feed-forward network"),
        ({"sliding_window": 4096}, "a sliding window"),
        ({"layer_types": ["full_attention"] * 4}, "layers of several types"),
    ],
)
def test_variants_that_are_refused(changes: dict[str, Any], match: str) -> None:
    refused(FALLOW, match, **changes)


def test_gemma_3_with_vision() -> None:
    config = read(GEMMA_VISION)
    assert (config.architecture, config.vocab_size, config.head_dim) == ("gemma3", 262_208, 256)
    assert (config.num_attention_heads, config.num_key_value_heads) == (8, 4)
    assert [i for i, window in enumerate(config.layer_windows) if window is None] == [5, 11]
    assert config.layer_windows[0] == 1024
    assert (config.rope.theta, config.rope.scaling, dict(config.rope.parameters)) == (1e6, "linear", {"factor": 8.0})
    assert config.rope_local is not None
    assert (config.rope_local.theta, config.rope_local.scaling) == (10_000.0, "none")
    assert (config.hidden_act, config.qk_norm, config.post_norms) == ("gelu_tanh", True, True)
    assert config.embedding_scale == math.sqrt(2560)
    assert config.attention_scale == 1 / 16
    assert (config.tie_word_embeddings, config.eos_token_ids) == (True, (1, 106))
    larger = GEMMA_VISION["text_config"] | {"query_pre_attn_scalar": 168}
    assert read(GEMMA_VISION, text_config=larger).attention_scale == 1 / math.sqrt(168)
    plain = GEMMA_VISION["text_config"] | {"sliding_window_pattern": 2, "rope_theta": 5e5, "rope_local_base_freq": 3e3}
    config = read(plain)
    assert config.layer_windows[:4] == (1024, None, 1024, None)
    assert config.rope_local is not None
    assert (config.rope.theta, config.rope_local.theta) == (5e5, 3e3)
    assert read(plain, sliding_window=None).layer_windows == (None,) * 13


@pytest.mark.parametrize("form", ["rope_scaling", "rope_parameters"])
def test_rope_kinds_in_both_forms(form: str) -> None:
    def rope(**values: Any) -> Any:
        named = dict(LLAMA) | {"head_dim": 8}
        if form == "rope_parameters":
            values["rope_theta"] = named.pop("rope_theta")
        return read(named, **{form: values}).rope

    original = {"original_max_position_embeddings": 2048}
    assert rope(rope_type="default") == rope()
    assert rope(type="linear", factor=2).parameters == {"factor": 2.0}
    assert rope(rope_type="linear", factor=2).theta == 100_000.0
    assert rope(rope_type="dynamic", factor=4.0).parameters == {"factor": 4.0}
    bands = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    llama3 = rope(rope_type="llama3", factor=32.0, **bands, **original)
    assert (llama3.scaling, llama3.parameters) == ("llama3", {"factor": 32.0, **bands, **original})
    yarn = rope(rope_type="yarn", factor=4.0, beta_fast=16, attention_factor=None)
    assert yarn.parameters == {"factor": 4.0, "beta_fast": 16.0, "original_max_position_embeddings": 8192}
    assert rope(rope_type="yarn", **original).parameters == {"factor": 4.0, **original}
    factors = {"short_factor": [1.0, 1.5, 2, 3], "long_factor": [1.0, 2.0, 4.0, 8.0]}
    longrope = rope(rope_type="longrope", **factors, **original)
    assert longrope.parameters == {**factors, **original, "factor": 4.0}


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"rope_type": "mrope"}, "rope_type in rope_.* is 'mrope', but it must be default, linear"),
        ({"rope_type": 3}, "rope_type .* must be a text"),
        ({"rope_type": "linear"}, "factor is missing"),
        ({"rope_type": "linear", "factor": 0}, "factor .* must be a number above 1e-06"),
        ({"rope_type": "linear", "factor": float("nan")}, "factor .* is nan"),
        ({"rope_type": "linear", "factor": True}, "factor .* is True"),
        ({"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}, "high_freq_factor"),
        ({"rope_type": "yarn", "factor": 8, "truncate": False}, "truncate"),
        ({"rope_type": "yarn", "factor": 8, "original_max_position_embeddings": 1}, "original_max_position"),
        ({"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0] * 32}, "short_factor .* 32 numbers"),
        ({"rope_type": "longrope", "short_factor": [1.0] * 32, "long_factor": [0.0] * 32}, "long_factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_theta": float("inf")}, "rope_theta"),
        ([1.0], "rope_.* must be an object"),
    ],
)
def test_rope_that_makes_no_sense(given: Any, match: str) -> None:
    refused(LLAMA, match, rope_parameters=given)
    if "rope_theta" not in given:
        refused(LLAMA, match, rope_scaling=given)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"model_type": "mixtral"}, "model_type in config.json is 'mixtral', which is not supported: use one of llama"),
        ({"model_type": None}, "model_type"),
        ({"model_type": ["llama"]}, "model_type"),
        ({"vocab_size": None}, "vocab_size is missing in config.json"),
        ({"vocab_size": 0}, "vocab_size in config.json is 0, but it must be an integer from 1"),
        ({"vocab_size": 1 << 60}, "vocab_size"),
        ({"hidden_size": -576}, "hidden_size"),
        ({"hidden_size": 576.0}, "hidden_size"),
        ({"hidden_size": "576"}, "hidden_size in config.json is '576'"),
        ({"hidden_size": True}, "hidden_size in config.json is True"),
        ({"hidden_size": 577}, "577 .* not a multiple of the 9 heads"),
        ({"num_hidden_layers": 100_000}, "num_hidden_layers"),
        ({"num_key_value_heads": 2}, "num_key_value_heads .* divisor of the number of attention heads, 9"),
        ({"head_dim": 63}, "head_dim .* must be even"),
        ({"head_dim": 10**9}, "head_dim"),
        ({"rms_norm_eps": 0}, "rms_norm_eps"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps in config.json is nan"),
        ({"rope_theta": 0.5}, "rope_theta"),
        ({"hidden_act": "gelu"}, "hidden_act in config.json is 'gelu', but it must be one of silu"),
        ({"hidden_act": "relu2"}, "hidden_act in config.json is 'relu2', but it must be one of silu"),
        ({"hidden_act": "x" * 10_000}, r"is 'xxx[x]{0,60}\.\.\., but"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings .* true or false"),
        ({"eos_token_id": 49152}, "eos_token_id"),
        ({"eos_token_id": [2, "3"]}, "eos_token_id"),
        ({"bos_token_id": -1}, "bos_token_id"),
        ({"num_local_experts": 8}, "a mixture of experts"),
        ({"attn_logit_softcapping": 50.0}, "a soft cap on attention logits"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantised in a Hugging Face format"),
        ({"max_position_embeddings": 1 << 40}, "max_position_embeddings"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], match: str) -> None:
    refused(LLAMA, match, **changes)


def test_a_vision_model_whose_text_part_is_no_object() -> None:
    refused(GEMMA_VISION, "text_config in config.json", text_config=[])
    refused(
        GEMMA_VISION, "query_pre_attn_scalar in text_config in config.json", text_config={"query_pre_attn_scalar": -1}
    )


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma3"])
def test_what_transformers_writes_for_every_rope(family: str) -> None:
    import transformers

    bands = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    kinds: dict[str, dict[str, Any]] = {
        "linear": {},
        "dynamic": {},
        "yarn": {"original_max_position_embeddings": 64},
        "llama3": {"original_max_position_embeddings": 64, **bands},
    }
    classes = {
        "llama": transformers.LlamaConfig,
        "mistral": transformers.MistralConfig,
        "qwen2": transformers.Qwen2Config,
        "qwen3": transformers.Qwen3Config,
        "gemma3": transformers.Gemma3TextConfig,
    }
    for kind, more in kinds.items():
        parameters: dict[str, Any] = {"rope_type": kind, "rope_theta": 5000.0, "factor": 4.0, **more}
        if family == "gemma3":
            parameters = {
                "full_attention": parameters,
                "sliding_attention": {"rope_type": "default", "rope_theta": 7.0},
            }
        written = classes[family](num_hidden_layers=7, rope_parameters=parameters).to_dict()
        config = read(written)
        assert (config.rope.scaling, config.rope.theta) == (kind, 5000.0)
        assert config.rope.parameters == {"factor": 4.0, **more}
        assert (config.rope_local.theta if config.rope_local else None) == (7.0 if family == "gemma3" else None)


def gguf_config(folder: Path, path: Path, **metadata: Any) -> ModelConfig:
    write_gguf(path / "model.gguf", folder, gguf.GGMLQuantizationType.F32, metadata=metadata)
    return open_checkpoint(path / "model.gguf").config


def test_gguf_windows_and_local_rope(tiny_checkpoints: dict[str, Path], tmp_path: Path) -> None:
    config = gguf_config(tiny_checkpoints["gemma3"], tmp_path, **{"attention.sliding_window": 16})
    assert config.layer_windows == (16, 16, 16, 16, 16, None, 16)
    assert config.rope_local is not None
    assert config.rope_local.theta == 10_000.0
    assert (config.attention_scale, config.embedding_scale) == (1 / math.sqrt(32), 8.0)
    listed = [True, False, True, True, False, False, True]
    more = {"attention.sliding_window": 16, "attention.sliding_window_pattern": listed, "rope.freq_base_swa": 500.0}
    config = gguf_config(tiny_checkpoints["gemma3"], tmp_path, **more)
    assert config.layer_windows == tuple(16 if local else None for local in listed)
    assert config.rope_local is not None
    assert config.rope_local.theta == 500.0
    config = gguf_config(tiny_checkpoints["mistral"], tmp_path, **{"attention.sliding_window": 40})
    assert config.layer_windows == (40, 40, 40)


def test_gguf_rope(tiny_checkpoints: dict[str, Path], tmp_path: Path) -> None:
    folder = tiny_checkpoints["qwen2"]

    def rope(**metadata: Any) -> Any:
        return gguf_config(folder, tmp_path, **{f"rope.{key}": value for key, value in metadata.items()}).rope

    assert rope().scaling == "none"
    assert rope(**{"scaling.type": "none", "scaling.factor": 4.0}).scaling == "none"
    assert rope(scale_linear=2.0).parameters == {"factor": 2.0}
    assert rope(**{"scaling.factor": 0.0}).scaling == "none"
    assert rope(**{"scaling.type": "linear", "scaling.factor": 4.0}).parameters == {"factor": 4.0}
    yarn = {"scaling.type": "yarn", "scaling.factor": 4.0, "scaling.original_context_length": 128}
    parameters = rope(**yarn).parameters
    assert parameters == {"factor": 4.0, "original_max_position_embeddings": 128}
    scaled = rope(**yarn, **{"scaling.attn_factor": 0.5, "scaling.yarn_beta_fast": 16.0}).parameters
    assert scaled["attention_factor"] == pytest.approx(0.5 * (0.1 * math.log(4.0) + 1))
    assert scaled["beta_fast"] == 16.0
    with pytest.raises(ModelFileError, match=r"rope.scaling.type in qwen2\.\* .* must be none, linear or yarn"):
        rope(**{"scaling.type": "su"})


def test_gguf_frequency_factors(tiny_checkpoints: dict[str, Path], tmp_path: Path) -> None:
    import numpy as np

    factors = np.linspace(1, 8, 8, dtype=np.float32)
    path = tmp_path / "model.gguf"
    write_gguf(path, tiny_checkpoints["llama"], gguf.GGMLQuantizationType.F32, tensors={"rope_freqs.weight": factors})
    assert open_checkpoint(path).config.rope.frequency_factors == tuple(factors.tolist())
    for bad in (factors[:7], factors * 0, factors * np.float32(np.nan)):
        write_gguf(path, tiny_checkpoints["llama"], gguf.GGMLQuantizationType.F32, tensors={"rope_freqs.weight": bad})
        with pytest.raises(ModelFileError, match=r"rope_freqs.weight"):
            open_checkpoint(path)


@pytest.mark.parametrize(
    ("metadata", "match"),
    [
        ({"block_count": 0}, r"block_count in llama\.\* in the metadata of .* is 0"),
        ({"block_count": 4}, r"'blk.3.attn_norm.weight' is missing"),
        ({"block_count": 2}, r"'blk.2.attn_norm.weight', which a model of its kind does not have"),
        ({"attention.head_count": [4, 4, 4]}, "attention.head_count"),
        ({"attention.head_count_kv": 3}, "divisor"),
        ({"attention.value_length": 8}, "the same as attention.key_length, 16"),
        ({"rope.dimension_count": 8}, "the size of a head, 16"),
        (
            {"embedding_length": 32},
            r"'token_embd.weight' .* shape \[320, 64\], but its configuration needs \[320, 32\]",
        ),
        ({"attention.layer_norm_rms_epsilon": float("nan")}, "layer_norm_rms_epsilon"),
        ({"rope.freq_base": float("inf")}, "rope.freq_base"),
        ({"expert_count": 8}, "a mixture of experts"),
        ({"attention.causal": False}, "not causal"),
        ({"attention.sliding_window": 8, "attention.sliding_window_pattern": [True]}, "sliding_window_pattern"),
    ],
)
def test_gguf_metadata_that_makes_no_sense(
    metadata: dict[str, Any], match: str, tiny_checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(ModelFileError, match=match):
        gguf_config(tiny_checkpoints["llama"], tmp_path, **metadata)


def test_gguf_of_another_architecture(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelFileError, match="architecture 'mamba', which is not supported: use one of llama, qwen2"):
        open_checkpoint(tmp_path / "model.gguf")
