"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from fallow.terminal import progress

if TYPE_CHECKING:
    from fallow.plan import SparsityPlan

DEFAULT_MODEL = "smollm2-135m"

Precisions = Literal["auto", "bf16", "q8", "q4"]

Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A known name, a hub id, a GGUF file or a Hugging Face folder."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Precision = Annotated[
    Precisions,
    typer.Option(help="auto keeps the file's own; the others convert from floating point."),
]
Threads = Annotated[
    int | None,
    typer.Option(min=1, show_default="as many as cores may be used", help="Threads of the engine."),
]
Dense = Annotated[bool, typer.Option("--dense", help="Without the plan that lies beside the model: nothing rests.")]
Speculation = Annotated[
    Literal["off", "prompt-lookup", "self"],
    typer.Option(
        help="What drafts tokens that one step verifies, for speed: the text so far, which changes no output, or the "
        "model under its plan, where the output is the dense model's."
    ),
]

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="A TOML file, such as recipes/quick.toml.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Another value for a key of the recipe.")
]


def example(*lines: str) -> str:
    """The end of a command's help: what to type."""
    return "\b\nExample:\n" + "\n".join(f"  {line}" for line in lines)


def plan_of(dense: bool) -> SparsityPlan | None:
    """The plan that ``--dense`` asks for; None: that beside the model."""
    from fallow.plan import SparsityPlan

    return SparsityPlan.dense() if dense else None


def fetch(model: str) -> Path:
    """Where a model lies; it is fetched, under a progress bar, where it is not there yet."""
    from fallow.models.store import resolve

    with progress(unit="bytes") as bar:
        return resolve(model, progress=bar)
