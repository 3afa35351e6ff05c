"""`fallow run` with the real model: through pipes, and in a terminal as a person uses it."""

from __future__ import annotations

import json
import os
import pty
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

LONG = "Write a very long story about a farmer, a field and a horse."
# login_tty makes the terminal on stdin this process's own: Ctrl-C then arrives as from a keyboard. A child of a job in
# the background inherits that SIGINT is ignored, and would not hear it.
IN_TERMINAL = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.login_tty(0)
os.execv(sys.executable, [sys.executable, "-m", "fallow", *sys.argv[1:]])
"""


class Terminal:
    """A command in a terminal of its own: what it shows, and keys for it."""

    def __init__(self, *arguments: str, environment: Mapping[str, str]) -> None:
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", IN_TERMINAL, *arguments], env={**environment, "TERM": "xterm"}, stdin=slave
        )
        os.close(slave)
        self.shown = ""

    def read_until(self, text: str, *, seconds: float = 300) -> str:
        """What was shown since the last call, to the end of ``text``."""
        ends = time.monotonic() + seconds
        while text not in self.shown:
            piece = self._read(ends)
            assert piece, f"the command ended before it showed {text!r}, after {self.shown[-500:]!r}"
            self.shown += piece
        before, _, self.shown = self.shown.partition(text)
        return before + text

    def type(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def close(self, *, seconds: float = 300) -> tuple[int, str]:
        """Waits for the end; the exit code and what was shown last."""
        ends = time.monotonic() + seconds
        while piece := self._read(ends):
            self.shown += piece
        return self.process.wait(seconds), self.shown

    def interrupt(self) -> tuple[int, str]:
        """Ctrl-C at a prompt, as often as it takes: one that arrives just before CPython waits for the next key is
        heard with that key only. What ``close`` gives."""
        for _ in range(60):
            self.type("\x03")
            if select.select([self.master], [], [], 5)[0]:
                break
        return self.close()

    def _read(self, ends: float) -> str:
        """The next piece, or "" where the command has closed the terminal; fails where that takes too long."""
        left = ends - time.monotonic()
        if left <= 0 or not select.select([self.master], [], [], left)[0]:
            pytest.fail(f"what was awaited was neither shown nor followed by the end; shown was {self.shown[-500:]!r}")
        try:
            return os.read(self.master, 4096).decode(errors="replace")
        except OSError:  # the other side is closed
            return ""

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)


@pytest.fixture
def terminal(environment: Mapping[str, str]) -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def open_terminal(*arguments: str) -> Terminal:
        opened.append(Terminal(*arguments, environment=environment))
        return opened[-1]

    yield open_terminal
    for each in opened:
        each.kill()


def test_one_answer(fallow, smollm2_gguf: Path):
    arguments = ["run", str(smollm2_gguf), "Say hello.", "--temperature", "0", "--max-tokens", "8"]
    plain = fallow(*arguments)
    assert plain.returncode == 0, plain.stderr
    assert "J/token" in plain.stderr
    assert "tokens/s" in plain.stderr
    machine = fallow(*arguments, "--json")
    assert machine.returncode == 0
    assert machine.stderr == ""
    assert machine.stdout.count("\n") == 1
    answer = json.loads(machine.stdout)
    assert answer["text"] + "\n" == plain.stdout
    assert 1 <= answer["completion_tokens"] <= 8
    assert answer["finish_reason"] in {"stop", "length"}
    assert answer["joules_per_token"] > 0
    assert answer["energy_source"] in plain.stderr


def test_the_prompt_may_come_from_a_pipe(fallow, smollm2_gguf: Path):
    options = ["--raw", "--temperature", "0", "--max-tokens", "4", "--json"]
    given = fallow("run", str(smollm2_gguf), "The capital of France is", *options)
    piped = fallow("run", str(smollm2_gguf), *options, stdin="The capital of France is")
    assert json.loads(given.stdout)["text"] == json.loads(piped.stdout)["text"]
    assert "Paris" in json.loads(given.stdout)["text"]


def test_a_prompt_over_the_context_is_one_line_and_1(fallow, smollm2_gguf: Path):
    done = fallow("run", str(smollm2_gguf), stdin="far too long " * 5000)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("fallow: ")
    assert done.stderr.count("\n") == 1


def test_a_model_without_a_chat_template_is_one_line_and_1(fallow, terminal, tiny_checkpoints, tmp_path: Path):
    model = shutil.copytree(tiny_checkpoints["llama"], tmp_path / "plain")
    (model / "tokenizer_config.json").unlink()
    done = fallow("run", str(model), "hello")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("fallow: This model has no chat template: ")
    assert done.stderr.count("\n") == 1
    assert fallow("run", str(model), "hello", "--raw", "--max-tokens", "2").returncode == 0
    code, shown = terminal("run", str(model)).close()
    assert code == 1
    assert "no chat template" in shown
    assert "> " not in shown


def test_ctrl_c_ends_one_answer_with_130(terminal, smollm2_gguf: Path):
    shell = terminal("run", str(smollm2_gguf), LONG, "--temperature", "0", "--max-tokens", "4000")
    shell.read_until(". ")
    shell.type("\x03")
    code, rest = shell.close()
    assert code == 130
    assert "Traceback" not in rest
    assert "fallow:" not in rest


def test_ctrl_c_while_the_model_is_loading(terminal, smollm2_gguf: Path):
    shell = terminal("run", str(smollm2_gguf), LONG)
    shown = shell.read_until("Loading")
    shell.type("\x03")
    code, rest = shell.close()
    assert code == 130
    assert "Traceback" not in rest
    assert (shown + rest).count("\x1b[?25l") == (shown + rest).count("\x1b[?25h"), "the cursor stays hidden"


def test_a_chat(terminal, smollm2_gguf: Path):
    shell = terminal("run", str(smollm2_gguf), "--temperature", "0", "--max-tokens", "4000")
    shell.read_until("> ")
    shell.type("My name is Ada. Say hello to me in one short sentence.\n")
    assert "Ada" in shell.read_until("J/token").partition("sentence.")[2]
    shell.read_until("> ")
    shell.type(LONG + "\n")
    shell.read_until(". ")
    shell.type("\x03")
    shell.read_until("J/token")
    shell.read_until("> ")
    shell.type("/reset\n")
    shell.read_until("forgotten")
    shell.read_until("> ")
    shell.type("/exit\n")
    code, rest = shell.close()
    assert code == 0
    assert "Traceback" not in rest


def test_ctrl_c_at_the_prompt_leaves(terminal, smollm2_gguf: Path):
    shell = terminal("run", str(smollm2_gguf))
    shell.read_until("> ")
    shell.type("half a thought")
    shell.read_until("thought")
    code, rest = shell.interrupt()
    assert code == 130
    assert "Traceback" not in rest
