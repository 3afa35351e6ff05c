"""The engine as its users see it: text, deltas, limits, cancels, failures, the end."""

from __future__ import annotations

import gc
import json
import shutil
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from reference_runner import VOCAB_SIZE, ReferenceRunner, byte_tokenizer

import fallow
from fallow.engine.constraint import Constraint
from fallow.engine.engine import Engine, RequestDelta
from fallow.engine.sampling import SamplingParams
from fallow.errors import FallowError, OverloadedError, RequestError
from fallow.models.chat_template import ChatTemplate
from fallow.models.tokenizer import Tokenizer

TOKENIZER = byte_tokenizer()
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


@pytest.fixture
def start() -> Iterator[Callable[..., Engine]]:
    engines: list[Engine] = []

    def start(pages: int = 64, runner: ReferenceRunner | None = None, **options: Any) -> Engine:
        options = {"max_num_seqs": 8, "prefill_chunk": 64} | options
        engines.append(Engine.over(runner or ReferenceRunner(pages), TOKENIZER, **options))
        return engines[-1]

    yield start
    for engine in engines:
        assert engine.drain(30)
        engine.scheduler.check()
        assert engine.stats().pages_used == 0
        assert engine.stats().running == engine.stats().waiting == 0
        engine.close()


class Held(ReferenceRunner):
    """A runner whose steps wait until they are let go."""

    def __init__(self, pages: int = 64) -> None:
        super().__init__(pages)
        self.go = threading.Event()

    def step(self, batch: Any) -> Any:
        assert self.go.wait(30)
        return super().step(batch)


class Collector:
    """Takes the deltas of one request; ``ended`` is set with the last choice's."""

    def __init__(self, n: int = 1) -> None:
        self.deltas: list[RequestDelta] = []
        self.ended = threading.Event()
        self._left = n

    def __call__(self, delta: RequestDelta) -> None:
        self.deltas.append(delta)
        self._left -= delta.finish_reason is not None
        if not self._left:
            self.ended.set()

    @property
    def reason(self) -> str | None:
        assert self.ended.wait(30)
        return self.deltas[-1].finish_reason


def test_text_tokens_and_counts_agree(start: Callable[..., Engine]) -> None:
    engine = start()
    (output,) = engine.generate("hello", SamplingParams(max_tokens=30, n=3, seed=4, logprobs=2, ignore_eos=True))
    assert output.prompt_tokens == 5
    assert 0 < output.time_to_first_token <= output.seconds
    for index, choice in enumerate(output.outputs):
        assert choice.index == index
        assert choice.finish_reason == "length"
        assert len(choice.token_ids) == 30
        assert choice.text == TOKENIZER.decode(choice.token_ids)
        assert choice.logprobs is not None
        assert [entry.token_id for entry in choice.logprobs] == choice.token_ids
        for entry in choice.logprobs:
            assert len(entry.top) == 2
            assert entry.top[0][3] >= entry.top[1][3]
            assert entry.logprob <= entry.top[0][3] <= 0
    stats = engine.stats()
    assert (stats.prompt_tokens, stats.generated_tokens) == (5, 90)


@pytest.mark.parametrize(("wanted", "asked"), [(None, -1), (0, 0), (3, 3)])
def test_log_probabilities_are_computed_only_where_they_are_wanted(
    start: Callable[..., Engine], wanted: int | None, asked: int
) -> None:
    rows: list[int] = []

    class Noting(ReferenceRunner):
        def step(self, batch: Any) -> Any:
            rows.extend(batch.sampling["logprobs"].tolist())
            return super().step(batch)

    params = SamplingParams(max_tokens=4, ignore_eos=True, logprobs=wanted)
    (output,) = start(runner=Noting(64)).generate("x", params)[0].outputs
    assert set(rows) == {asked}
    assert (output.logprobs is None) == (wanted is None)


def test_choice_i_is_drawn_with_seed_plus_i(start: Callable[..., Engine]) -> None:
    engine = start()
    (together,) = engine.generate("hello", SamplingParams(max_tokens=8, n=3, seed=2**64 - 2))
    for i, seed in enumerate((2**64 - 2, 2**64 - 1, 0)):
        (alone,) = engine.generate("hello", SamplingParams(max_tokens=8, seed=seed))
        assert alone.outputs[0].token_ids == together.outputs[i].token_ids


def test_without_a_seed_every_request_is_another(start: Callable[..., Engine]) -> None:
    first, second = start().generate(["hello"] * 2, SamplingParams(max_tokens=20))
    assert first.outputs[0].token_ids != second.outputs[0].token_ids


def test_the_stream_is_the_whole_in_pieces(start: Callable[..., Engine]) -> None:
    engine = start()
    deltas = list(engine.stream("hello", GREEDY))
    (output,) = engine.generate("hello", GREEDY)
    assert "".join(delta.text for delta in deltas) == output.outputs[0].text
    assert [delta.completion_tokens for delta in deltas] == list(range(1, 13))
    assert [delta.finish_reason for delta in deltas] == [None] * 11 + ["length"]


def test_a_stop_string_ends_the_text_before_it(start: Callable[..., Engine]) -> None:
    engine = start()
    letters = dict.fromkeys(TOKENIZER.encode("abcd"), 100.0)
    free = SamplingParams(max_tokens=40, seed=1, logit_bias=letters)
    text = engine.generate("x", free)[0].outputs[0].text
    stop = text[9:12]
    (output,) = engine.generate("x", SamplingParams(max_tokens=40, seed=1, logit_bias=letters, stop=["zz", stop]))
    assert output.outputs[0].text == text[: text.index(stop)]
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", stop)
    shown = SamplingParams(max_tokens=40, seed=1, logit_bias=letters, stop=stop, include_stop_str_in_output=True)
    assert engine.generate("x", shown)[0].outputs[0].text == text[: text.index(stop)] + stop


def test_stop_tokens_and_the_end_of_sequence(start: Callable[..., Engine]) -> None:
    engine = start()
    (letter,) = TOKENIZER.encode("a")
    always = {"temperature": 0.0, "max_tokens": 5}
    (output,) = engine.generate("x", SamplingParams(**always, logit_bias={letter: 100}, stop_token_ids=[letter]))
    choice = output.outputs[0]
    assert (choice.text, choice.token_ids, choice.finish_reason, choice.stop_reason) == ("", [letter], "stop", letter)
    (output,) = engine.generate("x", SamplingParams(**always, logit_bias={2: 100}))
    choice = output.outputs[0]
    assert (choice.text, choice.token_ids, choice.finish_reason, choice.stop_reason) == ("", [2], "stop", None)
    (output,) = engine.generate("x", SamplingParams(**always, logit_bias={2: 100}, ignore_eos=True))
    assert output.outputs[0].token_ids == [2] * 5


def test_penalties_look_at_the_output_and_repetition_at_the_prompt_too(start: Callable[..., Engine]) -> None:
    engine = start()
    a, b = TOKENIZER.encode("ab")
    common: dict[str, Any] = {"temperature": 0, "max_tokens": 4}
    plain = engine.generate([[a, b]], SamplingParams(**common, logit_bias={a: 50}))[0].outputs[0]
    assert plain.token_ids == [a] * 4
    presence = SamplingParams(**common, logit_bias={a: 21.0, b: 20.0}, presence_penalty=2)
    assert set(engine.generate([[a, a]], presence)[0].outputs[0].token_ids) >= {a, b}
    counts = SamplingParams(temperature=0, max_tokens=60, frequency_penalty=2, logit_bias={a: 30, b: 30})
    tokens = engine.generate([[a, b]], counts)[0].outputs[0].token_ids
    assert abs(tokens.count(a) - tokens.count(b)) <= 5
    # One of the tokens of the prompt would be the answer, so the strongest repetition penalty changes it.
    first = engine.generate("hello", SamplingParams(temperature=0, max_tokens=1))[0].outputs[0].token_ids
    prompt = [*first, *TOKENIZER.encode("hello")]
    likely = engine.generate([prompt], SamplingParams(temperature=0, max_tokens=1))[0].outputs[0].token_ids
    every = [*likely, *prompt]
    again = engine.generate([every], SamplingParams(temperature=0, max_tokens=8, repetition_penalty=100))[0]
    assert not set(again.outputs[0].token_ids) & set(every)
    assert len(set(again.outputs[0].token_ids)) == 8


def test_an_answer_follows_its_grammar(start: Callable[..., Engine]) -> None:
    engine = start(pages=256)
    pattern = SamplingParams(n=3, seed=1, max_tokens=200, constraint=Constraint.regex("(ab|cd){2,4}!"))
    free = SamplingParams(seed=1, max_tokens=50, ignore_eos=True)
    calls = [Collector(3), Collector()]
    for call, params in zip(calls, (pattern, free), strict=True):
        engine.submit("x", params, call)
    assert calls[0].reason == "stop"
    for index in range(3):
        text = "".join(delta.text for delta in calls[0].deltas if delta.index == index)
        assert text.rstrip("!").replace("ab", "").replace("cd", "") == ""
        assert text.endswith("!")
    assert calls[1].reason == "length"


def test_max_tokens_ends_at_the_context(start: Callable[..., Engine]) -> None:
    engine = start(pages=10)
    assert engine.max_context == 80
    for max_tokens in (None, 10**6):
        (output,) = engine.generate([[5] * 70], SamplingParams(max_tokens=max_tokens, ignore_eos=True))
        assert len(output.outputs[0].token_ids) == 10
        assert output.outputs[0].finish_reason == "length"
    (output,) = engine.generate([[5] * 79], SamplingParams(max_tokens=5))
    assert len(output.outputs[0].token_ids) == 1


def test_what_cannot_be_served_is_refused_at_once(start: Callable[..., Engine]) -> None:
    engine = start(pages=10, max_context=50)
    with pytest.raises(RequestError, match=r"50 tokens, but this engine's context is 50") as caught:
        engine.generate([[5] * 50])
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "prompt")
    for prompt, message in (([], "empty"), ("", "empty"), ([VOCAB_SIZE], "0 to"), ([-1], "0 to"), ([True], "0 to")):
        with pytest.raises(RequestError, match=message):
            engine.generate([prompt])
    with pytest.raises(RequestError, match="logit_bias"):
        engine.generate("x", SamplingParams(logit_bias={VOCAB_SIZE: 1}))
    assert engine.stats().waiting == 0


@pytest.mark.parametrize(
    "options",
    [{"max_num_seqs": 0}, {"prefill_chunk": 1.5}, {"max_queue": -1}, {"max_context": 1}, {"speculation": "magic"}],
)
def test_wrong_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(FallowError, match=next(iter(options))):
        Engine.over(ReferenceRunner(8), TOKENIZER, **options)


class Fewer(ReferenceRunner):
    """A runner whose model has so few tokens that the tokenizer must be another model's."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__(8)
        self.vocab_size = vocab_size


def test_a_tokenizer_of_another_model_is_refused(tiny_checkpoints: dict[str, Path], tmp_path: Path) -> None:
    last = TOKENIZER.vocab_size - 1
    Engine.over(Fewer(last + 1), TOKENIZER).close()
    with pytest.raises(ValueError, match=rf"^The tokenizer of model can give the token {last} \(.*\.$"):
        Engine.over(Fewer(last), TOKENIZER)
    model = shutil.copytree(tiny_checkpoints["llama"], tmp_path / "mixed")
    backend = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json"))
    backend.add_tokens(["another"])
    backend.save(str(model / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"^The tokenizer of mixed can give .*'another'"):
        Engine(model)


def test_a_prompt_with_a_token_beyond_the_model_is_refused() -> None:
    backend = tokenizers.Tokenizer.from_str(TOKENIZER.backend.to_str())
    backend.add_special_tokens(["<image>"])
    tokenizer = Tokenizer(json.loads(backend.to_str()), bos_token_id=1, eos_token_ids=[2])
    with Engine.over(Fewer(TOKENIZER.vocab_size), tokenizer) as engine:
        for prompt in ("what is <image>?", tokenizer.encode("what is <image>?")):
            with pytest.raises(RequestError, match="holds") as error:
                engine.generate([prompt])
            assert error.value.param == "prompt"
        assert engine.generate("what is it?", GREEDY)[0].outputs[0].token_ids


def test_chat_needs_a_template(start: Callable[..., Engine]) -> None:
    with pytest.raises(RequestError, match="chat template"):
        start().chat([{"role": "user", "content": "hi"}])


def test_an_error_of_a_chat_names_its_messages(start: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TOKENIZER, "chat_template", ChatTemplate("{{ messages[0].content }}"))
    for text, reason in (("x" * 1000, "context"), ("\ud800", "tokenized"), ("", "empty")):
        with pytest.raises(RequestError, match=reason) as error:
            start().chat([{"role": "user", "content": text}])
        assert error.value.param == "messages"


def test_a_full_queue_refuses_and_recovers(start: Callable[..., Engine]) -> None:
    runner = Held()
    engine = start(runner=runner, max_num_seqs=1, max_queue=3)
    calls = [Collector() for _ in range(4)]
    engine.submit("hello", GREEDY, calls[0])
    while engine.stats().running == 0:
        time.sleep(0.001)
    for call in calls[1:]:
        engine.submit("hello", GREEDY, call)
    with pytest.raises(OverloadedError, match="queue is full with 3"):
        engine.submit("hello", GREEDY, Collector())
    runner.go.set()
    assert engine.generate(["hello"] * 9, GREEDY)[8].outputs[0].finish_reason == "length"
    assert [call.reason for call in calls] == ["length"] * 4


def test_cancel_before_and_during_and_after(start: Callable[..., Engine]) -> None:
    runner = Held()
    engine = start(runner=runner, max_num_seqs=2)
    running, waiting, done = Collector(4), Collector(), Collector()
    first = engine.submit("one", SamplingParams(n=4, ignore_eos=True), running)
    second = engine.submit("two", GREEDY, waiting)
    engine.cancel(second)
    engine.cancel("no such request")
    runner.go.set()
    while not running.deltas:
        time.sleep(0.001)
    engine.cancel(first)
    engine.cancel(first)
    assert running.reason == "cancelled"
    assert waiting.reason == "cancelled"
    assert sorted(delta.index for delta in running.deltas if delta.finish_reason) == [0, 1, 2, 3]
    engine.cancel(engine.submit("three", SamplingParams(max_tokens=1), done))
    assert done.reason in ("cancelled", "length", "stop")


def test_a_stream_that_is_closed_early_is_cancelled(start: Callable[..., Engine]) -> None:
    engine = start(pages=256)
    deltas = engine.stream("hello", SamplingParams(ignore_eos=True))
    next(deltas)
    deltas.close()  # type: ignore[attr-defined]
    assert engine.drain(30)
    assert engine.stats().generated_tokens < 500


def test_a_failing_step_ends_its_requests_and_not_the_engine(start: Callable[..., Engine]) -> None:
    runner = Held()
    runner.fail_at = {3}
    engine = start(runner=runner, max_num_seqs=2)
    calls = [Collector(2), Collector()]
    engine.submit([5] * 20, SamplingParams(n=2, max_tokens=20, ignore_eos=True), calls[0])
    engine.submit([6] * 20, SamplingParams(max_tokens=20, ignore_eos=True), calls[1])
    runner.go.set()
    assert calls[0].reason == "error"
    assert "RuntimeError" in str(calls[0].deltas[-1].error)
    assert calls[1].reason in ("error", "length")
    assert engine.generate("hello", GREEDY)[0].outputs[0].finish_reason == "length"
    runner.fail_at = {runner.steps + 2}
    with pytest.raises(FallowError, match="failed at a step"):
        engine.generate("hello", GREEDY)


def test_a_receiver_that_raises_only_loses_its_own_request(start: Callable[..., Engine]) -> None:
    engine = start()

    def broken(delta: RequestDelta) -> None:
        raise KeyError("no such client")

    call = Collector()
    engine.submit("one", SamplingParams(ignore_eos=True), broken)
    engine.submit("two", GREEDY, call)
    assert call.reason == "length"
    assert engine.drain(30)


def test_drain_finishes_what_was_taken_and_refuses_more(start: Callable[..., Engine]) -> None:
    runner = Held()
    engine = start(runner=runner, max_num_seqs=1)
    calls = [Collector() for _ in range(4)]
    for call in calls:
        engine.submit("hello", GREEDY, call)
    assert not engine.drain(0.01)
    with pytest.raises(OverloadedError, match="shutting down"):
        engine.submit("more", GREEDY, Collector())
    runner.go.set()
    assert engine.drain(30)
    assert [call.ended.is_set() for call in calls] == [True] * 4
    assert [call.reason for call in calls] == ["length"] * 4


def test_close_cancels_what_runs_and_frees_the_runner() -> None:
    runner = ReferenceRunner(256)
    engine = Engine.over(runner, TOKENIZER)
    call = Collector()
    engine.submit("hello", SamplingParams(ignore_eos=True), call)
    engine.close()
    engine.close()
    assert runner.closed
    assert call.reason in ("cancelled", "length")
    with pytest.raises(OverloadedError, match="closed"):
        engine.submit("hello", GREEDY, call)
    assert engine.scheduler.pages.used_pages == 0


def test_an_engine_that_nobody_holds_ends_its_thread() -> None:
    runner = ReferenceRunner(8)
    engine = Engine.over(runner, TOKENIZER)
    engine.generate("hello", GREEDY)
    held = weakref.ref(engine)
    del engine
    gc.collect()
    assert held() is None
    assert runner.closed


def test_without_prefix_caching_requests_share_nothing(start: Callable[..., Engine]) -> None:
    for caching, hits in ((True, 32), (False, 0)):
        engine = start(prefix_caching=caching)
        first, second = (engine.generate([[5] * 40], GREEDY)[0] for _ in range(2))
        assert first.outputs[0].token_ids == second.outputs[0].token_ids
        assert second.cached_tokens == engine.stats().prefix_hits == hits


def test_the_public_names_are_there() -> None:
    assert set(fallow.__all__) <= set(dir(fallow))
    assert fallow.Engine is Engine
    assert all(getattr(fallow, name) is not None for name in fallow.__all__)
    with pytest.raises(AttributeError):
        _ = fallow.nothing
