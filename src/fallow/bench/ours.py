"""Our own engine among the peers: a worker of the same protocol, in the Python that runs this."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from fallow.bench.peers.base import Variant
from fallow.bench.result import DENSE, OURS
from fallow.errors import FallowError
from fallow.models.checkpoint import open_checkpoint
from fallow.plan import SparsityPlan

PRECISIONS = ("auto", "bf16", "q8", "q4")


def our_variants(model: Path, precisions: Sequence[str] | None = None) -> list[Variant]:
    """Our engine with each precision: by default the file's own and ``q8``, and ``q4`` too where the file is in
    floating point. Where a plan lies beside the model, each with it and without. Raises ``FallowError`` for a precision
    that does not exist, or where the plan cannot be read."""
    for precision in precisions or ():
        if precision not in PRECISIONS:
            raise FallowError(f"precision {precision!r} is not known: use one of {', '.join(PRECISIONS)}.")
    if precisions is None:
        tensors = open_checkpoint(model).tensors
        floating = all(tensor.type.is_floating for tensor in tensors.values())
        precisions = ("auto", "q8", "q4") if floating else ("auto", "q8")
    python = Path(sys.executable)
    plan = SparsityPlan.beside(model)
    forms = (False,) if plan is None or plan.is_dense else (False, True)
    return [
        Variant(
            OURS,
            precision + DENSE * dense,
            python,
            "ours",
            model,
            worker_precision=precision,
            for_quality=True,
            dense=dense,
        )
        for precision in dict.fromkeys(precisions)
        for dense in forms
    ]


def our_server_command(variant: Variant, *, port: int, threads: int, max_context: int) -> list[str]:
    """What starts ``fallow serve`` on 127.0.0.1."""
    options = {
        "--served-model-name": "model",
        "--port": port,
        "--threads": threads,
        "--max-context": max_context,
        "--precision": variant.worker_precision,
    }
    arguments = [str(part) for name, value in options.items() for part in (name, value)]
    if variant.dense:
        arguments.append("--dense")
    return [sys.executable, "-m", "fallow", "serve", str(variant.model), *arguments]
