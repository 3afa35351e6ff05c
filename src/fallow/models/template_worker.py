"""The child process that renders chat templates; run as a script, imports nothing of fallow.

Each line of standard input is a JSON object ``{"source", "variables"}``; each line of standard output is
``{"kind": "ok" | "messages" | "template" | "limit", "text"}``. A template that exceeds the processor time ends the
process: the signal's default action is the only one that also interrupts a long operation inside the interpreter.
"""

from __future__ import annotations

import json
import sys
from typing import Any

CPU_SECONDS = 2
MEMORY_BYTES = 512 << 20
MAX_OUTPUT = 4 << 20  # characters; the longest contexts are well below


class OutputLimitError(Exception):
    """The rendered text is longer than any prompt."""


class RefusedError(Exception):
    """The template called ``raise_exception``."""


def make_environment() -> Any:
    """The Jinja environment in which Hugging Face chat templates are written."""
    from datetime import datetime

    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationBlock(Extension):
        """``{% generation %}`` marks what an assistant wrote, for training; here it renders as it is."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body).set_lineno(line)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def raise_exception(message: object) -> None:
        raise RefusedError(str(message)[:500])

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    return environment


def render(environment: Any, compiled: dict[str, Any], source: str, variables: dict[str, Any]) -> tuple[str, str]:
    """The kind and the text of one reply; ``compiled`` keeps the last templates."""
    from jinja2 import TemplateSyntaxError
    from jinja2.exceptions import SecurityError

    try:
        if source not in compiled:
            if len(compiled) >= 8:
                compiled.clear()
            compiled[source] = environment.from_string(source)
        parts, length = [], 0
        for part in compiled[source].generate(**variables):
            parts.append(part)
            length += len(part)
            if length > MAX_OUTPUT:
                raise OutputLimitError
        return "ok", "".join(parts)
    except (MemoryError, OutputLimitError):
        return "limit", ""
    except (TemplateSyntaxError, SecurityError, RecursionError, SyntaxError) as error:
        return "template", f"{type(error).__name__}: {error}"[:500]
    except RefusedError as error:
        return "messages", str(error).rstrip(".")
    except Exception as error:
        return "messages", f"{type(error).__name__}: {error}"[:500].rstrip(".")


def main() -> None:
    """Serve requests until standard input ends."""
    import resource
    import signal

    environment = make_environment()
    compiled: dict[str, Any] = {}
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    for line in sys.stdin.buffer:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        kind, text = render(environment, compiled, request["source"], request["variables"])
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(json.dumps({"kind": kind, "text": text}).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
