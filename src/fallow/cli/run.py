"""``fallow run``."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated

import typer

from fallow.cli.options import DEFAULT_MODEL, Dense, Json, Precision, Speculation, Threads, fetch, plan_of
from fallow.terminal import note, print_json, spinner, write_text

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def run(
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", show_default=DEFAULT_MODEL, help="A known name, a hub id, a file or a folder."),
    ] = None,
    prompt: Annotated[str | None, typer.Argument(metavar="PROMPT", help="Without one, a chat begins.")] = None,
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0 always takes the likeliest token.")] = 0.2,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Sample from this much of the probability.")] = 0.9,
    top_k: Annotated[int, typer.Option(min=0, help="Sample from this many tokens; 0 is all.")] = 0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Length of an answer at most.")] = 512,
    seed: Annotated[int | None, typer.Option(min=0, help="The same seed gives the same answer.")] = None,
    speculation: Speculation = "off",
    dense: Dense = False,
    precision: Precision = "auto",
    threads: Threads = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue PROMPT as it is, without the chat template.")] = False,
    json: Json = False,
) -> None:
    """Chat in the terminal, or give one answer to PROMPT.

    An argument alone is MODEL if it is a known or stored name, a hub id (owner/name), ends in .gguf, or is a file or
    folder that exists; else it is PROMPT, for the default model. Where stdin is not a terminal, PROMPT comes from it.
    """
    model, prompt = model_and_prompt(model, prompt)
    if prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.read()
    if prompt is None and (json or raw):
        raise typer.BadParameter("--json and --raw need a PROMPT")
    if prompt is not None and not prompt.strip():
        raise typer.BadParameter("PROMPT is empty")

    from fallow.cli.conversation import Conversation, chat
    from fallow.engine.engine import Engine
    from fallow.engine.sampling import SamplingParams

    sampling = SamplingParams(temperature=temperature, top_p=top_p, top_k=top_k, max_tokens=max_tokens, seed=seed)
    fetch(model)
    with spinner(f"Loading {model}"):
        engine = Engine(
            model,
            precision=precision,
            threads=threads,
            max_num_seqs=1,
            speculation=None if speculation == "off" else speculation,
            plan=plan_of(dense),
        )
    try:
        conversation = Conversation(engine, sampling, system=system)
        if prompt is None:
            chat(conversation)
            return
        answer = conversation.answer(prompt, (lambda text: None) if json else write_text, raw=raw)
        if answer.finish_reason == "cancelled":
            raise KeyboardInterrupt
        if json:
            print_json(answer.to_json())
        else:
            write_text("\n")
            note(answer.summary())
    finally:
        engine.close()


def model_and_prompt(first: str | None, second: str | None) -> tuple[str, str | None]:
    """Which of the two arguments is the model; the rule stands in the command's help."""
    if first is None or second is not None or is_model(first):
        return first or DEFAULT_MODEL, second
    return DEFAULT_MODEL, first


def is_model(word: str) -> bool:
    from fallow.models.known import KNOWN_MODELS
    from fallow.models.store import stored_models

    if word in KNOWN_MODELS or word in {model.name for model in stored_models()}:
        return True
    if word.endswith(".gguf") or HUB_ID.fullmatch(word):
        return True
    try:
        return word != "" and Path(word).expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # a prompt that no path can be
        return False
