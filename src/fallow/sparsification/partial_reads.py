"""How long a step computes with a part of a 4-bit matrix, relative to all of it: measured once on each machine.

Memory decides: records that are read here and there take longer than their bytes say, by how much depends on their size
and on the machine. So the kernels are timed with the model's shapes, on more memory than caches hold.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Literal

import numpy as np

from fallow import _native
from fallow.arrays import Bytes, Float32, Float64
from fallow.files import write_json
from fallow.meter.machine import machine
from fallow.models.store import store_path

SHARES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""At rest."""
Layout = Literal["rows", "columns"]
_VERSION = 1  # of what is measured
_READ_BYTES = 96 << 20  # by a step: several times what caches hold
_TURNS, _WARM_STEPS, _STEPS = 5, 2, 4
_BLOCK, _BLOCK_BYTES = 32, 20  # of Q4_1


def partial_times(layout: Layout, out_features: int, in_features: int, *, threads: int | None = None) -> Float64:
    """Float64 ``[len(SHARES)]``: the time of a linear of one token while so much of its rows or columns rests, over
    that of the dense linear. Kept in the store, so that a machine is asked once."""
    threads = threads or _native.usable_cores()
    isa = _native.available_isas()[0]
    key = f"{machine()['cpu']}, {isa}, {threads} threads: {layout} of {out_features} x {in_features}, {_VERSION}"
    file = store_path() / "timings" / "partial_reads.json"
    known = _known(file)
    if key not in known:
        known[key] = _measured(layout, out_features, in_features, threads, isa).tolist()
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, known)
    return np.array(known[key])


def _known(file: Path) -> dict[str, list[float]]:
    """What was measured before; what is damaged is measured again."""
    try:
        entries = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    if not isinstance(entries, dict):
        return {}
    return {key: times for key, times in entries.items() if _is_times(times)}


def _is_times(times: object) -> bool:
    return (
        isinstance(times, list)
        and len(times) == len(SHARES)
        and all(type(part) is float and math.isfinite(part) and part > 0 for part in times)
    )


def _measured(layout: Layout, out_features: int, in_features: int, threads: int, isa: str) -> Float64:
    """The fastest of some steps: what else the machine does makes any one slower, and none faster."""
    shape = out_features, in_features
    whole = _Linears("tiles", *shape, threads=threads, isa=isa)
    parts = _Linears(layout, *shape, threads=threads, isa=isa)
    best = np.full(len(SHARES) + 1, np.inf)
    for _ in range(_TURNS):
        best[-1] = min(best[-1], *whole.seconds(0))
        for share in range(len(SHARES)):
            best[share] = min(best[share], *parts.seconds(share))
    relative: Float64 = best[:-1] / best[-1]
    return relative


class _Linears:
    """Linears that follow one another, each with weights of its own, so that none of them lie in a cache. A token's
    number says which of ``SHARES`` rests."""

    def __init__(self, layout: str, out_features: int, in_features: int, *, threads: int, isa: str) -> None:
        self._program = program = _native.Program(
            threads=threads, isa=isa, num_heads=1, num_kv_heads=1, head_dim=16, num_layers=1, max_tokens=1,
            max_sequences=1, max_logit_rows=1, num_pages=1, max_positions=1,
        )  # fmt: skip
        rng = np.random.default_rng(0)
        blocks = _random_blocks(rng, out_features, in_features)
        x, gates, out = (program.buffer(width) for width in (in_features, out_features, out_features))
        inputs = np.tile(rng.choice(np.array([-1, 1], np.float32), in_features), (len(SHARES), 1))
        self._embed(_with(rng, inputs, 0.0) if layout == "columns" else inputs, x)
        if layout == "rows":
            self._embed(_with(rng, np.ones((len(SHARES), out_features), np.float32), -1.0), gates)
        activations = None
        for _ in range(max(_READ_BYTES // blocks.size, 1)):
            weights = program.weights([("Q4_1", blocks)], in_features, layout=layout)
            if activations is None:
                activations = program.activations_for(weights)
                program.quantise(x, activations)
            if layout == "rows":
                program.linear(activations, weights, out, gates=gates, activation="relu")
            else:
                program.linear(activations, weights, out)
        logits = program.buffer(out_features)
        program.gather(out, logits)
        program.finish(logits)

    def seconds(self, share: int) -> list[float]:
        """Of some steps; the first ones, while other threads still wait for work, are left out."""
        nothing = np.zeros(1, np.int32)
        token, offsets = np.array([share], np.int32), np.array([0, 1], np.int32)
        seconds = []
        for _ in range(_WARM_STEPS + _STEPS):
            began = time.perf_counter()
            self._program.run(token, offsets, nothing, nothing[None], nothing)
            seconds.append(time.perf_counter() - began)
        return seconds[_WARM_STEPS:]

    def _embed(self, rows: Float32, out: int) -> None:
        table = self._program.weights([("F32", rows.view(np.uint8))], rows.shape[1], precision="bf16")
        self._program.embed(table, out)


def _with(rng: np.random.Generator, rows: Float32, value: float) -> Float32:
    """In each row the value at so many places as its one of ``SHARES`` says."""
    rows = rows.copy()
    for row, share in zip(rows, SHARES, strict=True):
        row[rng.permutation(len(row))[: round(share * len(row))]] = value
    return rows


def _random_blocks(rng: np.random.Generator, rows: int, columns: int) -> Bytes:
    blocks = rng.integers(0, 256, (rows, columns // _BLOCK, _BLOCK_BYTES), np.uint8)
    blocks[..., :4] = np.array([0.01, -0.08], np.float16).view(np.uint8)  # scale and minimum
    return blocks.reshape(rows, -1)
