"""The frontier as a picture: what each plan that was measured costs in perplexity, and what it is worth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, PercentFormatter

from fallow.files import replacing

if TYPE_CHECKING:
    from fallow.sparsification.search import Point

PICTURES = ("frontier.svg", "frontier.png")
_MEASURED, _CHOSEN, _BUDGET = "#0072b2", "#d55e00", "#666666"  # told apart by the colour-blind too (Okabe and Ito)


def draw(frontier: Sequence[Point], found: Point, *, budget: float, title: str, folder: Path) -> None:
    """Write ``PICTURES`` into the folder: perplexity against the predicted speed-up and against the share at rest, from
    the most cautious plan on; ``found`` is marked, and the ``budget`` (0.01: one percent) is a line."""
    # Text stays text, a name is no formula, and the same frontier gives the same bytes.
    with mpl.rc_context({"svg.fonttype": "none", "text.parse_math": False, "svg.hashsalt": "fallow"}):
        frontier = frontier or [found]  # nothing to choose from
        figure = Figure(figsize=(9.0, 4.0), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        _panel(left, [(point.speedup, point) for point in frontier], (found.speedup, found), budget)
        left.set_xlabel("predicted speed-up of a step of decoding (times)")
        left.xaxis.set_major_formatter(FormatStrFormatter("%.2f"))
        left.set_ylabel("change of perplexity")
        left.yaxis.set_major_formatter(PercentFormatter(100))
        _panel(right, [(100 * point.resting, point) for point in frontier], (100 * found.resting, found), budget)
        right.set_xlabel("share at rest of what may rest")
        right.xaxis.set_major_formatter(PercentFormatter(100))
        right.legend(loc="upper left")
        figure.suptitle(title)
        for name in PICTURES:
            kind = name.rpartition(".")[2]
            with replacing(folder / name) as file:
                figure.savefig(file, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)


def _panel(axes: Axes, points: Sequence[tuple[float, Point]], found: tuple[float, Point], budget: float) -> None:
    axes.grid(alpha=0.3)
    axes.axhline(100 * budget, color=_BUDGET, linestyle="--", label=f"the budget, {100 * budget:.4g}%", gid="budget")
    places = [(x, _change(point)) for x, point in points]
    axes.plot(*zip(*places, strict=True), "o-", color=_MEASURED, label="measured", gid="measured")
    axes.plot(
        found[0], _change(found[1]), "o", markersize=13, markerfacecolor="none", markeredgewidth=2, color=_CHOSEN,
        label="the plan", gid="plan",
    )  # fmt: skip


def _change(point: Point) -> float:
    """Of perplexity, in percent."""
    return 100 * (point.perplexity_ratio - 1)
