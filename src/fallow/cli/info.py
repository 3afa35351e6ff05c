"""``fallow info``."""

from __future__ import annotations

from fallow.cli.options import DEFAULT_MODEL, Json, Model, Precision, fetch
from fallow.terminal import print_fields, print_json


def info(model: Model = DEFAULT_MODEL, precision: Precision = "auto", json: Json = False) -> None:
    """What is in a model: shapes, precision, size, expected bytes and MACs per token."""
    from fallow.models.checkpoint import open_checkpoint
    from fallow.models.info import describe

    described = describe(open_checkpoint(fetch(model)), precision=precision).to_json()
    if json:
        print_json(described)
    else:
        print_fields(described)
