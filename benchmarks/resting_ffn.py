"""What neurons that rest are worth: the time of feed-forward networks and of whole steps of decoding, with and without.

    python benchmarks/resting_ffn.py runs/rest-30m/model     a model that `fallow train` made, with its plan.json
    python benchmarks/resting_ffn.py runs/rest-30m/model --dense runs/books-30m/model     beside another, dense one
    python benchmarks/resting_ffn.py --synthetic 0.01        the shape of a 1B model: 4 layers of 2,048 and 5,632
                                                             neurons, random weights, 1% of the neurons at work

The time of the feed-forward networks is that of a step less that of the same model without them. The dense side is the
model itself without its plan unless another one is given.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import NormalDist
from typing import get_args

import numpy as np
import torch
from step_parts import Side, step_milliseconds

from fallow.data.sources import open_source
from fallow.engine.program import DecoderProgram
from fallow.engine.runner import Precision
from fallow.meter.cost import usd_per_million_tokens
from fallow.models.checkpoint import open_checkpoint
from fallow.models.tokenizer import load_tokenizer
from fallow.plan import LayerRule, SparsityPlan
from fallow.terminal import print_table
from fallow.training.corpus import open_corpus
from fallow.training.export import export_model
from fallow.training.model import new_decoder
from fallow.training.recipe import ModelRecipe, load_recipe

BATCHES = (1, 8, 32)
CONTEXT = 256
RECIPE = Path(__file__).parent.parent / "recipes" / "books-30m.toml"
SHAPE = ModelRecipe(hidden_size=2048, intermediate_size=5632, layers=4, heads=16, activation="reglu")


class WithoutFeedForward(DecoderProgram):
    """The same model without its feed-forward networks."""

    def _feed_forward(self, layer: int) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, help="a folder with a plan")
    parser.add_argument("--dense", type=Path, help="the folder of a dense model of the same sizes and vocabulary")
    parser.add_argument("--synthetic", type=float, metavar="SHARE", help="of the neurons that work, in random weights")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="the folder of the books")
    parser.add_argument("--precision", choices=get_args(Precision), default="auto")
    parser.add_argument("--turns", type=int, default=15)
    options = parser.parse_args()
    if (options.model is None) == (options.synthetic is None):
        parser.error("give a model, or --synthetic")
    with ExitStack() as stack:
        if options.synthetic is None:
            model, plan = options.model, SparsityPlan.beside(options.model)
            if plan is None:
                parser.error(f"{model} has no plan: few of its neurons rest")
            texts = _texts(model, options.data)
        else:
            model = stack.enter_context(_random_model())
            plan = SparsityPlan(ffn=(_share_at_work(options.synthetic),))
            texts = np.random.default_rng(0).integers(0, 8192, (BATCHES[-1], CONTEXT)).tolist()
        resting, dense = open_checkpoint(model), open_checkpoint(options.dense or model)
        sides = (
            Side(dense),
            Side(resting, plan),
            Side(dense, layout=WithoutFeedForward),
            Side(resting, layout=WithoutFeedForward),
        )
        rows = [_row(sides, texts, batch, options) for batch in BATCHES]
    names = (
        "dense ms",
        "resting ms",
        "ratio",
        "dense ffn",
        "resting ffn",
        "ratio of ffn",
        "dense $/Mtok",
        "resting $/Mtok",
    )
    print_table({"batch": "right", **dict.fromkeys(names, "right")}, rows)


def _row(sides: Sequence[Side], texts: list[list[int]], batch: int, options: argparse.Namespace) -> tuple[object, ...]:
    dense, rests, dense_without, rests_without = step_milliseconds(
        sides, texts, batch=batch, context=CONTEXT, turns=options.turns, precision=options.precision
    ).T
    whole, part = dense - dense_without, rests - rests_without
    cells = (dense, rests, dense / rests, whole, part, whole / part)
    prices = (usd_per_million_tokens(1000 * batch / float(np.median(times))) for times in (dense, rests))
    return batch, *(f"{np.median(cell):.2f}" for cell in cells), *(f"{price:.4f}" for price in prices)


def _texts(model: Path, data: Path) -> list[list[int]]:
    """The beginnings of books that the model was not trained on."""
    tokenizer = load_tokenizer(model)
    documents = [document.text for document in open_source(str(data / "books-valid.jsonl.gz")).documents()]
    ids = [tokenizer.encode(text[20_000 + 4_000 * part :][:4_000]) for part in range(4) for text in documents]
    return [tokens[:CONTEXT] for tokens in ids][: BATCHES[-1]]


@contextmanager
def _random_model() -> Iterator[Path]:
    recipe = load_recipe(RECIPE, ["data.context=512"]).model_copy(update={"model": SHAPE})
    tokenizer = open_corpus(recipe).tokenizer
    decoder = new_decoder(recipe, tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        export_model(decoder.config, dict(decoder.named_parameters()), tokenizer, Path(folder) / "model")
        del decoder
        yield Path(folder) / "model"


def _share_at_work(share: float) -> LayerRule:
    """Of random weights: gates are normal, with the initial deviation times the norm of a normalised state."""
    deviation = 0.02 * SHAPE.hidden_size**0.5
    return LayerRule("threshold", parameters={"threshold": deviation * NormalDist().inv_cdf(1 - share)})


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
