"""Finds what may rest in a model that exists, within a budget of quality. Needs PyTorch."""

from importlib.util import find_spec

from fallow.errors import FallowError

if find_spec("torch") is None:
    raise FallowError("fallow sparsify needs torch, which is not installed: pip install 'fallow[train]'.")
