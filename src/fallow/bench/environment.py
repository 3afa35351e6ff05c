"""A virtual environment for each peer, made once, beside ours: a peer's dependencies are its own affair.

Folders: ``$FALLOW_PEERS_HOME``, or ``peers`` in the model store. An environment's name holds a hash of what is
installed into it, so that other versions make another one. pip is called as the user has configured it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from fallow import files
from fallow.errors import FallowError
from fallow.models.store import store_path
from fallow.terminal import Progress

_COMPLETE = "complete.json"
_MINUTES = 60


class PeerError(FallowError):
    """A peer that cannot be measured here; the message says why."""


@dataclass(frozen=True)
class Requirements:
    """What ``pip install`` is given, what is uninstalled again, and what is set in the environment meanwhile."""

    install: tuple[str, ...]
    uninstall: tuple[str, ...] = ()
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        parts = [self.install, self.uninstall, sorted(self.variables.items()), sys.version_info[:2]]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


def peers_home() -> Path:
    """Where environments and prepared models of peers lie."""
    home = os.environ.get("FALLOW_PEERS_HOME")
    return Path(home).expanduser() if home else store_path() / "peers"


def python_variable(name: str) -> str:
    """The environment variable that names a Python which has the peer already: ``FALLOW_PEER_PYTHON_LLAMA_CPP``."""
    return "FALLOW_PEER_PYTHON_" + name.upper().replace(".", "_")


def peer_python(name: str, requirements: Requirements, progress: Progress | None = None) -> Path:
    """The interpreter of the environment of peer ``name``, which is made if it is not there.

    Raises ``PeerError`` where it cannot be made.
    """
    given = os.environ.get(python_variable(name))
    if given:
        python = Path(given)
        if not os.access(python, os.X_OK):
            raise PeerError(f"{python_variable(name)} is {given}, which is not a Python that can be run.")
        return python
    folder = peers_home() / f"{name}-{requirements.digest}"
    python = folder / "bin" / "python"
    with locked(folder.name):
        if not (folder / _COMPLETE).is_file():
            if progress is not None:
                progress(f"installing {name} (once, some minutes)", 0, None)
            shutil.rmtree(folder, ignore_errors=True)
            try:
                _make(folder, python, requirements)
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
            (folder / _COMPLETE).write_text(json.dumps(list(requirements.install)))
    return python


@contextmanager
def locked(name: str) -> Iterator[None]:
    """One process at a time makes what is called ``name``; the lock goes with its process, however that ends."""
    with ExitStack() as stack:
        try:
            stack.enter_context(files.locked(peers_home() / f"{name}.lock"))
        except OSError as error:
            raise PeerError(
                f"{peers_home()} cannot be written ({error.strerror}): set FALLOW_PEERS_HOME to a folder that can."
            ) from error
        yield


def _make(folder: Path, python: Path, requirements: Requirements) -> None:
    log = folder.with_suffix(".log")
    environment = {**os.environ, **requirements.variables, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    environment.pop("PYTHONPATH", None)
    run("python -m venv", [sys.executable, "-m", "venv", str(folder)], log, environment)
    run("pip install", [str(python), "-m", "pip", "install", *requirements.install], log, environment)
    if requirements.uninstall:
        command = [str(python), "-m", "pip", "uninstall", "-y", *requirements.uninstall]
        run("pip uninstall", command, log, environment)


def run(what: str, command: list[str], log: Path, environment: dict[str, str]) -> None:
    """Run ``command``, its output to the end of ``log``. Raises ``PeerError`` with its last line where it fails."""
    with log.open("a") as file:
        file.write(f"$ {' '.join(command)}\n")
        file.flush()
        try:
            code = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                timeout=60 * _MINUTES,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            raise PeerError(f"{what} did not end within {_MINUTES} minutes, see {log}.") from None
    if code != 0:
        raise PeerError(f"{what} failed ({last_line(log)}), see {log}.")


def last_line(log: Path) -> str:
    """The last line that says something, shortened; pip's errors before its hints."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith(("ERROR:", "error:")) or "Error:" in line]
    return (errors or lines or ["it said nothing"])[-1][:200]
