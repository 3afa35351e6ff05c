"""The plan file: what is written is read back, and what is damaged is refused with a sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fallow.errors import ModelFileError
from fallow.plan import LayerRule, SparsityPlan

PLAN = SparsityPlan(
    ffn=(LayerRule("zeros", 0), LayerRule("top_k", 1, parameters={"k": 64})),
    input=(LayerRule("threshold", 3, "o_proj", {"threshold": 0.25}),),
    attention=(
        LayerRule("top_pages", 0, parameters={"sink_pages": 1, "recent_pages": 2, "top_pages": 3}),
        LayerRule("top_pages", 1, parameters={"sink_pages": 1, "recent_pages": 2, "top_pages": 3, "context_pages": 9}),
    ),
    head=(LayerRule("screen", parameters={"rank": 32, "candidates": 512}),),
    provenance={"made_by": "test"},
)


def test_a_plan_survives_the_file(tmp_path: Path) -> None:
    PLAN.save(tmp_path / "plan.json")
    assert SparsityPlan.load(tmp_path / "plan.json") == PLAN
    SparsityPlan.dense().save(tmp_path / "plan.json")
    assert SparsityPlan.load(tmp_path / "plan.json").is_dense
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def test_a_summary() -> None:
    assert SparsityPlan.dense().summary is None
    assert PLAN.summary == "ffn in 2 layers, input in 1 layer, attention in 2 layers, head"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version 2"),
        ({"more": 1}, "unknown field 'more'"),
        ({"provenance": [1]}, "provenance"),
        ({"ffn": {}}, "list of objects"),
        ({"ffn": [{"rule": "magic"}]}, "one of zeros, threshold, top_k"),
        ({"ffn": [{"rule": ["zeros"]}]}, "one of zeros, threshold, top_k"),
        ({"ffn": [{"rule": "top_k", "layer": 0}]}, "needs k"),
        ({"ffn": [{"rule": "top_k", "layer": 0, "k": 1, "context_pages": 1}]}, "needs k .*, but has context_pages, k"),
        ({"attention": [{"rule": "top_pages", "context_pages": 9}]}, "needs recent_pages, sink_pages, top_pages"),
        ({"ffn": [{"rule": "top_k", "layer": True, "k": 1}]}, "from 0 to"),
        ({"ffn": [{"rule": "top_k", "layer": 10**9, "k": 1}]}, "from 0 to"),
        ({"ffn": [{"rule": "top_k", "layer": 0, "k": float("nan")}]}, "at least 0 as k"),
        ({"ffn": [{"rule": "top_k", "layer": 0, "k": "1"}]}, "at least 0 as k"),
        ({"input": [{"rule": "threshold", "target": 3, "threshold": 1}]}, "target"),
    ],
)
def test_a_wrong_plan_is_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(PLAN.to_json() | change))
    with pytest.raises(ModelFileError, match=message) as caught:
        SparsityPlan.load(path)
    assert str(path) in str(caught.value)


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    for content in (b"", b"{", b"\xff\xfe", b"[" * 100_000, b"[]"):
        (tmp_path / "plan.json").write_bytes(content)
        with pytest.raises(ModelFileError, match=r"plan\.json"):
            SparsityPlan.load(tmp_path / "plan.json")
    with pytest.raises(ModelFileError, match="cannot be read"):
        SparsityPlan.load(tmp_path / "none.json")
