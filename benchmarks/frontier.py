"""What perplexity it costs that a share of a model's weights rests, up to half of them: by axis, without any training,
and of models that were healed under such a plan.

    python benchmarks/frontier.py smollm2-135m --plans plans
    fallow train recipes/heal.toml --set distil.plan=plans/neurons-50.json --out healed
    python benchmarks/frontier.py smollm2-135m --healed healed/model

Of each share the cheapest choice of layers is taken, by the prices of ``fallow sparsify``: ``neurons`` with small gates
(of the up and down projections), small ``inputs`` of the output and down projections, and heads and neurons that are
``removed`` (of all matrices of the layers). Prices come from books of the training set; perplexity is measured in the
engine, on WikiText-2 test and on other books, in windows of 512 tokens.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import torch

from fallow.arrays import Float64
from fallow.data.sources import open_source
from fallow.engine.runner import ModelRunner
from fallow.evaluate.perplexity import token_windows
from fallow.models.checkpoint import open_checkpoint
from fallow.models.decoder_weights import load_decoder
from fallow.models.store import resolve
from fallow.models.tensors import Checkpoint
from fallow.models.tokenizer import load_tokenizer
from fallow.plan import SparsityPlan
from fallow.sparsification.choices import Choices
from fallow.sparsification.partial_reads import SHARES
from fallow.sparsification.removal_choices import RemovalChoices
from fallow.sparsification.removal_prices import removal_errors
from fallow.sparsification.search import Menu
from fallow.sparsification.sensitivity import sensitivities
from fallow.sparsification.timing import pages_of
from fallow.sparsification.weight_choices import WeightChoices
from fallow.sparsification.weight_prices import weight_errors
from fallow.terminal import note, print_table

WINDOW = 512
RESTING = (0.1, 0.2, 0.3, 0.4, 0.5)
_HALVINGS = 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="without a plan")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="the folder of the texts")
    parser.add_argument("--windows", type=int, default=16, help=f"of {WINDOW} tokens, of each text")
    parser.add_argument("--plans", type=Path, metavar="DIR", help="write the plans here")
    parser.add_argument("--healed", type=Path, nargs="*", metavar="DIR", help="measure these models alone, with plans")
    options = parser.parse_args()
    path = resolve(options.model)
    checkpoint = open_checkpoint(path)
    files = (options.data / f"books-{name}.jsonl.gz" for name in ("train", "valid"))
    books, others = (_books(path, file, options.windows) for file in files)
    wikitext = (options.data / "wikitext-2-test.txt").read_text(encoding="utf-8")
    tokens = options.windows * WINDOW
    texts = [token_windows(load_tokenizer(path), wikitext, window=WINDOW, max_tokens=tokens), others]
    dense = [_nll(checkpoint, SparsityPlan.dense(), windows) for windows in texts]

    def cells(model: Checkpoint, plan: SparsityPlan) -> list[str]:
        return [f"{math.expm1(_nll(model, plan, w) - nll):+.2%}" for w, nll in zip(texts, dense, strict=True)]

    columns = {"WikiText-2 test": "right", "other books": "right"}
    if options.healed:
        rows = [(folder, *cells(open_checkpoint(folder), SparsityPlan.beside(folder))) for folder in options.healed]
        print_table({"model": "left", **columns}, rows)
        return
    rows = []
    for axis, kinds in _kinds(checkpoint, books[:3]).items():
        for share in RESTING:
            plan, resting = _plan(kinds, share)
            rows.append((axis, f"{resting:.1%}", *cells(checkpoint, plan)))
            note(" ".join(map(str, rows[-1])))
            if options.plans is not None:
                options.plans.mkdir(parents=True, exist_ok=True)
                plan.save(options.plans / f"{axis}-{100 * share:.0f}.json")
    print_table({"axis": "left", "rests": "right", **columns}, rows)


def _books(model: Path, file: Path, windows: int) -> list[list[int]]:
    """A window of each of some books, again and again."""
    tokenizer = load_tokenizer(model)
    texts = [document.text for document in open_source(str(file)).documents()]
    found: list[list[int]] = []
    start = 20_000
    while len(found) < windows:
        parts = (text[start : start + 8 * WINDOW] for text in texts)
        found += [tokenizer.encode(part, add_special_tokens=False)[:WINDOW] for part in parts]
        start += 8 * WINDOW
    return found[:windows]


def _nll(checkpoint: Checkpoint, plan: SparsityPlan | None, windows: Sequence[Sequence[int]]) -> float:
    """Nats a token."""
    with closing(ModelRunner(checkpoint, num_pages=pages_of(WINDOW), max_step_sequences=1, plan=plan)) as runner:
        return -float(np.concatenate([runner.score(window) for window in windows]).mean())


def _kinds(checkpoint: Checkpoint, windows: Sequence[Sequence[int]]) -> dict[str, list[Choices]]:
    decoder = load_decoder(checkpoint, context=WINDOW).eval().requires_grad_(False)
    weighed = sensitivities(decoder, windows, torch.Generator().manual_seed(0)).numpy()
    errors, (heads, neurons) = weight_errors(decoder, windows), removal_errors(decoder, windows)

    def times(layout: str, rows: int, columns: int) -> Float64:
        return 1 - np.array(SHARES)  # what rests is spared

    def small(part: str) -> Choices:
        return WeightChoices.of((part,), checkpoint, "auto", errors, weighed, times)

    return {
        "neurons": [small("neurons")],
        "inputs": [small("o_proj"), small("down_proj")],
        "removed": [
            RemovalChoices.of("heads", checkpoint, "auto", heads, weighed),
            RemovalChoices.of("neurons", checkpoint, "auto", neurons, weighed),
        ],
    }


def _plan(kinds: Sequence[Choices], share: float) -> tuple[SparsityPlan, float]:
    """The cheapest one under which a share of the kinds' bytes rests, or a little less, and the share."""
    menu = Menu(tuple(kinds), dense=sum(kind.bytes for kind in kinds), spared=0.0)
    low, high = 0.0, float(sum(np.where(np.isfinite(kind.prices), kind.prices, 0).max(1).sum() for kind in kinds))
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if menu.resting(menu.choose(middle)) <= share else (low, middle)
    chosen = menu.choose(low)
    return menu.plan(chosen, SparsityPlan.dense()), menu.resting(chosen)


if __name__ == "__main__":
    main()
