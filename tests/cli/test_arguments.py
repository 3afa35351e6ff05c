"""Which argument of `fallow run` is the model and which the prompt."""

from __future__ import annotations

import pytest

from fallow.cli.run import model_and_prompt

DEFAULT = "smollm2-135m"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((None, None), (DEFAULT, None)),
        (("smollm2-135m", None), ("smollm2-135m", None)),
        (("HuggingFaceTB/SmolLM2-135M-Instruct", None), ("HuggingFaceTB/SmolLM2-135M-Instruct", None)),
        (("gone.gguf", None), ("gone.gguf", None)),
        (("hello", None), (DEFAULT, "hello")),
        (("What is 1/2 of 10?", None), (DEFAULT, "What is 1/2 of 10?")),
        (("", None), (DEFAULT, "")),
        (("long " * 2000, None), (DEFAULT, "long " * 2000)),
        (("nul\0byte", None), (DEFAULT, "nul\0byte")),
        (("~nobody-has-this-name", None), (DEFAULT, "~nobody-has-this-name")),
        (("anything", "hello"), ("anything", "hello")),
        (("hello", "smollm2-135m"), ("hello", "smollm2-135m")),
    ],
)
def test_model_and_prompt(arguments, expected):
    assert model_and_prompt(*arguments) == expected


def test_a_folder_alone_is_a_model(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    assert model_and_prompt("model", None) == ("model", None)
    assert model_and_prompt(str(tmp_path / "model"), None) == (str(tmp_path / "model"), None)
