"""Drafts: what followed before, adapted to how often it comes true, and never a change of the output."""

from __future__ import annotations

import random
from array import array
from typing import Any

import pytest
from reference_runner import ReferenceRunner, byte_tokenizer

from fallow.engine.engine import Engine
from fallow.engine.sampling import SamplingParams
from fallow.engine.speculate import LONGEST_DRAFT, LONGEST_PAUSE, PromptLookup


def lookup(*tokens: int) -> PromptLookup:
    return PromptLookup(array("i", tokens))


def test_the_longest_suffix_that_stood_before_is_followed() -> None:
    assert lookup(1, 2, 3, 4, 5, 9, 2, 3).draft(2).tolist() == [4, 5]
    # 7 2 3 is longer than 2 3, which stood later.
    assert lookup(7, 2, 3, 4, 5, 2, 3, 6, 7, 2, 3).draft(2).tolist() == [4, 5]
    # Of two equal ones the later.
    assert lookup(2, 3, 4, 8, 2, 3, 5, 8, 8, 2, 3).draft(1).tolist() == [5]
    assert lookup(1, 2, 3).draft(5).tolist() == []
    assert lookup(1).draft(5).tolist() == []


def test_the_draft_adapts() -> None:
    drafts = lookup(*([1, 2, 3, 4] * 10))
    first = len(drafts.draft(100))
    drafts.observe(first, first)
    assert len(drafts.draft(100)) > first
    for _ in range(5):
        length = len(drafts.draft(100))
        drafts.observe(length, length)
    assert len(drafts.draft(100)) == LONGEST_DRAFT
    drafts.observe(LONGEST_DRAFT, 1)
    assert len(drafts.draft(100)) == 2
    drafts.observe(2, 0)
    assert len(drafts.draft(100)) == 0


def test_drafts_that_never_come_true_become_rare() -> None:
    random.seed(0)
    tokens = array("i", [0])
    drafts = PromptLookup(tokens)
    tried = 0
    for _ in range(4000):
        draft = drafts.draft(8)
        if draft:
            tried += 1
            drafts.observe(len(draft), 0)
        tokens.append(random.randrange(4))
        drafts.append()
    assert tried < 4000 / LONGEST_PAUSE + 10


def outputs(speculation: Any, params: list[SamplingParams], *, pages: int, chunk: int) -> tuple[list[Any], Any]:
    tokenizer = byte_tokenizer()
    prompts = [list(tokenizer.encode(f"{i % 3} a b c a b c " * (1 + i % 4))) for i in range(len(params))]
    runner = ReferenceRunner(pages, max_context=120, repeating=True)
    engine = Engine.over(runner, tokenizer, max_num_seqs=4, prefill_chunk=chunk, speculation=speculation)
    try:
        calls = [engine.generate([prompt], how)[0] for prompt, how in zip(prompts[:4], params[:4], strict=True)]
        calls += engine.generate(prompts[4:], params[4])
        engine.scheduler.check()
        stats = engine.stats()
        assert stats.pages_used == 0
        return [(o.token_ids, o.text, o.logprobs, o.finish_reason) for call in calls for o in call.outputs], stats
    finally:
        engine.close()


@pytest.mark.parametrize("temperature", [0.0, 0.01])
@pytest.mark.parametrize("pages", [16, 128])
def test_the_output_is_the_same_with_drafts_and_without(temperature: float, pages: int) -> None:
    common: dict[str, Any] = {"temperature": temperature, "seed": 5, "logprobs": 2, "max_tokens": 60, "n": 2}
    params = [
        SamplingParams(**common),
        SamplingParams(**common, ignore_eos=True, logit_bias={5: 1.5}),
        SamplingParams(**common, repetition_penalty=1.2, presence_penalty=0.3),
        SamplingParams(**common, stop=["a", "b"]),
        *[SamplingParams(**common, ignore_eos=True)] * 6,
    ]
    plain, _ = outputs(None, params, pages=pages, chunk=40)
    drafted, stats = outputs("prompt-lookup", params, pages=pages, chunk=40)
    assert drafted == plain
    assert stats.accepted_tokens > 100
    assert stats.steps < stats.generated_tokens
