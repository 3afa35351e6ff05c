"""Checkpoints of a run: written beside the training, complete or not there, checked before they are used.

A folder ``step-00000200`` holds what ``torch.distributed.checkpoint`` writes, a file of each process (a run may go on
with another number of them), ``run.json`` with the numbers of the run, and ``manifest.json``, written when all have
written, with the size and the SHA-256 of every other file.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from fallow.errors import FallowError
from fallow.files import replacing_folder, write_json
from fallow.training.processes import ALONE, Processes

# It says so of every checkpoint of a single process.
warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)

_RUN, _MANIFEST = "run.json", "manifest.json"
_PREFIX = "step-"


@dataclass(frozen=True)
class Checkpoint:
    """One that was whole when it was looked at. ``run`` is what ``save`` was given."""

    step: int
    folder: Path
    run: dict[str, Any]

    def load_into(self, tensors: dict[str, Any]) -> None:
        """Fill a nested dictionary of tensors, shaped like the one that was saved. Raises ``FallowError``."""
        try:
            load(tensors, checkpoint_id=self.folder, no_dist=True)
        except (Exception, CheckpointException) as error:  # what it raises depends on what does not fit
            raise FallowError(
                f"The checkpoint {self.folder} does not fit this recipe ({_reason(error)}): train into another folder "
                "with --out."
            ) from error


class Checkpoints:
    """The checkpoints in ``folder``: the last ``keep`` and the best one, by ``run["validation"]`` (bits per byte).

    ``damaged`` names those that were found cut short or changed, with the reason. All ``processes`` see the folder and
    call ``save``, ``wait`` and ``latest`` together.
    """

    def __init__(self, folder: Path, keep: int, processes: Processes = ALONE) -> None:
        self.folder = folder
        self.keep = keep
        self._processes = processes
        self.damaged: list[str] = []
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, step: int, tensors: dict[str, Any], run: dict[str, Any]) -> None:
        """Write a checkpoint while the caller goes on: tensors are copied first. One is written at a time.

        Raises ``FallowError`` where an earlier one could not be written.
        """
        self.wait()
        copied = _copied(tensors)
        self._thread = threading.Thread(target=self._write, args=(step, copied, dict(run)), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Until what was saved is on disk. Raises ``FallowError`` where that failed; what was there before still is."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            reason = _reason(error)
            last = self.steps()
            left = f"the one of step {last[-1]} is still there" if last else "there is no earlier one"
            raise FallowError(
                f"A checkpoint cannot be written to {self.folder}: {reason}; {left}. Free some space and start again."
            ) from error

    def steps(self) -> list[int]:
        """The steps of all checkpoints, damaged ones among them, in order."""
        names = (path.name.removeprefix(_PREFIX) for path in self.folder.glob(f"{_PREFIX}*"))
        return sorted(int(name) for name in names if name.isdecimal())

    def latest(self) -> Checkpoint | None:
        """The newest that is whole; the first process looks for it."""
        return self._processes.on_first(self._latest)

    def _latest(self) -> Checkpoint | None:
        for step in reversed(self.steps()):
            folder = self._place(step)
            reason = _damage(folder)
            if reason is None:
                return Checkpoint(step, folder, json.loads((folder / _RUN).read_bytes()))
            self.damaged.append(f"{folder} ({reason})")
        return None

    def _write(self, step: int, tensors: dict[str, Any], run: dict[str, Any]) -> None:
        processes = self._processes.background
        try:
            with processes.led(replacing_folder(self._place(step))) as partial:
                writer = _Writer(partial, single_file_per_rank=True, sync_files=True)
                alone = processes.group is None
                save(tensors, storage_writer=writer, process_group=processes.group, no_dist=alone)
                processes.on_first(lambda: _seal(partial, run))
            processes.on_first(self._prune)
        except BaseException as error:  # a thread's failure is told by ``wait``
            self._error = error

    def _prune(self) -> None:
        steps = self.steps()
        scores: dict[int, float] = {}
        for step in steps:
            run = self._place(step) / _RUN
            score = json.loads(run.read_bytes()).get("validation") if run.is_file() else None
            if isinstance(score, int | float):
                scores[step] = score
        kept = {*steps[-self.keep :], *([min(scores, key=lambda step: scores[step])] if scores else [])}
        for step in steps:
            if step not in kept:
                shutil.rmtree(self._place(step))

    def _place(self, step: int) -> Path:
        return self.folder / f"{_PREFIX}{step:08d}"


class _Writer(FileSystemWriter):
    """Errors go to the other processes without what caused them: so the system's own goes, where it is the cause."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            raise _system_error(error) or error from None


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copied(item) for item in value)
    return value


def _seal(folder: Path, run: dict[str, Any]) -> None:
    write_json(folder / _RUN, run)
    write_json(folder / _MANIFEST, {path.name: _record(path) for path in sorted(folder.iterdir())})


def _record(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_bytes())
        for name, record in manifest.items():
            if _record(folder / Path(name).name) != record:
                return f"{name} has changed or is cut short"
    except OSError as error:
        return f"{Path(error.filename).name}: {error.strerror}"
    except (ValueError, AttributeError):
        return f"{_MANIFEST} is not what was written"
    return None if _RUN in manifest else f"{_RUN} is missing"


def _reason(error: BaseException) -> str:
    """The system's word for what went wrong where there is one, else what was said, in one line."""
    if isinstance(error, CheckpointException):  # what went wrong in each process
        error = next(iter(error.failures.values()))[0]
    system = _system_error(error)
    if system is not None:
        return str(system.strerror)
    return " ".join(str(error).split()).rstrip(".")[:200] or type(error).__name__


def _system_error(error: BaseException) -> OSError | None:
    """The one that an error comes from."""
    found: BaseException | None = error
    while found is not None and not (isinstance(found, OSError) and found.strerror):
        found = found.__cause__ or found.__context__
    return found
