"""The C++ compiler that PyTorch compiles layers with."""

from __future__ import annotations

import os
import shutil
import sys


def compiler() -> str:
    """Its name, as PyTorch looks for it: the variable ``CXX``, else the system's usual one."""
    return os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")


def has_compiler() -> bool:
    return shutil.which(compiler()) is not None
