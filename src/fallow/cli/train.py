"""``fallow train``."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fallow.cli.options import Json, Overrides, RecipeFile
from fallow.terminal import note, print_fields, print_json, print_table, progress

if TYPE_CHECKING:
    from fallow.training.activity import Activity
    from fallow.training.loop import StepReport
    from fallow.training.run import TrainResult


def train(
    recipe: RecipeFile,
    override: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", show_default="runs/NAME", help="The folder of the run.")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Begin again, even where there is a checkpoint.")] = False,
    json: Json = False,
) -> None:
    """Train a model by RECIPE; a run that was stopped goes on where it was."""
    from fallow.training.processes import EndedElsewhereError, is_first
    from fallow.training.run import train as run

    with progress(unit="steps") if is_first() else nullcontext() as bar:

        def show(report: StepReport) -> None:
            if json:
                print_json(report.to_json())
                return
            if bar is not None:
                bar(_line(report), report.step, report.steps)
            if report.validation is not None:
                resting = f", {report.activity.resting:.1%} of neurons rest" if report.activity is not None else ""
                note(f"step {report.step}: validation {report.validation.bits_per_byte:.4f} bits per byte{resting}")
            if report.sample is not None:
                note(f"step {report.step}: {report.sample!r}")

        try:
            result = run(
                recipe,
                overrides=override or (),
                out=out,
                fresh=fresh,
                on_step=show,
                on_note=note,
                progress=bar,
            )
        except EndedElsewhereError:
            raise typer.Exit(1) from None
    if is_first():
        _conclude(result, json)
    if result.stopped is not None:
        raise typer.Exit(128 + result.stopped)


def _line(report: StepReport) -> str:
    return (
        f"loss {report.loss:.3f} · {report.bits_per_byte:.3f} bits/byte · {report.tokens_per_s:,.0f} tokens/s · "
        f"{report.mfu:.0%} MFU · {report.joules:.0f} J"
    )


def _conclude(result: TrainResult, json: bool) -> None:
    fields = {
        "step": result.step,
        "tokens": result.tokens,
        "seconds": result.seconds,
        "joules": result.joules,
        "energy_source": result.energy_source,
        "loss": None if result.validation is None else result.validation.loss,
        "bits_per_byte": None if result.validation is None else result.validation.bits_per_byte,
        "model": None if result.model is None else str(result.model),
    }
    if json:
        activity = {} if result.activity is None else {"activity": result.activity.to_json()}
        print_json({**fields, **activity, "final": True})
    else:
        print_fields(fields)
        if result.activity is not None:
            _print_activity(result.activity)
    if result.stopped is not None:
        note(f"Stopped at step {result.step} of {result.steps}: the same command goes on from there.")


def _print_activity(activity: Activity) -> None:
    """How many neurons work for a token, and for several, layer by layer."""
    columns = ("layer", "neurons", "mean", "99th percentile", "of 8 tokens", "of 32 tokens", "dead")
    layers = activity.layers
    rows = [
        (index, layer.neurons, layer.mean, layer.p99, layer.union_8, layer.union_32, layer.dead)
        for index, layer in enumerate(layers)
    ]
    print_table(dict.fromkeys(columns, "right"), rows)
    note(f"{activity.resting:.2%} of the feed-forward neurons rest for a token, on {activity.tokens:,} tokens.")
