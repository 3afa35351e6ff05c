"""The search for a side's settings: one at a time, from the best so far, over trainings of a third of the tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field

from fallow.bench.training.records import Record, Records
from fallow.bench.training.runner import Runner
from fallow.bench.training.sides import Side
from fallow.errors import FallowError
from fallow.training.recipe import Section, checked, read_toml

TRIAL_SHARE = 1 / 3  # of the whole training's tokens


class Stage(Section):
    """All ``values`` of one ``key`` are tried, the other settings as they were best so far."""

    key: str
    values: tuple[Any, ...] = Field(min_length=1)


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
    stages: tuple[Stage, ...],
    records: Records,
    runner: Runner,
    *,
    on_note: Callable[[str], None] = lambda text: None,
) -> SearchResult:
    """Try what ``stages`` say, each training unless ``records`` has it already, and add it there.

    ``edges`` names the keys whose best value was the first or the last one tried, so that others may be better.
    Raises ``FallowError`` where there are no stages or every trial was lost.
    """
    if not stages:
        raise FallowError(f"There is nothing to try for {side.name}: give it stages in the file of the search.")
    tokens = max(int(side.tokens * TRIAL_SHARE), 1)
    seed = side.recipe.train.seed
    best: dict[str, Any] = {}
    seen: list[Record] = []
    edges: dict[str, bool] = {}
    for stage in stages:
        losses: dict[int, float] = {}
        for number, value in enumerate(stage.values):
            changes = {**best, stage.key: value}
            trial = side.with_settings(changes, tokens=tokens, seed=seed)
            label = f"{side.name}, {stage.key} = {value}"
            record = records.find(runner.identity(trial), same_speed=False)
            if record is None:
                record = runner.run(trial, label)
                records.add(record)
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
