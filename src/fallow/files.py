"""Files and folders that are complete or not there, and work that one process does at a time."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from fallow.errors import FallowError


def decoded(content: bytes, name: str | Path) -> str:
    """What was read from ``name``, as text. Raises ``FallowError`` where it is not UTF-8."""
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise FallowError(f"{name} is not text in UTF-8 (byte {error.start}): convert it with iconv.") from None


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the place of ``path`` when the block ends, and leaves it as it was where it raises."""
    partial = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_native_id()}")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """An empty folder to fill that takes the place of ``path`` when the block ends, and goes where it raises.

    For one process at a time: what a killed one left behind is removed. Who writes the files syncs them, and the
    folders within.
    """
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        sync_folder(partial)
        move_into_place(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def move_into_place(folder: Path, place: Path) -> None:
    """Rename ``folder`` to ``place``; what was there is moved away first, since a folder cannot replace one."""
    place.parent.mkdir(parents=True, exist_ok=True)
    old = folder.with_name(f"{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if place.exists():
        place.rename(old)
    try:
        folder.rename(place)
    except OSError:
        if old.exists():
            old.rename(place)
        raise
    sync_folder(place.parent)
    shutil.rmtree(old, ignore_errors=True)


def write_json(path: Path, value: object) -> None:
    """A JSON file, on disk when this returns."""
    with path.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def whole_lines(path: Path) -> list[bytes]:
    """The lines of a file that ``append_json_line`` writes, none where there is no file. What follows the last end of
    line was being written when its process was killed."""
    return path.read_bytes().split(b"\n")[:-1] if path.is_file() else []


def append_json_line(path: Path, value: object) -> None:
    """Add a line to a file that several processes may add to; it is on disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write(json.dumps(value).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def sync_file(path: Path) -> None:
    """Put a file's content on disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Put a folder's list of files on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time is in a block with the same ``path``; the lock goes with its process, however that ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def locked_or_refused(path: Path, sentence: str) -> Iterator[None]:
    """As ``locked``, but where another process is in such a block, ``FallowError`` with ``sentence`` is raised."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FallowError(sentence) from None
        yield
