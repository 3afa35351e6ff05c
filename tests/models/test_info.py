"""What ``fallow info`` says about a model."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest
from gguf_files import write_gguf

from fallow.errors import FallowError
from fallow.models.checkpoint import open_checkpoint
from fallow.models.info import OWN_FORMS, PRECISIONS, describe, engine_form
from fallow.models.tensors import TensorType


def test_the_real_model(smollm2_gguf: Path) -> None:
    info = describe(open_checkpoint(smollm2_gguf))
    assert info.parameters == 134_515_008
    layers = 30 * (2 * 576 * 576 + 2 * 192 * 576 + 3 * 576 * 1536)
    assert info.macs_per_token == layers + 49152 * 576 == 134_479_872
    assert info.kv_bytes_per_token == 30 * 2 * 3 * 64 * 2
    # The weights in their own precision; the head's sums and the vectors are the engine's.
    own = layers * 20 // 32 + 49152 * 576 * 34 // 32
    assert own < info.bytes_per_token < own * 1.03
    stored = {group.name: group for group in info.tensors}
    assert (stored["embed_tokens"].storage, stored["embed_tokens"].converted) == ("Q8_0", False)
    assert stored["layers.*.gate_proj"].count == 30
    assert stored["layers.*.gate_proj"].bytes == 30 * 1536 * 576 * 20 // 32
    assert not any(group.converted for group in info.tensors)
    in_rows = describe(open_checkpoint(smollm2_gguf), precision="q8")
    assert all(group.converted for group in in_rows.tensors if len(group.shape) == 2)


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
    bits = {"auto": 16, "bf16": 16, "q8": 8, "q4": 5}[precision]
    assert bits <= 8 * written["bytes_per_token"] / written["macs_per_token"] < bits * 1.25
    assert written["sliding_window"] == (24 if family == "gemma3" else None)


def test_mixed_storage_is_told_apart(tiny_checkpoints: dict[str, Path], tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", tiny_checkpoints["qwen2"], gguf.GGMLQuantizationType.Q5_0)
    info = describe(open_checkpoint(tmp_path / "model.gguf"))
    gate = next(group for group in info.tensors if group.name == "layers.*.gate_proj")
    assert (gate.storage, gate.engine, gate.converted) == ("Q5_0", "8-bit codes of the same values", True)
    bias = next(group for group in info.tensors if group.name == "layers.*.q_proj.bias")
    assert (bias.storage, bias.engine, bias.converted, bias.shape) == ("F32", "F32", False, (64,))


def test_every_storage_type_has_a_form() -> None:
    assert set(OWN_FORMS) == set(TensorType)
    for type in TensorType:
        kept = type in (TensorType.BF16, TensorType.Q4_0, TensorType.Q4_1, TensorType.Q4_K, TensorType.Q8_0)
        assert (engine_form(type, "auto").name.upper() == type.name) == kept
    with pytest.raises(FallowError, match="precision 'q3' is not known"):
        engine_form(TensorType.F32, "q3")
