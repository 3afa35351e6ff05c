"""The child process that renders chat templates; run as a script, imports nothing of fallow.

Arguments: processor seconds a template may take, bytes of memory, characters of output. Each line of standard input is
a JSON object ``{"source", "variables"}``; each line of standard output is
``{"kind": "ok" | "messages" | "template" | "limit", "text"}``. A template that exceeds the processor time ends the
process: the signal's default action is the only one that also interrupts a long operation inside the interpreter.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from datetime import datetime
from typing import Any

from jinja2 import Environment, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


class OutputLimitError(Exception):
    """The rendered text is longer than any prompt."""


class RefusedError(Exception):
    """The template called ``raise_exception``."""


class GenerationBlock(Extension):
    """``{% generation %}`` marks what an assistant wrote, for training; here it renders as it is."""

    tags = {"generation"}  # noqa: RUF012 (declared so by Jinja)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


def tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON without the HTML escapes of Jinja's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def raise_exception(message: object) -> None:
    """How a template says that it does not take these messages."""
    raise RefusedError(str(message)[:500])


def strftime_now(format: str) -> str:
    """The local time of now."""
    return datetime.now().strftime(format)


def make_environment() -> Environment:
    """The Jinja environment in which Hugging Face chat templates are written."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals.update(raise_exception=raise_exception, strftime_now=strftime_now)
    return environment


def render(
    environment: Environment, compiled: dict[str, Any], request: dict[str, Any], max_output: int
) -> tuple[str, str]:
    """The kind and the text of one reply; ``compiled`` keeps the last templates."""
    source = request["source"]
    try:
        if source not in compiled:
            if len(compiled) >= 8:
                compiled.clear()
            compiled[source] = environment.from_string(source)
        parts, length = [], 0
        for part in compiled[source].generate(**request["variables"]):
            parts.append(part)
            length += len(part)
            if length > max_output:
                raise OutputLimitError
        return "ok", "".join(parts)
    except (MemoryError, OutputLimitError):
        return "limit", ""
    except RefusedError as error:
        return "messages", str(error)
    except (TemplateSyntaxError, SecurityError, RecursionError, SyntaxError) as error:
        return "template", f"{type(error).__name__}: {error}"[:500]
    except Exception as error:
        return "messages", f"{type(error).__name__}: {error}"[:500]


def main(cpu_seconds: int, memory_bytes: int, max_output: int) -> None:
    """Serve requests until standard input ends."""
    environment = make_environment()
    compiled: dict[str, Any] = {}
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        kind, text = render(environment, compiled, json.loads(line), max_output)
        reply = json.dumps({"kind": kind, "text": text}).encode() + b"\n"
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(reply)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]))
