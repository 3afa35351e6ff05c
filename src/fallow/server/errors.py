"""The errors that a client sees: OpenAI's body, and one sentence that names the field."""

from __future__ import annotations

import re
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails
from starlette.responses import JSONResponse

from fallow.errors import FallowError, OverloadedError, RequestError

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An answer other than 200: ``status``, one sentence, and OpenAI's ``param`` and ``code``."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = " ".join(message.split())  # names of fields in it are the client's: one line, whatever they hold
        self.param = param
        self.code = code
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), status_code=self.status, headers=self.headers)


def from_engine(error: FallowError, *, retry_after: int, prompt_field: str = "prompt") -> ApiError:
    """The answer to a request that the engine, the template or the grammar refused.

    ``prompt_field`` is the field of the request that the prompt was made from.
    """
    if isinstance(error, OverloadedError):
        return ApiError(429, str(error), code="overloaded", headers={"retry-after": str(retry_after)})
    if isinstance(error, RequestError):
        param = prompt_field if error.param == "prompt" else error.param
        return ApiError(400, str(error), param=param, code=error.code)
    return ApiError(400, str(error))


_UNSUPPORTED = {
    "audio": "this server writes text only",
    "functions": "it was replaced by tools",
    "function_call": "it was replaced by tool_choice",
    "web_search_options": "this server has no web search",
    "moderation": "this server has no moderation model",
}

# pydantic puts the branch of a union into an error's location; a field of the API never looks like these.
_BRANCH = re.compile(r"^(str|int|float|bool|list\[.*|dict\[.*|constrained-.*|function-.*|[A-Z]\w*|nullable.*|.*\[.*)$")


def _field(location: tuple[int | str, ...]) -> str:
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif not _BRANCH.match(part):
            path += f".{part}" if path else part
    return path[:200]


def _limits(context: dict[str, Any]) -> str:
    words = {"ge": "at least", "gt": "greater than", "le": "at most", "lt": "less than"}
    return " and ".join(f"{word} {context[key]}" for key, word in words.items() if key in context)


_EXPECTED = {
    "string": "a string",
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "list": "an array",
    "dict": "an object",
    "model": "an object",
    "model_attributes": "an object",
}


def _expected(kind: str) -> str | None:
    return _EXPECTED.get(kind.removesuffix("_type").removesuffix("_parsing"))


def _sentence(error: ErrorDetails, alternatives: list[str]) -> tuple[str, str | None]:
    kind, context, field = error["type"], error.get("ctx", {}), _field(error["loc"])
    name = field or "The request body"
    if kind == "json_invalid":
        reason = str(context.get("error", "it could not be read"))[:200]
        return f"The request body is not valid JSON: {reason}.", None
    if kind == "missing":
        return f"{name} is missing: it is required.", field
    if kind == "extra_forbidden":
        reason = _UNSUPPORTED.get(field, "this server does not know it; remove it")
        return f"{name} is not supported: {reason}.", field
    if kind == "finite_number":
        return f"{name} must be a finite number.", field
    if kind == "wrong_together":
        return str(context["message"]), str(context["param"])
    if kind == "none_required":
        return f"{name} is not supported: leave it out.", field
    if kind.startswith(("greater_than", "less_than")):
        return f"{name} must be {_limits(context)}.", field
    if kind in ("too_long", "string_too_long"):
        unit = "characters" if kind == "string_too_long" else "entries"
        return f"{name} is too long: at most {context.get('max_length')} {unit} are allowed.", field
    if kind in ("too_short", "string_too_short"):
        unit = "character(s)" if kind == "string_too_short" else "entry"
        return f"{name} is too short: it needs at least {context.get('min_length')} {unit}.", field
    if kind == "literal_error":
        return f"{name} must be {context.get('expected')}.", field
    if kind == "string_pattern_mismatch":
        return f"{name} must match the pattern {context.get('pattern')}.", field
    if kind in ("int_parsing_size", "int_from_float"):
        return f"{name} must be an integer of a reasonable size.", field
    expected = " or ".join(alternatives)
    return (f"{name} must be {expected}." if expected else f"{name} is not valid."), field or None


def from_validation(error: ValidationError) -> ApiError:
    """One sentence for a body that does not fit its schema: the first field at fault, and what it must be."""
    errors = error.errors(include_url=False, include_input=False)
    first = errors[0]
    path = _field(first["loc"])
    same = [e for e in errors if _field(e["loc"]) == path]
    if length := next((e for e in same if e["type"].endswith(("too_long", "too_short"))), None):
        message, param = _sentence(length, [])
        return ApiError(400, message, param=param or None)
    # Of a union's branches, the one that got deepest into the value is the one the client meant.
    inside = [e for e in errors if _field(e["loc"]).startswith(path) and _field(e["loc"]) != path]
    if inside and any(_expected(e["type"]) for e in same) and path:
        first = max(inside, key=lambda e: len(e["loc"]))
        same = [e for e in errors if _field(e["loc"]) == _field(first["loc"])]
    else:
        first = next((e for e in same if not _expected(e["type"])), first)
    kinds = list(dict.fromkeys(word for e in same if (word := _expected(e["type"]))))
    message, param = _sentence(first, kinds)
    return ApiError(400, message, param=param or None)
