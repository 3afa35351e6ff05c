"""A request's tokens and log-probabilities are the same bits alone and in any company, cut and cached in any way, and
whichever threads compute them."""

from __future__ import annotations

import random
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fallow.engine.constraint import Constraint
from fallow.engine.engine import Engine, RequestDelta
from fallow.engine.runner import ModelRunner
from fallow.engine.sampling import SamplingParams
from fallow.models.checkpoint import open_checkpoint
from fallow.plan import LayerRule, SparsityPlan

REQUESTS = 40
MAX_NUM_SEQS = 12
Written = dict[int, list[tuple[Any, ...]]]


def random_requests(vocab_size: int) -> list[tuple[list[int], SamplingParams]]:
    draw = random.Random(20260)
    stems = [[draw.randrange(3, vocab_size) for _ in range(120)] for _ in range(4)]
    requests = []
    for i in range(REQUESTS):
        stem = draw.choice(stems)[: draw.choice([0, 0, 1, 33, 64, 100])]
        prompt = stem + [draw.randrange(3, vocab_size) for _ in range(draw.choice([1, 2, 7, 31, 32, 33, 60]))]
        params = SamplingParams(
            n=draw.choice([1, 1, 1, 2, 3]),
            seed=draw.randrange(2**64),
            max_tokens=draw.choice([1, 3, 8, 40]),
            temperature=draw.choice([0, 0, 0.02, 0.7, 1.0, 1.5]),
            top_p=draw.choice([1.0, 1.0, 0.9, 0.3]),
            top_k=draw.choice([0, 0, 1, 40]),
            min_p=draw.choice([0, 0, 0.05]),
            repetition_penalty=draw.choice([1.0, 1.0, 1.0, 1.3]),
            presence_penalty=draw.choice([0.0, 0.0, 0.0, 0.7, -0.5]),
            frequency_penalty=draw.choice([0.0, 0.0, 0.0, 0.4]),
            logit_bias=draw.choice([{}, {}, {5: 4.0, 9: -100.0}]),
            ignore_eos=draw.random() < 0.7,
            logprobs=draw.choice([None, 0, 1, 5]),
            constraint=Constraint.regex("[a-f]{4,9}") if i % 16 == 5 else None,
        )
        requests.append((prompt, params))
    return requests


class Run:
    """Some requests at once; between the steps the size of the chunks changes at random."""

    def __init__(self, engine: Engine, requests: list[tuple[list[int], SamplingParams]], seed: int | None) -> None:
        self._engine = engine
        self._draw = None if seed is None else random.Random(seed)
        self._requests = requests
        self._left = threading.Semaphore(0)
        self.written: dict[tuple[int, int], list[Any]] = {}

    def submit(self, number: int) -> None:
        prompt, params = self._requests[number]

        def receive(delta: RequestDelta) -> None:
            record = self.written.setdefault((number, delta.index), [[], [], "", None])
            record[0] += delta.token_ids
            record[1] += [(e.logprob, [(i, p) for i, _, _, p in e.top]) for e in delta.logprobs or []]
            record[2] += delta.text
            record[3] = delta.finish_reason
            if self._draw is not None:  # on the engine's thread, between two steps
                self._engine.scheduler.max_step_tokens = self._draw.randrange(MAX_NUM_SEQS, 100)
            if delta.finish_reason is not None:
                self._left.release()

        self._engine.submit(prompt, params, receive)

    def wait(self, number: int) -> None:
        for _ in range(self._requests[number][1].n):
            assert self._left.acquire(timeout=60)


PAGE_NUMBERS = {"sink_pages": 1, "recent_pages": 1, "context_pages": 3}
PAGES = SparsityPlan(
    attention=tuple(
        LayerRule("top_pages", None, f"kv_head.{head}", PAGE_NUMBERS | {"top_pages": top})
        for head, top in enumerate((1, 0, 2))
    )
)
NEURONS = SparsityPlan(
    ffn=(LayerRule("threshold", parameters={"threshold": 0.1}),),
    input=tuple(LayerRule("threshold", None, target, {"threshold": 0.1}) for target in ("o_proj", "down_proj")),
    attention=PAGES.attention,
    structure=tuple(
        LayerRule("removed", layer, target)
        for layer, target in ((5, "kv_head.1"), (5, "neurons.3"), (7, "attention"), (9, "ffn"), (29, "kv_head.0"))
    ),
)


@pytest.mark.parametrize("plan", [None, NEURONS], ids=["dense", "every axis"])
def test_the_same_bits_alone_and_in_shuffled_batches(start_engine: Any, plan: SparsityPlan | None) -> None:
    engine = start_engine(pages=64, max_num_seqs=MAX_NUM_SEQS, prefix_caching=False, plan=plan)
    requests = random_requests(engine.tokenizer.vocab_size)
    alone = Run(engine, requests, None)
    for number in range(REQUESTS):
        alone.submit(number)
        alone.wait(number)
    assert engine.stats().prefix_hits == 0
    assert engine.stats().preemptions == 0
    engine.close()

    # Few enough pages that sequences are set back, and the second round finds prefixes of the first.
    engine = start_engine(
        pages=10, max_num_seqs=MAX_NUM_SEQS, prefill_chunk=100, speculation="prompt-lookup", plan=plan
    )
    for seed in range(2):
        together = Run(engine, requests, seed)
        order = list(range(REQUESTS))
        random.Random(seed).shuffle(order)
        for number in order:
            together.submit(number)
        for number in order:
            together.wait(number)
        assert together.written.keys() == alone.written.keys()
        for key, record in alone.written.items():
            assert together.written[key] == record, (key, requests[key[0]])
    stats = engine.stats()
    assert stats.prefix_hits > 0
    assert stats.preemptions > 0


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("top_pages", [None, 0, 1])
def test_the_same_bits_with_any_number_of_threads_and_rows(
    tiny_checkpoints: dict[str, Path], family: str, top_pages: int | None
) -> None:
    checkpoint = open_checkpoint(tiny_checkpoints[family])
    plan = SparsityPlan.dense()
    if top_pages is not None:
        numbers = {"sink_pages": 1, "recent_pages": 1, "top_pages": top_pages}
        plan = SparsityPlan(attention=(LayerRule("top_pages", parameters=numbers),))
    tokens = np.random.default_rng(3).integers(3, checkpoint.config.vocab_size, 150).tolist()

    def logits(threads: int, rows: int) -> Any:
        runner = ModelRunner(checkpoint, precision="q8", threads=threads, num_pages=8, max_step_tokens=rows, plan=plan)
        try:
            return runner.logits(tokens, chunk=rows)
        finally:
            runner.close()

    alone = logits(1, 150)
    for threads, rows in [(1, 5), (2, 7), (2, 13), (2, 130), (3, 17), (3, 20), (5, 64)]:
        np.testing.assert_array_equal(logits(threads, rows), alone, err_msg=f"{threads} threads, {rows} rows a step")
