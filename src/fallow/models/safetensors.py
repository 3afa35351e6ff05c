"""Reader of safetensors files (the format: github.com/huggingface/safetensors, README) and of their sharded index.

The ``safetensors`` package is not used for reading: without PyTorch it cannot give bfloat16, it maps the file (a file
that is cut short under a map kills the process), and a serving install is smaller without it. The format is a length,
a JSON header and bytes; each number in the header is checked here before it is used, and the bytes stay on disk.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TypeGuard

from fallow.arrays import Bytes
from fallow.errors import ModelFileError
from fallow.models.data_file import DataFile
from fallow.models.tensors import TensorType

MAX_HEADER_BYTES = 32 << 20
MAX_JSON_BYTES = 32 << 20
MAX_TENSORS = 1 << 17
MAX_SHARDS = 4096
MAX_DIMENSIONS = 8
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_TYPES = {"F32": TensorType.F32, "F16": TensorType.F16, "BF16": TensorType.BF16}


@dataclass(frozen=True)
class SafetensorsTensor:
    """Where a tensor lies in its file. ``dtype`` is the file's word, which ``type`` may refuse."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    file: DataFile

    @property
    def type(self) -> TensorType:
        """Raises ``ModelFileError`` where numbers of this kind cannot be weights here."""
        if self.dtype not in _TYPES:
            raise ModelFileError(
                f"The tensor {self.name[:80]!r} in {self.file.path} is stored as {self.dtype[:20]!r}, which is not "
                "supported: convert the model to F32, F16 or BF16."
            )
        return _TYPES[self.dtype]

    def read(self) -> Bytes:
        """Its bytes, uint8 ``[rows, bytes per row]``; one row for a vector. Raises ``ModelFileError``."""
        rows = prod(self.shape[:-1])
        return self.file.read(self.offset, self.nbytes).reshape(rows, -1)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object out of a file. Raises ``ModelFileError`` where the file is not one or is absurdly large."""
    file = DataFile(path)
    if file.size > MAX_JSON_BYTES:
        raise ModelFileError(f"{path} is larger than {MAX_JSON_BYTES} bytes, too large to be what it should be.")
    return _parse_json(file.read(0, file.size), str(path))


def has_safetensors(folder: Path) -> bool:
    return (folder / INDEX).exists() or (folder / SINGLE).exists()


def open_safetensors(folder: Path) -> dict[str, SafetensorsTensor]:
    """All tensors of ``model.safetensors`` in a folder, or of the files that its index names.

    Raises ``ModelFileError`` where a file is missing, damaged, or named outside of the folder.
    """
    if not has_safetensors(folder):
        raise ModelFileError(f"There is no {SINGLE} and no {INDEX} in {folder}: the folder has no weights to read.")
    if not (folder / INDEX).exists():
        return read_header(folder / SINGLE)
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or len(weight_map) > MAX_TENSORS:
        raise ModelFileError(f"{folder / INDEX} is damaged: weight_map must name the file of each tensor.")
    names = list(dict.fromkeys(name for name in weight_map.values() if isinstance(name, str)))
    if len(names) > MAX_SHARDS:
        raise ModelFileError(f"{folder / INDEX} names {len(names)} files, more than {MAX_SHARDS}.")
    shards = {name: read_header(folder / _plain_name(name, folder / INDEX)) for name in names}
    tensors = {}
    for name, shard in weight_map.items():
        tensor = shards[shard].get(name) if isinstance(shard, str) else None
        if tensor is None:
            raise ModelFileError(f"The tensor {name[:80]!r} is not in the file that {folder / INDEX} names for it.")
        tensors[name] = tensor
    return tensors


def read_header(path: Path) -> dict[str, SafetensorsTensor]:
    """The tensors of one file. Raises ``ModelFileError`` where the file is damaged."""
    file = DataFile(path)
    damaged = _damaged(path)
    if file.size < 10:
        raise damaged("it is too short")
    size = int(file.read(0, 8).view("<u8")[0])
    if size > min(MAX_HEADER_BYTES, file.size - 8):
        raise damaged(f"its header claims {size} bytes")
    header = _parse_json(file.read(8, size), f"the header of {path}")
    header.pop("__metadata__", None)
    if len(header) > MAX_TENSORS:
        raise damaged(f"it claims {len(header)} tensors")
    start = 8 + size
    return {name: _tensor(name, entry, file, start) for name, entry in header.items()}


def _tensor(name: str, entry: object, file: DataFile, start: int) -> SafetensorsTensor:
    damaged = _damaged(file.path)
    if not isinstance(entry, dict):
        raise damaged(f"the entry of the tensor {name[:80]!r} is not an object")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or not _are_sizes(shape, MAX_DIMENSIONS) or not _are_sizes(offsets, 2):
        raise damaged(f"the tensor {name[:80]!r} has no proper dtype, shape and data_offsets")
    if len(offsets) != 2 or not offsets[0] <= offsets[1] <= file.size - start:
        raise damaged(f"the tensor {name[:80]!r} does not lie inside the file: it may be cut short")
    nbytes = offsets[1] - offsets[0]
    if dtype in _ITEM_BYTES and prod(shape) * _ITEM_BYTES[dtype] != nbytes:
        raise damaged(f"the tensor {name[:80]!r} has {nbytes} bytes, which is not what its shape needs")
    return SafetensorsTensor(name, dtype, tuple(shape), start + offsets[0], nbytes, file)


def _are_sizes(values: object, limit: int) -> TypeGuard[list[int]]:
    if not isinstance(values, list) or len(values) > limit:
        return False
    return all(type(value) is int and 0 <= value < 1 << 62 for value in values)


def _plain_name(name: str, index: Path) -> str:
    if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name or len(name) > 255:
        raise ModelFileError(f"{index} names {name[:80]!r}, which is not a file of its own folder.")
    return name


def _parse_json(data: Bytes, what: str) -> dict[str, Any]:
    try:
        value = json.loads(data.tobytes(), object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{what} is damaged: it is not JSON, or has a key twice.") from error
    if not isinstance(value, dict):
        raise ModelFileError(f"{what} is damaged: a JSON object is expected.")
    return value


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a key is there twice")
    return values


def _damaged(path: Path) -> Callable[[str], ModelFileError]:
    return lambda reason: ModelFileError(f"{path} is damaged: {reason}.")
