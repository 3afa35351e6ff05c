"""How much may rest, and what it costs: the recipe of recipes/books-30m.toml at 1.4 million parameters, with penalties.

python benchmarks/rest.py             run the trials that benchmarks/rest.jsonl does not have
python benchmarks/rest.py --table     the frontier of those that it has
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trials import arguments, finished, run_missing

from fallow.terminal import print_table
from fallow.training.recipe import Recipe, load_recipe

HERE = Path(__file__).parent
RESULTS = HERE / "rest.jsonl"
SETTING = (
    "model.hidden_size=128",
    "model.intermediate_size=384",
    "model.layers=4",
    "model.heads=2",
    "data.train=../shared/data/books-train.jsonl.gz",
    "data.valid=../shared/data/books-valid.jsonl.gz",
    "data.vocab_size=4096",
    "data.context=256",
    "train.batch=8",
    "train.tokens=600_000",
    "train.compile=false",
    "report.evaluate_every=0",
    "report.evaluate_tokens=65_536",
    "report.checkpoint_every=0",
)
TRIALS: tuple[tuple[str, ...], ...] = (
    (),
    ("rest.l1=1e-3",),
    ("rest.l1=1e-2",),
    ("model.active_share=0.1",),
    ("rest.l1=3e-3",),
    ("rest.l1=1e-2", "rest.begin_share=0.4", "rest.full_share=0.6"),
)


def name_of(overrides: tuple[str, ...]) -> str:
    return " ".join(override.partition(".")[2] for override in overrides) or "dense"


def trials() -> Iterator[tuple[str, Recipe, dict[str, Any]]]:
    for overrides in TRIALS:
        recipe = load_recipe(HERE.parent / "recipes" / "books-30m.toml", (*SETTING, *overrides))
        yield name_of(overrides), recipe, {}


def print_results() -> None:
    found = finished(RESULTS)
    ended = [line for line in found.values() if line["bits_per_byte"] is not None]
    rows = []
    for line in sorted(ended, key=lambda line: line["activity"]["resting"]):
        layers = line["activity"]["layers"]
        neurons = sum(layer["neurons"] for layer in layers)
        to_dense = line["bits_per_byte"] / found["dense"]["bits_per_byte"] - 1
        rows.append(
            (
                line["trial"],
                f"{line['activity']['resting']:.1%}",
                f"{sum(layer['union_32'] for layer in layers) / neurons:.1%}",
                f"{sum(layer['dead'] for layer in layers) / neurons:.1%}",
                f"{line['bits_per_byte']:.4f}",
                f"{to_dense:+.2%}",
            )
        )
    columns = ("resting", "at work in 32 tokens", "dead", "bits/byte", "to dense")
    print_table({"trial": "left", **dict.fromkeys(columns, "right")}, rows)


if __name__ == "__main__":
    options = arguments(__doc__, "runs/rest")
    if not options.table:
        run_missing(RESULTS, trials(), options)
    print_results()
