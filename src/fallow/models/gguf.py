"""Reader of GGUF files, versions 2 and 3, little endian (the format: github.com/ggml-org/ggml, docs/gguf.md).

The ``gguf`` package maps the file and trusts its counts, lengths and offsets. Here everything is checked against the
size of the file, and against limits that no real model reaches, before it is used; the tensors' bytes stay on disk.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from fallow.arrays import Bytes
from fallow.errors import ModelFileError
from fallow.models.data_file import DataFile
from fallow.models.tensors import TensorType

MAX_HEADER_BYTES = 128 << 20
MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 16
MAX_KEY_BYTES = 1 << 16
MAX_STRING_BYTES = 16 << 20
MAX_ARRAY_ELEMENTS = 1 << 22  # of all arrays together
MAX_ARRAY_DEPTH = 4
MAX_DIMENSIONS = 4
MAX_ALIGNMENT = 1 << 16

_WINDOW = 1 << 20
_BOOL, _STRING, _ARRAY = 7, 8, 9
_SCALARS: dict[int, np.dtype[Any]] = {
    0: np.dtype("<u1"),
    1: np.dtype("<i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    _BOOL: np.dtype("<u1"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")

_TYPES = {
    0: TensorType.F32,
    1: TensorType.F16,
    2: TensorType.Q4_0,
    3: TensorType.Q4_1,
    6: TensorType.Q5_0,
    7: TensorType.Q5_1,
    8: TensorType.Q8_0,
    12: TensorType.Q4_K,
    13: TensorType.Q5_K,
    14: TensorType.Q6_K,
    30: TensorType.BF16,
}
_UNSUPPORTED = {
    9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip


@dataclass(frozen=True)
class GgufTensor:
    """A tensor in an open file: ``shape`` is row-major, ``offset`` counts from the start of the file."""

    name: str
    type: TensorType
    shape: tuple[int, ...]
    file: DataFile
    offset: int

    @property
    def row_bytes(self) -> int:
        return self.shape[-1] // self.type.block_elements * self.type.block_bytes

    @property
    def nbytes(self) -> int:
        return prod(self.shape[:-1]) * self.row_bytes

    def read(self) -> Bytes:
        """Its bytes, uint8 ``[rows, bytes per row]``; raises ``ModelFileError`` where the file has become shorter."""
        return self.file.read(self.offset, self.nbytes).reshape(-1, self.row_bytes)


class GgufFile:
    """An open GGUF file: ``metadata`` (keys as the file has them, arrays as lists) and ``tensors`` by their names.

    Without ``texts``, arrays of texts are checked but left out of ``metadata``: those of a tokenizer take tens of
    megabytes, which nobody needs who only wants the tensors.
    Raises ``ModelFileError`` where the file is damaged or of a kind that is not supported.
    """

    def __init__(self, path: str | Path, *, texts: bool = True) -> None:
        self.path = Path(path)
        data = DataFile(self.path)
        header = _Header(data, texts)
        tensor_count, key_count = header.start()
        self.metadata: dict[str, Any] = {}
        for _ in range(key_count):
            key = header.string("a key of the metadata", MAX_KEY_BYTES)
            if key in self.metadata:
                raise header.damaged(f"the key {key[:80]!r} is there twice")
            self.metadata[key] = header.value(header.u32(), key)
        self.metadata = {key: value for key, value in self.metadata.items() if value is not None}
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 1 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            raise header.damaged("general.alignment is not a power of two of a sensible size")
        infos = [header.tensor() for _ in range(tensor_count)]
        start = -(-header.position // alignment) * alignment
        self.tensors: dict[str, GgufTensor] = {}
        for name, kind, shape, offset in infos:
            if name in self.tensors:
                raise header.damaged(f"the tensor {name[:80]!r} is there twice")
            tensor = GgufTensor(name, kind, shape, data, start + offset)
            if shape[-1] % kind.block_elements:
                raise header.damaged(f"rows of {name[:80]!r} are not whole blocks of {kind.name}")
            if offset % alignment or tensor.offset + tensor.nbytes > data.size:
                raise header.damaged(f"the tensor {name[:80]!r} does not lie inside the file: it may be cut short")
            self.tensors[name] = tensor


class _Header:
    """Reads from the front of a file, never past its end, through a window that moves along."""

    def __init__(self, file: DataFile, texts: bool) -> None:
        self._file = file
        self._texts = texts
        self._limit = min(file.size, MAX_HEADER_BYTES)
        self._window = b""
        self._start = 0  # of the window, in the file
        self._at = 0  # in the window
        self._elements = 0

    @property
    def position(self) -> int:
        return self._start + self._at

    def start(self) -> tuple[int, int]:
        """Magic, version and the two counts: of tensors, of metadata keys."""
        if self._file.size < 4 or self.take(4) != b"GGUF":
            raise ModelFileError(f"{self._file.path} is not a GGUF file: it does not begin with 'GGUF'.")
        version = self.u32()
        if version not in (2, 3):
            kind = "big endian, which is not supported" if version & 0xFFFF == 0 else f"of version {version}"
            raise ModelFileError(f"{self._file.path} is {kind}: convert the model to GGUF 3, little endian.")
        tensors, keys = self.u64(), self.u64()
        if tensors > MAX_TENSORS or keys > MAX_KEYS:
            raise self.damaged(f"it claims {tensors} tensors and {keys} keys")
        return tensors, keys

    def damaged(self, reason: str) -> ModelFileError:
        return ModelFileError(f"{self._file.path} is damaged: {reason}.")

    def take(self, count: int) -> bytes:
        self._need(count)
        self._at += count
        return self._window[self._at - count : self._at]

    def u32(self) -> int:
        self._need(4)
        self._at += 4
        return int(_U32.unpack_from(self._window, self._at - 4)[0])

    def u64(self) -> int:
        self._need(8)
        self._at += 8
        return int(_U64.unpack_from(self._window, self._at - 8)[0])

    def string(self, what: str, limit: int = MAX_STRING_BYTES) -> str:
        size = self.u64()
        if size > limit:
            raise self.damaged(f"{what} claims {size} bytes")
        try:
            return self.take(size).decode()
        except UnicodeDecodeError as error:
            raise self.damaged(f"{what} is not UTF-8 text") from error

    def value(self, kind: int, key: str, depth: int = 0) -> Any:
        if kind == _STRING:
            return self.string(repr(key[:80]))
        if kind == _ARRAY:
            return self._array(key, depth)
        return self._numbers(kind, 1, key)[0]

    def _array(self, key: str, depth: int) -> list[Any] | None:
        kind, count = self.u32(), self.u64()
        self._elements += count
        if depth >= MAX_ARRAY_DEPTH or self._elements > MAX_ARRAY_ELEMENTS:
            raise self.damaged(f"the array {key[:80]!r} is too large or nested too deeply")
        if kind == _STRING:
            return self._strings(count, key)
        if kind == _ARRAY:
            return [self._array(key, depth + 1) for _ in range(count)]
        return self._numbers(kind, count, key)

    def _strings(self, count: int, key: str) -> list[str] | None:
        """As ``string``, for the hundreds of thousands that a vocabulary has. None where they are not wanted."""
        strings: list[str] = []
        for _ in range(count):
            self._need(8)
            size = _U64.unpack_from(self._window, self._at)[0]
            if size > MAX_STRING_BYTES:
                raise self.damaged(f"{key[:80]!r} claims {size} bytes")
            self._need(8 + size)
            start = self._at + 8
            self._at = start + size
            try:
                text = self._window[start : self._at].decode()
            except UnicodeDecodeError as error:
                raise self.damaged(f"{key[:80]!r} is not UTF-8 text") from error
            if self._texts:
                strings.append(text)
        return strings if self._texts else None

    def _numbers(self, kind: int, count: int, key: str) -> list[Any]:
        dtype = _SCALARS.get(kind)
        if dtype is None:
            raise self.damaged(f"{key[:80]!r} is of the unknown type {kind}")
        numbers = np.frombuffer(self.take(count * dtype.itemsize), dtype)
        if kind == _BOOL:
            if count and numbers.max() > 1:
                raise self.damaged(f"{key[:80]!r} is neither true nor false")
            numbers = numbers.astype(bool)
        return list(numbers.tolist())

    def tensor(self) -> tuple[str, TensorType, tuple[int, ...], int]:
        """Name, type, row-major shape, and offset from the start of the data."""
        name = self.string("a tensor's name", MAX_KEY_BYTES)
        count = self.u32()
        if not 1 <= count <= MAX_DIMENSIONS:
            raise self.damaged(f"the tensor {name[:80]!r} claims {count} dimensions")
        shape = tuple(self.u64() for _ in range(count))[::-1]
        # No type takes less than half a byte an element, so a larger count cannot be in the file.
        if 0 in shape or prod(shape) > 2 * self._file.size:
            raise self.damaged(f"the tensor {name[:80]!r} claims the shape {list(shape)}")
        number = self.u32()
        kind = _TYPES.get(number)
        if kind is None:
            known = _UNSUPPORTED.get(number, f"type {number}")
            supported = ", ".join(t.name for t in TensorType)
            raise ModelFileError(
                f"The tensor {name[:80]!r} in {self._file.path} is stored as {known}, which is not supported: "
                f"use a file with {supported}."
            )
        return name, kind, shape, self.u64()

    def _need(self, count: int) -> None:
        """Makes the window hold the next ``count`` bytes."""
        if self._at + count <= len(self._window):
            return
        here = self.position
        if count > self._limit - here:
            raise self.damaged(
                "its header is too long" if self._limit < self._file.size else "its header is cut short; fetch it again"
            )
        self._window = self._file.read(here, min(max(count, _WINDOW), self._limit - here)).tobytes()
        self._start, self._at = here, 0
