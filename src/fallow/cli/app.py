"""The table of commands."""

from __future__ import annotations

import typer

from fallow.cli.bench import bench
from fallow.cli.bench_train import EXAMPLE as BENCH_TRAIN_EXAMPLE
from fallow.cli.bench_train import bench_train
from fallow.cli.evaluate import evaluate
from fallow.cli.info import info
from fallow.cli.options import example
from fallow.cli.pull import pull
from fallow.cli.run import run
from fallow.cli.serve import serve
from fallow.cli.sparsify import sparsify
from fallow.cli.subcommand import with_subcommand
from fallow.cli.train import train

app = typer.Typer(
    help="Run and serve language models on a native engine, with the joules and the money on the table.",
    epilog=example("fallow run 'What is a fallow field?'", "fallow serve smollm2-135m"),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(epilog=example("fallow pull smollm2-135m"))(pull)
app.command(epilog=example("fallow run", "fallow run 'What is a fallow field?'"))(run)
app.command(epilog=example("fallow serve smollm2-135m --port 8000 --api-key SECRET"))(serve)
app.command("eval", epilog=example("fallow eval smollm2-135m a.txt", "man sh | fallow eval smollm2-135m -"))(evaluate)
app.command(
    cls=with_subcommand("train", bench_train, BENCH_TRAIN_EXAMPLE),
    epilog=example(
        "fallow bench --quick",
        "fallow bench smollm2-135m --peer llama.cpp --peer openvino",
        "fallow bench train recipes/speedrun.toml",
    ),
)(bench)
app.command(epilog=example("fallow train recipes/quick.toml", "fallow run runs/quick/model --raw"))(train)
app.command(epilog=example("fallow sparsify smollm2-135m --budget 1% --text book.txt --context 4096 --out lean"))(
    sparsify
)
app.command(epilog=example("fallow info model.gguf --json"))(info)
