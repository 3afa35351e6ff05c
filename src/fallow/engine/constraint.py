"""Answers that follow a grammar: JSON schemas, regular expressions, Lark grammars and tool calls, by llguidance.

A ``Constraint`` is a grammar that was checked; ``start`` gives the state of one sequence, whose ``mask`` says which
tokens may come next. A tool call is written ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``, the form of
the Hermes and Qwen families; several may follow one another.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from fallow.arrays import UInt32
from fallow.errors import RequestError
from fallow.models.tokenizer import Tokenizer

MAX_GRAMMAR_CHARACTERS = 256 << 10
MAX_TOOLS = 128
_TOOL_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
# Some white space keeps the model in the style it was trained on; without a bound a small model may never leave it.
# Look-around and back-references, which an automaton cannot follow.
_NOT_REGULAR = re.compile(r"(?<!\\)(?:\\\\)*(?:\(\?<?[=!]|\\(?:[1-9]|k<))")
_VALUES = ("const", "enum", "default", "examples")
_WHITESPACE = r"[\x20\x0A\x0D\x09]{0,24}"
_JSON_OPTIONS: Any = {"whitespace_pattern": _WHITESPACE}
_LIMITS = LLParserLimits(max_grammar_size=200_000, verbose_errors=False)


class GrammarVocabulary:
    """The tokens of a model as the grammar engine needs them: build it once, it takes some tenths of a second.

    ``vocab_size`` is the number of rows of the model's head; rows that are no token are never allowed.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        if not tokenizer.eos_token_ids:
            raise RequestError(
                "This model names no end-of-sequence token, so an answer cannot be made to follow a grammar.",
                param="response_format",
            )
        self.vocab_size = vocab_size
        ends = sorted(i for i in tokenizer.eos_token_ids if i < vocab_size)
        table: Any = _TokenTable(tokenizer, vocab_size, ends[0])
        self.backend = LLTokenizer(table, n_vocab=vocab_size, eos_token=ends)


class _TokenTable:
    """What llguidance asks of a tokenizer that it does not know."""

    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_id: int) -> None:
        tokens = tokenizer.token_bytes[:vocab_size]
        self.tokens = tokens + [b""] * (vocab_size - len(tokens))
        self.eos_token_id = eos_token_id
        self.bos_token_id = tokenizer.bos_token_id
        self.special_token_ids = sorted(i for i in tokenizer.special_ids if i < vocab_size)
        self._tokenizer = tokenizer

    def __call__(self, text: str | bytes) -> list[int]:
        if isinstance(text, bytes):
            text = text.decode(errors="replace")
        return self._tokenizer.encode(text, add_special_tokens=False, allow_special=False)


class Constraint:
    """A grammar that an answer must follow; immutable, shared by all choices of a request.

    The constructors raise ``RequestError`` with the reason where the grammar is wrong, too large, or asks for what the
    grammar engine cannot do. ``param`` is the field of the request that the error names.
    """

    def __init__(self, grammar: str, param: str) -> None:
        """``grammar`` is what one of ``LLMatcher.grammar_from_*`` made."""
        problem = LLMatcher.validate_grammar(grammar, None, limits=_LIMITS)
        if problem and not problem.startswith("WARNING"):
            raise RequestError(f"The grammar cannot be used: {_one_line(problem)}.", param=param)
        self.grammar = grammar
        self.param = param

    @staticmethod
    def json_schema(schema: Mapping[str, Any], *, strict: bool = True, param: str = "response_format") -> Constraint:
        """JSON that a JSON Schema (draft 2020-12) describes. Without ``strict``, what the grammar engine cannot hold
        an answer to (a keyword or a format that it does not know, a pattern that is not regular) is ignored instead of
        refused."""
        text = _schema_text(schema, param, strict=strict)
        try:
            options: Any = {**_JSON_OPTIONS, "lenient": not strict}
            grammar = LLMatcher.grammar_from_json_schema(text, overrides=options)
        except ValueError as error:
            raise RequestError(f"The schema cannot be used: {_one_line(str(error))}.", param=param) from error
        return Constraint(grammar, param)

    @staticmethod
    def json_object(*, param: str = "response_format") -> Constraint:
        """Any JSON object."""
        return Constraint.json_schema({"type": "object"}, param=param)

    @staticmethod
    def regex(pattern: str, *, param: str = "response_format") -> Constraint:
        """Text that a regular expression matches from its start to its end."""
        return Constraint(LLMatcher.grammar_from_regex(_bounded(pattern, param)), param)

    @staticmethod
    def lark(grammar: str, *, param: str = "response_format") -> Constraint:
        """Text of a Lark grammar with llguidance's extensions."""
        return Constraint(LLMatcher.grammar_from_lark(_bounded(grammar, param)), param)

    @staticmethod
    def from_tools(tools: Sequence[Mapping[str, Any]], *, required: bool = False, parallel: bool = True) -> Constraint:
        """Calls of ``tools``, which are as in the API: ``{"type": "function", "function": {...}}``.

        Without ``required`` the answer is text in which the model may call tools; with it, calls and nothing else.
        ``parallel`` allows more than one call. A function's ``strict`` is as in ``json_schema``, and off if not given.
        """
        functions = _functions(tools)
        if required:
            rules = [f"start: {'call+' if parallel else 'call'}\n{_CALL}"]
        else:
            rules = [f"start: spoken_call{'*' if parallel else '?'} REST\n{_SPOKEN}"]
        rules.append("body: " + " | ".join(f"body_{i}" for i in range(len(functions))))
        for i, (name, function) in enumerate(functions.items()):
            opening = json.dumps(f'"{name}"')
            rules.append(
                f'body_{i}: "{{" ws "\\"name\\":" ws {opening} ws "," ws "\\"arguments\\":" ws arguments_{i} ws "}}"'
            )
            rules.append(f"arguments_{i}: %json {_parameters_text(name, function)}")
        return Constraint.lark("\n".join(rules) + "\n", param="tools")

    def start(self, vocabulary: GrammarVocabulary) -> ConstraintState:
        """The state of one sequence before its first token."""
        matcher = LLMatcher(vocabulary.backend, self.grammar, log_level=0, limits=_LIMITS)
        return ConstraintState(matcher, self.param)


_WS = "ws: /[ \\n]{0,4}/\n"
_CALL = f'call: "<tool_call>" ws body ws "</tool_call>" ws\n{_WS}'
_SPOKEN = (
    'spoken_call: lead ws body ws "</tool_call>"\n'
    'lead[suffix="<tool_call>"]: /(?s:.*)/\n'
    f"REST: /(?s:.*)/ & ~/(?s:.*<tool_call>.*)/\n{_WS}"
)


class ConstraintState:
    """Where one sequence is in its grammar. Not safe under several threads at once."""

    def __init__(self, matcher: LLMatcher, param: str) -> None:
        self._matcher = matcher
        self._param = param
        self._check()

    def mask(self) -> UInt32:
        """The tokens that may come next, one bit each, least significant first: uint32 [ceil(vocab_size / 32)].

        An end-of-sequence token is among them exactly when the grammar is satisfied. Raises ``RequestError`` where the
        grammar became too complex to go on.
        """
        words = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint32)
        self._check()
        return words

    def advance(self, token_id: int) -> None:
        """Take a token that the mask allows. Raises ``RequestError`` where it does not."""
        if not self._matcher.consume_token(token_id):
            self._check()

    def accepted(self, token_ids: Sequence[int]) -> int:
        """How many of these tokens, from the first on, the grammar allows next; the state stays as it is."""
        return int(self._matcher.validate_tokens(list(token_ids)))

    def rollback(self, count: int) -> None:
        """Take back the last ``count`` tokens."""
        if count and not self._matcher.rollback(count):
            self._check()

    @property
    def is_accepting(self) -> bool:
        """Whether the answer may end here."""
        return bool(self._matcher.is_accepting())

    @property
    def is_finished(self) -> bool:
        """Whether the answer is complete and only an end-of-sequence token could follow, or has followed."""
        return bool(self._matcher.is_stopped())

    def _check(self) -> None:
        if self._matcher.is_error():
            raise RequestError(
                f"The answer cannot follow the grammar any further: {_one_line(self._matcher.get_error())}.",
                param=self._param,
            )


def _functions(tools: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    if not isinstance(tools, Sequence) or isinstance(tools, str) or not 1 <= len(tools) <= MAX_TOOLS:
        raise RequestError(f"tools must be a list of 1 to {MAX_TOOLS} functions.", param="tools")
    functions: dict[str, Mapping[str, Any]] = {}
    for i, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, Mapping) and tool.get("type") == "function" else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(name, str) or not _TOOL_NAME.fullmatch(name):
            raise RequestError(
                f"tools[{i}] must be a function whose name is 1 to 64 letters, digits, '_' or '-'.", param="tools"
            )
        if name in functions:
            raise RequestError(f"tools[{i}] has the name {name} of an earlier tool.", param="tools")
        functions[name] = function
    return functions


def _parameters_text(name: str, function: Mapping[str, Any]) -> str:
    """The schema of a function's arguments, which is an object whatever the schema leaves open."""
    parameters = function.get("parameters")
    if parameters is None:
        parameters = {}
    if not isinstance(parameters, Mapping) or parameters.get("type", "object") != "object":
        raise RequestError(f"The parameters of the tool {name} must be a JSON schema of type object.", param="tools")
    strict = function.get("strict") is True
    options = {**_JSON_OPTIONS, "lenient": not strict}
    return _schema_text({**parameters, "type": "object", "x-guidance": options}, "tools", strict=strict)


def _schema_text(schema: object, param: str, *, strict: bool) -> str:
    if not isinstance(schema, Mapping):
        raise RequestError("A JSON schema must be an object.", param=param)
    try:
        text = json.dumps(schema if strict else _without_irregular(schema))
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"The schema is not JSON: {_one_line(str(error))}.", param=param) from error
    return _bounded(text, param)


def _without_irregular(schema: Any) -> Any:
    """The schema without the patterns that no automaton can follow."""
    if isinstance(schema, list | tuple):
        return [_without_irregular(part) for part in schema]
    if not isinstance(schema, Mapping):
        return schema
    return {
        key: part if key in _VALUES else _without_irregular(part)
        for key, part in schema.items()
        if not (key == "pattern" and isinstance(part, str) and _NOT_REGULAR.search(part))
    }


def _bounded(text: str, param: str) -> str:
    if len(text) > MAX_GRAMMAR_CHARACTERS:
        raise RequestError(
            f"The grammar has {len(text)} characters, more than the limit of {MAX_GRAMMAR_CHARACTERS}.", param=param
        )
    return text


def _one_line(text: str) -> str:
    """The reason alone: llguidance adds a backtrace or the mark of its terse mode."""
    for mark in ("<backtrace>", "<non-verbose/>"):
        text = text.partition(mark)[0]
    return " ".join(text.split())[:300].rstrip(". ")
