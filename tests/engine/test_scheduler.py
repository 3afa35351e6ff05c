"""What is in a step and in which order, and that no page is ever lost."""

from __future__ import annotations

import random
from array import array
from typing import Any

import pytest
from reference_runner import VOCAB_SIZE, ReferenceRunner, byte_tokenizer

from fallow.engine.detokenize import Detokenizer
from fallow.engine.outputs import RequestDelta
from fallow.engine.pages import PageManager
from fallow.engine.pays import Pays
from fallow.engine.sampling import SamplingParams
from fallow.engine.scheduler import Scheduler
from fallow.engine.sequence import Request, Sequence
from fallow.engine.speculate import Speculation

TOKENIZER = byte_tokenizer()
SIZE = ReferenceRunner.page_size


class Bench:
    """A scheduler and a runner, stepped by hand. A draft takes a fifth of the ``now`` of another step."""

    def __init__(
        self, pages: int = 64, *, sequences: int = 8, tokens: int = 64, speculation: Speculation | None = None
    ) -> None:
        self.runner = ReferenceRunner(pages, repeating=speculation == "prompt-lookup", harsh=0.2)
        self.speculation = speculation
        self.now = 0.0
        self.context = min(512, pages * SIZE)
        self.scheduler = Scheduler(
            PageManager(pages, SIZE),
            max_sequences=sequences,
            max_step_tokens=tokens,
            max_context=self.context,
            vocab_size=VOCAB_SIZE,
            describe=lambda token: (str(token), b""),
            pays=Pays() if speculation == "self" else None,
            clock=lambda: self.now,
        )
        self.requests: list[Request] = []
        self.told: dict[tuple[int, int], list[RequestDelta]] = {}
        self.batch: Any = None

    def add(self, prompt: list[int], **params: Any) -> Request:
        how = SamplingParams(**({"seed": 1, "max_tokens": 4, "ignore_eos": True} | params))
        number = len(self.requests)
        request = Request(str(number), number, how, array("i", prompt), lambda delta: None)
        for index in range(how.n):
            request.sequences.append(
                Sequence(
                    request,
                    index,
                    max_length=min(len(prompt) + (how.max_tokens or 512), self.context),
                    stop_ids=frozenset(how.stop_token_ids),
                    detokenizer=Detokenizer(TOKENIZER.token_bytes, tuple(how.stop)),
                    constraint=None,
                    speculation=self.speculation,
                )
            )
        self.requests.append(request)
        self.scheduler.add(request)
        return request

    def tell(self, events: list[tuple[Request, RequestDelta]]) -> None:
        for request, delta in events:
            self.told.setdefault((request.number, delta.index), []).append(delta)

    def step(self) -> bool:
        self.batch = self.scheduler.schedule()
        if self.batch is not None:
            self.now += 0.2 if self.batch.mode == "draft" else 1.0
            self.tell(self.scheduler.commit(self.runner.step(self.batch)))
        self.scheduler.check()
        return self.batch is not None

    def run(self) -> None:
        while self.scheduler.has_work:
            assert self.step()

    def tokens(self, number: int, index: int = 0) -> list[int]:
        return [token for delta in self.told[number, index] for token in delta.token_ids]


def test_decoding_rows_come_before_prefill_and_the_budget_holds() -> None:
    bench = Bench(tokens=32)
    bench.add([5] * 10, max_tokens=20)
    bench.step()
    bench.add([6] * 50)
    bench.add([7] * 9)
    lengths = []
    for _ in range(3):
        bench.step()
        lengths.append((bench.batch.row_offsets[1:] - bench.batch.row_offsets[:-1]).tolist())
    assert lengths == [[1, 31], [1, 19, 9], [1, 1, 1]]


def test_first_come_first_served() -> None:
    bench = Bench(sequences=2)
    for _ in range(6):
        bench.add([9] * 20)
    begun = []
    while bench.scheduler.has_work:
        bench.step()
        begun += [request.number for request in bench.scheduler.begun]
        bench.scheduler.begun.clear()
        assert bench.scheduler.num_running <= 2
    assert begun == list(range(6))


def test_a_prompt_that_waits_for_pages_is_not_overtaken() -> None:
    bench = Bench(pages=16)
    bench.add([1] * 80, max_tokens=8)
    bench.step()
    bench.add([2] * 60)
    bench.add([3] * 2)
    bench.step()
    assert [sequence.request.number for sequence in bench.scheduler.waiting] == [1, 2]
    bench.run()
    assert all(len(bench.tokens(number)) == count for number, count in ((0, 8), (1, 4), (2, 4)))


def test_the_choices_of_a_request_share_the_pages_of_its_prompt() -> None:
    bench = Bench()
    bench.add(list(range(30)), n=4, max_tokens=3)
    bench.step()
    assert bench.scheduler.num_running == 1
    bench.step()
    assert bench.scheduler.num_running == 4
    assert bench.scheduler.pages.used_pages == 3 + 4  # three full pages together, and the tail of each
    assert (bench.batch.row_offsets[1:] - bench.batch.row_offsets[:-1]).tolist() == [1, 6, 6, 6]
    bench.run()
    assert len({tuple(bench.tokens(0, index)) for index in range(4)}) == 4


def test_equal_prompts_are_computed_once() -> None:
    bench = Bench()
    for _ in range(3):
        bench.add(list(range(33)), max_tokens=2)
    computed = 0
    while bench.scheduler.has_work:
        bench.step()
        computed += len(bench.batch.tokens)
    assert computed == 33 + 1 + 2 * (1 + 1)
    assert bench.told[2, 0][0].cached_tokens == 32


def test_at_least_the_last_token_of_a_cached_prompt_is_computed() -> None:
    bench = Bench()
    bench.add(list(range(32)), max_tokens=1)
    bench.run()
    bench.add(list(range(32)), max_tokens=1)
    bench.run()
    assert bench.told[1, 0][0].cached_tokens == 24
    assert bench.tokens(1) == bench.tokens(0)


def test_the_answer_is_a_prefix_of_the_next_turn() -> None:
    bench = Bench()
    bench.add(list(range(20)), max_tokens=30)
    bench.run()
    bench.add([*range(20), *bench.tokens(0), 7, 7], max_tokens=1)
    bench.run()
    assert bench.told[1, 0][0].cached_tokens == 48


def test_the_last_token_of_an_answer_was_not_computed() -> None:
    bench = Bench()
    bench.add(list(range(20)), max_tokens=28)
    bench.run()
    prompt = [*range(20), *bench.tokens(0), 7, 7]
    bench.add(prompt)
    bench.run()
    assert bench.told[1, 0][0].cached_tokens == 40
    alone = Bench()
    alone.add(prompt)
    alone.run()
    assert alone.tokens(0) == bench.tokens(1)


def test_requests_with_different_salts_share_nothing() -> None:
    bench = Bench()
    for _ in range(2):
        bench.add(list(range(40)))
        bench.requests[-1].salt = bytes([len(bench.requests)]) * 16
    bench.run()
    assert bench.scheduler.prefix_hits == 0


def test_the_latest_is_set_back_and_goes_on_to_the_same_tokens() -> None:
    alone = []
    for first in range(3):
        bench = Bench(pages=64)
        bench.add([first] * 20, max_tokens=60, seed=first)
        bench.run()
        alone.append(bench.tokens(0))
    bench = Bench(pages=16)
    for first in range(3):
        bench.add([first] * 20, max_tokens=60, seed=first)
    bench.run()
    assert bench.scheduler.preemptions > 0
    assert [bench.tokens(number) for number in range(3)] == alone
    # The first comer was never set back: one token a step from its first to its last.
    assert len(bench.told[0, 0]) == 60


def test_a_sequence_that_ended_in_a_failed_step_is_told_of_it() -> None:
    bench = Bench()
    first, second = bench.add([1] * 9, max_tokens=2), bench.add([2] * 9)
    bench.step()

    def broken(token: int) -> str:
        raise RuntimeError

    class Broken:
        feed = broken
        finish = staticmethod(lambda: "")

    second.sequences[0].detokenizer = Broken  # type: ignore[assignment]
    with pytest.raises(RuntimeError):
        bench.step()
    assert first.sequences[0].finish_reason == "length"
    assert bench.scheduler.running_requests() == [first, second]
    for request in (first, second):
        bench.tell(bench.scheduler.stop(request, "error", "because"))
    bench.scheduler.check()
    assert bench.scheduler.pages.used_pages == 0
    assert [bench.told[number, 0][-1].finish_reason for number in (0, 1)] == ["error", "error"]


@pytest.mark.parametrize("speculation", [None, "prompt-lookup", "self"])
@pytest.mark.parametrize("seed", range(12))
def test_no_page_is_lost_on_any_path(seed: int, speculation: Speculation | None) -> None:
    """Random arrivals, cancels and failing steps on a pool that is too small, against every request alone."""
    draw = random.Random(seed)
    sequences = draw.choice([1, 3, 6])
    bench = Bench(pages=draw.choice([12, 20, 40]), sequences=sequences, tokens=32, speculation=speculation)
    bench.runner.fail_at = {draw.randrange(5, 80) for _ in range(2)}
    cancelled: set[int] = set()
    todo = 14
    while todo or bench.scheduler.has_work:
        if todo and draw.random() < 0.4:
            todo -= 1
            family = draw.randrange(3)
            bench.add(
                [family] * draw.randrange(1, 60),
                n=draw.choice([1, 1, 1, 3]),
                seed=todo,
                max_tokens=draw.choice([1, 5, 40]),
                temperature=draw.choice([0, 0.02, 0.3]),
                presence_penalty=draw.choice([0, 0, 0.5]),
                repetition_penalty=draw.choice([1, 1, 1.3]),
                logit_bias=draw.choice([{}, {}, {9: 3.0}]),
                stop_token_ids=draw.choice([[], range(40)]),
                stop=draw.choice([[], ["a", "xyz"]]),
            )
        if draw.random() < 0.08 and bench.requests:
            request = draw.choice(bench.requests)
            bench.tell(bench.scheduler.stop(request, "cancelled"))
            cancelled.add(request.number)
        try:
            bench.step()
        except RuntimeError:
            for request in bench.scheduler.running_requests():
                bench.tell(bench.scheduler.stop(request, "error", "because"))
                cancelled.add(request.number)
        bench.scheduler.check()
    assert bench.scheduler.pages.used_pages == 0
    for request in bench.requests:
        for index in range(request.params.n):
            reasons = [delta.finish_reason for delta in bench.told[request.number, index]]
            assert reasons[-1] is not None
            assert reasons[:-1] == [None] * (len(reasons) - 1)
            assert sum(len(delta.token_ids) for delta in bench.told[request.number, index]) == (
                bench.told[request.number, index][-1].completion_tokens
            )
            if request.number in cancelled:
                continue
            alone = Bench(pages=64, tokens=512)
            alone.runner = ReferenceRunner(64, repeating=bench.runner.repeating)
            alone.context = bench.context
            how = {name: getattr(request.params, name) for name in request.params.__dataclass_fields__}
            how |= {"n": 1, "seed": request.params.seed + index}
            alone.add(request.prompt.tolist(), **how)
            alone.run()
            assert alone.tokens(0) == bench.tokens(request.number, index)
            assert alone.told[0, 0][-1].finish_reason == reasons[-1]
