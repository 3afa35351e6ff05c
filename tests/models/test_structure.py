"""What is left of a model when parts are taken out: rules against its shape, and rows and columns of its tensors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest

from fallow.arrays import Bytes
from fallow.errors import FallowError, ModelFileError
from fallow.models.checkpoint import open_checkpoint
from fallow.models.config import ModelConfig
from fallow.models.dequantize import dequantize
from fallow.models.resting import resting
from fallow.models.structure import Kept, kept_parts, without_removed
from fallow.models.tensors import Checkpoint, RawTensor, TensorType
from fallow.plan import LayerRule, SparsityPlan


@pytest.fixture
def checkpoint(tiny_checkpoints: dict[str, Path]) -> Checkpoint:
    """With biases on queries, keys and values; 2 KV heads."""
    return open_checkpoint(tiny_checkpoints["qwen2"])


@pytest.fixture
def config(checkpoint: Checkpoint) -> ModelConfig:
    return checkpoint.config


def removed(target: str | None, layer: int | None = None) -> LayerRule:
    return LayerRule("removed", layer, target)


def structure(*rules: LayerRule) -> SparsityPlan:
    return SparsityPlan(structure=rules)


def test_heads_neurons_and_blocks(config: ModelConfig) -> None:
    layers, neurons = config.num_hidden_layers, config.intermediate_size
    assert kept_parts(SparsityPlan.dense(), config) == [Kept()] * layers
    found = kept_parts(structure(removed("kv_head.1", 0), removed("neurons.1", 0), removed("ffn", 1)), config)
    assert found == [Kept((0,), (*range(32), *range(64, neurons))), Kept(None, ()), *[Kept()] * (layers - 2)]
    assert kept_parts(structure(removed("attention")), config) == [Kept(())] * layers
    assert kept_parts(structure(removed("kv_head.0"), removed("kv_head.1", 1)), config)[:2] == [Kept((1,)), Kept(())]
    every = structure(*(removed(f"neurons.{i}") for i in range(neurons // 32)))
    assert kept_parts(every, config) == kept_parts(structure(removed("ffn")), config)


def test_rules_for_what_is_taken_out_are_void(config: ModelConfig) -> None:
    pages = LayerRule("top_pages", parameters={"sink_pages": 1, "recent_pages": 1, "top_pages": 1})
    inputs = tuple(LayerRule("threshold", None, name, {"threshold": 0.1}) for name in ("o_proj", "down_proj"))
    neurons = LayerRule("top_k", parameters={"k": 3})
    plan = SparsityPlan(attention=(pages,), input=inputs, ffn=(neurons,))
    whole = resting(plan, config)
    without = resting(replace(plan, structure=(removed("attention", 0), removed("ffn", 1))), config)
    assert without[0] == replace(whole[0], pages=None, inputs={"down_proj": 0.1}, kept=Kept(()))
    assert without[1] == replace(whole[1], neurons=None, most_neurons=None, inputs={"o_proj": 0.1}, kept=Kept(None, ()))
    assert without[2:] == whole[2:]


@pytest.mark.parametrize(
    "target", [None, "", "o_proj", "kv_head.2", "kv_head.-1", "kv_head.", "neurons.99", "neurons.١"]
)
def test_a_target_that_there_is_not_is_a_sentence(config: ModelConfig, target: str | None) -> None:
    with pytest.raises(ModelFileError) as error:
        resting(structure(removed(target)), config)
    assert f"the target {target!r}: use attention or ffn, kv_head.0 to kv_head.1, or neurons.0 to" in str(error.value)
    assert "\n" not in str(error.value)


def test_statistical_top_k_needs_all_neurons_or_none(config: ModelConfig) -> None:
    spark = replace(config, active_share=0.1)
    assert kept_parts(structure(removed("ffn", 0)), spark)[0] == Kept(None, ())
    with pytest.raises(FallowError, match="statistical top-k"):
        kept_parts(structure(removed("neurons.0", 0)), spark)


def test_rows_and_columns_of_what_is_left(checkpoint: Checkpoint) -> None:
    config = checkpoint.config
    head, shared = config.head_dim, config.num_attention_heads // config.num_key_value_heads
    kept = [Kept((1,), (*range(5), 7, 40)), *[Kept()] * (config.num_hidden_layers - 1)]
    smaller = without_removed(checkpoint, kept).tensors
    keys, queries = slice(head, 2 * head), slice(shared * head, 2 * shared * head)
    neurons = np.array(kept[0].neurons)
    expected = {
        "q_proj": (queries, slice(None)), "q_proj.bias": (queries,),
        "k_proj": (keys, slice(None)), "k_proj.bias": (keys,),
        "v_proj": (keys, slice(None)), "v_proj.bias": (keys,),
        "o_proj": (slice(None), queries),
        "gate_proj": (neurons,), "up_proj": (neurons,), "down_proj": (slice(None), neurons),
    }  # fmt: skip
    for name, tensor in checkpoint.tensors.items():
        part = name.removeprefix("layers.0.")
        if part == name or part not in expected:
            assert smaller[name] is tensor
            continue
        whole = dequantize(tensor)[expected[part]]
        assert smaller[name].shape == whole.shape
        np.testing.assert_array_equal(dequantize(smaller[name]), whole)
        assert smaller[name].read().nbytes == smaller[name].nbytes


@pytest.mark.parametrize("kind", [TensorType.Q4_0, TensorType.Q4_1, TensorType.Q8_0, TensorType.Q6_K])
def test_columns_of_blocks(config: ModelConfig, kind: TensorType) -> None:
    values = np.random.default_rng(1).normal(size=(24, 768)).astype(np.float32)
    stored = np.ascontiguousarray(
        gguf.quantize(values, gguf.GGMLQuantizationType[kind.name])
        if kind is not TensorType.Q6_K
        else np.random.default_rng(2).integers(0, 60, (24, 3 * kind.block_bytes), np.uint8)
    ).view(np.uint8)

    def read() -> Bytes:
        return stored

    wide = replace(config, intermediate_size=768)
    tensor = RawTensor("layers.0.down_proj", kind, (24, 768), read)
    whole = dequantize(tensor)
    checkpoint = Checkpoint(Path("model.gguf"), "gguf", wide, {tensor.name: tensor})

    def left(*neurons: int) -> RawTensor:
        return without_removed(checkpoint, [Kept(None, neurons)]).tensors[tensor.name]

    blocks = (*range(256), *range(512, 768))  # of all of these types
    assert left(*blocks).type is kind
    np.testing.assert_array_equal(dequantize(left(*blocks)), whole[:, blocks])
    groups = (*range(32), *range(64, 128))
    assert left(*groups).type is (TensorType.Q8_0 if kind is TensorType.Q6_K else kind)
    np.testing.assert_allclose(dequantize(left(*groups)), whole[:, groups], atol=np.abs(whole).max() / 127)
    few = (3, 4, 700)
    assert left(*few).type is TensorType.F32
    np.testing.assert_array_equal(dequantize(left(*few)), whole[:, few])
