"""The JSON contract and the tables."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from fallow.bench.loads import FULL, QUICK, loads_of
from fallow.bench.result import BenchResult, Quality, Run, Skipped
from fallow.bench.table import print_bench
from fallow.errors import FallowError

RUN_KEYS = {
    "engine",
    "precision",
    "load",
    "batch",
    "context",
    "tokens_per_s",
    "ttft_s",
    "peak_memory_bytes",
    "joules_per_token",
    "energy_source",
    "usd_per_million_output_tokens",
}


def run(engine: str, precision: str, at: tuple[str, int | None, int | None], speed: float) -> Run:
    load, batch, context = at
    return Run(
        engine=engine,
        precision=precision,
        load=load,
        batch=batch,
        context=context,
        tokens_per_s=speed,
        ttft_s=0.25,
        peak_memory_bytes=200_000_000 if (load, batch, context) == ("decode", 1, 128) else None,
        joules_per_token=0.05,
        energy_source="estimate",
        usd_per_million_output_tokens=None if load == "prefill" else 0.5,
    )


def result() -> BenchResult:
    found = BenchResult(
        model="m",
        machine={"cpu": "A CPU", "cores": 2, "threads": 2, "memory_bytes": 24 << 30},
        usd_per_hour=0.1,
        price_source="given",
        energy_method="estimate",
    )
    for engine, precision, speed in (
        ("fallow", "auto", 200.0),
        ("fallow", "q8", 300.0),
        ("llama.cpp", "Q4_0", 150.0),
        ("openvino", "int8", 100.0),
    ):
        found.runs += [run(engine, precision, (load.kind, load.batch, load.context), speed) for load in QUICK]
    found.runs.append(run("fallow", "auto", ("trace", None, None), 50.0))
    found.runs.append(run("vllm", "bf16", ("trace", None, None), 0.0))
    found.quality.append(Quality("fallow", "auto", "text", 17.25, 0.9, 1000, 1024))
    found.skipped.append(Skipped("transformers", "it was not to be had"))
    return found


def test_json_has_the_keys_that_were_promised() -> None:
    found = json.loads(json.dumps(result().to_json(), allow_nan=False))
    assert {"model", "machine", "runs", "quality", "ratios", "skipped"} <= set(found)
    assert all(set(entry) >= RUN_KEYS for entry in found["runs"])
    assert set(found["quality"][0]) >= {"engine", "precision", "text", "perplexity"}
    assert set(found["ratios"][0]) >= {"load", "batch", "context", "best_peer", "ratio"}
    assert found["skipped"] == [{"peer": "transformers", "reason": "it was not to be had"}]


def test_ratios_compare_the_best_of_ours_with_the_best_peer_at_each_load() -> None:
    ratios = result().ratios
    assert [(r.load, r.batch, r.context) for r in ratios] == [(load.kind, load.batch, load.context) for load in QUICK]
    assert all(r.ratio == pytest.approx(2.0) and r.best_peer == "llama.cpp Q4_0" and r.ours == "q8" for r in ratios)


def test_without_peers_there_are_no_ratios() -> None:
    found = result()
    found.runs = [r for r in found.runs if r.engine == "fallow"]
    assert found.ratios == []


@pytest.mark.parametrize("width", [60, 120])
def test_tables_show_every_engine_every_load_and_what_was_left_out(width: int) -> None:
    out = io.StringIO()
    print_bench(result(), Console(file=out, width=width))
    text = out.getvalue()
    assert "it was not to be had" in " ".join(text.split())
    if width == 120:
        for word in (
            "fallow auto",
            "fallow q8",
            "llama.cpp Q4_0",
            "openvino int8",
            "2.00",
            "17.250",
            "A CPU",
            "×8",
            "trace",
            "vllm bf16",
        ):
            assert word in text


def test_a_speed_of_sequences_that_ran_apart_is_marked() -> None:
    found = result()
    shown = {}
    for together in (True, False):
        found.runs[0] = replace(found.runs[0], tokens_per_s=123.0, details={} if together else {"together": False})
        out = io.StringIO()
        print_bench(found, Console(file=out, width=120))
        shown[together] = " ".join(out.getvalue().split())
    assert "123*" in shown[False]
    assert "hardly ran at once" in shown[False]
    assert "*" not in shown[True]


def test_a_result_without_runs_is_shown_too() -> None:
    found = result()
    found.runs, found.quality = [], []
    out = io.StringIO()
    print_bench(found, Console(file=out, width=120))
    assert "transformers" in out.getvalue()
    assert found.to_json()["ratios"] == []


def test_loads_that_do_not_fit_the_context_are_left_out() -> None:
    assert loads_of("full", 8192) == FULL
    assert [load.context for load in loads_of("full", 5000)] == [512, 128, 128, 128, 128, 128, 4096]
    assert loads_of("none", 8192) == ()
    with pytest.raises(FallowError, match="too short"):
        loads_of("quick", 64)
    with pytest.raises(FallowError, match="'fast'"):
        loads_of("fast", 8192)
