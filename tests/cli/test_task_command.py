"""``fallow eval MODEL TASK``."""

from __future__ import annotations

import json
from pathlib import Path


def test_a_task_file_as_a_table_and_as_json(fallow, smollm2_gguf: Path, capitals: Path) -> None:
    found = json.loads(fallow("eval", str(smollm2_gguf), str(capitals), "--json").stdout)
    assert found["accuracy"] == 2 / 3
    assert found["tasks"] == [{"task": "capitals", "questions": 3, "metrics": {"exact_match,none": 2 / 3}}]
    printed = fallow("eval", str(smollm2_gguf), str(capitals), "--limit", "1").stdout.split()
    assert printed[-4:] == ["capitals", "1", "exact_match,none", "1.0000"]


def test_what_is_neither_a_file_nor_a_task(fallow, smollm2_gguf: Path) -> None:
    answer = fallow("eval", str(smollm2_gguf), "no-such-task")
    assert answer.returncode == 1
    assert "no-such-task is no file and no task of lm-eval" in answer.stderr
