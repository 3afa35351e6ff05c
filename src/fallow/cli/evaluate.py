"""``fallow eval``."""

from __future__ import annotations

import sys
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from fallow.cli.options import Dense, Json, Model, Precision, Threads, fetch, plan_of
from fallow.errors import FallowError
from fallow.evaluate import NEEDLE, TRIALS, is_needle
from fallow.files import decoded
from fallow.terminal import print_fields, print_json, print_table, progress, spinner


def evaluate(
    model: Model,
    text: Annotated[
        str,
        typer.Argument(
            metavar="TEXT|needle|TASK",
            help="A file of text in UTF-8 or of documents (JSONL, Parquet), - for stdin; numbers hidden in long "
            "documents; a task of lm-eval, or its file.",
        ),
    ],
    window: Annotated[int, typer.Option(min=2, help="Tokens of TEXT that are scored together.")] = 1024,
    last: Annotated[
        int | None,
        typer.Option(min=1, show_default="all", help="Score only so many tokens at the end of each whole window."),
    ] = None,
    context: Annotated[
        int | None, typer.Option(min=1, show_default="the model's", help="Tokens of a document with a needle.")
    ] = None,
    trials: Annotated[int, typer.Option(min=1, help="Needles at each depth.")] = TRIALS,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Questions of a TASK at most, or windows spread over TEXT.", show_default="all"),
    ] = None,
    shots: Annotated[
        int | None, typer.Option(min=0, help="Solved examples before a question.", show_default="the task's")
    ] = None,
    dense: Dense = False,
    precision: Precision = "auto",
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Perplexity of MODEL on TEXT and, where it has a plan, how far that takes it from the dense model; or how often
    it finds a needle, or solves a TASK."""
    if is_needle(text):
        _find_needles(model, context, trials, dense, precision, threads, json)
    elif text.endswith((".yaml", ".yml")) or (text != "-" and "." not in text and not Path(text).exists()):
        _solve(model, text, limit, shots, dense, precision, threads, json)
    else:
        _score(model, text, window, last, limit, dense, precision, threads, json)


def _score(
    model: str,
    text: str,
    window: int,
    last: int | None,
    limit: int | None,
    is_dense: bool,
    precision: Precision,
    threads: Threads,
    json: bool,
) -> None:
    from fallow.data.sources import texts_in

    texts = [read_text(text)] if text == "-" else list(texts_in(Path(text)))

    from fallow.engine.runner import ModelRunner
    from fallow.evaluate.divergence import divergence
    from fallow.evaluate.perplexity import perplexity, windows_of
    from fallow.models.checkpoint import open_checkpoint
    from fallow.models.rope import longest_context
    from fallow.models.tokenizer import load_tokenizer
    from fallow.plan import SparsityPlan

    path = fetch(model)
    with spinner(f"Loading {model}"):
        tokenizer, checkpoint = load_tokenizer(path), open_checkpoint(path)
        tokenizer.check_vocabulary(checkpoint.config.vocab_size, model)
        window = min(window, longest_context(checkpoint.config.rope, checkpoint.config.max_position_embeddings))
        windows = windows_of(tokenizer, texts, window=window, last=last, limit=limit)
        pages = -(-window // ModelRunner.page_size)
        plan = plan_of(is_dense) or SparsityPlan.beside(path) or SparsityPlan.dense()

        def runner_of(plan: SparsityPlan) -> ModelRunner:
            return ModelRunner(checkpoint, precision=precision, threads=threads, num_pages=pages, plan=plan)

        runner = runner_of(plan)
    found = None
    with closing(runner), progress(unit="tokens") as bar:
        result = perplexity(runner, tokenizer, windows, last=last, progress=bar)
        if not plan.is_dense:
            with closing(runner_of(SparsityPlan.dense())) as dense:
                found = divergence(dense, runner, windows, last=last, progress=bar)
    fields = {"model": model, "text": text, "tokens": result.tokens}
    fields |= {"perplexity": result.perplexity, "bits_per_byte": result.bits_per_byte}
    if json:
        kl_to_dense, ratio = (None, None) if found is None else (found.nats, found.perplexity_ratio)
        print_json({**fields, "kl_to_dense": kl_to_dense, "perplexity_ratio": ratio, "accuracy": None})
    elif found is None:
        print_fields(fields)
    else:
        print_fields({**fields, "kl_to_dense": found.nats, "over_dense": f"{found.perplexity_ratio - 1:+.2%}"})


def _find_needles(
    model: str, context: int | None, trials: int, dense: bool, precision: Precision, threads: Threads, json: bool
) -> None:
    from fallow.engine.engine import Engine
    from fallow.engine.sampling import SamplingParams
    from fallow.evaluate.needle import find_needles

    path = fetch(model)
    with spinner(f"Loading {model}"):
        engine = Engine(
            path,
            precision=precision,
            threads=threads,
            max_context=context,
            max_num_seqs=4,
            plan=plan_of(dense),
        )

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


def _solve(
    model: str,
    task: str,
    limit: int | None,
    shots: int | None,
    dense: bool,
    precision: Precision,
    threads: Threads,
    json: bool,
) -> None:
    try:
        from fallow.evaluate.tasks import HarnessModel, Writing, accuracy, run_task
    except ImportError as error:
        raise FallowError(
            f"{task} is no file, and tasks need lm-eval ({error}): pip install 'fallow[eval]', or give a text file."
        ) from error
    from fallow.engine.engine import Engine
    from fallow.engine.sampling import SamplingParams

    path = fetch(model)
    with spinner(f"Loading {model}"):
        # Pages that a prefix keeps would be overwritten when a text is scored.
        engine = Engine(
            path,
            precision=precision,
            threads=threads,
            max_num_seqs=8,
            prefix_caching=False,
            plan=plan_of(dense),
        )

    def writes(prompts: list[list[int]], how: Writing) -> list[str]:
        outputs = engine.generate(prompts, SamplingParams(seed=0, **asdict(how)))
        return [output.outputs[0].text for output in outputs]

    with engine, progress(unit="answers") as bar:
        solver = HarnessModel(engine.runner, writes, engine.tokenizer, progress=bar)
        results = run_task(solver, task, limit=limit, shots=shots)
    if json:
        nothing = dict.fromkeys(("perplexity", "bits_per_byte", "kl_to_dense", "tokens"))
        tasks = [{"task": r.task, "questions": r.questions, "metrics": r.metrics} for r in results]
        print_json({"model": model, "task": task, "accuracy": accuracy(results), **nothing, "tasks": tasks})
        return
    print_table(
        {"task": "left", "questions": "right", "metric": "left", "value": "right"},
        [(r.task, r.questions, name, f"{value:.4f}") for r in results for name, value in r.metrics.items()],
    )


def read_text(name: str) -> str:
    return decoded(sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes(), name)
