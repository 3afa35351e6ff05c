"""``fallow pull``."""

from __future__ import annotations

from fallow.cli.options import DEFAULT_MODEL, Json, Model
from fallow.terminal import print_json, progress


def pull(model: Model = DEFAULT_MODEL, json: Json = False) -> None:
    """Fetch a model into the local store and print where it is."""
    from fallow.models import store

    with progress(unit="bytes") as bar:
        path = store.pull(model, progress=bar)
    if json:
        print_json({"model": model, "path": str(path)})
    else:
        print(path)
