"""A copy of a model's files with other bytes in some of the tensors: same types, same places, all else as it was."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np

from fallow.arrays import Bytes
from fallow.files import sync_file
from fallow.models.tensors import Checkpoint, RawTensor


def copy_model(
    checkpoint: Checkpoint, tensors: Mapping[str, Bytes], folder: Path, *, without: Collection[str] = ()
) -> None:
    """Copy the file of ``checkpoint``, or the files of its folder but those named in ``without``, into ``folder``, with
    ``tensors`` in place of those that have these names: bytes as ``RawTensor.read`` gives them, of tensors that have a
    ``place``.

    Raises ``OSError`` where the disk has no room.
    """
    source = checkpoint.path
    files = [source] if source.is_file() else [file for file in source.iterdir() if file.is_file()]
    for file in files:
        if file.name not in without:
            shutil.copyfile(file, folder / file.name)
    for name, data in tensors.items():
        _write(checkpoint.tensors[name], data, folder)
    for file in folder.iterdir():
        sync_file(file)


def _write(tensor: RawTensor, data: Bytes, folder: Path) -> None:
    place = tensor.place
    assert place is not None
    assert data.nbytes == tensor.nbytes
    if place.order is not None:
        rows = data.reshape(len(place.order), -1)
        data = np.empty_like(rows)
        data[place.order] = rows
    with (folder / place.path.name).open("r+b") as file:
        file.seek(place.offset)
        file.write(np.ascontiguousarray(data).data)
