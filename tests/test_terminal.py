"""What reaches stdout: one JSON object, or text that cannot act on the terminal."""

from __future__ import annotations

import io
import json
import sys

from fallow.terminal import print_json, write_text


class FakeTerminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_json_holds_no_infinity(capsys):
    print_json({"a": float("nan"), "b": [1.5, float("inf")], "c": ("ü", None, True)})
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert json.loads(out, parse_constant=lambda name: 1 / 0) == {"a": None, "b": [1.5, None], "c": ["ü", None, True]}


def test_an_answer_cannot_act_on_the_terminal(monkeypatch):
    terminal = FakeTerminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    write_text("\x1b]0;title\x07a\tb\nc\x9b2J\r\x00é\u00a0 👩\u200d🌾")
    assert terminal.getvalue() == "]0;titlea\tb\nc2Jé\u00a0 👩\u200d🌾"


def test_a_pipe_gets_the_answer_as_it_is(capsys):
    write_text("\x1b[1ma\r\n")
    assert capsys.readouterr().out == "\x1b[1ma\r\n"
