"""A dense step of a program with a plan gives the bits of a program without one; a draft draws as a dense step does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lean_model import CANDIDATES

from fallow.engine.batch import SAMPLING_DTYPE, StepBatch, StepMode
from fallow.engine.program import TILE_ROWS
from fallow.engine.runner import ModelRunner
from fallow.models.checkpoint import open_checkpoint
from fallow.plan import SparsityPlan

CONTEXT = 320


@pytest.fixture(scope="module")
def runners(lean_smollm2: Path) -> Iterator[tuple[ModelRunner, ModelRunner]]:
    """Without a plan and with one."""
    checkpoint = open_checkpoint(lean_smollm2)
    made = [
        ModelRunner(checkpoint, threads=threads, num_pages=48, max_step_tokens=128, max_step_sequences=16, plan=plan)
        for plan, threads in ((None, 1), (SparsityPlan.beside(lean_smollm2), 2))
    ]
    yield made[0], made[1]
    for runner in made:
        runner.close()


class Text:
    """Three sequences that grow by the same tokens in any runner, each with pages of its own."""

    def __init__(self, vocab_size: int) -> None:
        self.tokens = np.random.default_rng(7).integers(3, vocab_size, (3, CONTEXT)).astype(np.int32)
        self.pages = np.arange(48, dtype=np.int32).reshape(3, 16)

    def step(
        self, runner: ModelRunner, parts: Sequence[tuple[int, int]], mode: StepMode, tokens: Any = None, **sampling: Any
    ) -> Any:
        """Positions ``[begin, end)`` of each sequence; the logits of each are wanted."""
        tokens = self.tokens if tokens is None else tokens
        offsets = np.cumsum([0, *(end - begin for begin, end in parts)]).astype(np.int32)
        how = np.zeros(offsets[-1], SAMPLING_DTYPE)
        how["top_p"], how["repetition_penalty"], how["logprobs"] = 1, 1, -1
        how["draw"] = np.arange(len(how))
        for name, value in sampling.items():
            how[name] = value
        return runner.step(
            StepBatch(
                np.concatenate([tokens[s, begin:end] for s, (begin, end) in enumerate(parts)]),
                offsets,
                np.array([begin for begin, _ in parts], np.int32),
                self.pages,
                np.arange(offsets[-1], dtype=np.int32),
                how,
                mode=mode,
            )
        )


def assert_same(found: Any, expected: Any) -> None:
    for name in ("tokens", "logprobs", "top_tokens", "top_logprobs"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0}, {"temperature": 0.8, "top_k": 9}], ids=str)
def test_dense_steps_among_drafts_are_those_of_no_plan(
    runners: tuple[ModelRunner, ModelRunner], sampling: dict[str, float]
) -> None:
    """Drafts write other tokens, over the end of a page too; what a dense step writes later counts."""
    dense, lean = runners
    text = Text(dense.vocab_size)
    wrong = np.random.default_rng(8).integers(3, dense.vocab_size, text.tokens.shape).astype(np.int32)
    for begin, end in [*((begin, begin + 30) for begin in range(0, 240, 30)), (240, 245), (245, 252), (252, 260)]:
        parts = [(begin, end)] * 3
        if begin >= 240:
            for at in range(begin, end):
                text.step(lean, [(at, at + 1)] * 3, "draft", wrong)
        wanted = 4 if begin % 2 else -1
        expected = text.step(dense, parts, "plan", logprobs=wanted, **sampling)
        assert_same(text.step(lean, parts, "dense", logprobs=wanted, **sampling), expected)


def test_drafts_rest_and_the_plan_is_obeyed_again_after_dense_steps(runners: tuple[ModelRunner, ModelRunner]) -> None:
    """Summaries of pages are kept by dense steps, so what the plan reads does not depend on how the text was read."""
    _, lean = runners
    text = Text(lean.vocab_size)
    last = [(299, 300)] * 3

    def read(mode: StepMode) -> Any:
        """The plan's layers over the keys of dense steps: the summaries alone could differ."""
        for begin in range(0, 299, 23):
            text.step(lean, [(begin, min(begin + 23, 299))] * 3, mode)
        return text.step(lean, last, "plan", logprobs=5)

    chosen = read("dense")
    assert_same(read("dense"), chosen)
    dense = text.step(lean, last, "dense", logprobs=5)
    assert not np.array_equal(chosen.logprobs, dense.logprobs)
    read("plan")
    again = read("dense")
    assert_same(again, chosen)
    assert_same(text.step(lean, last, "draft", logprobs=5), chosen)


@pytest.mark.parametrize(
    "sampling",
    [{"temperature": 0.7}, {"temperature": 0.9, "min_p": 0.01}, {"temperature": 0.8, "top_p": 0.9}, {}],
    ids=str,
)
def test_a_draft_draws_as_a_dense_step_does(
    runners: tuple[ModelRunner, ModelRunner], sampling: dict[str, float]
) -> None:
    """As long as all pages are read a draft has the logits of a dense step, but for what is not in the shortlist."""
    dense, lean = runners
    text = Text(dense.vocab_size)
    parts = [(0, 40), (0, 33), (0, 7)]
    expected = text.step(dense, parts, "plan", **sampling).tokens
    rows, tiles, _ = lean.head_counts
    agreed = np.mean(text.step(lean, parts, "draft", **sampling).tokens == expected)
    assert agreed > (0.4 if sampling else 0.9)
    assert lean.head_counts == (rows + 80, tiles + 80 * CANDIDATES // TILE_ROWS, lean.head_counts[2])
    screened = lean.head_counts[0]
    np.testing.assert_array_equal(text.step(lean, parts, "dense", **sampling).tokens, expected)
    assert lean.head_counts[0] == screened
    if sampling == {"temperature": 0.7}:  # noise draws others
        assert np.mean(text.step(lean, parts, "plan", **sampling).tokens == expected) < agreed


def test_an_unknown_mode_is_refused(runners: tuple[ModelRunner, ModelRunner]) -> None:
    with pytest.raises(ValueError, match="plan, draft or dense"):
        Text(320).step(runners[0], [(0, 1)] * 3, "sparse")  # type: ignore[arg-type]
