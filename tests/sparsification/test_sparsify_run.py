"""``fallow sparsify`` on the real model, from text to a folder that is served."""

from __future__ import annotations

import inspect
import itertools
import json
import random
import typing
from dataclasses import replace
from pathlib import Path

import pytest

from fallow.engine.engine import Engine
from fallow.engine.sampling import SamplingParams
from fallow.errors import FallowError
from fallow.evaluate.needle import DEPTHS, needles
from fallow.models.checkpoint import open_checkpoint
from fallow.models.head_screen import SCREEN_FILE
from fallow.models.info import describe
from fallow.models.tokenizer import load_tokenizer
from fallow.plan import LayerRule, SparsityPlan
from fallow.sparsification import run
from fallow.sparsification.choices import Load
from fallow.sparsification.floor import Floor
from fallow.sparsification.judge import Judge
from fallow.sparsification.picture import PICTURES
from fallow.sparsification.run import SparsifyResult, sparsify
from fallow.sparsification.text import cut, windows_in, written_by
from fallow.sparsification.vocabulary import head_rules

CONTEXT = 448


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "source.py"
    path.write_text(inspect.getsource(random)[:3400] + inspect.getsource(typing)[:3400], encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def result(smollm2_gguf: Path, text: Path, capitals: Path, tmp_path_factory: pytest.TempPathFactory) -> SparsifyResult:
    out = tmp_path_factory.mktemp("out") / "lean"
    options = {"budget": 0.02, "text": text, "context": CONTEXT, "task": str(capitals), "floor": 0.6, "threads": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "OWN_TEXTS", (3, 512))  # a screen of fewer texts is a worse one, and chooses the same words
        return sparsify(smollm2_gguf, out=out, **options)


def test_a_plan_within_the_budget(result: SparsifyResult) -> None:
    found = result.found
    assert not found.plan.is_dense
    assert found.plan.head == head_rules()
    assert found.perplexity_ratio <= 1.02
    assert found in result.frontier
    assert 0.02 < found.resting < 0.9
    assert 1 < found.speedup < 2
    assert result.measured > 0
    assert found.plan.provenance["calibrated_on"] == "source.py"
    assert result.accuracy == 2 / 3
    fields = result.to_json()
    assert set(fields) >= {"model", "plan", "perplexity_ratio", "speedup", "frontier", "accuracy"}
    assert set(fields["speedup"]) == {"predicted", "measured"}
    assert set(fields["frontier"][0]) == {"resting", "perplexity_ratio", "speedup"}


def test_the_folder_is_the_model_with_its_plan(result: SparsifyResult, smollm2_gguf: Path) -> None:
    plan = SparsityPlan.beside(result.folder)
    assert plan == result.found.plan
    assert describe(open_checkpoint(result.folder), plan=plan).plan == plan.summary
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=0)
    prompt = list(range(1000, 1000 + 400))

    def answer(model: Path, plan: SparsityPlan | None) -> list[float]:
        with Engine(model, plan=plan) as engine:
            return [entry.logprob for entry in engine.generate([prompt], params)[0].outputs[0].logprobs]

    # What lies beside the weights screens the head, which changes no log-probability.
    assert (result.folder / SCREEN_FILE).is_file()
    assert all((result.folder / name).stat().st_size > 10_000 for name in PICTURES)
    others = replace(result.found.plan, head=None)
    assert answer(result.folder, None) == answer(smollm2_gguf, others) != answer(smollm2_gguf, None)
    with pytest.raises(FallowError, match="make the plan again"):
        answer(smollm2_gguf, result.found.plan)


def test_what_cannot_be_done_is_a_sentence_and_nothing_is_written(
    result: SparsifyResult, smollm2_gguf: Path, text: Path, capitals: Path, tmp_path: Path
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("Too short.")
    chat = tmp_path / "chat.jsonl"
    chat.write_text('{"messages": [{"role": "user", "content": "What rests?"}]}')
    damaged = tmp_path / "damaged.txt"
    damaged.write_bytes(b"\xff\xfe\x00")
    out = tmp_path / "out"
    for options, message in (
        ({"out": result.folder}, "exists already"),
        ({"budget": 0.0}, "between 0 and 1"),
        ({"context": 10_000}, "The context is 10000"),
        ({"context": 32}, "The context is 32"),
        ({"text": short}, r"too little text for a context of 448 tokens: .* or a document of 896 tokens; .* have \d\."),
        ({"text": chat}, "chat.jsonl, line 1: a text is expected here, but this is a conversation"),
        ({"text": damaged}, "not text in UTF-8"),
        ({"text": tmp_path / "nowhere.txt"}, "cannot be read"),
        ({"task": "arc_easy"}, "A task needs a floor"),
        ({"floor": 0.4}, "a floor or a limit a task"),
        ({"task": "arc_easy", "floor": 40.0}, "an accuracy from 0 to 1"),
        ({"task": str(capitals), "floor": 0.9}, "solves 66.7% of .* below the floor of 90.0%"),
    ):
        with pytest.raises(FallowError, match=message) as error:
            sparsify(smollm2_gguf, **{"out": out, "text": text, "context": CONTEXT} | options)
        assert "\n" not in str(error.value)
    assert not out.exists()


def test_heads_and_neurons_are_taken_out(tiny_checkpoints: dict[str, Path], text: Path, tmp_path: Path) -> None:
    """Of a model whose weights are random, so that little is lost with them."""
    options = {"budget": 0.3, "text": text, "context": 64, "batch": 8, "threads": 2}
    kept = sparsify(tiny_checkpoints["llama"], out=tmp_path / "kept", **options)
    assert not kept.found.plan.structure
    result = sparsify(tiny_checkpoints["llama"], out=tmp_path / "smaller", remove=True, **options)
    assert result.found.plan.structure
    assert result.found.perplexity_ratio <= 1.3
    assert result.found.plan.provenance["removed"]
    assert result.found.speedup > kept.found.speedup
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    with Engine(result.folder) as engine:
        assert len(engine.generate("a", params)[0].outputs[0].token_ids) == 6


def test_a_floor_of_needles(smollm2_gguf: Path) -> None:
    checkpoint = open_checkpoint(smollm2_gguf)
    load = Load(1, 200)
    judge = Judge(checkpoint, checkpoint, None, (), load, "auto", 2, lambda what, done, total: None)
    floor = Floor("needle", 0.5, load.context, limit=1)
    assert judge.accuracy(SparsityPlan.dense(), floor) >= 0.6
    everything = SparsityPlan(structure=(LayerRule("removed", None, "attention"),))
    assert judge.accuracy(everything, floor) == 0


def test_needles_that_price_are_like_those_that_are_asked_but_others(smollm2_gguf: Path) -> None:
    tokenizer = load_tokenizer(smollm2_gguf)
    questions = Floor("needle", 0.5, 300, limit=1).questions(tokenizer)
    asked = {needle.answer for depth in DEPTHS for needle in needles(tokenizer, 300, depth, 20)}
    assert len(questions) == 3
    for question in questions:
        prompt, answer = tokenizer.decode(question.prompt), tokenizer.decode(question.answer)
        assert f"is{answer}." in prompt
        assert [question.tokens[at + 1] for at in question.answers] == question.answer
        assert answer.strip() not in asked
    assert Floor("capitals.yaml", 0.5, 300).questions(tokenizer) == []


@pytest.mark.parametrize(
    ("context", "priced", "verified"), [(9000, 6, 12), (1100, 6, 14), (500, 12, 32), (100, 61, 96)]
)
def test_windows_for_calibration_are_kept_apart(context: int, priced: int, verified: int) -> None:
    number = 4 * verified + 1
    windows = cut([list(range(number * context + context // 2))], context, "numbers")
    for found, count in ((windows.calibrated, priced), (windows.verified, verified)):
        starts = [window[0] for window in found]
        assert found == [list(range(start, start + context)) for start in starts]
        assert len(found) == count
        gaps = {(later - earlier) // context for earlier, later in itertools.pairwise(starts)}
        assert max(gaps) - min(gaps) <= 2  # spread over the text
        assert starts[-1] + (max(gaps) + 2) * context >= number * context
    verified_tokens = set(itertools.chain(*windows.verified))
    assert not verified_tokens & set(itertools.chain(*windows.calibrated))
    assert set(itertools.chain(*windows.others)) == set(range(number * context + context // 2)) - verified_tokens


def test_few_windows_are_all_taken() -> None:
    windows = cut([list(range(50))], 20, "numbers")
    assert (windows.calibrated, windows.verified) == ([list(range(20))], [list(range(20, 40))])


def test_windows_lie_within_documents(smollm2_gguf: Path, tmp_path: Path) -> None:
    """Of one that is shorter than a window nothing prices or verifies; documents are records of JSONL."""
    path = tmp_path / "documents.jsonl"
    texts = ["a b c d e f g h", "short", "i j k l m", "n o p q"]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = load_tokenizer(smollm2_gguf)
    windows, decode = windows_in(path, tokenizer, 4, lambda what, done, total: None), tokenizer.decode
    assert [decode(window) for window in windows.calibrated] == ["a b c d", "i j k l"]
    assert [decode(window) for window in windows.verified] == [" e f g h", "n o p q"]
    assert [decode(piece) for piece in windows.others] == ["a b c d", "short", "i j k l m"]


def test_the_model_writes_its_own_text(tiny_checkpoints: dict[str, Path]) -> None:
    with Engine(tiny_checkpoints["qwen3"]) as engine:
        windows = written_by(engine, 40)
        assert written_by(engine, 40) == windows
    assert (len(windows.calibrated), len(windows.verified)) == (48, 48)
    every = [*windows.calibrated, *windows.verified]
    assert {len(window) for window in every} == {40}
    assert len({tuple(window) for window in every}) == 96
