"""The safetensors reader against the ``safetensors`` package, and against files that lie about themselves."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fallow.errors import ModelFileError
from fallow.models.safetensors import open_safetensors, read_header, read_json
from fallow.models.tensors import TensorType


def file_bytes(header: Any, data: bytes = b"", size: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + data


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_what_the_package_writes(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    tensors = {
        "matrix": torch.randn(3, 5),
        "half": torch.randn(4, 2).half(),
        "brain": torch.randn(7).bfloat16(),
        "ids": torch.arange(3),
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    read = open_safetensors(tmp_path)
    assert read.keys() == tensors.keys()
    assert read["matrix"].type is TensorType.F32
    assert np.array_equal(read["matrix"].read().view(np.float32), tensors["matrix"].numpy())
    assert read["half"].type is TensorType.F16
    assert np.array_equal(read["half"].read().view(np.float16), tensors["half"].numpy())
    assert read["brain"].type is TensorType.BF16
    assert np.array_equal(read["brain"].read(), tensors["brain"].view(torch.uint8).numpy()[None])
    with pytest.raises(ModelFileError, match=r"'ids' in .* is stored as 'I64', which is not supported: convert"):
        _ = read["ids"].type


def test_shards(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(file_bytes({"x": entry()}, struct.pack("<2f", 1, 2)))
    (tmp_path / "b.safetensors").write_bytes(file_bytes({"y": entry(), "z": entry()}, struct.pack("<2f", 3, 4)))
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}))
    tensors = open_safetensors(tmp_path)
    assert {name: t.read().view("<f4").tolist() for name, t in tensors.items()} == {"x": [[1, 2]], "y": [[3, 4]]}
    for weight_map, match in (
        ({"x": "b.safetensors"}, "The tensor 'x' is not in the file"),
        ({"x": "c.safetensors"}, "cannot be opened: No such file"),
        ({"x": ["a.safetensors"]}, "The tensor 'x' is not in the file"),
        ({}, "weight_map must name the file"),
        ("a.safetensors", "weight_map must name the file"),
        ({"x": "../a.safetensors"}, "not a file of its own folder"),
        ({str(i): f"{i}.safetensors" for i in range(5000)}, "names 5000 files"),
    ):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(ModelFileError, match=match):
            open_safetensors(tmp_path)


def test_a_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="the folder has no weights"):
        open_safetensors(tmp_path)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "too short"),
        (bytes(9), "too short"),
        (file_bytes({}, size=1 << 63), "header claims 9223372036854775808 bytes"),
        (file_bytes({}, size=100), "header claims 100 bytes"),
        (file_bytes({}, bytes(100), size=40), "not JSON"),
        (file_bytes([1, 2]), "a JSON object is expected"),
        (file_bytes(b"[" * 100_000), "not JSON"),
        (file_bytes(b'{"x":' + b"9" * 10_000 + b"}"), "not JSON"),
        (file_bytes(b'{"x": {}, "x": {}}'), "or has a key twice"),
        (file_bytes(b"\xff\xff\xff"), "not JSON"),
        (file_bytes({"x": 3}), "'x' is not an object"),
        (file_bytes({"x": entry(dtype=4)}, bytes(8)), "no proper dtype"),
        (file_bytes({"x": entry(shape=[-2])}, bytes(8)), "no proper dtype"),
        (file_bytes({"x": entry(shape=[2.0])}, bytes(8)), "no proper dtype"),
        (file_bytes({"x": entry(shape=[True])}, bytes(8)), "no proper dtype"),
        (file_bytes({"x": entry(shape=[1] * 9)}, bytes(8)), "no proper dtype"),
        (file_bytes({"x": entry(shape=[1 << 31, 1 << 31, 4])}, bytes(8)), "not what its shape needs"),
        (file_bytes({"x": entry(shape=[1 << 70])}, bytes(8)), "no proper dtype"),
        (file_bytes({"x": entry(shape=[3])}, bytes(8)), "has 8 bytes, which is not what its shape needs"),
        (file_bytes({"x": entry(offsets=[0])}, bytes(8)), "not lie inside the file"),
        (file_bytes({"x": entry(offsets=[8, 0])}, bytes(8)), "not lie inside the file"),
        (file_bytes({"x": entry(offsets=[-8, 0])}, bytes(8)), "no proper dtype"),
        (file_bytes({"x": entry(offsets=[0, 8])}, bytes(7)), "may be cut short"),
    ],
)
def test_files_that_lie(data: bytes, match: str, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(data)
    with pytest.raises(ModelFileError, match=match):
        read_header(tmp_path / "x.safetensors")


def test_json_that_is_absurd(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # takes no room on disk
    with pytest.raises(ModelFileError, match="too large to be what it should be"):
        read_json(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(ModelFileError, match="is not a file"):
        read_json(path)


def test_a_header_with_an_escape_sequence(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(file_bytes({"\x1b[2J\ud800": 1}))
    with pytest.raises(ModelFileError) as caught:
        read_header(tmp_path / "x.safetensors")
    assert "\x1b" not in str(caught.value)
    str(caught.value).encode()
