"""The tables that people read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from fallow.bench.loads import Load
from fallow.bench.result import OURS, BenchResult, Run

_Key = tuple[str, int | None, int | None]


@dataclass(frozen=True)
class _Column:
    """A column of the cost table: which run of an engine it shows, which field of it, and times what."""

    name: str
    wanted: Callable[[Run], bool]
    field: Callable[[Run], float | None]
    scale: float

    def cell(self, run: Run | None) -> str:
        value = self.field(run) if run else None
        return "" if value is None else _number(value * self.scale)


def bench_tables(result: BenchResult) -> RenderableType:
    """Speed, cost, and what was left out, as one renderable of at most about 100 columns."""
    engines = list(dict.fromkeys((run.engine, run.precision) for run in result.runs if run.load != "trace"))
    parts: list[RenderableType] = [_heading(result)]
    if engines or result.quality:
        parts += [_speed(result, engines), _cost(result, engines)]
    if any(run.load == "trace" for run in result.runs):
        parts.append(_trace(result))
    parts += [Text(f"Left out: {skipped.peer}: {skipped.reason}", style="yellow") for skipped in result.skipped]
    parts.append(Text(_footnote(result), style="dim"))
    return Group(*parts)


def print_bench(result: BenchResult, console: Console) -> None:
    """The tables on ``console``."""
    console.print(bench_tables(result))


def _heading(result: BenchResult) -> Text:
    machine = result.machine
    gigabytes = machine["memory_bytes"] / 2**30
    return Text(f"{result.model} on {machine['cpu']}, {machine['threads']} threads, {gigabytes:.0f} GiB", style="bold")


def _footnote(result: BenchResult) -> str:
    is_apart = any(run.is_apart for run in result.runs)
    apart = " * Sequences hardly ran at once: of the whole run, prompts among it." if is_apart else ""
    texts = dict.fromkeys(f" Perplexity of {q.text}, {q.tokens:,} tokens." for q in result.quality)
    return (
        f"Tokens per second over the whole batch. $ at {result.usd_per_hour:.4g} an hour ({result.price_source}). "
        f"Energy: {result.energy_method}.{apart}" + "".join(texts)
    )


def _speed(result: BenchResult, engines: list[tuple[str, str]]) -> Table:
    measured = [run for run in result.runs if run.load != "trace"]
    keys: list[_Key] = list(dict.fromkeys((run.load, run.batch, run.context) for run in measured))
    table = Table(title="tokens/s", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("engine")
    for key in keys:
        table.add_column(_title(key), justify="right")
    runs = {(run.engine, run.precision, run.load, run.batch, run.context): run for run in result.runs}
    for engine, precision in engines:
        cells = []
        for key in keys:
            run = runs.get((engine, precision, *key))
            cells.append(_number(run.tokens_per_s) + "*" * run.is_apart if run else "")
        table.add_row(f"{engine} {precision}", *cells, style="bold" if engine == OURS else None)
    ratios = {(ratio.load, ratio.batch, ratio.context): ratio for ratio in result.ratios}
    if ratios:
        table.add_section()
        cells = [f"{ratios[key].ratio:.2f}" if key in ratios else "" for key in keys]
        table.add_row("fallow / best peer", *cells, style="bold")
    planned = {(found.precision, found.load, found.batch, found.context): found.speed for found in result.plan_ratios}
    for precision in dict.fromkeys(found[0] for found in planned):
        cells = [f"{planned[precision, *key]:.2f}" if (precision, *key) in planned else "" for key in keys]
        table.add_row(f"{precision}: plan / dense", *cells, style="bold")
    return table


def _cost(result: BenchResult, engines: list[tuple[str, str]]) -> Table:
    decodes = [run for run in result.runs if run.load == "decode" and run.context is not None]
    shortest = min((run.context or 0 for run in decodes), default=0)
    batches = sorted({run.batch or 0 for run in decodes if run.context == shortest})
    ends = list(dict.fromkeys((*batches[:1], *batches[-1:])))
    table = Table(title="cost", title_justify="left", box=box.SIMPLE_HEAD)
    columns: list[_Column] = [
        _Column("first token ms", lambda run: run.load == "prefill", lambda run: run.ttft_s, 1000),
        _Column("peak MB", lambda run: run.peak_memory_bytes is not None, lambda run: run.peak_memory_bytes, 1e-6),
    ]
    for batch in ends:
        at = ("decode", batch, shortest)
        wanted = partial(_is_at, at)
        columns += [
            _Column(f"mJ/token ×{batch}", wanted, lambda run: run.joules_per_token, 1000),
            _Column(f"$/M tokens ×{batch}", wanted, lambda run: run.usd_per_million_output_tokens, 1),
        ]
    quality = {(found.engine, found.precision): found for found in result.quality}
    table.add_column("engine")
    for name in [column.name for column in columns] + ["perplexity"] * bool(quality):
        table.add_column(name, justify="right")
    rows = list(dict.fromkeys([*engines, *quality]))
    for engine, precision in rows:
        cells = [column.cell(_first(result, engine, precision, column.wanted)) for column in columns]
        if quality:
            found = quality.get((engine, precision))
            cells.append(f"{found.perplexity:.3f}" if found else "")
        table.add_row(f"{engine} {precision}", *cells, style="bold" if engine == OURS else None)
    return table


def _trace(result: BenchResult) -> Table:
    """The highest rate that each server bore, and what it was like then."""
    table = Table(title="trace, at the highest rate within the objective", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("engine")
    names = ("requests/s", "tokens/s", "first token p90 s", "per token p90 ms", "mJ/token", "$/M tokens")
    for name in names:
        table.add_column(name, justify="right")
    for run in (run for run in result.runs if run.load == "trace"):
        best = run.details.get("best") or {}
        values = (
            best.get("requests_per_s"),
            run.tokens_per_s,
            best.get("ttft_p90"),
            _times(best.get("tpot_p90"), 1000),
            _times(run.joules_per_token, 1000),
            run.usd_per_million_output_tokens,
        )
        cells = ["" if value is None else _number(value) for value in values]
        table.add_row(f"{run.engine} {run.precision}", *cells, style="bold" if run.engine == OURS else None)
    return table


def _times(value: float | None, scale: float) -> float | None:
    return None if value is None else value * scale


def _first(result: BenchResult, engine: str, precision: str, wanted: Callable[[Run], bool]) -> Run | None:
    for run in result.runs:
        if (run.engine, run.precision) == (engine, precision) and wanted(run):
            return run
    return None


def _is_at(key: _Key, run: Run) -> bool:
    return (run.load, run.batch, run.context) == key


def _number(value: float) -> str:
    """Three digits that mean something, and thousands with commas."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _title(key: _Key) -> str:
    load, batch, context = key
    return Load(load, batch or 1, context or 0, 0).title.replace("decode ", "")  # type: ignore[arg-type]
