"""Checkpoints: written whole or not at all, checked before use, the best one kept."""

from __future__ import annotations

import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fallow.errors import FallowError
from fallow.training.checkpoints import Checkpoints


def tensors(value: float) -> dict[str, object]:
    return {"model": {"a": torch.full((3, 4), value)}, "optimizers": {"state": {"a": {"m": torch.full((2,), value)}}}}


def saved(folder: Path, steps: int, keep: int = 2) -> Checkpoints:
    checkpoints = Checkpoints(folder, keep)
    for step in range(1, steps + 1):
        checkpoints.save(step, tensors(step), {"step": step, "validation": abs(step - 2) + 1.0})
    checkpoints.wait()
    return checkpoints


def test_the_last_and_the_best_are_kept_and_come_back(tmp_path: Path):
    checkpoints = saved(tmp_path, 6)
    assert checkpoints.steps() == [2, 5, 6]
    latest = checkpoints.latest()
    assert (latest.step, latest.run) == (6, {"step": 6, "validation": 5.0})
    found = tensors(0)
    latest.load_into(found)
    assert torch.equal(found["model"]["a"], torch.full((3, 4), 6.0))
    assert torch.equal(found["optimizers"]["state"]["a"]["m"], torch.full((2,), 6.0))


def test_what_is_saved_is_what_was_there_at_the_call(tmp_path: Path):
    checkpoints, weights = Checkpoints(tmp_path, 1), torch.zeros(1 << 20)
    checkpoints.save(1, {"w": weights}, {})
    weights.fill_(1)
    checkpoints.wait()
    found = {"w": torch.full((1 << 20,), 7.0)}
    checkpoints.latest().load_into(found)
    assert not found["w"].any()


@pytest.mark.parametrize("harm", ["cut", "flip", "remove", "manifest", "run"])
def test_a_damaged_one_is_found_and_the_one_before_used(tmp_path: Path, harm: str):
    checkpoints = saved(tmp_path, 3)
    folder = tmp_path / "step-00000003"
    data = next(path for path in folder.iterdir() if path.suffix == ".distcp")
    match harm:
        case "cut":
            data.write_bytes(data.read_bytes()[:-1])
        case "flip":
            content = bytearray(data.read_bytes())
            content[len(content) // 2] ^= 1
            data.write_bytes(content)
        case "remove":
            data.unlink()
        case "manifest":
            (folder / "manifest.json").write_text("{")
        case "run":
            (folder / "run.json").unlink()
    assert checkpoints.latest().step == 2
    assert len(checkpoints.damaged) == 1
    assert str(folder) in checkpoints.damaged[0]


def test_what_a_killed_run_was_writing_is_not_taken_for_a_checkpoint(tmp_path: Path):
    saved(tmp_path, 2)
    shutil.copytree(tmp_path / "step-00000002", tmp_path / ".step-00000003.partial")
    checkpoints = Checkpoints(tmp_path, 2)
    assert checkpoints.steps() == [1, 2]
    checkpoints.save(3, tensors(3), {})
    checkpoints.wait()
    assert checkpoints.latest().step == 3


def test_one_of_another_model_is_a_sentence(tmp_path: Path):
    latest = saved(tmp_path, 1).latest()
    with pytest.raises(FallowError, match="does not fit this recipe"):
        latest.load_into({"model": {"b": torch.zeros(1)}})


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
import torch
from fallow.errors import FallowError
from fallow.training.checkpoints import Checkpoints
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
checkpoints = Checkpoints(Path(sys.argv[1]), 2)
checkpoints.save(1, {"w": torch.ones(8)}, {})
checkpoints.wait()
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
checkpoints.save(2, {"w": torch.ones(1 << 20)}, {})
try:
    checkpoints.wait()
except FallowError as error:
    print(error)
print(checkpoints.latest().step)
"""


def test_a_disk_without_room_is_a_sentence_and_loses_nothing(tmp_path: Path):
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    done = subprocess.run([sys.executable, "-c", FULL_DISK, tmp_path], capture_output=True, text=True, check=True)
    sentence, step = done.stdout.splitlines()
    assert sentence.startswith(f"A checkpoint cannot be written to {tmp_path}: ")
    assert "the one of step 1 is still there" in sentence
    assert step == "1"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001"]
