"""Tasks of lm-eval on our engine, beside its own model over ``transformers`` and our own sums."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fallow.engine.runner import ModelRunner
from fallow.errors import FallowError
from fallow.evaluate.tasks import HarnessModel, TaskResult, Writing, accuracy, run_task
from fallow.models.checkpoint import open_checkpoint
from fallow.models.tokenizer import Tokenizer, load_tokenizer

DATA = """\
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
"""
CHOICE = """\
task: animals
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
WRITTEN = """\
task: echoes
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["."], max_gen_toks: 7}
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
ROLLING = """\
task: prose
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list:
  - metric: bits_per_byte
    aggregation: bits_per_byte
    higher_is_better: false
"""
DOCUMENTS = [
    {"question": "A cow says", "choices": [" moo", " quack quack", " e"], "answer": 0},
    {"question": "Of all the birds on the pond, the duck says", "choices": [" m", " quack", " a"], "answer": 1},
    {"question": "The fox", "choices": [" is red", " is a fish", " swims at night"], "answer": 2},
    {"question": "Two and two are", "choices": [" four", " five", " six"], "answer": 1},
]


@pytest.fixture(autouse=True)
def no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def tasks(tmp_path: Path) -> dict[str, str]:
    data = tmp_path / "documents.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    files = {}
    for name, text in (("choice", CHOICE), ("written", WRITTEN), ("rolling", ROLLING)):
        (tmp_path / f"{name}.yaml").write_text(DATA.format(data=data) + text)
        files[name] = str(tmp_path / f"{name}.yaml")
    return files


@pytest.fixture
def folder(tiny_checkpoints: dict[str, Path]) -> Path:
    return tiny_checkpoints["qwen3"]


@pytest.fixture
def runner(folder: Path) -> Iterator[ModelRunner]:
    runner = ModelRunner(open_checkpoint(folder), precision="bf16", num_pages=16)
    with closing(runner):
        yield runner


def no_answers(prompts: list[list[int]], how: Writing) -> list[str]:
    raise AssertionError("this task writes nothing")


def test_scores_are_those_of_the_harness_over_transformers(
    folder: Path, runner: ModelRunner, tasks: dict[str, str]
) -> None:
    from lm_eval.models.huggingface import HFLM

    theirs: Any = HFLM(str(folder), device="cpu", dtype="float32", batch_size=1)
    ours = HarnessModel(runner, no_answers, load_tokenizer(folder))
    for name in ("choice", "rolling"):
        [found], [expected] = run_task(ours, tasks[name]), run_task(theirs, tasks[name])
        assert found.questions == expected.questions == len(DOCUMENTS)
        assert found.metrics == pytest.approx(expected.metrics, rel=1e-2)


def test_log_likelihoods_are_sums_of_scores(folder: Path, runner: ModelRunner) -> None:
    tokenizer = load_tokenizer(folder)
    model = HarnessModel(runner, no_answers, tokenizer)
    context = tokenizer.encode("The river was wide")
    continuations = [[7], [19], [7, 8, 9], [200]]
    found = model._loglikelihood_tokens([(("", ""), context, continuation) for continuation in continuations])
    for (score, greedy), continuation in zip(found, continuations, strict=True):
        scores = runner.score([*context, *continuation])[len(context) - 1 :]
        assert score == pytest.approx(float(scores.sum()), rel=1e-5)
        row = next(iter(runner.logit_blocks(context)))[-1]
        assert greedy == (continuation == [int(np.argmax(row))])


def test_answers_are_asked_for_as_the_task_says(folder: Path, runner: ModelRunner, tasks: dict[str, str]) -> None:
    tokenizer = load_tokenizer(folder)
    asked: list[tuple[list[str], Writing]] = []

    def writes(prompts: list[list[int]], how: Writing) -> list[str]:
        asked.append(([tokenizer.decode(prompt) for prompt in prompts], how))
        return [" moo", " duck", " is red", " four"]

    [result] = run_task(HarnessModel(runner, writes, tokenizer), tasks["written"])
    assert asked == [([document["question"] for document in DOCUMENTS], Writing(7, (".",)))]
    assert (result.questions, result.accuracy) == (4, 0.75)


@pytest.mark.parametrize(
    ("task", "message"),
    [("gone.yaml", "There is no file"), ("broken.yaml", "cannot be run")],
)
def test_tasks_that_cannot_be_run(folder: Path, runner: ModelRunner, tmp_path: Path, task: str, message: str) -> None:
    (tmp_path / "broken.yaml").write_text(DATA.format(data=tmp_path / "gone.jsonl") + CHOICE)
    with pytest.raises(FallowError, match=message):
        run_task(HarnessModel(runner, no_answers, load_tokenizer(folder)), str(tmp_path / task))


def test_text_that_begins_with_the_first_token_does_not_get_another(
    runner: ModelRunner, tiny_checkpoints: dict[str, Path]
) -> None:
    document = json.loads((tiny_checkpoints["gemma3"] / "tokenizer.json").read_text())
    tokenizer = Tokenizer(document, bos_token_id=0, eos_token_ids=(2,), add_bos_token=True)
    model = HarnessModel(runner, no_answers, tokenizer)
    bos = tokenizer.token_text(tokenizer.bos_token_id)
    assert model.tok_encode(bos + "hello") == model.tok_encode("hello") == tokenizer.encode("hello")
    assert model.tok_encode("hello")[0] == 0
    assert model.tok_encode("hello", add_special_tokens=False) == tokenizer.encode("hello", add_special_tokens=False)


def test_accuracy_over_several_tasks() -> None:
    first, second = TaskResult("a", 30, {"acc,none": 0.5, "acc_norm,none": 0.9}), TaskResult("b", 10, {"acc,none": 0.1})
    assert accuracy([first, second]) == pytest.approx(0.4)
    assert accuracy([first, TaskResult("c", 10, {"bits_per_byte,none": 1.0})]) is None
