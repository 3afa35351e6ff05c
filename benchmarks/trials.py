"""Trials of a benchmark: each a short training run whose result is a line of a file; what is there is not run again.

Run the benchmarks from the root of the repository. A trial that is stopped (SIGTERM, Ctrl-C) goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from fallow.errors import FallowError
from fallow.files import append_json_line, whole_lines
from fallow.terminal import note
from fallow.training.corpus import open_corpus
from fallow.training.loop import StepReport, Trainer
from fallow.training.model import new_decoder
from fallow.training.optimizers.build import state_bytes
from fallow.training.processes import Processes, joined
from fallow.training.recipe import Recipe


def arguments(description: str | None, runs: str) -> argparse.Namespace:
    """What every benchmark of trials takes on its command line."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path(runs), help="where runs are kept until they have ended")
    parser.add_argument("--limit", type=int, metavar="N", help="run N trials at most")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="run those whose names match it")
    parser.add_argument("--table", action="store_true", help="run nothing, print the table of what there is")
    return parser.parse_args()


def finished(results: Path) -> dict[str, dict[str, Any]]:
    """The lines of the file by the name of their trial, in order."""
    return {line["trial"]: line for line in map(json.loads, whole_lines(results))}


def run_missing(
    results: Path, trials: Iterable[tuple[str, Recipe, Mapping[str, Any]]], options: argparse.Namespace
) -> None:
    """Run the trials (a name, a recipe and what else its line should say) that the file does not have. Several
    processes may run some each, with ``--only``."""
    left = options.limit
    for name, recipe, facts in trials:
        if name in finished(results) or left == 0 or not fnmatchcase(name, options.only):
            continue
        line = {"trial": name, **facts, **_run(recipe, options.runs / name)}
        append_json_line(results, line)
        shutil.rmtree(options.runs / name)
        note(f"{name}: {line['bits_per_byte'] or 'lost'} bits per byte")
        left = None if left is None else left - 1


def _run(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Train to the end of the recipe; where the loss is lost, ``lost`` says how and ``bits_per_byte`` is None."""
    folder.mkdir(parents=True, exist_ok=True)
    with joined() as processes:  # on a GPU where there is one
        return _trained(recipe, folder, processes)


def _trained(recipe: Recipe, folder: Path, processes: Processes) -> dict[str, Any]:
    corpus = open_corpus(recipe)
    decoder = new_decoder(recipe, corpus.tokenizer)
    trainer = Trainer(recipe, decoder, corpus, folder, processes=processes, on_note=note)
    trainer.resume()
    reports: list[StepReport] = []
    facts: dict[str, Any] = {"parameters": sum(p.numel() for p in decoder.parameters()), "tokens": recipe.train.tokens}
    try:
        validation = trainer.run(reports.append)
    except FallowError as error:
        return facts | {"bits_per_byte": None, "lost": str(error)}
    if validation is None:
        raise SystemExit(128 + (trainer.stopped or 0))
    facts |= {
        "bits_per_byte": validation.bits_per_byte,
        "loss": validation.loss,
        "train_loss": statistics.fmean(report.loss for report in reports[-20:]),
        "state_bytes": state_bytes(trainer.optimizers),
        "tokens_per_s": statistics.median(report.tokens_per_s for report in reports),
        "seconds": trainer.state.seconds,
        "device": processes.device.type,
    }
    activity = trainer.activity()
    return facts if activity is None else facts | {"activity": activity.to_json()}
