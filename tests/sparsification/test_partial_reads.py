"""What reading a part of a matrix takes: measured, and kept."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fallow.sparsification import partial_reads
from fallow.sparsification.choices import stacked, unstacked
from fallow.sparsification.partial_reads import SHARES, partial_times


@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_it_is_measured_once(layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FALLOW_HOME", str(tmp_path))
    monkeypatch.setattr(partial_reads, "_READ_BYTES", 4 << 20)
    found = partial_times(layout, 96, 160, threads=1)
    assert found.shape == (len(SHARES),)
    assert np.isfinite(found).all()
    assert (found > 0).all()
    assert found[-1] < found[0]  # a tenth of the work takes less time than four fifths
    assert (partial_times(layout, 96, 160, threads=1) == found).all()
    file = tmp_path / "timings" / "partial_reads.json"
    (key,) = json.loads(file.read_bytes())
    for damaged in (b"no JSON", b"[]", json.dumps({key: [0.5]}).encode(), json.dumps({key: ["1"] * 8}).encode()):
        file.write_bytes(damaged)
        again = partial_times(layout, 96, 160, threads=1)
        assert json.loads(file.read_bytes()) == {key: again.tolist()}
    assert partial_times(layout, 64, 160, threads=1).shape == found.shape
    assert len(json.loads(file.read_bytes())) == 2


def test_tables_of_different_widths_are_chosen_from_together() -> None:
    rng = np.random.default_rng(0)
    tables = [rng.random((3, 4)), rng.random((2, 2)), rng.random((1, 6))]
    together = stacked(tables)
    assert together.shape == (6, 6)
    assert (together[3:5, :4] == tables[1][:, -1:]).all()  # as its last choice
    for place, row in enumerate(np.concatenate([table[:, -1] for table in tables])):
        assert together[place, -1] == row
    chosen = np.array([2, 3, 5, 4, 5, 0])
    parts = unstacked(chosen, tables)
    assert [part.tolist() for part in parts] == [[0, 1, 3], [0, 1], [0]]
    picked = [table[np.arange(len(table)), part] for table, part in zip(tables, parts, strict=True)]
    assert np.concatenate(picked).tolist() == together[np.arange(6), chosen].tolist()
