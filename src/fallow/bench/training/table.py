"""What people read of a comparison and of a search."""

from __future__ import annotations

from fallow.bench.training.comparison import Comparison
from fallow.bench.training.search import SearchResult
from fallow.bench.training.sides import BASELINE
from fallow.terminal import print_fields, print_table

_COLUMNS = ("loss", "bits/byte", "tokens", "tokens/s", "seconds", "compiling", "joules", "peak MB", "ratio")


def print_comparison(comparison: Comparison) -> None:
    """A row a run, the ratio of each side at its last one, and what stands in the way of a ratio."""
    first = comparison.runs[BASELINE][0]
    print_fields(
        {
            "recipe": comparison.recipe,
            "machine": f"{first['machine']['cpu']}, {first['threads']} threads",
            "target": f"{comparison.target_loss:.4f} nats a token, {comparison.bits_per_byte:.4f} bits a byte",
            "code": ", ".join(comparison.commits),
        }
    )
    rows = []
    for side, runs in comparison.runs.items():
        ratio = comparison.ratio(side)
        for number, run in enumerate(runs, 1):
            shown = f"{ratio:.2f}" if ratio is not None and number == len(runs) else ""
            rows.append((side, run["seed"], *_cells(run), shown))
    print_table({"side": "left", "seed": "right", **dict.fromkeys(_COLUMNS, "right")}, rows)
    notes = {}
    for side in comparison.runs:
        factors = comparison.breakdown(side)
        shortfall = comparison.shortfall(side)
        if shortfall is not None:
            notes[side] = shortfall
        elif factors is not None and side != BASELINE:
            notes[side] = (
                f"{comparison.ratio(side):.2f} times as fast to the target: {factors['tokens']:.2f} by fewer tokens, "
                f"{factors['tokens_per_s']:.2f} by tokens a second"
            )
    if not comparison.quiet:
        notes["seconds"] = "some runs had a low priority or ran beside others: their times and joules mean nothing"
    print_fields(notes)


def print_search(result: SearchResult) -> None:
    """The trials in their order, the best settings, and where the search ended at an edge."""
    rows = [("none" if trial["loss"] is None else f"{trial['loss']:.4f}", trial["config"]) for trial in result.trials]
    print_table({"loss": "right", "settings": "left"}, rows)
    print_fields({"best": result.best, "loss": result.loss, "at the edge": ", ".join(result.edges) or None})


def _cells(run: dict[str, object]) -> tuple[object, ...]:
    if run["loss"] is None:
        return ("none", *[""] * (len(_COLUMNS) - 2))
    seconds, compiling, joules, peak = (run[k] for k in ("seconds", "compile_seconds", "joules", "peak_memory_bytes"))
    assert isinstance(seconds, float)
    assert isinstance(compiling, float)
    assert isinstance(joules, float | None)
    assert isinstance(peak, int)
    return (
        f"{run['loss']:.4f}",
        f"{run['bits_per_byte']:.4f}",
        run["trained_tokens"],
        f"{run['tokens_per_s']:,.0f}",
        f"{seconds:,.0f}",
        f"{compiling:,.0f}",
        "" if joules is None else f"{joules:,.0f}",
        f"{peak / 1e6:,.0f}",
    )
