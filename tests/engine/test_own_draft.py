"""A model that drafts under its plan and verifies densely writes what the dense one writes, and drafts when it pays."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from lean_model import HEAD
from reference_runner import ReferenceRunner, byte_tokenizer
from test_same_bits import MAX_NUM_SEQS, Run, random_requests
from test_scheduler import SIZE, Bench

from fallow.engine.engine import Engine
from fallow.engine.own_draft import OwnDraft
from fallow.engine.pays import (
    FEWEST,
    FIRST_PAUSE,
    LONGEST_DRAFT,
    LONGEST_PAUSE,
    PLAIN_EVERY,
    TRIAL_DRAFT,
    Pays,
    expected_tokens,
    load_of,
)
from fallow.errors import FallowError
from fallow.plan import LayerRule, SparsityPlan

LOAD = load_of(1, 1000)


def lengths(pays: Pays, count: int, *, rates: Sequence[float], plain: float, draft: float, row: float) -> list[int]:
    """What is chosen step by step where steps take as long as is said."""
    chosen = []
    for _ in range(count):
        length = pays.length(LOAD, rates, 0, LONGEST_DRAFT)
        chosen.append(length)
        for _ in range(length):
            pays.saw_draft(LOAD, draft)
        if length:
            pays.saw_verification(LOAD, length, plain + length * row)
        else:
            pays.saw_plain(LOAD, plain)
    return chosen


def test_a_load_is_measured_before_anything_is_chosen() -> None:
    begin = FEWEST * [0] + FEWEST * [TRIAL_DRAFT]
    chosen = lengths(Pays(), len(begin) + 1, rates=[0.9], plain=1.0, draft=0.3, row=0.02)
    assert chosen[:-1] == begin
    assert chosen[-1] > TRIAL_DRAFT


@pytest.mark.parametrize("rate", [0.5, 0.8, 0.95])
@pytest.mark.parametrize("draft", [0.2, 0.5, 0.8])
def test_the_length_is_the_one_that_writes_most_in_a_second(rate: float, draft: float) -> None:
    chosen = lengths(Pays(), 10, rates=[rate], plain=1.0, draft=draft, row=0.05)[-1]
    speeds = [expected_tokens(rate, k) / (1 + k * (draft + 0.05)) for k in range(LONGEST_DRAFT + 1)]
    assert speeds[chosen] == pytest.approx(max(speeds))


def test_sequences_without_drafts_wait_for_those_with_some() -> None:
    pays = Pays()
    lengths(pays, 2 * FEWEST, rates=[0.9], plain=1.0, draft=0.3, row=0.02)
    assert pays.length(LOAD, [0.9], 0, 8) > pays.length(LOAD, [0.9], 1, 8)
    assert pays.length(LOAD, [0.9], 40, 8) == 0
    assert pays.length(LOAD, [0.9], 0, 2) == 2
    assert pays.length(LOAD, [0.9], 0, 0) == 0


def test_rounds_that_ended_otherwise_than_they_began_do_not_count() -> None:
    pays = Pays()
    for _ in range(FEWEST):
        pays.saw_plain(LOAD, 1.0)
        pays.saw_verification(LOAD, 3, 1.1)  # its drafts were of another load: a sequence ended in between
    assert pays.length(LOAD, [0.9], 0, 8) == TRIAL_DRAFT


def test_what_does_not_pay_is_tried_more_and_more_rarely() -> None:
    chosen = lengths(Pays(), 4000, rates=[0.3], plain=1.0, draft=0.9, row=0.1)
    trials = [step for step, length in enumerate(chosen) if length]
    pauses = [later - earlier for earlier, later in itertools.pairwise(trials)]
    assert pauses[FEWEST - 1] == FIRST_PAUSE
    assert pauses[-1] == LONGEST_PAUSE
    assert pauses == sorted(pauses)


def test_what_pays_is_held_against_plain_steps_again() -> None:
    chosen = lengths(Pays(), 4 * PLAIN_EVERY, rates=[0.9], plain=1.0, draft=0.2, row=0.02)
    assert 3 <= chosen[2 * FEWEST :].count(0) <= 4


def test_a_load_that_turns_out_otherwise_is_chosen_for_otherwise() -> None:
    pays = Pays()
    assert lengths(pays, 20, rates=[0.9], plain=1.0, draft=0.2, row=0.02)[-1] > 0
    assert lengths(pays, 300, rates=[0.9], plain=0.1, draft=0.2, row=0.02)[-1] == 0
    assert lengths(pays, 1000, rates=[0.9], plain=1.0, draft=0.2, row=0.02)[-1] > 0
    assert pays.length(load_of(8, 1000), [0.9], 0, 8) == 0  # nothing is known of it


def test_a_rate_is_of_the_tokens_of_which_something_is_known() -> None:
    draft = OwnDraft()
    for _ in range(100):
        draft.observe(8, 1)
    assert draft.rate == pytest.approx(0.5, abs=1e-3)
    for _ in range(100):
        draft.observe(3, 3)
    assert draft.rate == pytest.approx(1, abs=1e-3)


def always(length: int) -> Callable[..., int]:
    return lambda self, load, rates, others, most: min(length, most)


def modes(bench: Bench, steps: int) -> list[tuple[str, list[int]]]:
    found = []
    for _ in range(steps):
        bench.step()
        found.append((bench.batch.mode, (bench.batch.row_offsets[1:] - bench.batch.row_offsets[:-1]).tolist()))
    return found


def test_a_round_is_some_drafts_and_one_dense_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pays, "length", always(3))
    bench = Bench(speculation="self")
    bench.runner.harsh = 0
    bench.add([5] * 10, max_tokens=20)
    bench.add([6] * 10, max_tokens=20, presence_penalty=0.5)  # the rows of its drafts would need penalties of their own
    assert modes(bench, 5) == [("dense", [10, 10]), *[("draft", [1])] * 3, ("dense", [4, 1])]
    assert len(bench.tokens(0)) == 5
    bench.run()
    assert bench.scheduler.drafted_tokens == bench.scheduler.accepted_tokens > 10


def test_a_prompt_that_comes_ends_the_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pays, "length", always(8))
    bench = Bench(speculation="self")
    bench.runner.harsh = 0
    bench.add([5] * 10, max_tokens=40)
    assert modes(bench, 3) == [("dense", [10]), *[("draft", [1])] * 2]
    bench.add([6] * 10)
    assert modes(bench, 3) == [("dense", [3, 10]), *[("draft", [1, 1])] * 2]
    bench.tell(bench.scheduler.stop(bench.requests[1], "cancelled"))
    assert modes(bench, 7) == [*[("draft", [1])] * 6, ("dense", [9])]
    bench.run()
    alone = Bench()
    alone.add([5] * 10, max_tokens=40)
    alone.run()
    assert bench.tokens(0) == alone.tokens(0)


def test_a_draft_goes_over_the_end_of_a_page_where_there_are_some_to_spare(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pays, "length", always(4))
    for pages, rows in ((64, 5), (3, 2)):
        bench = Bench(pages=pages, speculation="self")
        bench.add([5] * (2 * SIZE - 2), max_tokens=9)
        drafts = modes(bench, rows + 1)[1:]
        assert drafts == [*[("draft", [1])] * (rows - 1), ("dense", [rows])]
        bench.run()


def test_a_draft_ends_with_what_ends_the_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pays, "length", always(8))
    alone = Bench()
    alone.add([5] * 10, max_tokens=4)
    alone.run()
    bench = Bench(speculation="self")
    bench.runner.harsh = 0
    bench.add([5] * 10, max_tokens=20, stop_token_ids=[alone.tokens(0)[2]])
    assert modes(bench, 4) == [("dense", [10]), *[("draft", [1])] * 2, ("dense", [3])]
    assert not bench.scheduler.has_work
    bench = Bench(speculation="self")
    bench.add([5] * 10, max_tokens=4)
    assert modes(bench, 4) == [("dense", [10]), *[("draft", [1])] * 2, ("dense", [3])]


@pytest.fixture(params=["reference", "smollm2"])
def start(request: pytest.FixtureRequest) -> Iterator[Callable[..., Engine]]:
    """``start(pages=..., harsh=..., **options)``: engines of one model, with a plan where they draft for themselves."""
    engines: list[Engine] = []
    folder: Path | None = request.getfixturevalue("lean_smollm2") if request.param == "smollm2" else None

    def begin(*, pages: int, speculation: Any = None, harsh: bool = True, **options: Any) -> Engine:
        options |= {"max_num_seqs": MAX_NUM_SEQS, "speculation": speculation}
        if folder is None:
            runner = ReferenceRunner(4 * pages, harsh=0.3 if harsh else 0)
            engine = Engine.over(runner, byte_tokenizer(), **options)
        else:
            if speculation is None:
                plan = SparsityPlan.dense()
            elif harsh:
                plan = SparsityPlan.beside(folder)
            else:  # a page more than any of these sequences has
                plan = SparsityPlan(attention=(LayerRule("top_pages", None, None, EVERY_PAGE),))
            page_bytes = 30 * 3 * 64 * 2 * 2 * (32 if speculation is None else 33)
            engine = Engine(folder, plan=plan, kv_cache_bytes=pages * page_bytes, threads=1, **options)
            assert engine.stats().pages_total == pages
        engines.append(engine)
        return engine

    yield begin
    for engine in engines:
        assert engine.drain(60)
        assert engine.stats().pages_used == 0
        engine.scheduler.check()
        engine.close()


EVERY_PAGE = {"sink_pages": 1, "recent_pages": 1, "top_pages": 9}


def test_the_bits_of_the_dense_model_in_any_batch(
    start: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start(pages=64, prefix_caching=False)
    requests = [
        (prompt, replace(params, stop=("e", "a b")) if number % 5 == 0 else params)
        for number, (prompt, params) in enumerate(random_requests(engine.tokenizer.vocab_size)[:24])
    ]
    order = list(range(len(requests)))
    dense = Run(engine, requests, None)
    for number in order:
        dense.submit(number)
    for number in order:
        dense.wait(number)
    assert engine.stats().drafted_tokens == 0
    engine.close()

    draw = random.Random(1)
    monkeypatch.setattr(Pays, "length", lambda self, load, rates, others, most: draw.randrange(min(most, 8) + 1))
    for harsh in (True, False):
        # Few enough pages that sequences are set back; the second round finds prefixes of the first.
        engine = start(pages=7, prefill_chunk=100, speculation="self", harsh=harsh)
        for seed in range(2 if harsh else 1):
            lossless = Run(engine, requests, seed)
            random.Random(seed).shuffle(order)
            for number in order:
                lossless.submit(number)
            for number in order:
                lossless.wait(number)
            assert lossless.written.keys() == dense.written.keys()
            for key, record in dense.written.items():
                assert lossless.written[key] == record, (key, requests[key[0]])
        stats = engine.stats()
        assert stats.preemptions > 0 or not harsh
        assert stats.prefix_hits > 0
        assert stats.drafted_tokens > 50
        assert 0 < stats.accepted_tokens <= stats.drafted_tokens
        assert harsh == (stats.accepted_tokens < 0.9 * stats.drafted_tokens)
        engine.close()


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (None, "axis attention or head, which smollm2-135m does not have"),
        (SparsityPlan(ffn=(LayerRule("zeros"),)), "axis attention or head"),
        (
            SparsityPlan(
                ffn=(LayerRule("threshold", parameters={"threshold": 0.1}),),
                attention=(LayerRule("top_pages", None, None, EVERY_PAGE),),
            ),
            "below a threshold",
        ),
        (SparsityPlan(structure=(LayerRule("removed", 4, "attention"),), head=HEAD), "takes parts out"),
    ],
)
def test_a_model_that_has_nothing_to_draft_with_is_refused(plan: SparsityPlan | None, message: str) -> None:
    with pytest.raises(FallowError, match=message):
        Engine("smollm2-135m", plan=plan, speculation="self")
