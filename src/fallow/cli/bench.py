"""``fallow bench``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fallow.cli.evaluate import read_text
from fallow.cli.options import DEFAULT_MODEL, Json, Model, Threads, fetch
from fallow.errors import FallowError
from fallow.terminal import console, print_json, progress

_QUICK_REPETITIONS = 1
_REPETITIONS = 3


def bench(
    model: Model = DEFAULT_MODEL,
    peer: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="llama.cpp, openvino, vllm or transformers; may be given several times."),
    ] = None,
    precision: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            show_default="auto and q8, and q4 from floating point",
            help="auto, bf16, q8 or q4; may be given several times.",
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer and shorter loads, each once, no perplexity.")] = False,
    load: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KIND:BATCH:CONTEXT",
            help="These loads and no others, such as decode:8:7680 or prefill:1:2048; may be given several times.",
        ),
    ] = None,
    repetitions: Annotated[
        int | None, typer.Option(min=1, show_default="3, or 1 with --quick", help="Times that each load is measured.")
    ] = None,
    threads: Threads = None,
    price: Annotated[
        float | None,
        typer.Option(min=0, show_default="c7a.large's", help="What the machine costs an hour, in dollars."),
    ] = None,
    text: Annotated[
        str | None, typer.Option(metavar="FILE", show_default="Python's own source", help="Text of the perplexity.")
    ] = None,
    quality_tokens: Annotated[
        int | None, typer.Option(min=0, show_default="16384", help="Tokens of it that are scored; 0 leaves it out.")
    ] = None,
    quality_only: Annotated[bool, typer.Option("--quality-only", help="Nothing but the perplexity.")] = False,
    trace: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Replay the arrivals of a trace against each engine's server.")
    ] = None,
    trace_only: Annotated[bool, typer.Option("--trace-only", help="Nothing but the trace.")] = False,
    ttft_objective: Annotated[float, typer.Option(help="Seconds to the first token, 90th percentile.")] = 2.0,
    tpot_objective: Annotated[float, typer.Option(help="Seconds a token after it, 90th percentile.")] = 0.1,
    endpoint: Annotated[
        str | None,
        typer.Option(metavar="URL", help="An OpenAI endpoint that runs already; replays the trace there too."),
    ] = None,
    endpoint_model: Annotated[
        str | None, typer.Option(metavar="NAME", show_default="MODEL", help="The model's name there.")
    ] = None,
    endpoint_key: Annotated[
        str | None, typer.Option(metavar="KEY", envvar="FALLOW_ENDPOINT_KEY", help="The API key that it wants.")
    ] = None,
    json: Json = False,
) -> None:
    """The cost table of MODEL, ours and the peers', in one run.

    "fallow bench train RECIPE" compares trainings instead; it has a help of its own.
    """
    if trace is None and (trace_only or endpoint is not None):
        raise typer.BadParameter("--trace-only and --endpoint need --trace FILE")
    if trace_only and (quick or quality_only or text is not None or quality_tokens is not None):
        raise typer.BadParameter(
            "--trace-only measures nothing else: leave out --quick, --quality-only, --text and --quality-tokens"
        )
    if load and (quick or trace_only or quality_only):
        raise typer.BadParameter("--load measures the loads that it names: leave out --quick and the --...-only")
    if quality_only and (quick or trace is not None or quality_tokens == 0):
        raise typer.BadParameter(
            "--quality-only measures nothing else: leave out --quick and --trace, and score at least one token"
        )

    from fallow.bench.loads import load_named
    from fallow.bench.quality import QualityText
    from fallow.bench.replay import Endpoint
    from fallow.bench.run import run_bench
    from fallow.bench.table import print_bench
    from fallow.bench.trace import TraceOptions

    if trace is not None and not trace.is_file():
        raise FallowError(f"{trace} is not a file: give a trace as CSV with TIMESTAMP,ContextTokens,GeneratedTokens")
    try:
        named = [load_named(text) for text in load or ()]
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    quality = None if text is None else QualityText(text, read_text(text))
    fetch(model)
    with progress(unit="steps") as bar:
        result = run_bench(
            model,
            peers=peer or (),
            precisions=precision,
            loads=named or ("none" if trace_only or quality_only else "quick" if quick else "full"),
            repetitions=repetitions or (_QUICK_REPETITIONS if quick else _REPETITIONS),
            threads=threads,
            price=price,
            text=quality,
            quality_tokens=0 if trace_only else quality_tokens,
            trace=None if trace is None else TraceOptions(trace, ttft_objective, tpot_objective),
            endpoint=None if endpoint is None else Endpoint(endpoint, endpoint_model or model, endpoint_key),
            progress=bar,
        )
    if json:
        print_json(result.to_json())
    else:
        print_bench(result, console())
