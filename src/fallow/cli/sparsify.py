"""``fallow sparsify``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fallow.cli.options import Json, Model, Precision, Threads, fetch
from fallow.terminal import note, print_fields, print_json, print_table, progress


def sparsify(
    model: Model,
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder to write: the model with its plan.")],
    budget: Annotated[str, typer.Option(metavar="SHARE", help="How much perplexity may rise, as 1% or 0.01.")] = "1%",
    text: Annotated[
        Path | None,
        typer.Option(metavar="FILE", show_default="the model writes it", help="Text like that which will be served."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, max=64, help="Sequences that are decoded at once.")] = 1,
    context: Annotated[int, typer.Option(help="Tokens that each of them has read.")] = 4096,
    heal: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="TOKENS",
            show_default="not at all",
            help="Tune the weights under a plan that costs more, by so many tokens of the text.",
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            metavar="TASK",
            help="A task of lm-eval, its file, or needle (numbers in long documents), that must still be solved.",
            show_default="none",
        ),
    ] = None,
    floor: Annotated[
        str | None, typer.Option(metavar="SHARE", help="Of its answers that must be right, as 40% or 0.4.")
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Questions of the TASK, or needles at each depth.", show_default="all, or 20"),
    ] = None,
    remove: Annotated[bool, typer.Option("--remove", help="Heads and neurons may also be taken out for good.")] = False,
    precision: Precision = "auto",
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Find what may rest in MODEL within a budget of quality, and write the model with its plan.

    It looks at the pages of the KV cache that each KV head reads, at a screen that tells which words of the vocabulary
    are worth computing, and, where weights have 4 bits, at small inputs of linear layers and neurons with small gates,
    by what they spare on this machine; with --remove also at heads and neurons that can go. A healing that was stopped
    goes on when the same command is given again.
    """
    share = _share(budget, "--budget")
    least = None if floor is None else _share(floor, "--floor")
    path = fetch(model)

    from fallow.sparsification import run

    with progress(unit="steps") as bar:
        result = run.sparsify(
            path,
            budget=share,
            out=out,
            text=text,
            batch=batch,
            context=context,
            heal=heal,
            task=task,
            floor=least,
            limit=limit,
            remove=remove,
            precision=precision,
            threads=threads,
            on_note=note,
            progress=bar,
        )
    if json:
        print_json(result.to_json() | {"model": model})
        return
    print_table(
        {"resting": "right", "perplexity": "right", "predicted": "right"},
        [
            (f"{point.resting:.1%}", f"{point.perplexity_ratio - 1:+.2%}", f"{point.speedup:.2f}")
            for point in result.frontier
        ],
    )
    print_fields(
        {
            "load": f"{batch} x {context:,} tokens",
            "perplexity": f"{result.found.perplexity_ratio - 1:+.2%}",
            "faster": f"{result.measured:.2f} times (predicted {result.found.speedup:.2f})",
            **({} if result.accuracy is None else {"solves": f"{result.accuracy:.1%} of {task}"}),
            "written to": out,
            "drawn in": out / "frontier.svg",
        }
    )


def _share(text: str, option: str) -> float:
    number, percent = text.removesuffix("%"), text.endswith("%")
    try:
        return float(number) / (100 if percent else 1)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no share: write 1% or 0.01", param_hint=option) from None
