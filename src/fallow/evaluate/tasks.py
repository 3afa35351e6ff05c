"""Tasks of the field's harness (EleutherAI's lm-evaluation-harness): a model of ours as one of its models. Needs the
package ``lm-eval``, of the extra ``eval``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from fallow.arrays import Float32
from fallow.errors import FallowError
from fallow.evaluate.divergence import Distribution
from fallow.models.tokenizer import Tokenizer
from fallow.terminal import Progress

DEFAULT_ANSWER_TOKENS = 256
_ACCURACIES = ("acc", "exact_match", "acc_norm")  # what counts as accuracy, first found


class Scorer(Distribution, Protocol):
    """What is needed of a ``ModelRunner``: its logits, and its context in tokens."""

    max_context: int


@dataclass(frozen=True)
class Writing:
    """How an answer is written: the settings of the harness that change a token."""

    max_tokens: int
    stop: tuple[str, ...] = ()
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0


Writes = Callable[[list[list[int]], Writing], list[str]]
"""What a model writes after each of some prompts of token ids."""


class HarnessModel(TemplateLM):  # type: ignore[misc]
    """A model under the harness: log-likelihoods by ``scorer``, answers by ``writes``."""

    def __init__(
        self,
        scorer: Scorer,
        writes: Writes,
        tokenizer: Tokenizer,
        *,
        progress: Progress = lambda what, done, total: None,
    ) -> None:
        super().__init__()
        self._scorer = scorer
        self._writes = writes
        self._tokenizer = tokenizer
        self._progress = progress

    @property
    def eot_token_id(self) -> int:
        tokens = self._tokenizer.eos_token_ids
        return min(tokens) if tokens else 0

    @property
    def prefix_token_id(self) -> int:
        bos = self._tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return "fallow"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Tokens; with those that the model's own prompts begin with, unless the text has them already."""
        bos = self._tokenizer.bos_token_id
        if add_special_tokens is None:
            add_special_tokens = bos is None or not string.startswith(self._tokenizer.token_text(bos))
        return self._tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        template = self._tokenizer.chat_template
        if template is None:
            raise FallowError("The model has no chat template: run the task without one.")
        return template.render(chat_history, add_generation_prompt=add_generation_prompt)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        found: list[tuple[float, bool]] = []
        for (context, first), group in groupby(requests, key=lambda request: (request[1], len(request[2]) == 1)):
            continuations = [continuation for _, _, continuation in group]
            if first:  # one token each: the same logits serve all of them
                row = self._last_logits(context, 1)
                found += [_loglikelihood(row, tokens) for tokens in continuations]
            else:
                found += [
                    _loglikelihood(self._last_logits(context + tokens[:-1], len(tokens)), tokens)
                    for tokens in continuations
                ]
            self._progress("scoring", len(found), len(requests))
        return found

    def _last_logits(self, tokens: Sequence[int], count: int) -> Float32:
        """The logits after each of the last ``count`` tokens; of more than the context holds the last ones are read."""
        ids = np.asarray(tokens[-self._scorer.max_context :], np.int32)
        if count > len(ids):
            raise FallowError(f"A continuation of {count} tokens does not fit the context of {len(ids)}.")
        return np.concatenate(list(self._scorer.logit_blocks(ids, first=len(ids) - count)))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        totals = []
        for done, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            windows = map(
                make_disjoint_window,
                get_rolling_token_windows(tokens, self.prefix_token_id, self._scorer.max_context, 1),
            )
            scores = [_loglikelihood(self._last_logits(a + b[:-1], len(b)), b) for a, b in windows]
            totals.append(sum(score for score, _ in scores))
            self._progress("scoring", done + 1, len(requests))
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        found: list[str] = []
        for writing, group in groupby(requests, key=lambda request: _writing(request.args[1])):
            room = self._scorer.max_context - writing.max_tokens
            if room < 1:
                raise FallowError(
                    f"Answers of {writing.max_tokens} tokens leave no room for a question in the context."
                )
            found += self._writes([self.tok_encode(request.args[0])[-room:] for request in group], writing)
            self._progress("answering", len(found), len(requests))
        return found


def _loglikelihood(logits: Float32, tokens: Sequence[int]) -> tuple[float, bool]:
    """Of ``tokens`` under the logits of their places; and whether each is the most likely one."""
    peaks = logits.max(1, keepdims=True)
    totals = np.log(np.exp(logits - peaks).sum(1, dtype=np.float64)) + peaks[:, 0]
    own = logits[np.arange(len(tokens)), list(tokens)]
    return float((own - totals).sum()), bool((logits.argmax(1) == np.asarray(tokens)).all())


def _writing(settings: Mapping[str, Any]) -> Writing:
    names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
    limits = [int(settings[name]) for name in names if settings.get(name) is not None]
    stop = settings.get("until") or ()
    draws = settings.get("do_sample", settings.get("temperature", 0) not in (0, None))
    return Writing(
        max_tokens=limits[0] if limits else DEFAULT_ANSWER_TOKENS,
        stop=(stop,) if isinstance(stop, str) else tuple(text for text in stop if text),
        temperature=float(settings.get("temperature") or 1.0) if draws else 0.0,
        top_p=float(settings.get("top_p") or 1.0),
        top_k=int(settings.get("top_k") or 0),
    )


@dataclass(frozen=True)
class TaskResult:
    """``metrics`` as the harness names them (``acc,none``), of ``questions`` that were asked. ``accuracy`` is the one
    that counts as such, None where the task has none."""

    task: str
    questions: int
    metrics: dict[str, float]

    @property
    def accuracy(self) -> float | None:
        plain = {name.partition(",")[0]: value for name, value in reversed(self.metrics.items())}
        return next((plain[name] for name in _ACCURACIES if name in plain), None)


def accuracy(results: Sequence[TaskResult]) -> float | None:
    """Over all questions of ``results``; None where a task has no accuracy."""
    found = [(result.accuracy, result.questions) for result in results]
    if any(value is None for value, _ in found):
        return None
    return sum(value * count for value, count in found if value is not None) / sum(count for _, count in found)


def run_task(model: HarnessModel, task: str, *, limit: int | None = None, shots: int | None = None) -> list[TaskResult]:
    """The results of a task, of all tasks of a group, or of a task file (YAML) of the harness, by the first ``limit``
    questions of each, with ``shots`` solved examples before a question where that is not the task's own number.

    Raises ``FallowError`` where there is no such task or its data cannot be had."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    is_file = task.endswith((".yaml", ".yml"))
    if is_file and not Path(task).is_file():
        raise FallowError(f"There is no file {task}.")
    manager = TaskManager(include_defaults=not is_file)
    if not is_file and task not in manager.all_tasks:
        raise FallowError(f"{task} is no file and no task of lm-eval: `lm-eval ls tasks` lists them.")
    try:
        found = simple_evaluate(
            model,
            tasks=[task],
            task_manager=manager,
            limit=limit,
            num_fewshot=shots,
            bootstrap_iters=0,
            log_samples=False,
        )
    except FallowError:
        raise
    except Exception as error:  # whatever the code and the data of a task do
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise FallowError(f"The task {task} cannot be run: {reason}") from error
    assert found is not None, "this is the only process"
    counts = found["n-samples"]
    return [
        TaskResult(name, int(counts[name]["effective"]), _numbers(metrics))
        for name, metrics in found["results"].items()
        if name in counts
    ]


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in metrics.items()
        if isinstance(value, int | float) and "," in name and "stderr" not in name
    }
