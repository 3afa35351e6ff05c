"""What a technique of training is worth alone: recipes/speedrun.toml at 5 million parameters with one thing changed.

    python benchmarks/techniques.py             run the trials that benchmarks/techniques.jsonl does not have
    python benchmarks/techniques.py --table     what the trials that it has ended at, beside the recipe as it is

Two seeds. Only the loss counts; what a technique does to the time of a step stands in docs/log.md.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trials import arguments, finished, run_missing

from fallow.terminal import print_table
from fallow.training.recipe import Recipe, load_recipe

HERE = Path(__file__).parent
RESULTS = HERE / "techniques.jsonl"
SETTING = (
    "model.hidden_size=192",
    "model.intermediate_size=512",
    "model.layers=6",
    "model.heads=3",
    "data.context=256",
    "train.tokens=1_000_000",
    "train.batch=8",
    "train.compile=false",
    "report.evaluate_every=0",
    "report.evaluate_tokens=131_072",
    "report.checkpoint_every=0",
)
AS_IT_IS = "as it is"
TECHNIQUES = {
    AS_IT_IS: (),
    "QK-norm": ("model.qk_norm=true",),
    "zero output projections": ("model.zero_outputs=true",),
    "value embeddings in the last two layers": ("model.value_embedding_layers=[4, 5]",),
    "residual mixes": ("model.residual_mixes=true",),
    "logit soft cap of 15": ("model.logit_softcap=15.0",),
    "ReLU², as many weights": ("model.activation=relu2", "model.intermediate_size=768"),
    "batch ramp from 2, over a quarter of the steps": ("train.first_batch=2", "train.ramp_share=0.25"),
    "NorMuon": ("optimizer.0.variance=0.95",),
    "cautious weight decay": ("optimizer.0.cautious=true",),
    "4 iterations of Newton-Schulz": ("optimizer.0.iterations=4",),
    "3 iterations of Newton-Schulz": ("optimizer.0.iterations=3",),
    "averaged weights (0.98)": ("train.ema=0.98",),
    "bags of 4 over 0.3 of the steps": ("superposition.bag=4", "superposition.share=0.3"),
}


def trials() -> Iterator[tuple[str, Recipe, dict[str, Any]]]:
    for seed in range(2):
        for technique, overrides in TECHNIQUES.items():
            recipe = load_recipe(
                HERE.parent / "recipes" / "speedrun.toml", (*SETTING, f"train.seed={seed}", *overrides)
            )
            yield f"{technique}, seed {seed}", recipe, {"technique": technique, "seed": seed}


def print_results() -> None:
    bits: dict[str, dict[int, float]] = {technique: {} for technique in TECHNIQUES}
    parameters = {}
    for line in finished(RESULTS).values():
        if line["bits_per_byte"] is not None:
            bits[line["technique"]][line["seed"]] = line["bits_per_byte"]
            parameters[line["technique"]] = line["parameters"]
    plain = bits[AS_IT_IS]
    rows = []
    for technique, found in bits.items():
        changes = [found[seed] / plain[seed] - 1 for seed in found if seed in plain]
        rows.append(
            (
                technique,
                f"{parameters[technique] / 1e6:.2f} M" if found else "",
                ", ".join(f"{found[seed]:.4f}" for seed in sorted(found)),
                f"{statistics.fmean(changes):+.2%}" if changes and technique != AS_IT_IS else "",
            )
        )
    print_table({"technique": "left", "parameters": "right", "bits/byte": "right", "mean change": "right"}, rows)


if __name__ == "__main__":
    options = arguments(__doc__, "runs/techniques")
    if not options.table:
        run_missing(RESULTS, trials(), options)
    print_results()
