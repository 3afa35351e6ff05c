"""What a plan is worth at long context: the time of a step of decoding and of a whole prompt, dense and under the plan.

    fallow sparsify smollm2-135m --budget 0.5% --text books.txt --context 7680 --out lean
    python benchmarks/long_context.py lean --context 7680

Both sides take turns over the same books; a ratio is the median of the turns' ratios.
"""

from __future__ import annotations

import argparse
import time
from contextlib import closing
from pathlib import Path

import numpy as np
from step_parts import Side, step_milliseconds

from fallow.data.sources import open_source
from fallow.engine.runner import ModelRunner
from fallow.meter.cost import usd_per_million_tokens
from fallow.models.checkpoint import open_checkpoint
from fallow.models.tensors import Checkpoint
from fallow.models.tokenizer import load_tokenizer
from fallow.plan import SparsityPlan
from fallow.sparsification.timing import Decoding, pages_of
from fallow.terminal import print_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a folder with a plan")
    parser.add_argument("--context", type=int, default=7680)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--turns", type=int, default=7, help="of steps")
    parser.add_argument("--prompts", type=int, default=3, help="turns of prompts; 0: none")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="the folder of the books")
    options = parser.parse_args()
    plan = SparsityPlan.beside(options.model)
    if plan is None:
        parser.error(f"{options.model} has no plan")
    checkpoint = open_checkpoint(options.model)
    texts = _texts(options.model, options.data, options.context)
    rows = []
    if options.prompts:
        seconds = np.array([
            [_prompt_seconds(checkpoint, rules, texts[turn % len(texts)]) for rules in (SparsityPlan.dense(), plan)]
            for turn in range(options.prompts)
        ])  # fmt: skip
        rows.append(("a prompt", *_cells(1000 * seconds)))
    for batch in options.batches:
        sides = (Side(checkpoint), Side(checkpoint, plan))
        times = step_milliseconds(sides, texts, batch=batch, context=options.context, turns=options.turns)
        dollars = (f"{usd_per_million_tokens(1000 * batch / float(np.median(side))):.4f}" for side in times.T)
        rows.append((f"a step of {batch}", *_cells(times), *dollars))
    columns = ("dense ms", "plan ms", "ratio", "of turns", "dense $/Mtok", "plan $/Mtok")
    print_table({"": "left", **dict.fromkeys(columns, "right")}, [(*row, *[""] * (7 - len(row))) for row in rows])


def _texts(model: Path, data: Path, context: int) -> list[list[int]]:
    """Stretches of books that no plan was made on."""
    tokenizer = load_tokenizer(model)
    books = [document.text for document in open_source(str(data / "books-valid.jsonl.gz")).documents()]
    ids = (tokenizer.encode(text[20_000:][: 6 * context]) for text in books)
    return [tokens[:context] for tokens in ids if len(tokens) >= context]


def _prompt_seconds(checkpoint: Checkpoint, plan: SparsityPlan, text: list[int]) -> float:
    with closing(ModelRunner(checkpoint, num_pages=pages_of(len(text)), max_step_sequences=1, plan=plan)) as runner:
        Decoding(runner, [text], 1, ModelRunner.page_size)  # what is touched for the first time
        began = time.perf_counter()
        Decoding(runner, [text], 1, len(text))
        return time.perf_counter() - began


def _cells(milliseconds: np.ndarray) -> tuple[str, ...]:
    dense, sparse = milliseconds.T
    ratios = dense / sparse
    turns = f"{ratios.min():.2f} to {ratios.max():.2f}"
    return f"{np.median(dense):.2f}", f"{np.median(sparse):.2f}", f"{np.median(ratios):.2f}", turns


if __name__ == "__main__":
    main()
