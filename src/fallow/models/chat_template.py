"""Chat templates: messages to one prompt text, by the Jinja template that the checkpoint carries.

A template is a program from a file that nobody vouches for. It runs in Jinja's immutable sandbox inside a small child
process with limits on processor time, memory and output, because a sandbox alone cannot stop a template that loops for
hours or multiplies strings.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import selectors
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fallow.errors import ModelFileError, RequestError

CPU_SECONDS = 2
MEMORY_BYTES = 512 << 20
MAX_OUTPUT = 4 << 20  # characters; the longest contexts are well below
_WALL_SECONDS = 30.0  # beside the limit on processor time, for a machine that is busy with other work
_WORKER = Path(__file__).with_name("template_worker.py")
_HOSTILE = (
    "The chat template of this model took more than "
    f"{CPU_SECONDS} s, {MEMORY_BYTES >> 20} MiB or {MAX_OUTPUT >> 20} Mi characters for one prompt: "
    "it is damaged or hostile, use another template."
)


class ChatTemplate:
    """The template ``source`` of a model, with the texts of its special tokens.

    Rendered as Hugging Face does: ``trim_blocks``, ``lstrip_blocks``, ``raise_exception``, ``strftime_now``, loop
    controls, ``generation`` blocks, and a ``tojson`` that does not escape HTML.
    """

    def __init__(self, source: str, bos_token: str = "", eos_token: str = "") -> None:
        self.source = source
        self.bos_token = bos_token
        self.eos_token = eos_token

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **extra: Any,
    ) -> str:
        """The prompt of a conversation; encode it with ``add_special_tokens=False``.

        ``messages`` are those of the OpenAI API: the content is a text, or a list of ``{"type": "text", "text": ...}``
        parts, which are joined by line ends; arguments of tool calls may be JSON text. ``extra`` are more variables of
        the template. Raises ``RequestError`` where the messages do not fit the template and ``ModelFileError`` where
        the template is broken or exceeds its limits.
        """
        variables = {
            **extra,
            "messages": [_plain_message(message, i) for i, message in enumerate(messages)],
            "tools": list(tools) if tools else None,
            "add_generation_prompt": add_generation_prompt,
            "bos_token": self.bos_token,
            "eos_token": self.eos_token,
        }
        try:
            request = json.dumps({"source": self.source, "variables": variables}).encode() + b"\n"
        except (TypeError, ValueError, RecursionError) as error:
            raise RequestError(
                f"The messages or tools hold a value that is not JSON: {error}.", param="messages"
            ) from error
        reply = _worker.render(request)
        if reply is None or reply["kind"] == "limit":
            raise ModelFileError(_HOSTILE)
        text = str(reply["text"])
        if reply["kind"] == "template":
            raise ModelFileError(f"The chat template of this model is broken: {text.rstrip('.')}.")
        if reply["kind"] == "messages":
            raise RequestError(
                f"The model's chat template refuses these messages: {text.rstrip('.')}.", param="messages"
            )
        return text


def _plain_message(message: Mapping[str, Any], index: int) -> dict[str, Any]:
    where = f"messages[{index}]"
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise RequestError(f"{where} must be an object with a role that is a text.", param="messages")
    plain = dict(message)
    content = message.get("content")
    if content is None:
        plain["content"] = ""
    elif isinstance(content, list | tuple):
        plain["content"] = "\n".join(_part_text(part, f"{where}.content[{i}]") for i, part in enumerate(content))
    elif not isinstance(content, str):
        raise RequestError(f"{where}.content must be a text or a list of text parts.", param="messages")
    if message.get("tool_calls"):
        plain["tool_calls"] = _tool_calls(message["tool_calls"], where)
    return plain


def _part_text(part: object, where: str) -> str:
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, Mapping) else part
    raise RequestError(f'{where} is {kind!r:.40}; only {{"type": "text", "text": ...}} is served.', param="messages")


def _tool_calls(calls: object, where: str) -> list[dict[str, Any]]:
    """The API carries a call's arguments as JSON text, templates expect the object."""
    if not isinstance(calls, list | tuple):
        raise RequestError(f"{where}.tool_calls must be a list.", param="messages")
    plain = []
    for i, call in enumerate(calls):
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RequestError(f"{where}.tool_calls[{i}].function must have a name.", param="messages")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            # An answer that was cut short is no JSON: the template shows it as it is.
            with contextlib.suppress(ValueError, RecursionError):
                arguments = json.loads(arguments)
        plain.append({**call, "function": {**function, "arguments": arguments}})
    return plain


class _Worker:
    """One child process for all templates of this process, started at the first use and again after its death."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def render(self, request: bytes) -> dict[str, Any] | None:
        """The worker's reply, or None where it ran into a limit that ends a process."""
        with self._lock:
            process = self._started()
            assert process.stdin is not None
            try:
                process.stdin.write(request)
                process.stdin.flush()
                line = self._read_line(process)
            except BrokenPipeError:
                line = b""
            except BaseException:  # Ctrl-C between request and reply would leave the pipe out of step
                self.stop()
                raise
            if not line.endswith(b"\n"):
                self.stop()
                return None
        reply: dict[str, Any] = json.loads(line)
        return reply

    def stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    def forget(self) -> None:
        """After a fork: the child process belongs to the parent, whose pipes must not be used."""
        self._process = None
        self._lock = threading.Lock()

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self.stop()
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", str(_WORKER), str(CPU_SECONDS), str(MEMORY_BYTES), str(MAX_OUTPUT)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,  # Ctrl-C in the terminal is for the parent alone
                )
            except OSError as error:
                raise RequestError(
                    f"The chat template needs a child process, which cannot be started: {error.strerror}; "
                    "send one text to /v1/completions instead."
                ) from error
        return self._process

    @staticmethod
    def _read_line(process: subprocess.Popen[bytes]) -> bytes:
        assert process.stdout is not None
        chunks: list[bytes] = []
        deadline = time.monotonic() + _WALL_SECONDS
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while not chunks or not chunks[-1].endswith(b"\n"):
                left = deadline - time.monotonic()
                if left <= 0 or not selector.select(left):
                    return b""
                chunk = os.read(process.stdout.fileno(), 1 << 16)
                if not chunk:
                    return b""
                chunks.append(chunk)
        return b"".join(chunks)


_worker = _Worker()
atexit.register(_worker.stop)
os.register_at_fork(after_in_child=_worker.forget)
