"""``fallow bench train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from fallow.cli.options import Json, Overrides, RecipeFile, Threads, example
from fallow.terminal import note, print_json, progress

EXAMPLE = example(
    "fallow bench train recipes/speedrun.toml", "fallow bench train recipes/speedrun.toml --tune baseline"
)


def bench_train(
    recipe: RecipeFile,
    override: Overrides = None,
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of each side, each with a seed of its own.")] = 3,
    tune: Annotated[
        Literal["baseline", "baseline-muon", "ours", "free"] | None,
        typer.Option(help="Search the settings of a side instead, as baselines/NAME-search.toml says."),
    ] = None,
    trials: Annotated[
        Path | None, typer.Option(metavar="FILE", show_default="baselines/NAME-trials.jsonl", help="Trials of --tune.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Trials of --tune at a time.")] = 1,
    results: Annotated[
        Path | None,
        typer.Option(metavar="FILE", show_default="runs/bench-NAME.jsonl", help="Where finished trainings are kept."),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Begin the comparison again.")] = False,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Time to the same loss: the training of RECIPE against tuned HF Trainer baselines.

    The baselines' settings lie beside RECIPE in baselines/; trainings that finished are not repeated.
    """
    if tune is None and (trials is not None or jobs != 1):
        raise typer.BadParameter("--trials and --jobs belong to --tune")
    if tune is not None and (results is not None or fresh):
        raise typer.BadParameter("--results and --fresh are of the comparison: leave them out with --tune")

    from fallow.bench.training import run, table

    with progress(unit="steps") as bar:
        if tune is not None:
            found = run.tune(
                recipe,
                tune.replace("-", "_"),
                overrides=override or (),
                threads=threads,
                trials=trials,
                jobs=jobs,
                on_note=note,
                progress=bar,
            )
        else:
            comparison = run.compare_trainings(
                recipe,
                overrides=override or (),
                seeds=seeds,
                threads=threads,
                results=results,
                fresh=fresh,
                on_note=note,
                progress=bar,
            )
    if tune is not None:
        print_json(found.to_json()) if json else table.print_search(found)
    else:
        print_json(comparison.to_json()) if json else table.print_comparison(comparison)
