"""The names of the package."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

import fallow


@pytest.mark.parametrize("name", fallow.__all__)
def test_every_name_is_there(name: str):
    assert getattr(fallow, name) is not None


def test_train_is_a_function_whatever_was_imported():
    importlib.import_module("fallow.training.loop")
    assert fallow.train is importlib.import_module("fallow.training.run").train


def test_training_without_its_extra_is_a_sentence():
    code = "import sys; sys.modules['torch'] = None; import fallow; fallow.train"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "Training needs torch, which is not installed: pip install 'fallow[train]'." in ended.stderr
