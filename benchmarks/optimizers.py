"""The optimizers of the C4 tables at 6 million parameters on books, each tuned over five rates; beside published ones.

    python benchmarks/optimizers.py                     run what benchmarks/optimizers.jsonl does not have
    python benchmarks/optimizers.py --only 'speed-*'    the speeds alone: a few steps of each, three times in turns
    python benchmarks/optimizers.py --table             the table of what it has

Losses may come from a GPU, or from several trials at a time; speeds want a machine that does nothing else.

The setting is that of recipes/c4-60m.toml but for sizes and text: half of the parameters in embeddings and head, a
tenth of the steps to warm up, a cosine to a tenth of the rate, no decay of weights, no clipping. One rate holds for all
parameters: APOLLO and GaLore leave embeddings, head and vectors to AdamW, as their papers do, and so does Muon, whose
updates have AdamW's size; SCALE leaves vectors to AdamW at 0.02, its authors' default. APOLLO and GaLore take a quarter
of the rate for what they project: AdamW-quarter is AdamW with matrices at a quarter of the rate, to tell that from the
projection.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from trials import arguments, finished, run_missing

from fallow.terminal import note, print_table
from fallow.training.recipe import OptimizerRecipe, Recipe, load_recipe

HERE = Path(__file__).parent
RESULTS = HERE / "optimizers.jsonl"
SETTING = (
    "model.hidden_size=192",
    "model.intermediate_size=512",
    "model.layers=6",
    "model.heads=3",
    "data.train=../shared/data/books-train.jsonl.gz",
    "data.valid=../shared/data/books-valid.jsonl.gz",
    "data.vocab_size=8192",
    "train.tokens=2_000_000",
    "train.batch=8",
    "train.micro_batch=8",
    "train.compile=false",
    "report.evaluate_every=0",
    "report.evaluate_tokens=131_072",
    "report.checkpoint_every=0",
)
SPEED = ("train.tokens=24_576", "report.evaluate_tokens=2048")  # twelve steps
RANK = 48  # a quarter of hidden_size, as in the papers
MATRICES = ("layers.*_proj.weight",)
RATES = {
    "AdamW": (0.001, 0.002, 0.004, 0.008, 0.016),
    "AdamW-quarter": (0.0025, 0.005, 0.01, 0.02, 0.04),
    "Muon": (0.001, 0.002, 0.004, 0.008, 0.016),
    "NorMuon": (0.001, 0.002, 0.004, 0.008, 0.016),
    "SCALE": (0.000125, 0.00025, 0.0005, 0.001, 0.002),
    "APOLLO": (0.0025, 0.005, 0.01, 0.02, 0.04),
    "APOLLO-Mini": (0.0025, 0.005, 0.01, 0.02, 0.04),
    "GaLore": (0.0025, 0.005, 0.01, 0.02, 0.04),
}
# Validation perplexity of LLaMA 60M on C4: GaLore's table 2 (arXiv 2403.03507), APOLLO's table 2 (2412.05270, which
# took over AdamW's and GaLore's; APOLLO-Mini at GaLore's rate, 30.95 at twice that), and SCALE's (2506.16659, a tenth
# more steps). NorMuon is in none of them.
PUBLISHED = {
    "AdamW": (34.06, 34.06, 30.05),
    "AdamW-quarter": (None, None, None),
    "Muon": (None, None, 28.86),
    "NorMuon": (None, None, None),
    "SCALE": (None, None, 30.81),
    "APOLLO": (None, 31.55, 30.94),
    "APOLLO-Mini": (None, 31.93, 31.85),
    "GaLore": (34.88, 34.88, 34.58),
}


def rules(optimizer: str, lr: float) -> tuple[OptimizerRecipe, ...]:
    """Which parameters get what, at one rate."""

    def rule(kind: str, parameters: tuple[str, ...] = MATRICES, **options: Any) -> OptimizerRecipe:
        return OptimizerRecipe(kind=kind, parameters=parameters, **{"lr": lr} | options)

    adamw = rule("adamw", ("*",))
    match optimizer:
        case "AdamW":
            return (adamw,)
        case "AdamW-quarter":
            return rule("adamw", lr=lr / 4), adamw
        case "Muon":
            return rule("muon"), adamw
        case "NorMuon":
            return rule("muon", variance=0.95), adamw
        case "SCALE":
            tables = (*MATRICES, "embed_tokens.weight")
            return (
                rule("scale", ("lm_head.weight",), momentum=0.9),
                rule("scale", tables),
                rule("adamw", ("*",), lr=0.02),
            )
        case "APOLLO" | "GaLore":
            return rule(optimizer.lower(), rank=RANK), adamw
        case _:
            return rule(optimizer.lower()), adamw


def trials() -> Iterator[tuple[str, Recipe, dict[str, Any]]]:
    recipe = _recipe()
    for place in range(5):  # the middle of each grid first
        for optimizer, rates in RATES.items():
            lr = rates[(2, 1, 3, 0, 4)[place]]
            yield f"{optimizer}-{lr:g}", _with(recipe, optimizer, lr), {"optimizer": optimizer, "lr": lr}


def speeds() -> Iterator[tuple[str, Recipe, dict[str, Any]]]:
    recipe = _recipe(*SPEED)
    for turn in range(3):
        for optimizer, rates in RATES.items():
            yield f"speed-{optimizer}-{turn}", _with(recipe, optimizer, rates[0]), {"optimizer": optimizer}


def _recipe(*overrides: str) -> Recipe:
    return load_recipe(HERE.parent / "recipes" / "c4-60m.toml", (*SETTING, *overrides))


def _with(recipe: Recipe, optimizer: str, lr: float) -> Recipe:
    return recipe.model_copy(update={"optimizer": rules(optimizer, lr), "name": optimizer})


def print_results() -> None:
    found = list(finished(RESULTS).values())
    rows, edges = [], []
    for optimizer, rates in RATES.items():
        own = [line for line in found if line["optimizer"] == optimizer and line.get("lr") in rates]
        ended = [line for line in own if line["bits_per_byte"] is not None]
        turns = [line["tokens_per_s"] for line in found if line["optimizer"] == optimizer and "lr" not in line]
        published = [f"{value:.2f}" if value else "" for value in PUBLISHED[optimizer]]
        if not ended:
            rows.append((optimizer, f"{len(own)} of {len(rates)}", *[""] * 6, *published))
            continue
        best = min(ended, key=lambda line: line["bits_per_byte"])
        if best["lr"] in (rates[0], rates[-1]):
            edges.append(optimizer)
        rows.append(
            (
                optimizer,
                f"{len(own)} of {len(rates)}",
                best["lr"],
                f"{best['bits_per_byte']:.4f}",
                f"{best['loss']:.4f}",
                f"{math.exp(best['loss']):.2f}",
                f"{best['state_bytes'] / 1e6:.1f} MB",
                round(statistics.median(turns)) if turns else "",
                *published,
            )
        )
    columns = (
        "trials",
        "rate",
        "bits/byte",
        "loss",
        "perplexity",
        "state",
        "tokens/s",
        "GaLore 60M",
        "APOLLO 60M",
        "SCALE 60M",
    )
    print_table({"optimizer": "left", **dict.fromkeys(columns, "right")}, rows)
    if edges:
        note(f"At an end of its rates, so a better one may lie beyond: {', '.join(edges)}.")


if __name__ == "__main__":
    options = arguments(__doc__, "runs/optimizers")
    if not options.table:
        run_missing(RESULTS, chain(trials(), speeds()), options)
    print_results()
