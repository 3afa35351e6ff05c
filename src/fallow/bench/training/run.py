"""``fallow bench train``: from a recipe's file to a comparison or a search."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from fallow import _native
from fallow.bench.training.comparison import Comparison, compare
from fallow.bench.training.records import Records
from fallow.bench.training.runner import Runner
from fallow.bench.training.search import SearchResult, load_plan, search
from fallow.bench.training.sides import OURS, Side, check_models, load_sides
from fallow.errors import FallowError
from fallow.terminal import Progress
from fallow.training.corpus import open_corpus


def compare_trainings(
    recipe: str | Path,
    *,
    overrides: Iterable[str] = (),
    seeds: int = 3,
    threads: int | None = None,
    results: str | Path | None = None,
    fresh: bool = False,
    on_note: Callable[[str], None] = lambda text: None,
    progress: Progress | None = None,
) -> Comparison:
    """Compare the recipe's training with its baselines, over ``seeds`` seeds from the recipe's on.

    Finished trainings are kept in ``results`` (default: ``runs/bench-NAME.jsonl``), from which an interrupted
    comparison goes on; ``fresh`` begins again. Raises ``FallowError``.
    """
    path = Path(recipe)
    sides, runner = _opened(path, overrides, threads, progress)
    records = Records(Path(results) if results is not None else Path("runs") / f"bench-{path.stem}.jsonl")
    if fresh:
        records.path.unlink(missing_ok=True)
    first = sides[OURS].recipe.train.seed
    return compare(path.stem, sides, range(first, first + seeds), records, runner, on_note=on_note)


def tune(
    recipe: str | Path,
    side: str,
    *,
    overrides: Iterable[str] = (),
    threads: int | None = None,
    trials: str | Path | None = None,
    jobs: int = 1,
    on_note: Callable[[str], None] = lambda text: None,
    progress: Progress | None = None,
) -> SearchResult:
    """Search the settings of ``side``, as ``baselines/NAME-search.toml`` beside the recipe says.

    Trials are kept in ``trials`` (default: ``baselines/NAME-trials.jsonl``) and never run twice; ``jobs`` run at a
    time, of ``threads`` each (default: an equal part of the cores). Raises ``FallowError``.
    """
    path = Path(recipe)
    sides, runner = _opened(path, overrides, threads, progress, jobs)
    if side not in sides:
        raise FallowError(f"{path.stem} has no side {side}: it has {', '.join(sides)}.")
    baselines = path.parent / "baselines"
    plan = load_plan(baselines / f"{path.stem}-search.toml")
    records = Records(Path(trials) if trials is not None else baselines / f"{path.stem}-trials.jsonl")
    return search(sides[side], plan, records, runner, on_note=on_note)


def _opened(
    path: Path, overrides: Iterable[str], threads: int | None, progress: Progress | None, jobs: int = 1
) -> tuple[dict[str, Side], Runner]:
    sides = load_sides(path, overrides)
    corpus = open_corpus(sides[OURS].recipe, progress)
    parameters = check_models(sides, corpus.tokenizer)
    threads = threads or max(_native.usable_cores() // jobs, 1)
    return sides, Runner(corpus, parameters, threads, jobs, progress)
