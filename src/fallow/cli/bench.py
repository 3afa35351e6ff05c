"""``fallow bench``."""

from __future__ import annotations

from fallow.cli.options import DEFAULT_MODEL, Json, Model, Threads


def bench(model: Model = DEFAULT_MODEL, threads: Threads = None, json: Json = False) -> None:
    """The cost table of MODEL, ours and the peers', in one run."""
