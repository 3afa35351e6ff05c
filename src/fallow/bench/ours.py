"""Our own engine among the peers: a worker of the same protocol, in the Python that runs this."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from fallow.bench.peers.base import Variant
from fallow.bench.result import OURS
from fallow.errors import FallowError
from fallow.models.checkpoint import open_checkpoint

PRECISIONS = ("auto", "bf16", "q8", "q4")


def our_variants(model: Path, precisions: Sequence[str] | None = None) -> list[Variant]:
    """Our engine with each precision: by default the file's own and ``q8``, and ``q4`` too where the file is in
    floating point. Raises ``FallowError`` for a precision that does not exist."""
    for precision in precisions or ():
        if precision not in PRECISIONS:
            raise FallowError(f"precision {precision!r} is not known: use one of {', '.join(PRECISIONS)}.")
    if precisions is None:
        tensors = open_checkpoint(model).tensors
        floating = all(tensor.type.is_floating for tensor in tensors.values())
        precisions = ("auto", "q8", "q4") if floating else ("auto", "q8")
    python = Path(sys.executable)
    return [
        Variant(OURS, precision, python, "ours", model, worker_precision=precision, for_quality=True)
        for precision in dict.fromkeys(precisions)
    ]


def our_server_command(model: Path, precision: str, *, port: int, threads: int, max_context: int) -> list[str]:
    """What starts ``fallow serve`` on 127.0.0.1."""
    options = {"--port": port, "--threads": threads, "--max-context": max_context, "--precision": precision}
    arguments = [str(part) for name, value in options.items() for part in (name, value)]
    return [sys.executable, "-m", "fallow", "serve", str(model), "--served-model-name", "model", *arguments]
