"""Finds what may rest in a model that exists, within a budget of quality. Needs PyTorch."""

from importlib.util import find_spec

from fallow.errors import FallowError

for name in ("torch", "matplotlib"):
    if find_spec(name) is None:
        raise FallowError(f"fallow sparsify needs {name}, which is not installed: pip install 'fallow[train]'.")
