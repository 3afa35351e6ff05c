"""The OpenAPI description: FastAPI writes the answers, this adds the request bodies.

The handlers read and check their bodies themselves (limits, one-sentence errors), so FastAPI does not see the types.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from fallow.server.requests import ChatCompletionRequest, CompletionRequest
from fallow.server.responses import ErrorResponse

_BODIES: dict[str, type[BaseModel]] = {
    "/v1/chat/completions": ChatCompletionRequest,
    "/v1/completions": CompletionRequest,
}
_ERRORS = {
    400: "A field is wrong; the message names it.",
    401: "The API key is missing or wrong.",
    404: "The model is not served here.",
    413: "The body is over the limit.",
    429: "The queue is full; Retry-After says when to come back.",
    500: "The server failed.",
    503: "The server is shutting down.",
}


def error_responses() -> dict[int | str, dict[str, Any]]:
    """The error answers of a completion route."""
    return {status: {"model": ErrorResponse, "description": text} for status, text in _ERRORS.items()}


def describe_routes(app: FastAPI) -> None:
    """Let ``app.openapi()`` know the request bodies, the event streams and the key."""
    without_bodies = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is not None:
            return app.openapi_schema
        document = without_bodies()
        schemas = document["components"]["schemas"]
        references, definitions = models_json_schema(
            [(model, "validation") for model in _BODIES.values()], ref_template="#/components/schemas/{model}"
        )
        schemas.update(definitions["$defs"])
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for path, model in _BODIES.items():
            operation = document["paths"][path]["post"]
            operation["requestBody"] = {
                "required": True,
                "content": {"application/json": {"schema": references[model, "validation"]}},
            }
            operation["responses"]["200"]["content"]["text/event-stream"] = {
                "schema": {"type": "string", "description": "Where stream is true: one JSON chunk an event."}
            }
        for path, operations in document["paths"].items():
            if path.startswith("/v1/"):
                for operation in operations.values():
                    operation["security"] = [{}, {"key": []}]
        app.openapi_schema = document
        return document

    app.openapi = openapi  # type: ignore[method-assign]
