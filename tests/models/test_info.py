"""What ``fallow info`` says about a model."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf_files import write_gguf

from fallow import _native
from fallow.engine.runner import ModelRunner, Precision
from fallow.errors import FallowError
from fallow.models.checkpoint import open_checkpoint
from fallow.models.info import OWN_FORMS, PRECISIONS, VOCABULARY, describe, engine_form
from fallow.models.tensors import TensorType


def test_the_real_model(smollm2_gguf: Path) -> None:
    info = describe(open_checkpoint(smollm2_gguf))
    assert info.parameters == 134_515_008
    layers = 30 * (2 * 576 * 576 + 2 * 192 * 576 + 3 * 576 * 1536)
    assert info.macs_per_token == layers + 49152 * 576 == 134_479_872
    assert info.kv_bytes_per_token == 30 * 2 * 3 * 64 * 2
    # The weights in their own precision; the head's sums and the vectors are the engine's.
    own = layers * 20 // 32 + 49152 * 576 * 34 // 32
    assert own < info.bytes_per_token < own * 1.04
    stored = {group.name: group for group in info.tensors}
    assert (stored["embed_tokens"].storage, stored["embed_tokens"].converted) == ("Q8_0", False)
    assert stored["layers.*.gate_proj"].count == 30
    assert stored["layers.*.gate_proj"].bytes == 30 * 1536 * 576 * 20 // 32
    assert not any(group.converted for group in info.tensors)
    in_groups = describe(open_checkpoint(smollm2_gguf), precision="q8")
    assert {g.storage for g in in_groups.tensors if g.converted} == {"Q4_1"}  # Q8_0 stays


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_real_model_as_the_engine_packs_it(smollm2_gguf: Path, precision: Precision) -> None:
    checkpoint = open_checkpoint(smollm2_gguf)
    runner = ModelRunner(checkpoint, precision=precision, num_pages=8)
    info = describe(checkpoint, precision=precision)
    vectors = sum(4 * group.count * group.shape[0] for group in info.tensors if len(group.shape) == 1)
    row = info.bytes_per_token - runner.weight_bytes - vectors
    assert 576 <= row <= 2 * 576  # of the embedding, for the token itself


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("family", ["llama", "qwen3"])  # a head of its own, and a tied one
def test_each_tensor_as_the_engine_packs_it(
    family: str, precision: Precision, tiny_checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    write_gguf(tmp_path / "model.gguf", tiny_checkpoints[family], gguf.GGMLQuantizationType.Q5_1)
    for path in (tiny_checkpoints[family], tmp_path / "model.gguf"):
        checkpoint = open_checkpoint(path)
        report = ModelRunner(checkpoint, precision=precision, num_pages=4).precision_report
        assert report.keys() == {tensor.name for tensor in checkpoint.tensors.values() if len(tensor.shape) == 2}
        for name, packed in report.items():
            type = checkpoint.tensors[name].type
            codes = {4: "q4", 8: "q8", 16: "bf16"}[engine_form(type, precision, vocabulary=name in VOCABULARY).codes]
            assert packed == f"{type.name} as {codes}"


@pytest.mark.parametrize("type", TensorType)
def test_bits_are_those_of_the_packed_matrix(type: TensorType) -> None:
    rows, columns = 64, 1024
    program = _native.Program(
        threads=1, isa=_native.available_isas()[-1], num_heads=1, num_kv_heads=1, head_dim=16, num_layers=1,
        max_tokens=1, max_sequences=1, max_logit_rows=1, num_pages=1, max_positions=1,
    )  # fmt: skip
    data = np.zeros((rows, columns // type.block_elements * type.block_bytes), np.uint8)
    for precision, native in (("auto", "own"), ("bf16", "bf16"), ("q8", "q8")):
        if native == "q8" and type is TensorType.Q8_0:
            continue
        form = engine_form(type, precision)
        for is_head in (False, True):
            packed = program.weights([(type.name, data)], columns, asymmetric=is_head, precision=native)
            assert program.describe(packed)["bytes"] * 8 == rows * columns * (form.bits + form.head_bits * is_head)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_folder(family: str, precision: str, tiny_checkpoints: dict[str, Path]) -> None:
    checkpoint = open_checkpoint(tiny_checkpoints[family])
    info = describe(checkpoint, precision=precision)
    written = info.to_json()
    assert json.loads(json.dumps(written)) == written
    needed = {"model", "architecture", "parameters", "precision", "plan", "bytes_per_token", "macs_per_token"}
    assert needed <= written.keys()
    assert (written["model"], written["architecture"], written["precision"]) == (family, family, precision)
    assert written["plan"] is None
    assert sum(group["count"] for group in written["tensors"]) == len(checkpoint.tensors)
    assert sum(group["bytes"] for group in written["tensors"]) == written["weight_bytes"]
    matrices = [group for group in written["tensors"] if len(group["shape"]) == 2]
    if precision in ("auto", "bf16"):
        assert {group["engine"] for group in matrices} == {"bf16"}
        assert all(group["converted"] == (group["storage"] != "BF16") for group in matrices)
    bits = {"auto": 16, "bf16": 16, "q8": 9.5, "q4": 5}[precision]
    assert bits <= 8 * written["bytes_per_token"] / written["macs_per_token"] < bits * 1.25
    assert written["sliding_window"] == (24 if family == "gemma3" else None)


def test_mixed_storage_is_told_apart(tiny_checkpoints: dict[str, Path], tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", tiny_checkpoints["qwen2"], gguf.GGMLQuantizationType.Q5_0)
    info = describe(open_checkpoint(tmp_path / "model.gguf"))
    gate = next(group for group in info.tensors if group.name == "layers.*.gate_proj")
    assert (gate.storage, gate.engine, gate.converted) == ("Q5_0", "8-bit, same values", True)
    bias = next(group for group in info.tensors if group.name == "layers.*.q_proj.bias")
    assert (bias.storage, bias.engine, bias.converted, bias.shape) == ("F32", "F32", False, (64,))


def test_every_storage_type_has_a_form() -> None:
    assert set(OWN_FORMS) == set(TensorType)
    for type in TensorType:
        kept = type in (TensorType.BF16, TensorType.Q4_0, TensorType.Q4_1, TensorType.Q4_K, TensorType.Q8_0)
        assert (engine_form(type, "auto").name.upper() == type.name) == kept
    with pytest.raises(FallowError, match="precision 'q3' is not known"):
        engine_form(TensorType.F32, "q3")
