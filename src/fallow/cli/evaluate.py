"""``fallow eval``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from fallow.cli.options import Json, Model, Precision, Threads, fetch
from fallow.files import decoded
from fallow.terminal import print_fields, print_json, progress, spinner


def evaluate(
    model: Model,
    text: Annotated[str, typer.Argument(metavar="TEXT", help="A text file in UTF-8, or - for stdin.")],
    window: Annotated[int, typer.Option(min=2, help="Tokens that are scored together.")] = 1024,
    precision: Precision = "auto",
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Perplexity of MODEL on TEXT."""
    content = read_text(text)

    from fallow.engine.runner import ModelRunner
    from fallow.evaluate.perplexity import perplexity
    from fallow.models.checkpoint import open_checkpoint
    from fallow.models.rope import longest_context
    from fallow.models.tokenizer import load_tokenizer
    from fallow.plan import SparsityPlan

    path = fetch(model)
    with spinner(f"Loading {model}"):
        tokenizer, checkpoint = load_tokenizer(path), open_checkpoint(path)
        tokenizer.check_vocabulary(checkpoint.config.vocab_size, model)
        context = min(window, longest_context(checkpoint.config.rope, checkpoint.config.max_position_embeddings))
        pages = -(-context // ModelRunner.page_size)
        runner = ModelRunner(
            checkpoint, precision=precision, threads=threads, num_pages=pages, plan=SparsityPlan.beside(path)
        )
    try:
        with progress(unit="tokens") as bar:
            result = perplexity(runner, tokenizer, content, window=window, progress=bar)
    finally:
        runner.close()
    fields = {"model": model, "text": text, "tokens": result.tokens}
    fields |= {"perplexity": result.perplexity, "bits_per_byte": result.bits_per_byte}
    if json:
        print_json({**fields, "kl_to_dense": None, "accuracy": None})
    else:
        print_fields(fields)


def read_text(name: str) -> str:
    return decoded(sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes(), name)
