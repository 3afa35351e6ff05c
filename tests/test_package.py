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


@pytest.mark.parametrize(("name", "what"), [("train", "Training"), ("sparsify", "fallow sparsify")])
def test_what_needs_pytorch_says_so_where_it_is_missing(name: str, what: str):
    code = f"import sys; sys.modules['torch'] = None; import fallow; fallow.{name}"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert f"{what} needs torch, which is not installed: pip install 'fallow[train]'." in ended.stderr
