"""Fallow: language models of which most may rest. ``from fallow import Engine, SamplingParams``."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fallow.engine.constraint import Constraint
    from fallow.engine.engine import Engine
    from fallow.engine.outputs import RequestDelta, RequestOutput
    from fallow.engine.sampling import SamplingParams
    from fallow.engine.trace import Trace
    from fallow.errors import FallowError, ModelFileError, OverloadedError, RequestError
    from fallow.plan import SparsityPlan
    from fallow.sparsification.run import SparsifyResult, sparsify
    from fallow.training.recipe import Recipe, load_recipe
    from fallow.training.run import TrainResult, train

__version__ = "0.1.0"

__all__ = [
    "Constraint",
    "Engine",
    "FallowError",
    "ModelFileError",
    "OverloadedError",
    "Recipe",
    "RequestDelta",
    "RequestError",
    "RequestOutput",
    "SamplingParams",
    "SparsifyResult",
    "SparsityPlan",
    "Trace",
    "TrainResult",
    "__version__",
    "load_recipe",
    "sparsify",
    "train",
]

# Loaded when first used, so that the commands which need no engine start at once.
_MODULES = {
    "Constraint": "fallow.engine.constraint",
    "Engine": "fallow.engine.engine",
    "FallowError": "fallow.errors",
    "ModelFileError": "fallow.errors",
    "OverloadedError": "fallow.errors",
    "Recipe": "fallow.training.recipe",
    "RequestDelta": "fallow.engine.outputs",
    "RequestError": "fallow.errors",
    "RequestOutput": "fallow.engine.outputs",
    "SamplingParams": "fallow.engine.sampling",
    "SparsifyResult": "fallow.sparsification.run",
    "SparsityPlan": "fallow.plan",
    "Trace": "fallow.engine.trace",
    "TrainResult": "fallow.training.run",
    "load_recipe": "fallow.training.recipe",
    "sparsify": "fallow.sparsification.run",
    "train": "fallow.training.run",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module 'fallow' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return __all__
