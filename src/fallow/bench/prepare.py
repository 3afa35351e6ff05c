"""Forms of a model that peers need, made once and kept by the hash of what they were made from."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from fallow.bench.environment import locked, peers_home, run
from fallow.terminal import Progress

_LAUNCH = Path(__file__).with_name("launch.py")


def source_hash(model: Path) -> str:
    """The first 16 digits of a SHA-256 over a file, or over the names and contents of a folder's files."""
    if model.is_file():
        with model.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]
    digest = hashlib.sha256()
    for path in sorted(path for path in model.iterdir() if path.is_file()):
        with path.open("rb") as file:
            digest.update(path.name.encode() + b"\0" + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def prepared(
    model: Path, name: str, make: Callable[[Path, Path], None], *, what: str, progress: Progress | None
) -> Path:
    """The form ``name`` of ``model``: a file or folder, from the cache or made by ``make(target, log)``.

    It appears under its name by one rename, when it is complete.
    """
    folder = peers_home() / "models" / source_hash(model)
    target = folder / name
    with locked(f"model-{folder.name}-{name}"):
        if not target.exists():
            if progress is not None:
                progress(what, 0, None)
            partial = folder / f"partial-{name}"
            remove(partial)
            folder.mkdir(parents=True, exist_ok=True)
            try:
                make(partial, folder / f"{name}.log")
                partial.rename(target)
            finally:
                remove(partial)
    return target


def remove(path: Path) -> None:
    """Remove a file or a folder if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def run_worker_script(python: Path, script: str, arguments: list[str], log: Path) -> None:
    """Run a module of ``fallow.bench.workers`` in a peer's environment. Raises ``PeerError`` where it fails."""
    command = [str(python), str(_LAUNCH), f"fallow.bench.workers.{script}", *arguments]
    run(f"{script} in {python}", command, log, worker_environment(python))


def worker_environment(python: Path) -> dict[str, str]:
    """Our environment without what would put our libraries into a peer's process, and its scripts first on the path."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment["PATH"] = f"{python.parent}{os.pathsep}{environment.get('PATH', os.defpath)}"
    environment["HF_HUB_OFFLINE"] = "1"
    environment["TOKENIZERS_PARALLELISM"] = "false"
    return environment


def as_hf_folder(model: Path, python: Path, progress: Progress | None) -> Path:
    """``model`` as a Hugging Face folder: a folder as it is, a GGUF file with its weights dequantised to float32.

    transformers' own GGUF reader does it, in the peer's environment, so that the reference of quality shares no code
    with the engine that it judges.
    """
    if model.is_dir() and (model / "config.json").is_file():
        return model
    source = gguf_file(model)
    return prepared(
        source,
        "hf-float32",
        lambda target, log: run_worker_script(python, "dequantize", [str(source), str(target)], log),
        what="dequantising the model for transformers",
        progress=progress,
    )


def gguf_file(model: Path) -> Path:
    """The GGUF file that ``model`` is or holds; ``model`` itself where there is not just one."""
    files = list(model.glob("*.gguf")) if model.is_dir() else []
    return files[0] if len(files) == 1 else model
