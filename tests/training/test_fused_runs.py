"""Runs whose updates happen in the backward pass: the same results, resumed to the same bits, and bad steps."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from test_train_run import KILLED, losses, weights

from fallow.errors import FallowError
from fallow.training.loop import StepReport
from fallow.training.recipe import load_recipe
from fallow.training.run import train

FUSED = ["train.fused_update=true", "train.clip=0"]
MATRICES = (
    "optimizer=[{kind='apollo-mini', parameters=['layers.*_proj.weight'], lr=0.01}, "
    "{kind='adamw', parameters=['*'], lr=0.003}]"
)


def test_results_are_those_of_updates_after_the_backward_pass(recipe_file: Path, tmp_path: Path):
    apart = train(load_recipe(recipe_file, ["train.clip=0", MATRICES]), out=tmp_path / "apart")
    reports: list[StepReport] = []
    fused = train(load_recipe(recipe_file, [*FUSED, MATRICES]), out=tmp_path / "fused", on_step=reports.append)
    assert losses(fused.folder) == losses(apart.folder)
    assert weights(fused.folder) == weights(apart.folder)
    assert all(report.gradient_norm > 0 for report in reports)


def test_killed_it_goes_on_to_the_same_bits(recipe_file: Path, tmp_path: Path):
    text = recipe_file.read_text().replace("[train]", "[train]\nfused_update = true\nclip = 0.0")
    recipe_file.write_text(text)
    whole = train(recipe_file, out=tmp_path / "whole")
    for step in ("8", "23"):
        command = [sys.executable, "-c", KILLED, str(recipe_file), str(tmp_path / "killed"), step]
        assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    train(recipe_file, out=tmp_path / "killed")
    assert losses(tmp_path / "killed") == losses(whole.folder)
    assert weights(tmp_path / "killed") == weights(whole.folder)


@pytest.mark.parametrize(
    ("override", "reason"), [("train.clip=1.0", "set train.clip to 0"), ("train.micro_batch=3", "of 3 micro-batches")]
)
def test_what_needs_all_gradients_is_refused(recipe_file: Path, tmp_path: Path, override: str, reason: str):
    with pytest.raises(FallowError, match=f"^Updates cannot be fused into the backward pass: .*{reason}"):
        train(load_recipe(recipe_file, [*FUSED, override]), out=tmp_path / "run")
