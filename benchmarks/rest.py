"""How much may rest, and what it costs: the recipe of recipes/books-30m.toml at smaller sizes, with penalties.

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
    "data.train=../shared/data/books-train.jsonl.gz",
    "data.valid=../shared/data/books-valid.jsonl.gz",
    "train.batch=8",
    "train.tokens=500_000",
    "train.compile=false",
    "report.evaluate_every=0",
    "report.evaluate_tokens=65_536",
    "report.checkpoint_every=0",
)
SIZES = {
    "0.3M": (
        "model.hidden_size=64",
        "model.intermediate_size=192",
        "model.layers=4",
        "model.heads=2",
        "data.vocab_size=1024",
        "data.context=128",
        "train.precision=fp32",
    ),
    "1M": (
        "model.hidden_size=128",
        "model.intermediate_size=384",
        "model.layers=4",
        "model.heads=2",
        "data.vocab_size=1024",
        "data.context=128",
        "train.precision=fp32",
    ),
    "6M": (
        "model.hidden_size=256",
        "model.intermediate_size=704",
        "model.layers=6",
        "model.heads=4",
        "data.vocab_size=4096",
        "data.context=256",
    ),
}
LATE = ("rest.begin_share=0.4", "rest.full_share=0.6")
TRIALS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("0.3M", ()),
    ("0.3M", ("rest.l1=1e-3",)),
    ("0.3M", ("rest.l1=1e-2",)),
    ("0.3M", ("rest.l1=3e-2",)),
    ("0.3M", ("rest.l1=1e-2", *LATE)),
    ("0.3M", ("model.active_share=0.1",)),
    ("0.3M", ("rest.l1=3e-4",)),
    ("1M", ("rest.l1=1e-3",)),
    ("1M", ()),
    ("0.3M", ("rest.l1=1e-3", *LATE)),
    ("1M", ("rest.l1=3e-4",)),
    ("0.3M", ("rest.l1=3e-3",)),
    ("0.3M", ("model.active_share=0.2",)),
    ("6M", ()),
    ("6M", ("rest.l1=1e-3",)),
    ("6M", ("rest.l1=3e-4",)),
    ("6M", ("rest.l1=3e-3",)),
    ("6M", ("rest.l1=1e-3", *LATE)),
    ("6M", ("model.active_share=0.1",)),
)


def trials() -> Iterator[tuple[str, Recipe, dict[str, Any]]]:
    for size, overrides in TRIALS:
        recipe = load_recipe(HERE.parent / "recipes" / "books-30m.toml", (*SETTING, *SIZES[size], *overrides))
        name = " ".join(override.partition(".")[2] for override in overrides) or "dense"
        yield f"{size} {name}", recipe, {"size": size}


def print_results() -> None:
    ended = [line for line in finished(RESULTS).values() if line["bits_per_byte"] is not None]
    rows = []
    dense = {line["size"]: line["bits_per_byte"] for line in ended if line["trial"].endswith(" dense")}
    for line in sorted(ended, key=lambda line: (list(SIZES).index(line["size"]), line["activity"]["resting"])):
        layers = line["activity"]["layers"]
        neurons = sum(layer["neurons"] for layer in layers)
        rows.append(
            (
                line["trial"],
                f"{line['activity']['resting']:.1%}",
                f"{sum(layer['union_32'] for layer in layers) / neurons:.1%}",
                f"{sum(layer['dead'] for layer in layers) / neurons:.1%}",
                f"{line['bits_per_byte']:.4f}",
                f"{line['bits_per_byte'] / dense[line['size']] - 1:+.2%}" if line["size"] in dense else "",
            )
        )
    columns = ("resting", "at work in 32 tokens", "dead", "bits/byte", "to dense")
    print_table({"trial": "left", **dict.fromkeys(columns, "right")}, rows)


if __name__ == "__main__":
    options = arguments(__doc__, "runs/rest")
    if not options.table:
        run_missing(RESULTS, trials(), options)
    print_results()
