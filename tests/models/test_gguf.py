"""The GGUF reader against the ``gguf`` package, and against files that lie about themselves."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from fallow.errors import ModelFileError
from fallow.models.gguf import GgufFile
from fallow.models.tensors import TensorType

STRING, ARRAY = 8, 9


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def array(kind: int, count: int, items: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + items


def tensor(name: str, dims: list[int], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def gguf_bytes(
    pairs: list[bytes] | None = None,
    tensors: list[bytes] | None = None,
    *,
    data: bytes = b"",
    magic: bytes = b"GGUF",
    version: int = 3,
    counts: tuple[int, int] | None = None,
) -> bytes:
    """A file put together by hand; ``data`` begins at the next multiple of 32."""
    pairs, tensors = pairs or [], tensors or []
    header = magic + struct.pack("<IQQ", version, *(counts or (len(tensors), len(pairs)))) + b"".join(pairs + tensors)
    return header + bytes(-len(header) % 32) + data


@pytest.fixture
def opened(tmp_path: Path) -> Callable[[bytes], GgufFile]:
    def write_and_open(data: bytes) -> GgufFile:
        (tmp_path / "model.gguf").write_bytes(data)
        return GgufFile(tmp_path / "model.gguf")

    return write_and_open


Opened = Callable[[bytes], GgufFile]


def test_what_the_package_writes(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    values: dict[str, Any] = {
        "u8": 200, "i8": -100, "u16": 65535, "i16": -5, "u32": 1 << 31, "i32": -7, "f32": 0.5, "f64": 0.1,
        "u64": 1 << 63, "i64": -(1 << 60), "yes": True, "no": False, "text": "für 水",
        "ints": [1, -2, 3], "floats": [0.5, 1.5], "texts": ["a", "", "ß"], "flags": [True, False],
    }  # fmt: skip
    kinds = {"u8": "uint8", "i8": "int8", "u16": "uint16", "i16": "int16", "u32": "uint32", "i32": "int32",
             "f32": "float32", "f64": "float64", "u64": "uint64", "i64": "int64"}  # fmt: skip
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in values.items():
        if key in kinds:
            getattr(writer, f"add_{kinds[key]}")(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    writer.add_custom_alignment(64)
    matrix = np.arange(96, dtype=np.float32).reshape(3, 32)
    kind = gguf.GGMLQuantizationType.Q8_0
    writer.add_tensor("vector", matrix[0])
    writer.add_tensor("matrix", gguf.quants.quantize(matrix, kind), raw_dtype=kind)
    writer.add_tensor("half", matrix.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GgufFile(path)
    assert file.metadata == {"general.architecture": "llama", "general.alignment": 64, **values}
    assert {name: (t.type, t.shape) for name, t in file.tensors.items()} == {
        "vector": (TensorType.F32, (32,)),
        "matrix": (TensorType.Q8_0, (3, 32)),
        "half": (TensorType.F16, (3, 32)),
    }
    assert np.array_equal(file.tensors["vector"].read().view(np.float32), matrix[:1])
    assert np.array_equal(file.tensors["matrix"].read(), gguf.quants.quantize(matrix, kind))
    assert np.array_equal(file.tensors["half"].read().view(np.float16), matrix)
    without = GgufFile(path, texts=False)
    texts = {key for key, value in values.items() if isinstance(value, list) and isinstance(value[0], str)}
    assert texts
    assert without.metadata == {key: value for key, value in file.metadata.items() if key not in texts}
    assert without.tensors.keys() == file.tensors.keys()


def test_the_real_file(smollm2_gguf: Path, smollm2_reader: gguf.GGUFReader) -> None:
    file = GgufFile(smollm2_gguf)
    fields = {key: field for key, field in smollm2_reader.fields.items() if not key.startswith("GGUF.")}
    assert list(file.metadata) == list(fields)
    for key, field in fields.items():
        if len(field.data) < 1000:
            assert file.metadata[key] == field.contents()
        else:  # the package takes seconds for all of them
            assert len(file.metadata[key]) == len(field.data)
            assert file.metadata[key][::97] == [field.contents(i) for i in range(0, len(field.data), 97)]
    assert list(file.tensors) == [t.name for t in smollm2_reader.tensors]
    for theirs in smollm2_reader.tensors:
        ours = file.tensors[theirs.name]
        assert (ours.type.name, ours.shape) == (theirs.tensor_type.name, tuple(theirs.shape.tolist()[::-1]))
        assert (ours.offset, ours.nbytes) == (theirs.data_offset, theirs.n_bytes)


def test_version_2_and_nested_arrays(opened: Opened) -> None:
    inner = array(4, 2, struct.pack("<II", 1, 2)) + array(STRING, 1, text("x"))
    file = opened(gguf_bytes([pair("nested", ARRAY, array(ARRAY, 2, inner))], version=2))
    assert file.metadata == {"nested": [[1, 2], ["x"]]}
    assert file.tensors == {}


def test_a_header_longer_than_the_window(opened: Opened) -> None:
    words = [f"word {i}" * (i % 40) for i in range(30_000)]
    pairs = [
        pair("words", ARRAY, array(STRING, len(words), b"".join(map(text, words)))),
        pair("long", STRING, text("ä" * (1 << 20))),
        pair("numbers", ARRAY, array(5, 1 << 19, np.arange(1 << 19, dtype="<i4").tobytes())),
    ]
    file = opened(gguf_bytes(pairs, [tensor("x", [4])], data=struct.pack("<4f", 1, 2, 3, 4)))
    assert file.metadata["words"] == words
    assert file.metadata["long"] == "ä" * (1 << 20)
    assert file.metadata["numbers"] == list(range(1 << 19))
    assert file.tensors["x"].read().view("<f4").tolist() == [[1, 2, 3, 4]]


def test_a_file_is_closed_with_its_last_reader(opened: Opened) -> None:
    import os

    data = gguf_bytes([], [tensor("x", [4])], data=bytes(16))
    before = len(os.listdir("/proc/self/fd"))
    files = [opened(data) for _ in range(20)]
    assert len(os.listdir("/proc/self/fd")) == before + 20
    del files
    assert len(os.listdir("/proc/self/fd")) == before


DEEP = array(ARRAY, 1) * 8 + array(4, 0)
HUGE = 1 << 62
LIES: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "does not begin with 'GGUF'"),
    "another magic": (gguf_bytes(magic=b"GGML"), "does not begin with 'GGUF'"),
    "only the magic": (b"GGUF", "cut short"),
    "version 1": (gguf_bytes(version=1), "of version 1: convert"),
    "version 4": (gguf_bytes(version=4), "of version 4"),
    "big endian": (gguf_bytes(version=0x03000000), "big endian"),
    "counts": (gguf_bytes(counts=(HUGE, 0)), "claims 4611686018427387904 tensors"),
    "count of keys": (gguf_bytes(counts=(0, HUGE)), "claims 0 tensors and 46116"),
    "too few keys": (gguf_bytes(counts=(0, 60_000)), "cut short"),
    "length of a key": (gguf_bytes([struct.pack("<Q", HUGE)]), "a key of the metadata claims"),
    "key beyond the end": (gguf_bytes([struct.pack("<Q", 60_000)]), "cut short"),
    "key of other bytes": (gguf_bytes([text(b"\xff\xfe")]), "not UTF-8"),
    "length of a string": (gguf_bytes([pair("k", STRING, struct.pack("<Q", HUGE))]), "'k' claims"),
    "a string of other bytes": (gguf_bytes([pair("k", STRING, text(b"\xc3"))]), "'k' is not UTF-8"),
    "unknown kind": (gguf_bytes([pair("k", 13, b"")]), "'k' is of the unknown type 13"),
    "unknown kind of items": (gguf_bytes([pair("k", ARRAY, array(99, 3))]), "unknown type 99"),
    "items": (gguf_bytes([pair("k", ARRAY, array(4, HUGE))]), "too large or nested too deeply"),
    "items that overflow": (gguf_bytes([pair("k", ARRAY, array(10, (1 << 61) + 1))]), "too large"),
    "items beyond the end": (gguf_bytes([pair("k", ARRAY, array(4, 1 << 20))]), "cut short"),
    "strings beyond the end": (gguf_bytes([pair("k", ARRAY, array(STRING, 1 << 22))]), "cut short"),
    "deep arrays": (gguf_bytes([pair("k", ARRAY, DEEP)]), "nested too deeply"),
    "neither true nor false": (gguf_bytes([pair("k", 7, b"\x02")]), "neither true nor false"),
    "a key twice": (gguf_bytes([pair("k", 0, b"\1"), pair("k", 0, b"\1")]), "the key 'k' is there twice"),
    "alignment 0": (gguf_bytes([pair("general.alignment", 4, bytes(4))]), "power of two"),
    "alignment 24": (gguf_bytes([pair("general.alignment", 4, struct.pack("<I", 24))]), "power of two"),
    "alignment as text": (gguf_bytes([pair("general.alignment", STRING, text("32"))]), "power of two"),
    "no dimensions": (gguf_bytes([], [tensor("x", [])]), "claims 0 dimensions"),
    "many dimensions": (gguf_bytes([], [tensor("x", [1] * 5)]), "claims 5 dimensions"),
    "an empty dimension": (gguf_bytes([], [tensor("x", [0, 4])]), r"claims the shape \[4, 0\]"),
    "dimensions that overflow": (gguf_bytes([], [tensor("x", [1 << 32, 1 << 32])]), "claims the shape"),
    "an unknown type": (gguf_bytes([], [tensor("x", [4], 999)]), "stored as type 999, which is not supported: use"),
    "a type that is not supported": (gguf_bytes([], [tensor("x", [256], 10)], data=bytes(84)), "stored as Q2_K"),
    "half a block": (gguf_bytes([], [tensor("x", [16], 8)], data=bytes(34)), "not whole blocks of Q8_0"),
    "an offset outside": (gguf_bytes([], [tensor("x", [4], 0, 1 << 40)], data=bytes(16)), "not lie inside the file"),
    "an offset that wraps": (gguf_bytes([], [tensor("x", [4], 0, (1 << 64) - 32)], data=bytes(16)), "not lie inside"),
    "an odd offset": (gguf_bytes([], [tensor("x", [4], 0, 4)], data=bytes(64)), "not lie inside"),
    "data cut short": (gguf_bytes([], [tensor("x", [4])], data=bytes(15)), "may be cut short"),
    "a tensor twice": (gguf_bytes([], [tensor("x", [4]), tensor("x", [4])], data=bytes(16)), "'x' is there twice"),
}


@pytest.mark.parametrize("lie", LIES)
def test_files_that_lie(lie: str, opened: Opened) -> None:
    data, match = LIES[lie]
    with pytest.raises(ModelFileError, match=match):
        opened(data)


def test_messages_do_not_carry_control_characters(opened: Opened) -> None:
    with pytest.raises(ModelFileError) as caught:
        opened(gguf_bytes([pair("\x1b[2Jkey", 13, b"")]))
    assert "\x1b" not in str(caught.value)
    with pytest.raises(ModelFileError) as caught:
        opened(gguf_bytes([pair("\x1b[2Jkey", STRING, struct.pack("<Q", HUGE))]))
    assert "\x1b" not in str(caught.value)
