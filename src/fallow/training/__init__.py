"""Training: one loop, its optimizers, schedules and checkpoints. ``FallowError`` where its extra is missing."""

from importlib.util import find_spec

from fallow.errors import FallowError

for _library in ("torch", "tensorboard", "safetensors", "pyarrow"):
    if find_spec(_library) is None:
        raise FallowError(f"Training needs {_library}, which is not installed: pip install 'fallow[train]'.")
