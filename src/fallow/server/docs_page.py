"""``/docs``: the OpenAPI description as one plain page.

FastAPI's own page loads its scripts from a content delivery network, which a closed network does not reach.
"""

from __future__ import annotations

from html import escape
from typing import Any

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid #ddd; } code { background: #f3f3f3; padding: 0 .25em; }
table { border-collapse: collapse; width: 100%; } td, th { text-align: left; vertical-align: top;
padding: .25rem .75rem .25rem 0; border-bottom: 1px solid #eee; } .method { text-transform: uppercase; color: #26a; }
@media (prefers-color-scheme: dark) { body { background: #181818; color: #ddd; } code { background: #2a2a2a; }
h2, td, th { border-color: #333; } .method { color: #7bf; } a { color: #8cf; } }
"""


def _type(schema: dict[str, Any]) -> str:
    """A schema in a few words, as HTML."""
    if "$ref" in schema:
        name = escape(schema["$ref"].rsplit("/", 1)[-1])
        return f'<a href="#{name}">{name}</a>'
    if "const" in schema:
        return f"<code>{escape(repr(schema['const']))}</code>"
    if "enum" in schema:
        return " | ".join(f"<code>{escape(repr(value))}</code>" for value in schema["enum"])
    for key in ("anyOf", "oneOf"):
        if key in schema:
            return " | ".join(_type(branch) for branch in schema[key])
    kind = schema.get("type", "any")
    if kind == "array":
        return f"array of {_type(schema.get('items', {}))}"
    bounds = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = ", ".join(f"{sign} {schema[key]}" for key, sign in bounds.items() if key in schema)
    return escape(f"{kind} ({limits})" if limits else str(kind))


def _fields(schema: dict[str, Any]) -> str:
    required = schema.get("required", [])
    rows = "".join(
        f"<tr><td><code>{escape(name)}</code></td><td>{_type(field)}</td>"
        f"<td>{'required. ' if name in required else ''}{escape(field.get('description', ''))}</td></tr>"
        for name, field in schema.get("properties", {}).items()
    )
    return f"<table><tr><th>field</th><th>type</th><th></th></tr>{rows}</table>"


def _operation(path: str, method: str, operation: dict[str, Any]) -> str:
    parts = [
        f'<h2><span class="method">{escape(method)}</span> {escape(path)}</h2>',
        f"<p>{escape(operation.get('description', ''))}</p>",
    ]
    if "requestBody" in operation:
        body = operation["requestBody"]["content"]["application/json"]["schema"]
        parts.append(f"<p>Body: {_type(body)}</p>")
    rows = "".join(
        f"<tr><td>{escape(status)}</td><td>{escape(answer.get('description', ''))}</td><td>"
        + ", ".join(f"{escape(kind)}: {_type(c.get('schema', {}))}" for kind, c in answer.get("content", {}).items())
        + "</td></tr>"
        for status, answer in operation["responses"].items()
    )
    parts.append(f"<table><tr><th>status</th><th></th><th>answer</th></tr>{rows}</table>")
    return "".join(parts)


def docs_page(document: dict[str, Any]) -> str:
    """The page for an OpenAPI document: every path, and every type with its fields."""
    title = escape(f"{document['info']['title']} {document['info']['version']}")
    operations = "".join(
        _operation(path, method, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    )
    types = "".join(
        f'<h2 id="{escape(name)}">{escape(name)}</h2>{_fields(schema)}'
        for name, schema in sorted(document["components"]["schemas"].items())
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body><h1>{title}</h1>'
        f'<p>An OpenAI-compatible server. For programs: <a href="/openapi.json">/openapi.json</a>.</p>'
        f"{operations}{types}</body></html>"
    )
