"""The comparison: all sides in turns, seed by seed, each to the end of its schedule, and what came of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from fallow.bench.training.records import Record, Records
from fallow.bench.training.runner import Runner
from fallow.bench.training.sides import BASELINE, OURS, Side
from fallow.errors import FallowError

_MEDIANS = ("loss", "bits_per_byte", "seconds", "compile_seconds", "trained_tokens", "tokens_per_s", "joules")


@dataclass(frozen=True)
class Comparison:
    """``runs``: of each side one record a seed, the seeds in the same order."""

    recipe: str
    runs: dict[str, list[Record]]

    @property
    def target_loss(self) -> float:
        """The median over the seeds of the losses at which the baseline ends (nats a token)."""
        return float(median(run["loss"] for run in self.runs[BASELINE]))

    @property
    def bits_per_byte(self) -> float:
        return float(median(run["bits_per_byte"] for run in self.runs[BASELINE]))

    def shortfall(self, side: str) -> str | None:
        """Why no time to the target can be told: each run of a side has to end at or below it."""
        for run in self.runs[side]:
            if run["loss"] is None:
                return f"{side} lost its loss with seed {run['seed']}: {run['diverged']}"
            if run["loss"] > self.target_loss:
                return (
                    f"{side} ended at {run['loss']:.4f} with seed {run['seed']}, above the target of "
                    f"{self.target_loss:.4f}: give it more tokens."
                )
        return None

    def ratio(self, side: str) -> float | None:
        """The baseline's seconds over those of ``side``: the median of the ratios of the seeds, whose runs were
        neighbours in time. None where the target was not reached."""
        return self._ratio(side, "seconds") if self.shortfall(side) is None else None

    def breakdown(self, side: str) -> dict[str, float] | None:
        """The two factors of the ratio: of how many tokens are needed, and of how many are done a second."""
        if self.shortfall(side) is not None:
            return None
        return {"tokens": self._ratio(side, "trained_tokens"), "tokens_per_s": 1 / self._ratio(side, "tokens_per_s")}

    def _ratio(self, side: str, what: str) -> float:
        pairs = zip(self.runs[BASELINE], self.runs[side], strict=True)
        return float(median(theirs[what] / own[what] for theirs, own in pairs))

    def to_json(self) -> dict[str, Any]:
        """The object that ``fallow bench train --json`` prints. Of each side the run of median seconds."""
        others = [side for side in self.runs if side != BASELINE]
        return {
            "recipe": self.recipe,
            "target_loss": self.target_loss,
            "bits_per_byte": self.bits_per_byte,
            **{side: _figures(_middle(runs)) for side, runs in self.runs.items()},
            "ratio": self.ratio(OURS),
            "ratios": {side: self.ratio(side) for side in others},
            "breakdown": {side: self.breakdown(side) for side in others},
            "shortfalls": [sentence for side in others if (sentence := self.shortfall(side))],
            "medians": {side: _medians(runs) for side, runs in self.runs.items()},
            "quiet": self.quiet,
            "commits": self.commits,
            "runs": [run for runs in self.runs.values() for run in runs],
        }

    @property
    def quiet(self) -> bool:
        """Whether seconds and joules are those of a machine that did nothing else, as far as can be told."""
        return all(run["quiet"] for runs in self.runs.values() for run in runs)

    @property
    def commits(self) -> list[str]:
        """Of the code that trained."""
        return sorted({run["commit"] for runs in self.runs.values() for run in runs})


def compare(
    recipe: str,
    sides: Mapping[str, Side],
    seeds: Iterable[int],
    records: Records,
    runner: Runner,
    *,
    on_note: Callable[[str], None] = lambda text: None,
) -> Comparison:
    """Train every side with every seed, the sides of a seed one after the other; what ``records`` has is not trained
    again. Raises ``FallowError`` where a training fails or the baseline loses its loss."""
    runs: dict[str, list[Record]] = {side: [] for side in sides}
    for seed in seeds:
        for name, side in sides.items():
            training = side.with_settings({}, tokens=side.tokens, seed=seed)
            record = records.find(runner.identity(training), same_speed=True)
            if record is None:
                record = runner.run(training, f"{name}, seed {seed}")
                records.add(record)
            if record["loss"] is None:
                if name == BASELINE:
                    raise FallowError(f"The baseline lost its loss with seed {seed}: {record['diverged']}")
                on_note(f"{name}, seed {seed}: {record['diverged']}")
            else:
                on_note(f"{name}, seed {seed}: {record['loss']:.4f} after {record['seconds']:.0f} s")
            runs[name].append(record)
    return Comparison(recipe, runs)


def _middle(runs: list[Record]) -> Record:
    """The run of median time; of an even number the faster of the two, diverged ones last."""
    ordered = sorted(runs, key=lambda run: run.get("seconds", float("inf")))
    return ordered[(len(ordered) - 1) // 2]


def _figures(run: Record) -> dict[str, Any]:
    names = ("seed", "loss", "bits_per_byte", "seconds", "compile_seconds", "tokens_per_s", "joules", "energy_source")
    figures = {name: run.get(name) for name in (*names, "peak_memory_bytes")}
    return {**figures, "tokens": run.get("trained_tokens")}


def _medians(runs: list[Record]) -> dict[str, float | None]:
    ended = [run for run in runs if run["loss"] is not None]
    return {name: _median([run[name] for run in ended]) for name in _MEDIANS}


def _median(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(median(known)) if known else None
