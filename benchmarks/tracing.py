"""What it costs to record what works: reading a text in chunks and token by token, with and without a trace.

    fallow sparsify smollm2-135m --out lean
    python benchmarks/tracing.py lean

Both sides take the same steps of the same runner in turns. Where the text is read token by token, as in decoding, a
token is chosen greedily after each, else after the last one. Medians over the turns; a ratio is of two that followed
each other.
"""

from __future__ import annotations

import argparse
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np

from fallow.engine.batch import greedy
from fallow.engine.runner import ModelRunner
from fallow.engine.trace import Trace
from fallow.models.checkpoint import open_checkpoint
from fallow.models.resting import Resting
from fallow.plan import SparsityPlan
from fallow.sparsification.timing import pages_of
from fallow.terminal import print_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a folder with a plan")
    parser.add_argument("--prompt", type=int, default=2048, help="tokens that are read in chunks, random ones")
    parser.add_argument("--decode", type=int, default=512, help="tokens that are read one by one")
    parser.add_argument("--turns", type=int, default=9)
    options = parser.parse_args()
    plan = SparsityPlan.beside(options.model)
    if plan is None:
        parser.error(f"{options.model} has no plan: nothing rests there")
    checkpoint = open_checkpoint(options.model)
    longest = max(options.prompt, options.decode)
    text = np.random.default_rng(0).integers(3, checkpoint.config.vocab_size, longest).astype(np.int32)
    with closing(ModelRunner(checkpoint, num_pages=pages_of(longest), plan=plan)) as runner:
        rows = [
            _row("prompt", runner, text[: options.prompt], 512, options.turns),
            _row("decode", runner, text[: options.decode], 1, options.turns),
        ]
    names = ("tokens", "seconds", "traced", "ratio", "of all turns", "MiB of trace")
    print_table({"": "left", **dict.fromkeys(names, "right")}, rows)


def _row(name: str, runner: ModelRunner, text: np.ndarray, chunk: int, turns: int) -> tuple[object, ...]:
    sampling = greedy(1 if chunk > 1 else len(text))
    recorded = runner._trace_shape
    nothing = replace(recorded, rests=[Resting()] * len(recorded.rests), inputs=[], tiles=None)
    seconds = np.zeros((turns + 1, 2))
    for turn in range(turns + 1):
        for side, shape in enumerate((nothing, recorded)):
            runner._trace_shape = shape
            began = time.perf_counter()
            trace = runner.trace(text, sampling=sampling, chunk=chunk)
            seconds[turn, side] = time.perf_counter() - began
    seconds = seconds[1:]  # the first turn warms up
    ratios = seconds[:, 1] / seconds[:, 0]
    medians = (f"{second:.3f}" for second in np.median(seconds, 0))
    of_all = f"{ratios.min():.3f} to {ratios.max():.3f}"
    return name, len(text), *medians, f"{np.median(ratios):.3f}", of_all, f"{_bytes(trace) / 2**20:.2f}"


def _bytes(trace: Trace) -> int:
    return sum(part.packed.nbytes for part in (trace.pages, trace.neurons, trace.inputs) if part is not None)


if __name__ == "__main__":
    main()
