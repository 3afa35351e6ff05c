"""Help, bad usage, failures: what a user reads when it is not the answer."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fallow.cli import main

COMMANDS = ["pull", "run", "serve", "eval", "bench", "train", "sparsify", "info"]


def test_help_lists_every_command(fallow):
    done = fallow("--help")
    assert done.returncode == 0
    listed = done.stdout.partition("Commands:\n")[2].splitlines()[: len(COMMANDS)]
    assert [line.split()[0] for line in listed] == COMMANDS


@pytest.mark.parametrize("command", [*COMMANDS, "bench train"])
def test_help_of_a_command_has_an_example(fallow, command):
    done = fallow(*command.split(), "--help")
    assert done.returncode == 0
    assert f"  fallow {command}" in done.stdout.partition("Example:")[2]


def test_help_loads_nothing_heavy():
    heavy = ["numpy", "rich", "fastapi", "tokenizers", "huggingface_hub", "fallow._native"]
    code = f"import sys, fallow.cli.app; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["run", "--nonsense"],
        ["run", "--temperature", "-1", "hello"],
        ["run", "--precision", "q3", "hello"],
        ["run", "--json"],
        ["run", "   "],
        ["eval", "smollm2-135m"],
        ["bench", "train"],
        ["bench", "train", "recipe.toml", "--trials", "trials.jsonl"],
        ["bench", "train", "recipe.toml", "--tune", "theirs"],
        ["bench", "train", "recipe.toml", "--tune", "ours", "--fresh"],
        ["sparsify", "smollm2-135m"],
        ["sparsify", "smollm2-135m", "--out", "lean", "--budget", "little"],
        ["sparsify", "smollm2-135m", "--out", "lean", "--heal", "0"],
        ["serve", "--port", "99999"],
        ["serve", "--api-key", ""],
    ],
)
def test_bad_usage_is_2(fallow, arguments):
    done = fallow(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Error: " in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["pull", "run", "serve", "eval", "bench", "info"])
@pytest.mark.parametrize("kind", ["missing", "damaged"])
def test_a_bad_model_is_one_line_and_1(fallow, tmp_path, command, kind):
    model = tmp_path / "model.gguf"
    if kind == "damaged":
        model.write_bytes(b"GGUF\x03\x00\x00\x00" + b"\xff" * 64)
    text = tmp_path / "text.txt"
    text.write_text("The field lies fallow.")
    more = {"run": ["hello"], "eval": [str(text)], "bench": ["--quick"]}.get(command, [])
    done = fallow(command, str(model), *more)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("fallow: ")
    assert done.stderr.count("\n") == 1
    assert "model.gguf" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_text_that_is_not_there_is_one_line_and_1(fallow, tmp_path):
    done = fallow("eval", "smollm2-135m", str(tmp_path / "no.txt"))
    assert done.returncode == 1
    assert "no.txt" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_closed_pipe_is_quiet(environment):
    # The reader goes before the first byte is written.
    process = subprocess.Popen(
        [sys.executable, "-m", "fallow", "--help"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        text=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait(60) == 1


def test_an_error_of_ours_is_one_line_and_1(monkeypatch, capfd, tmp_path):
    def fail(*arguments: object, **options: object) -> Path:
        raise KeyError("a bug")

    monkeypatch.setattr("fallow.models.store.pull", fail)
    monkeypatch.delenv("FALLOW_TRACEBACK", raising=False)
    with pytest.raises(SystemExit) as exit_:
        main(["pull"])
    assert exit_.value.code == 1
    error = capfd.readouterr().err
    assert error.startswith("fallow: internal error: KeyError: 'a bug'")
    assert "Traceback" not in error


def test_ctrl_c_is_130_and_quiet(monkeypatch, capfd):
    def interrupt(*arguments: object, **options: object) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr("fallow.models.store.pull", interrupt)
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit) as exit_:
            main(["pull"])
    finally:
        signal.signal(signal.SIGINT, handler)
    assert exit_.value.code == 130
    assert capfd.readouterr().err == ""
