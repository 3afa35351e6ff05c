"""A trace says what worked in the engine, token by token: as the reference in PyTorch has it, however the tokens are
cut, and without another bit in the results."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_obeyed_plans import CHOSEN
from test_screened_head import Model, screened
from test_variants import SIZES, VARIANTS, ZEROS, random_decoder, random_tokens, save

from fallow import Trace
from fallow.engine.batch import SAMPLING_DTYPE, StepBatch, greedy
from fallow.engine.constraint import Constraint
from fallow.engine.engine import Engine
from fallow.engine.program import TILE_ROWS
from fallow.engine.replay import replay
from fallow.engine.runner import ModelRunner
from fallow.engine.sampling import SamplingParams
from fallow.engine.trace import MAX_TRACE_BYTES, HeadWork, TraceShape, Worked
from fallow.errors import FallowError, OverloadedError, RequestError
from fallow.models import page_choice
from fallow.models.checkpoint import open_checkpoint
from fallow.models.decoder_weights import load_decoder
from fallow.models.resting import PageRule, Resting
from fallow.models.tokenizer import load_tokenizer
from fallow.plan import LayerRule, SparsityPlan

torch = pytest.importorskip("torch")


def source_tokens(model: Path, count: int) -> np.ndarray:
    return np.array(load_tokenizer(model).encode(inspect.getsource(random))[:count], np.int32)


def assert_same(one: Trace, other: Trace) -> None:
    for name in ("tokens", "chosen"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    for name, part in (("pages", "packed"), ("neurons", "packed"), ("inputs", "packed"), ("head", "tiles")):
        found, expected = getattr(one, name), getattr(other, name)
        assert (found is None) == (expected is None)
        if found is not None:
            np.testing.assert_array_equal(getattr(found, part), getattr(expected, part))


def test_the_pages_that_the_reference_reads(smollm2_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(smollm2_gguf)
    tokens = source_tokens(smollm2_gguf, 500)
    runner = ModelRunner(checkpoint, num_pages=16, plan=CHOSEN)
    trace = runner.trace(tokens)
    runner.close()
    assert trace.neurons is trace.head is None
    assert trace.pages is not None
    assert trace.pages.layers == tuple(range(30))
    blocks: list[np.ndarray] = []  # [kv_heads, queries, pages] of each layer, 256 queries at a time
    own: Callable[..., Any] = page_choice.chosen_pages

    def seen(*arguments: Any) -> Any:
        chosen = own(*arguments)
        blocks.append(np.pad(chosen[0].numpy(), [(0, 0), (0, 0), (0, 16 - chosen.shape[-1])]))
        return chosen

    monkeypatch.setattr(page_choice, "chosen_pages", seen)
    decoder = load_decoder(checkpoint, context=512)
    decoder.obey(CHOSEN)
    with torch.no_grad():
        decoder(torch.from_numpy(tokens.astype(np.int64))[None])
    layers = [np.concatenate(blocks[2 * layer : 2 * layer + 2], 1) for layer in range(30)]
    expected = np.stack(layers).transpose(2, 0, 1, 3)  # [tokens, layers, kv_heads, pages]
    found = trace.pages.unpacked()
    assert found.shape == expected.shape
    np.testing.assert_array_equal(trace.pages.counts, expected.sum(-1))
    np.testing.assert_array_equal(trace.pages.counts[-1], np.tile([7, 5, 8], (30, 1)))
    np.testing.assert_array_equal(trace.pages.counts[9 * 32 - 1], np.tile([4, 3, 5], (30, 1)))
    late = slice(200, None)  # there is a choice: 1 sink, 1 recent, and 2, 1 and 3 of those between; of 16 pages more
    chosen = expected[late] & ~always_read(len(tokens), 16)[late]
    missed = (chosen & ~found[late]).sum() / chosen.sum()
    others = (chosen & ~np.roll(found, 1, axis=1)[late]).sum() / chosen.sum()
    assert missed < 0.05  # rounding turns pages around that are worth nearly the same
    assert others > 6 * missed


def always_read(tokens: int, pages: int) -> np.ndarray:
    own = np.arange(tokens)[:, None] // 32
    number = np.arange(pages)
    return ((number < 1) | (number == own))[:, None, None]


@pytest.mark.parametrize(
    ("variant", "threshold"),
    [("reglu", 0.0), ("relu2", 0.0), ("top_k", 0.0), ("reglu", 0.4), ("swiglu", 0.4), ("geglu", 0.4), ("relu2", 1.5)],
)
def test_the_neurons_that_work_in_the_reference(variant: str, threshold: float, tmp_path: Path) -> None:
    rule = LayerRule("threshold", parameters={"threshold": threshold}) if threshold else LayerRule("zeros")
    plan = SparsityPlan(ffn=(replace(rule, layer=0), replace(rule, layer=2)))
    document = SIZES | VARIANTS[variant]
    decoder = random_decoder(document)
    tokens = random_tokens(200)
    runner = ModelRunner(open_checkpoint(save(decoder, document, tmp_path)), num_pages=8, threads=2, plan=plan)
    trace = runner.trace(tokens)
    runner.close()
    expected = []
    decoder.obey(plan)
    for layer in (0, 2):
        decoder.layers[layer].down_proj.register_forward_pre_hook(
            lambda module, arguments: expected.append(arguments[0][0].numpy() != 0)
        )
    with torch.no_grad():
        decoder(torch.from_numpy(tokens)[None])
    assert trace.pages is trace.head is None
    assert trace.neurons is not None
    assert trace.neurons.layers == (0, 2)
    found, at_work = trace.neurons.unpacked(), np.stack(expected, 1)  # [tokens, 2, intermediate]
    assert found.shape == at_work.shape == (200, 2, 160)
    np.testing.assert_array_equal(trace.neurons.counts, found.sum(-1))
    wrong, share = (found != at_work).mean(), at_work.mean()
    assert wrong < 0.03 * min(share, 1 - share) + 0.002  # rounding around the threshold
    assert (np.roll(found, 1, axis=0) != at_work).mean() > 10 * wrong
    np.testing.assert_array_equal(trace.neurons.unpacked(slice(7, 9)), found[7:9])


def test_the_inputs_that_work_in_the_reference(tmp_path: Path) -> None:
    thresholds = {"o_proj": 0.4, "down_proj": 0.5}
    rules = [
        LayerRule("threshold", layer, name, {"threshold": t}) for layer in (0, 2) for name, t in thresholds.items()
    ]
    plan = SparsityPlan(input=(*rules, LayerRule("threshold", 1, "down_proj", {"threshold": 0.5})))
    document = SIZES | VARIANTS["swiglu"]
    decoder = random_decoder(document)
    tokens = random_tokens(200)
    runner = ModelRunner(open_checkpoint(save(decoder, document, tmp_path)), num_pages=8, threads=2, plan=plan)
    trace = runner.trace(tokens, sampling=greedy(200))
    runner.close()
    assert trace.neurons is None
    assert trace.inputs is not None
    decoder.obey(plan)
    for name, layers in (("o_proj", (0, 2)), ("down_proj", (0, 1, 2))):
        expected: list[np.ndarray] = []
        hooks = [
            getattr(decoder.layers[layer], name).register_forward_pre_hook(
                lambda module, arguments, expected=expected: expected.append(arguments[0][0].numpy() != 0)
            )
            for layer in layers
        ]
        with torch.no_grad():
            decoder(torch.from_numpy(tokens)[None])
        for hook in hooks:
            hook.remove()
        worked, at_work = trace.inputs.of(name), np.stack(expected, 1)
        assert worked.layers == layers
        found = worked.unpacked()
        assert found.shape == at_work.shape
        assert 0.2 < at_work.mean() < 0.9
        assert (found != at_work).mean() < 0.02  # rounding around the threshold
        assert (np.roll(found, 1, axis=0) != at_work).mean() > 0.2


def test_the_tiles_of_the_head_that_a_step_computes(tiny_checkpoints: dict[str, Path]) -> None:
    model = Model(tiny_checkpoints["llama"])
    runner = model.runner(screened(32))
    tokens = np.random.default_rng(3).integers(3, model.vocab_size, 60).astype(np.int32)
    sampling = greedy(40)
    sampling["temperature"][::2], sampling["draw"] = 0.8, np.arange(40)
    sampling["top_p"][4], sampling["logprobs"][6] = 0.5, 0  # these take the whole head
    trace = runner.trace(tokens, sampling=sampling, chunk=7)
    assert trace.first_choice == 20
    assert trace.head is not None
    assert trace.head.size == model.vocab_size // TILE_ROWS == 20
    assert trace.head.whole[[4, 6]].all()
    pages = np.arange(2, dtype=np.int32)[None]
    one = np.array([0], np.int32)
    for position, token in enumerate(tokens.tolist()):
        place = position - trace.first_choice
        batch = StepBatch(
            np.array([token], np.int32), np.array([0, 1], np.int32), np.array([position], np.int32), pages,
            one[: place >= 0], sampling[max(place, 0) : place + 1] if place >= 0 else sampling[:0],
        )  # fmt: skip
        result = runner.step(batch)
        if place >= 0:
            assert result.tokens[0] == trace.chosen[place]
            assert trace.head.tiles[place] == len(runner.head_tiles(0))
    assert len(set(trace.head.tiles.tolist())) > 3
    assert not trace.head.whole.all()
    runner.close()


@pytest.fixture(scope="module")
def all_axes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SparsityPlan, Model]:
    """A tiny model whose pages, neurons, inputs and words rest."""
    document = SIZES | VARIANTS["reglu"] | {"hidden_size": 64}
    model = Model(save(random_decoder(document), document, tmp_path_factory.mktemp("all-axes")))
    pages = LayerRule("top_pages", parameters={"sink_pages": 1, "recent_pages": 1, "top_pages": 2})
    attention = (replace(pages, layer=1), replace(pages, layer=2))
    inputs = (LayerRule("threshold", 1, "o_proj", {"threshold": 0.3}),)
    plan = SparsityPlan(attention=attention, ffn=ZEROS.ffn, input=inputs, head=screened(32).head)
    return model.checkpoint.path, plan, model


def test_no_result_depends_on_how_it_is_cut_or_traced(all_axes: tuple[Path, SparsityPlan, Model]) -> None:
    _, plan, model = all_axes
    tokens = random_tokens(300).astype(np.int32)
    sampling = greedy(120)
    sampling["temperature"][::2], sampling["draw"] = 0.9, np.arange(120)

    def traced(threads: int, chunk: int) -> Trace:
        runner = ModelRunner(
            model.checkpoint, threads=threads, num_pages=16, max_step_tokens=chunk, plan=plan, head_screen=model.screen
        )
        try:
            return runner.trace(tokens, sampling=sampling, chunk=chunk)
        finally:
            runner.close()

    first = traced(1, 300)
    assert first.pages is not None
    assert first.neurons is not None
    assert first.pages.layers == (1, 2)
    assert (first.pages.counts == np.minimum(np.arange(300) // 32 + 1, 4)[:, None, None]).all()
    # No layer sees what the last one would make of a token after which nothing is chosen.
    assert not first.neurons.counts[: first.first_choice, 2].any()
    assert (first.neurons.counts[first.first_choice :, 2] > 0).all()
    assert (first.neurons.counts[:, :2] > 0).all()
    assert first.inputs is not None
    attended = first.inputs.of("o_proj")
    assert attended.layers == (1,)
    assert 0.2 < attended.counts.mean() / attended.size < 0.95
    assert first.inputs.of("down_proj").layers == ()
    for threads, chunk in [(1, 1), (2, 1), (2, 5), (3, 17), (2, 64), (2, 300), (3, 200)]:
        assert_same(traced(threads, chunk), first)


@pytest.mark.parametrize("plan", [CHOSEN, SparsityPlan.dense()], ids=["pages", "dense"])
def test_a_trace_changes_no_bit(smollm2_gguf: Path, plan: SparsityPlan) -> None:
    tokens = source_tokens(smollm2_gguf, 300)
    runner = ModelRunner(open_checkpoint(smollm2_gguf), num_pages=16, plan=plan)
    expected = runner.logits(tokens, chunk=100)
    scores = runner.score(tokens)
    trace = runner.trace(tokens, chunk=100)
    np.testing.assert_array_equal(runner._program.logits(100), expected[200:])
    np.testing.assert_array_equal(trace.chosen, expected.argmax(-1))
    np.testing.assert_array_equal(runner.score(tokens), scores)
    if plan is not CHOSEN:
        assert trace.pages is trace.neurons is trace.head is None
    runner.close()


@pytest.fixture(scope="module")
def lean(tiny_checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in a folder, whose pages and words rest."""
    folder = tmp_path_factory.mktemp("lean")
    for file in tiny_checkpoints["llama"].iterdir():
        (folder / file.name).symlink_to(file)
    Model(folder).screen.save(folder)
    pages = LayerRule("top_pages", parameters={"sink_pages": 1, "recent_pages": 1, "top_pages": 2})
    SparsityPlan(attention=(replace(pages, layer=0), replace(pages, layer=2)), head=screened(32).head).save(
        folder / "plan.json"
    )
    return folder


KINDS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0.8, "top_k": 20, "seed": 3},
    {"seed": 7},
    {"temperature": 0.8, "top_p": 0.9},
    {"temperature": 0, "repetition_penalty": 1.3, "logit_bias": {5: 2.0}},
    {"constraint": Constraint.regex("[a-f]{4,9}")},
]


def test_an_answer_and_what_worked_for_it(lean: Path) -> None:
    with Engine(lean, max_context=512) as engine:
        prompt = random_tokens(200).tolist()
        spared = 0
        for number, kind in enumerate(KINDS):
            params = SamplingParams(max_tokens=24, ignore_eos=True, **kind)
            trace = engine.trace(prompt, params)
            assert trace.tokens[:200].tolist() == prompt
            assert trace.first_choice == 199
            np.testing.assert_array_equal(trace.tokens[200:], trace.chosen[:-1])
            assert trace.pages is not None
            assert trace.pages.layers == (0, 2)
            assert trace.pages.counts.max() == 4  # one sink, one recent, two of those between
            assert trace.head is not None
            assert trace.head.whole.all() or number < 3, kind
            spared += (~trace.head.whole).sum()
            if kind.get("temperature") == 0 or "seed" in kind:
                answer = engine.generate([prompt], params)[0].outputs[0].token_ids
                assert trace.chosen.tolist() == answer
            if number == 0:
                sampling = greedy(len(trace.chosen))
                alone = ModelRunner(open_checkpoint(lean), num_pages=16, plan=SparsityPlan.beside(lean))
                assert_same(alone.trace(trace.tokens, sampling=sampling, chunk=9), trace)
                alone.close()
        assert spared > 10
        text = engine.trace("Why do farmers let a field lie fallow?", SamplingParams(max_tokens=5))
        assert len(text.chosen) <= 5


def test_the_choices_of_a_replay_are_those_of_the_answer(lean: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Engine(lean, max_context=512) as engine:
        replays: list[Trace] = []
        own = engine.runner.trace
        monkeypatch.setattr(engine.runner, "trace", lambda *a, **o: replays.append(own(*a, **o)) or replays[-1])
        for kind in KINDS[:4]:
            trace = engine.trace("Once upon a time", SamplingParams(max_tokens=40, ignore_eos=True, **kind))
            np.testing.assert_array_equal(replays[-1].chosen, trace.chosen)


def test_a_trace_beside_other_requests(lean: Path) -> None:
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    prompt = source_tokens(lean, 200).tolist()
    with Engine(lean, max_context=512) as engine:
        expected = [token for delta in engine.stream(prompt, params) for token in delta.token_ids]
        first = engine.trace(prompt, params)
        stream = engine.stream(prompt, params)
        found = list(next(stream).token_ids)
        assert_same(engine.trace(prompt, params), first)
        found += [token for delta in stream for token in delta.token_ids]
        assert found == expected == first.chosen.tolist()
        engine.scheduler.check()
        assert engine.stats().pages_used == 0


def test_what_cannot_be_traced_is_refused(all_axes: tuple[Path, SparsityPlan, Model]) -> None:
    _, plan, model = all_axes
    runner = ModelRunner(model.checkpoint, threads=1, num_pages=8, plan=plan, head_screen=model.screen)
    with pytest.raises(FallowError, match="no tokens to trace"):
        runner.trace([])
    with pytest.raises(FallowError, match="257 tokens do not fit the context of 256"):
        runner.trace([1] * 257)
    runner.close()
    rests = [Resting(PageRule(1, 1, (2,) * 8), 0.0)] * 64
    shape = TraceShape(rests, 8, 32, 16384, [], None)
    assert MAX_TRACE_BYTES > 8100 * 64 * 16384 // 8  # pages make it more
    with pytest.raises(FallowError, match=r"8,100 .* 1\.1 GiB, more than the 1 GiB that one may: trace fewer tokens"):
        shape.empty(np.zeros(8100, np.int32), 8100)


def test_an_engine_refuses_a_trace_that_it_has_no_room_for(lean: Path) -> None:
    params = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
    with Engine(lean, max_context=320) as engine:
        with pytest.raises(RequestError, match="n is 2, but one answer can be traced"):
            engine.trace("One", SamplingParams(n=2))
        with pytest.raises(RequestError, match="shorten the prompt"):
            engine.trace([5] * 400)
        manager = engine.scheduler.pages
        held = [manager.allocate() for _ in range(manager.available_pages - 4)]
        with pytest.raises(OverloadedError, match="needs 5 pages of the KV cache, but 4 are left"):
            engine._loop.between_steps(lambda: replay(engine, np.zeros(150, np.int32), replace(params, seed=1), 1))
        manager.release(held)
        engine.drain(10)
        with pytest.raises(OverloadedError, match="shutting down"):
            engine._loop.between_steps(lambda: None)


def test_a_record_of_another_shape_is_refused(all_axes: tuple[Path, SparsityPlan, Model]) -> None:
    _, plan, model = all_axes
    runner = ModelRunner(model.checkpoint, threads=1, num_pages=16, plan=plan, head_screen=model.screen)
    count = 300

    def step(**records: np.ndarray) -> Any:
        return runner._program.step(
            random_tokens(count).astype(np.int32), np.array([0, count], np.int32), np.zeros(1, np.int32),
            np.arange(10, dtype=np.int32)[None], np.array([3, 9], np.int32),
            greedy(2).view(np.uint8).reshape(-1, SAMPLING_DTYPE.itemsize), **records,
        )  # fmt: skip

    right = {"pages_read": (count, 2, 2, 2), "neurons_at_work": (count, 3, 20), "tiles_computed": (2,)}
    right["inputs_at_work"] = (count, 1, model.checkpoint.tensors["layers.1.o_proj"].shape[1] // 8)
    types = {"tiles_computed": np.int32}
    step(**{name: np.zeros(shape, types.get(name, np.uint8)) for name, shape in right.items()})
    for name, shape in right.items():
        kind = types.get(name, np.uint8)
        for axis in range(len(shape)):
            wrong = list(shape)
            wrong[axis] -= 1
            with pytest.raises(ValueError, match="record of"):
                step(**{name: np.zeros(wrong, kind)})
        for array in (
            np.zeros(shape, np.float32),
            np.zeros([*shape, 1], kind),
            np.zeros([2 * n for n in shape], kind)[tuple(slice(None, None, 2) for _ in shape)],
            np.broadcast_to(np.zeros(1, kind), shape),
        ):
            with pytest.raises(TypeError):
                step(**{name: array})
    runner.close()


def test_bits_are_counted() -> None:
    packed = np.random.default_rng(0).integers(0, 256, (70, 3, 2, 5), np.uint8)
    packed[..., -1] &= 0b111
    worked = Worked((0, 4, 9), packed, 35)
    np.testing.assert_array_equal(worked.counts, worked.unpacked().sum(-1))
    assert worked.unpacked().shape == (70, 3, 2, 35)
    assert worked.unpacked()[1, 2, 1, 9] == (packed[1, 2, 1, 1] >> 1) % 2
    np.testing.assert_array_equal(HeadWork(np.array([3, 20, 19], np.int32), 20).whole, [False, True, False])
