from __future__ import annotations

import json
import random
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from fallow.engine.constraint import MAX_GRAMMAR_CHARACTERS, Constraint, ConstraintState, GrammarVocabulary
from fallow.errors import RequestError
from fallow.models.tokenizer import Tokenizer, load_tokenizer

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
        "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/point"}]},
    },
    "required": ["name", "age", "tags", "next"],
    "additionalProperties": False,
    "$defs": {"point": {"type": "object", "properties": {"x": {"type": "boolean"}}, "additionalProperties": False}},
}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "find", "description": "d", "parameters": PERSON}},
    {"type": "function", "function": {"name": "stop"}},
]
ROWS = 49200  # more than the vocabulary has, as in models whose head is padded


@pytest.fixture(scope="module")
def tokenizer(smollm2_gguf: Path) -> Tokenizer:
    return load_tokenizer(smollm2_gguf)


@pytest.fixture(scope="module")
def vocabulary(tokenizer: Tokenizer) -> GrammarVocabulary:
    return GrammarVocabulary(tokenizer, ROWS)


def allowed(state: ConstraintState) -> npt.NDArray[np.int64]:
    words = state.mask()
    assert words.dtype == np.uint32
    assert words.shape == ((ROWS + 31) // 32,)
    return np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))


def walk(state: ConstraintState, tokenizer: Tokenizer, rng: random.Random, limit: int = 400) -> tuple[str, bool]:
    """Random tokens that the mask allows, white space and long texts less often; whether the grammar was completed."""
    ids: list[int] = []
    short = np.array([len(piece.strip()) == 1 for piece in tokenizer.token_bytes])
    (end,) = tokenizer.eos_token_ids
    for _ in range(limit):
        choices = allowed(state)
        assert (end in choices) == state.is_accepting
        assert choices.max() < tokenizer.vocab_size
        token = int(rng.choice(choices))
        if (len(ids) > 40 or rng.random() < 0.5) and short[choices].any():  # towards an end
            token = int(rng.choice(choices[short[choices]]))
        if end in choices and (rng.random() < 0.5 or len(choices) == 1):
            token = end
        state.advance(token)
        if token == end:
            assert state.is_finished
            return tokenizer.decode(ids), True
        ids.append(token)
    return tokenizer.decode(ids), False


def force(state: ConstraintState, tokenizer: Tokenizer, text: str) -> bool:
    """Whether the grammar takes ``text`` token by token and may end after it."""
    for token in tokenizer.encode(text, add_special_tokens=False):
        if token not in allowed(state):
            return False
        state.advance(token)
    return state.is_accepting


def check_person(value: Any) -> None:
    assert set(value) == {"name", "age", "tags", "next"}
    assert isinstance(value["name"], str)
    assert len(value["name"]) <= 12
    assert 0 <= value["age"] <= 150
    assert set(value["tags"]) <= {"a", "b"}
    assert len(value["tags"]) <= 3
    assert value["next"] is None or all(key == "x" and isinstance(x, bool) for key, x in value["next"].items())


def test_random_answers_follow_the_schema(tokenizer: Tokenizer, vocabulary: GrammarVocabulary) -> None:
    constraint, rng, complete = Constraint.json_schema(PERSON), random.Random(0), 0
    for _ in range(25):
        text, ended = walk(constraint.start(vocabulary), tokenizer, rng)
        complete += ended
        if ended:
            check_person(json.loads(text))
    assert complete > 12


def test_random_objects_parse(tokenizer: Tokenizer, vocabulary: GrammarVocabulary) -> None:
    constraint, rng = Constraint.json_object(), random.Random(1)
    texts = [walk(constraint.start(vocabulary), tokenizer, rng) for _ in range(15)]
    complete = [json.loads(text) for text, ended in texts if ended]
    assert len(complete) > 3
    assert all(isinstance(value, dict) for value in complete)


def test_regex_and_lark(tokenizer: Tokenizer, vocabulary: GrammarVocabulary) -> None:
    rng = random.Random(2)
    for constraint in (
        Constraint.regex(r"[A-Z]{2}-[0-9]{3}(é|🙂)"),
        Constraint.lark('start: A "-" B ("é" | "🙂")\nA: /[A-Z]{2}/\nB: /[0-9]{3}/'),
    ):
        for _ in range(8):
            text, ended = walk(constraint.start(vocabulary), tokenizer, rng)
            assert ended
            assert re.fullmatch(r"[A-Z]{2}-[0-9]{3}(é|🙂)", text)


def test_required_tools(tokenizer: Tokenizer, vocabulary: GrammarVocabulary) -> None:
    rng, complete = random.Random(3), 0
    for parallel in (False, True):
        constraint = Constraint.from_tools(TOOLS, required=True, parallel=parallel)
        for _ in range(10):
            text, ended = walk(constraint.start(vocabulary), tokenizer, rng)
            calls = re.findall(r"<tool_call>\s*(.*?)\s*</tool_call>", text, re.DOTALL)
            if not ended:
                continue
            complete += 1
            assert len(calls) == 1 or parallel
            assert re.sub(r"<tool_call>.*?</tool_call>", "", text, flags=re.DOTALL).strip() == ""
            for call in map(json.loads, calls):
                assert set(call) == {"name", "arguments"}
                assert call["name"] in ("find", "stop")
                assert isinstance(call["arguments"], dict)
                if call["name"] == "find":
                    check_person(call["arguments"])
    assert complete > 6


def test_tools_beside_text(tokenizer: Tokenizer, vocabulary: GrammarVocabulary) -> None:
    call = '<tool_call>\n{"name": "stop", "arguments": {"a": 1}}\n</tool_call>'
    takes = {
        "": True,
        "I can do that.": True,
        "a <tool b <tool_ c": True,
        call: True,
        f"Let me see. {call}": True,
        f"{call}\n{call}": True,
        f"{call} done": True,
        "a <tool_call> b": False,
        '<tool_call>{"name": "other", "arguments": {}}</tool_call>': False,
        '<tool_call>{"name": "find", "arguments": {}}</tool_call>': False,
        call.removesuffix("</tool_call>"): False,
    }
    many, one = Constraint.from_tools(TOOLS), Constraint.from_tools(TOOLS, parallel=False)
    for text, taken in takes.items():
        assert force(many.start(vocabulary), tokenizer, text) is taken, text
        assert force(one.start(vocabulary), tokenizer, text) is (taken and text.count(call) < 2), text


def test_choices_do_not_share_state(tokenizer: Tokenizer, vocabulary: GrammarVocabulary) -> None:
    constraint = Constraint.regex("ab|cd")
    first, second = constraint.start(vocabulary), constraint.start(vocabulary)
    first.advance(tokenizer.encode("a")[0])
    assert force(second, tokenizer, "cd")
    assert not first.is_accepting


def test_rollback_restores_the_mask(tokenizer: Tokenizer, vocabulary: GrammarVocabulary) -> None:
    state, rng = Constraint.json_schema(PERSON).start(vocabulary), random.Random(4)
    for _ in range(12):
        state.advance(int(rng.choice([i for i in allowed(state) if tokenizer.token_bytes[i].strip()])))
    before = state.mask().copy()
    taken = []
    for _ in range(5):
        taken.append(int(rng.choice(allowed(state))))
        state.advance(taken[-1])
    state.rollback(5)
    np.testing.assert_array_equal(state.mask(), before)
    assert state.accepted(taken) == 5
    np.testing.assert_array_equal(state.mask(), before)


def test_a_token_that_is_not_allowed_is_refused(tokenizer: Tokenizer, vocabulary: GrammarVocabulary) -> None:
    state = Constraint.json_object().start(vocabulary)
    with pytest.raises(RequestError, match="cannot follow the grammar"):
        state.advance(tokenizer.encode("x")[0])


BAD_SCHEMAS: list[Any] = [
    {"type": "foo"},
    {"$ref": "#/nowhere"},
    {"$ref": "http://example.com/schema"},
    {"type": "string", "pattern": "(a"},
    {"not": {"type": "string"}},
    {"const": 1, "type": "string"},
    {"properties": 3},
    "text",
    {"x": float("nan"), "enum": [{1}]},
]


@pytest.mark.parametrize("schema", BAD_SCHEMAS, ids=str)
def test_bad_schemas_are_refused_with_a_reason(schema: Any) -> None:
    with pytest.raises(RequestError) as caught:
        Constraint.json_schema(schema)
    assert caught.value.param == "response_format"
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)


def test_unknown_keywords_matter_when_strict() -> None:
    schema = {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}
    Constraint.json_schema(schema, strict=False)
    with pytest.raises(RequestError, match="uniqueItems"):
        Constraint.json_schema(schema)
    function = {"name": "f", "parameters": {"type": "object", "properties": {"a": schema}}}
    Constraint.from_tools([{"type": "function", "function": function}])
    with pytest.raises(RequestError, match="uniqueItems") as caught:
        Constraint.from_tools([{"type": "function", "function": {**function, "strict": True}}])
    assert caught.value.param == "tools"


@pytest.mark.parametrize("pattern", ["^(?=a)b$", "(?<!a)b", r"(a)\1", r"(?<x>a)\k<x>", r"\\\\(?!a)"])
def test_patterns_that_are_not_regular_matter_when_strict(pattern: str) -> None:
    schema = {
        "type": "object",
        "properties": {"pattern": {"type": "string", "pattern": pattern}, "b": {"const": {"pattern": pattern}}},
        "required": ["pattern", "b"],
        "additionalProperties": False,
    }
    (loose,) = json.loads(Constraint.json_schema(schema, strict=False).grammar)["grammars"]
    assert loose["json_schema"]["properties"] == {"pattern": {"type": "string"}, "b": {"const": {"pattern": pattern}}}
    with pytest.raises(RequestError, match="regex"):
        Constraint.json_schema(schema)
    with pytest.raises(RequestError, match="regex"):
        Constraint.json_schema({"type": "string", "pattern": "(a"}, strict=False)


@pytest.mark.parametrize("pattern", [r"\(?=a", r"\\1", r"a{2}\d+"])
def test_regular_patterns_count_in_any_case(pattern: str) -> None:
    assert "pattern" in Constraint.json_schema({"type": "string", "pattern": pattern}, strict=False).grammar


BAD_TOOLS: list[Any] = [
    [],
    "tools",
    [3],
    [{"type": "other"}],
    [{"type": "function", "function": {"name": 'a"b'}}],
    [{"type": "function", "function": {"name": "f", "parameters": {"type": "string"}}}],
    [{"type": "function", "function": {"name": "f", "parameters": []}}],
    [{"type": "function", "function": {"name": "f"}}] * 2,
    [{"type": "function", "function": {"name": f"f{i}"}} for i in range(129)],
]


@pytest.mark.parametrize("tools", BAD_TOOLS, ids=lambda tools: str(tools)[:40])
def test_bad_tools_are_refused(tools: Any) -> None:
    with pytest.raises(RequestError) as caught:
        Constraint.from_tools(tools)
    assert caught.value.param == "tools"


def test_size_and_depth_are_bounded() -> None:
    with pytest.raises(RequestError, match="more than the limit"):
        Constraint.regex("x" * (MAX_GRAMMAR_CHARACTERS + 1))
    schema: dict[str, Any] = {"type": "object"}
    for _ in range(3000):
        schema = {"type": "array", "items": schema}
    with pytest.raises(RequestError):
        Constraint.json_schema(schema)


@pytest.mark.parametrize(
    "pattern", ["((a{1000}){1000}){1000}b", "(a|b)*a(a|b){25}", "(.*a.{20})|(.*b.{21})", "(a?){500}a{500}"]
)
def test_hard_patterns_end(pattern: str, tokenizer: Tokenizer, vocabulary: GrammarVocabulary) -> None:
    began, rng = time.process_time(), random.Random(5)
    try:
        walk(Constraint.regex(pattern).start(vocabulary), tokenizer, rng, limit=60)
    except RequestError as error:
        assert error.param == "response_format"  # noqa: PT017 (either outcome is right, a third is not)
    assert time.process_time() - began < 60  # without the limits it would be hours


def test_mutated_schemas_only_ever_give_sentences(vocabulary: GrammarVocabulary) -> None:
    rng, text, usable = random.Random(6), json.dumps(PERSON), 0
    words = ["type", "object", "string", "array", "$ref", "#/$defs/point", "pattern", "maxItems", "minimum", "oneOf"]
    for _ in range(400):
        parts = re.findall(r"\w+|\W", text)
        for _ in range(rng.randint(1, 3)):
            parts[rng.randrange(len(parts))] = rng.choice([*words, *parts, "-1", "99999999999"])
        try:
            schema = json.loads("".join(parts))
        except ValueError:
            continue
        try:
            Constraint.json_schema(schema).start(vocabulary).mask()
            usable += 1
        except RequestError:
            continue
    assert usable > 10
