"""``fallow eval``."""

from __future__ import annotations

import sys
from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer

from fallow.cli.options import Json, Model, Precision, Threads, fetch
from fallow.files import decoded
from fallow.terminal import print_fields, print_json, print_table, progress, spinner

NEEDLE = "needle"


def evaluate(
    model: Model,
    text: Annotated[
        str,
        typer.Argument(
            metavar="TEXT|needle", help="A text file in UTF-8, - for stdin, or numbers hidden in long documents."
        ),
    ],
    window: Annotated[int, typer.Option(min=2, help="Tokens of TEXT that are scored together.")] = 1024,
    context: Annotated[
        int | None, typer.Option(min=1, show_default="the model's", help="Tokens of a document with a needle.")
    ] = None,
    trials: Annotated[int, typer.Option(min=1, help="Needles at each depth.")] = 20,
    precision: Precision = "auto",
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Perplexity of MODEL on TEXT and, where it has a plan, how far that takes it from the dense model; or how often
    it finds a needle."""
    if text == NEEDLE and not Path(text).exists():
        _find_needles(model, context, trials, precision, threads, json)
    else:
        _score(model, text, window, precision, threads, json)


def _score(model: str, text: str, window: int, precision: Precision, threads: Threads, json: bool) -> None:
    content = read_text(text)

    from fallow.engine.runner import ModelRunner
    from fallow.evaluate.divergence import divergence
    from fallow.evaluate.perplexity import perplexity, token_windows
    from fallow.models.checkpoint import open_checkpoint
    from fallow.models.rope import longest_context
    from fallow.models.tokenizer import load_tokenizer
    from fallow.plan import SparsityPlan

    path = fetch(model)
    with spinner(f"Loading {model}"):
        tokenizer, checkpoint = load_tokenizer(path), open_checkpoint(path)
        tokenizer.check_vocabulary(checkpoint.config.vocab_size, model)
        longest = min(window, longest_context(checkpoint.config.rope, checkpoint.config.max_position_embeddings))
        pages = -(-longest // ModelRunner.page_size)
        plan = SparsityPlan.beside(path) or SparsityPlan.dense()

        def runner_of(plan: SparsityPlan) -> ModelRunner:
            return ModelRunner(checkpoint, precision=precision, threads=threads, num_pages=pages, plan=plan)

        runner = runner_of(plan)
    kl_to_dense = None
    with closing(runner), progress(unit="tokens") as bar:
        result = perplexity(runner, tokenizer, content, window=window, progress=bar)
        if not plan.is_dense:
            windows = token_windows(tokenizer, content, window=min(window, runner.max_context))
            with closing(runner_of(SparsityPlan.dense())) as dense:
                kl_to_dense = divergence(dense, runner, windows, progress=bar)
    fields = {"model": model, "text": text, "tokens": result.tokens}
    fields |= {"perplexity": result.perplexity, "bits_per_byte": result.bits_per_byte}
    if json:
        print_json({**fields, "kl_to_dense": kl_to_dense, "accuracy": None})
    else:
        print_fields(fields if kl_to_dense is None else {**fields, "kl_to_dense": kl_to_dense})


def _find_needles(
    model: str, context: int | None, trials: int, precision: Precision, threads: Threads, json: bool
) -> None:
    from fallow.engine.engine import Engine
    from fallow.engine.sampling import SamplingParams
    from fallow.evaluate.needle import find_needles

    path = fetch(model)
    with spinner(f"Loading {model}"):
        engine = Engine(path, precision=precision, threads=threads, max_context=context, max_num_seqs=4)

    def answers(prompts: list[list[int]], tokens: int) -> list[str]:
        outputs = engine.generate(prompts, SamplingParams(temperature=0, max_tokens=tokens))
        return [output.outputs[0].text for output in outputs]

    with engine, progress(unit="documents") as bar:
        result = find_needles(answers, engine.tokenizer, context=engine.max_context, trials=trials, progress=bar)
    depths = [{"depth": depth, "accuracy": accuracy} for depth, accuracy in result.accuracies.items()]
    fields = {"model": model, "task": NEEDLE, "tokens": result.tokens, "accuracy": result.accuracy}
    if json:
        nothing = dict.fromkeys(("perplexity", "bits_per_byte", "kl_to_dense"))
        print_json({**fields, **nothing, "context": result.context, "trials": trials, "depths": depths})
        return
    print_fields({**fields, "context": result.context})
    print_table(
        {"depth": "right", "found": "right"},
        [(f"{depth['depth']:.0%}", f"{depth['accuracy']:.0%} of {trials}") for depth in depths],
    )


def read_text(name: str) -> str:
    return decoded(sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes(), name)
