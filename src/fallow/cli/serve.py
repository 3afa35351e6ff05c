"""``fallow serve``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from fallow.cli.options import DEFAULT_MODEL, Dense, Model, Precision, Speculation, Threads, fetch, plan_of
from fallow.terminal import spinner


def serve(
    model: Model = DEFAULT_MODEL,
    host: Annotated[str, typer.Option(help="Where to listen; 0.0.0.0 is every interface.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(help="A key that clients must send, or several; also from FALLOW_API_KEY."),
    ] = None,
    api_key_file: Annotated[str | None, typer.Option(help="A file with a key a line.")] = None,
    served_model_name: Annotated[str | None, typer.Option(help="The name in the API, where it is not MODEL.")] = None,
    max_num_seqs: Annotated[int, typer.Option(min=1, help="Sequences in a batch at most.")] = 64,
    max_queue: Annotated[int, typer.Option(min=1, help="Requests that may wait for a place in the batch.")] = 1024,
    replicas: Annotated[
        int, typer.Option(min=1, help="Server processes behind the port, each with its share of the cores.")
    ] = 1,
    max_context: Annotated[
        int | None, typer.Option(min=1, show_default="the model's", help="Tokens of a sequence at most.")
    ] = None,
    speculation: Speculation = "off",
    dense: Dense = False,
    price: Annotated[float | None, typer.Option(min=0, metavar="USD", help="What the machine costs an hour.")] = None,
    precision: Precision = "auto",
    threads: Threads = None,
) -> None:
    """Serve MODEL over the OpenAI API until Ctrl-C or SIGTERM, which let it finish what was begun."""
    if any(not key.strip() for key in api_key or ()):
        raise typer.BadParameter("--api-key is empty: without a key, leave it out")

    from fallow.server import ServerSettings, load_api_keys

    api_keys = load_api_keys(api_key or (), api_key_file)
    try:
        settings = ServerSettings(
            host=host,
            port=port,
            served_model_name=served_model_name,
            api_keys=api_keys,
            price_per_hour=price,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    fetch(model)
    options: dict[str, Any] = {
        "model": model,
        "precision": precision,
        "threads": threads,
        "max_context": max_context,
        "max_num_seqs": max_num_seqs,
        "max_queue": max_queue,
        "speculation": None if speculation == "off" else speculation,
    }
    plan = plan_of(dense)
    if replicas > 1:
        from fallow.server import serve_replicas

        raise typer.Exit(serve_replicas(options, settings, replicas=replicas, plan=plan))

    from fallow.engine.engine import Engine
    from fallow.server import serve as serve_engine

    with spinner(f"Loading {model}"):
        engine = Engine(**options, plan=plan)
    try:
        serve_engine(engine, settings)
    finally:
        engine.close()
