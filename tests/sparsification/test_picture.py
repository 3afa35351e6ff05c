"""The pictures of a frontier, read back."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from fallow.plan import SparsityPlan
from fallow.sparsification.picture import PICTURES, draw
from fallow.sparsification.search import Point

SVG = "{http://www.w3.org/2000/svg}"
DENSE = SparsityPlan.dense()
FRONTIER = [Point(0.5, 1.001, 1.5, DENSE, 0.1), Point(0.6, 1.004, 1.7, DENSE, 0.2), Point(0.9, 1.022, 1.9, DENSE, 0.4)]


def marks(group: ElementTree.Element) -> np.ndarray:
    """Where the markers of a line stand, ``[markers, 2]``."""
    return np.array([(float(use.get("x", 0)), float(use.get("y", 0))) for use in group.iter(f"{SVG}use")])


def panels(folder: Path) -> list[dict[str, ElementTree.Element]]:
    """Of each half the groups that have a name of ours."""
    root = ElementTree.parse(folder / "frontier.svg").getroot()
    axes = [group for group in root.iter(f"{SVG}g") if re.fullmatch(r"axes_\d", group.get("id", ""))]
    return [{group.get("id", ""): group for group in half.iter(f"{SVG}g")} for half in axes]


@pytest.mark.parametrize("found", [FRONTIER[1], Point(0.0, 1.0, 1.1, DENSE, 0.0)], ids=["on it", "beside it"])
def test_points_stand_where_they_were_measured(found: Point, tmp_path: Path) -> None:
    draw(FRONTIER, found, budget=0.01, title="a $model$ & its <plan>", folder=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(PICTURES)
    content = (tmp_path / "frontier.svg").read_text(encoding="utf-8")
    assert "a $model$ &amp; its &lt;plan&gt;" in content
    assert "the budget, 1%" in content
    halves = panels(tmp_path)
    assert len(halves) == 2
    for half, values in zip(
        halves, ([p.speedup for p in (*FRONTIER, found)], [p.resting for p in (*FRONTIER, found)]), strict=True
    ):
        places = np.concatenate([marks(half["measured"]), marks(half["plan"])])
        assert len(places) == 4
        ratios = [point.perplexity_ratio for point in (*FRONTIER, found)]
        slopes = []
        for axis, wanted in ((0, values), (1, ratios)):
            slope, offset = np.polyfit(wanted, places[:, axis], 1)
            np.testing.assert_allclose(places[:, axis], slope * np.array(wanted) + offset, atol=0.01)
            slopes.append((slope, offset))
        (line,) = half["budget"].iter(f"{SVG}path")
        heights = [float(y) for y in re.findall(r"[ML] \S+ (\S+)", line.get("d", ""))]
        np.testing.assert_allclose(heights, slopes[1][0] * 1.01 + slopes[1][1], atol=0.01)
        assert slopes[0][0] > 0 > slopes[1][0]  # to the right, and upwards


def test_the_same_frontier_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        draw(FRONTIER, FRONTIER[1], budget=0.01, title="model", folder=tmp_path / name)
    for name in PICTURES:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()
    with Image.open(tmp_path / "one" / "frontier.png") as image:
        assert image.size == (1350, 600)
        colours = np.asarray(image.convert("RGB")).reshape(-1, 3)
    for colour in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)):
        assert (colours == colour).all(1).sum() > 50
