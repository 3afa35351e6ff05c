"""``fallow eval MODEL TASK``."""

from __future__ import annotations

import json
from pathlib import Path

TASK = """\
task: capitals
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "The capital of {{{{country}}}} is"
doc_to_target: " {{{{capital}}}}"
generation_kwargs: {{until: [".", ",", "\\n"], max_gen_toks: 4}}
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""


def test_a_task_file_as_a_table_and_as_json(fallow, smollm2_gguf: Path, tmp_path: Path) -> None:
    data = tmp_path / "capitals.jsonl"
    rows = {"France": "Paris", "Italy": "Rome", "Spain": "Lisbon"}
    data.write_text("".join(json.dumps({"country": c, "capital": t}) + "\n" for c, t in rows.items()))
    task = tmp_path / "capitals.yaml"
    task.write_text(TASK.format(data=data))
    found = json.loads(fallow("eval", str(smollm2_gguf), str(task), "--json").stdout)
    assert found["accuracy"] == 2 / 3  # the last one is wrong in the file
    assert found["tasks"] == [{"task": "capitals", "questions": 3, "metrics": {"exact_match,none": 2 / 3}}]
    printed = fallow("eval", str(smollm2_gguf), str(task), "--limit", "1").stdout.split()
    assert printed[-4:] == ["capitals", "1", "exact_match,none", "1.0000"]


def test_what_is_neither_a_file_nor_a_task(fallow, smollm2_gguf: Path) -> None:
    answer = fallow("eval", str(smollm2_gguf), "no-such-task")
    assert answer.returncode == 1
    assert "no-such-task is no file and no task of lm-eval" in answer.stderr
