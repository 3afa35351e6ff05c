"""The search for a side's settings: one at a time, from the best so far, over trainings of a share of the tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field

from fallow.bench.guard import GUARD
from fallow.bench.training.records import Record, Records
from fallow.bench.training.runner import Runner
from fallow.bench.training.sides import Side
from fallow.errors import FallowError
from fallow.training.recipe import Section, checked, read_toml


class Stage(Section):
    """All ``values`` of one ``key`` are tried, the other settings as they were best so far, in trainings over ``share``
    of the tokens of the side's whole one."""

    key: str
    values: tuple[Any, ...] = Field(min_length=1)
    share: float = Field(1 / 3, gt=0, le=1)


class SearchPlan(Section):
    """The stages of each side, in order. A key may come again, to be looked at from better settings."""

    baseline: tuple[Stage, ...] = ()
    baseline_muon: tuple[Stage, ...] = ()
    ours: tuple[Stage, ...] = ()
    free: tuple[Stage, ...] = ()


@dataclass
class SearchResult:
    """``best`` are the changes to the side's file that gave ``loss``, ``trials`` all that were looked at."""

    side: str
    best: dict[str, Any]
    loss: float
    trials: list[Record] = field(default_factory=list)
    edges: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {"side": self.side, "best": self.best, "loss": self.loss, "edges": self.edges, "trials": self.trials}


def load_plan(path: Path) -> SearchPlan:
    """Raises ``FallowError`` with a sentence for each mistake."""
    return checked(SearchPlan, read_toml(path), f"The search {path}")


def search(
    side: Side,
    plan: SearchPlan,
    records: Records,
    runner: Runner,
    *,
    on_note: Callable[[str], None] = lambda text: None,
) -> SearchResult:
    """Try what ``plan`` says of ``side``, ``runner.jobs`` trainings at a time, each unless ``records`` has it already,
    and add it there.

    ``edges`` names the keys whose best value was the first or the last one tried, so that others may be better.
    Raises ``FallowError`` where there are no stages or every trial was lost.
    """
    stages: tuple[Stage, ...] = getattr(plan, side.name)
    if not stages:
        raise FallowError(f"There is nothing to try for {side.name}: give it stages in the file of the search.")
    seed = side.recipe.train.seed
    best: dict[str, Any] = {}
    seen: list[Record] = []
    edges: dict[str, bool] = {}
    for stage in stages:
        tokens = max(int(side.tokens * stage.share), 1)
        trials = {
            f"{side.name}, {stage.key} = {value}": side.with_settings(
                {**best, stage.key: value}, tokens=tokens, seed=seed
            )
            for value in stage.values
        }
        _run_missing(trials, records, runner)
        losses: dict[int, float] = {}
        for number, (label, trial) in enumerate(trials.items()):
            record = records.find(runner.identity(trial), same_speed=False)
            assert record is not None
            if record not in seen:
                seen.append(record)
            if record["loss"] is not None:
                losses[number] = record["loss"]
            on_note(
                f"{label}: "
                + (f"the loss was lost ({record['diverged']})" if record["diverged"] else f"{record['loss']:.4f}")
            )
        if losses:
            chosen = min(losses, key=lambda number: losses[number])
            best[stage.key] = stage.values[chosen]
            edges[stage.key] = len(stage.values) > 2 and chosen in (0, len(stage.values) - 1)
    found = [record["loss"] for record in seen if record["loss"] is not None]
    if not found:
        raise FallowError(f"Every trial of {side.name} lost its loss: start from lower learning rates.")
    return SearchResult(side.name, best, min(found), seen, [key for key, at_edge in edges.items() if at_edge])


def _run_missing(trials: Mapping[str, Side], records: Records, runner: Runner) -> None:
    """Train what ``records`` does not have. Each is added as it ends; where one fails, no other is begun, and those
    that run are waited for before it is raised."""
    missing = {
        label: trial
        for label, trial in trials.items()
        if records.find(runner.identity(trial), same_speed=False) is None
    }
    with ThreadPoolExecutor(runner.jobs) as pool:
        running = [pool.submit(runner.run, trial, label) for label, trial in missing.items()]
        failures: list[BaseException] = []
        try:
            for ended in as_completed(running):
                if ended.cancelled():
                    continue
                if failure := ended.exception():
                    failures.append(failure)
                    pool.shutdown(wait=False, cancel_futures=True)
                else:
                    records.add(ended.result())
        except BaseException:  # Ctrl-C: what runs would hold this process until it has ended by itself
            with GUARD.ending():
                pool.shutdown(cancel_futures=True)
            raise
    if failures:
        raise failures[0]
